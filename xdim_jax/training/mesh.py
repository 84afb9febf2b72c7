"""The mesh of devices with the axes ``data`` (samples) and ``space`` (depth of a volume), and connection of processes.

With ``jit``, one program is compiled for the whole mesh. Losses and batch statistics are those of the global batch, and
XLA inserts the communication. With ``pmap``, a program for one device is compiled, which averages gradients and
statistics over a named axis; only the axis ``data`` is available.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xdim_jax import ops
from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.threads import call_in_thread

PARALLELS = ("jit", "pmap")
DATA, SPACE = "data", "space"


@dataclasses.dataclass(frozen=True)
class Devices:
    """A mesh of devices, which distributes batches, states and programs; see `make_devices`.

    Attributes:
        mesh: The mesh, with the axes ``data`` and ``space``.
        parallel: ``jit`` or ``pmap``.
    """

    mesh: Mesh
    parallel: str = "jit"

    @property
    def axis(self) -> str | None:
        """Name of the axis over which a ``pmap`` program must average; None for ``jit``."""
        return DATA if self.parallel == "pmap" else None

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Copy the samples of a batch that this process has read to its devices.

        Samples are distributed over ``data``, and the first spatial axis of images and labels over ``space``. For
        ``pmap``, the result has a leading axis for the devices of this process: ``(devices, samples, ...)``.
        """
        if self.parallel == "pmap":
            count = len(self.mesh.local_devices)
            return {k: jax.numpy.asarray(v.reshape(count, len(v) // count, *v.shape[1:])) for k, v in batch.items()}
        images = NamedSharding(self.mesh, PartitionSpec(DATA, SPACE))
        rows = NamedSharding(self.mesh, PartitionSpec(DATA))
        return {k: jax.make_array_from_process_local_data(images if v.ndim > 2 else rows, v) for k, v in batch.items()}

    def abstract_batch(self, batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the global batch as shapes with the shardings of `put_batch`, given its shapes."""

        def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            if self.parallel == "pmap":
                count = len(self.mesh.local_devices)
                return jax.ShapeDtypeStruct((count, leaf.shape[0] // count, *leaf.shape[1:]), leaf.dtype)
            axes = PartitionSpec(DATA, SPACE) if len(leaf.shape) > 2 else PartitionSpec(DATA)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, axes))

        return {k: with_sharding(v) for k, v in batch.items()}

    def put_state(self, tree: Any) -> Any:
        """Copy a tree of arrays to every device. All processes must have the same values.

        Every leaf is copied, even if another leaf is the same array (initially, LookAhead's two copies of the weights
        are), because a training step cannot donate the same array twice.
        """
        replicated = NamedSharding(self.mesh, PartitionSpec())

        def put(leaf: Any) -> jax.Array:
            if jax.process_count() == 1:
                return jax.device_put(leaf, replicated, may_alias=False)
            if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
            values = np.array(leaf)
            return jax.make_array_from_callback(values.shape, replicated, lambda index: values[index])

        return jax.tree.map(put, tree)

    def lower(self, step: Callable[..., Any], state: Any, batch: Any, key: Any) -> Any:
        """Lower ``step(state, batch, key) -> state, metrics`` for the devices; its argument ``state`` is donated."""
        if self.parallel == "pmap":
            devices = list(self.mesh.devices.flat)
            program = jax.pmap(
                step, axis_name=DATA, in_axes=(None, 0, None), out_axes=None, donate_argnums=0, devices=devices
            )
        else:
            replicated = NamedSharding(self.mesh, PartitionSpec())
            program = jax.jit(step, donate_argnums=0, out_shardings=(replicated, replicated))
        sharded = self.mesh.shape[SPACE] > 1
        with ops.gc_disabled(), ops.use_implementation("sharded") if sharded else contextlib.nullcontext():
            return program.lower(state, batch, key)


def make_devices(
    data: int,
    space: int,
    *,
    batch: int,
    parallel: str = "jit",
    accumulate: int = 1,
    absent: Sequence[Any] | None = None,
) -> Devices:
    """Build a mesh of ``data * space`` devices.

    Args:
        data: Number of devices along the axis ``data``; -1 for the number of all devices divided by ``space``.
        space: Number of devices along the axis ``space``.
        batch: Number of samples of the global batch.
        parallel: ``jit`` or ``pmap``.
        accumulate: Number of parts of the batch that a step processes one after the other.
        absent: Devices that this machine does not have, to compile for (`xdim_jax.training.absent_devices`); None for
            those of JAX.

    Raises:
        UserError: There are too few devices; or the number of devices is not divisible by ``space``; or the batch is
            not divisible by ``data * accumulate`` or by the number of processes.
    """
    if parallel not in PARALLELS:
        raise UserError(f"config.mesh.parallel={parallel!r} is unknown; known: {', '.join(PARALLELS)}")
    if parallel == "pmap" and space != 1:
        raise UserError(f"config.mesh.space={space}: pmap supports only the axis data; set --config.mesh.parallel=jit")
    devices, processes = (jax.devices(), jax.process_count()) if absent is None else (list(absent), 1)
    if space < 1 or len(devices) % space:
        raise UserError(f"config.mesh.space={space} does not divide the {len(devices)} devices")
    if processes > 1 and jax.local_device_count() % space:
        raise UserError(
            f"config.mesh.space={space} does not divide the {jax.local_device_count()} devices of a process, but a "
            "volume cannot be distributed over several processes"
        )
    rows = len(devices) // space if data == -1 else data
    if rows < 1 or rows * space > len(devices):
        raise UserError(f"config.mesh needs {rows} x {space} devices, but there are {len(devices)}")
    if processes > 1 and rows * space != len(devices):
        raise UserError(
            f"config.mesh uses {rows} x {space} of {len(devices)} devices; with several processes it must use all: "
            "set --config.mesh.data=-1"
        )
    parts = rows * accumulate
    if batch % parts or batch % processes:
        many = f" in {accumulate} parts (config.train.accumulate)" if accumulate > 1 else ""
        fewer = [d for d in range(1, rows) if batch % (d * accumulate) == 0] if processes == 1 else []
        raise UserError(
            f"config.data.batch={batch} does not divide over {rows} data-parallel devices in {processes} "
            f"processes{many}; set --config.data.batch={parts * max(batch // parts, 1)}"
            + (f" or --config.mesh.data={fewer[-1]}" if fewer else "")
        )
    grid = np.asarray(devices[: rows * space]).reshape(rows, space)
    return Devices(Mesh(grid, (DATA, SPACE), axis_types=(AxisType.Auto, AxisType.Auto)), parallel)


def local(tree: Any) -> Any:
    """Return a copy on one device of this process, given arrays that are replicated over a mesh."""
    return jax.tree.map(lambda a: a.addressable_data(0), tree)


def join_processes(coordinator: str, count: int | None, index: int | None) -> None:
    """Connect this process with the other processes of a run. Call it before any other use of JAX.

    Args:
        coordinator: Address ``host:port`` of process 0; ``auto`` if the launcher provides it (SLURM, Open MPI, TPU
            pods, GKE); empty for a run with one process.
        count: Number of processes, if the launcher does not provide it.
        index: Number of this process, if the launcher does not provide it.

    Raises:
        UserError: The arguments are incomplete or contradictory, or the other processes cannot be reached.
    """
    if not coordinator:
        if count is not None or index is not None:
            raise UserError("--processes and --process need --coordinator=<host:port>")
        return
    known: dict[str, Any] = {"num_processes": count, "process_id": index}
    if coordinator != "auto":
        if count is None or index is None or not 0 <= index < count:
            raise UserError(
                f"--coordinator={coordinator} needs --processes=<how many> and --process=<0 to processes - 1>; "
                f"found {count} and {index}"
            )
        if not coordinator.rpartition(":")[2].isdigit() or ":" not in coordinator:
            raise UserError(f"--coordinator={coordinator}: expected host:port, e.g. node0:12345, or auto")
        known["coordinator_address"] = coordinator
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM; see xdim_jax.base.signals
    try:
        jax.distributed.initialize(**{k: v for k, v in known.items() if v is not None})
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--coordinator={coordinator}: the processes could not be joined: {first_line(error)}. Outside "
            "SLURM, Open MPI and TPU pods, give --coordinator=<host:port> --processes=<count> --process=<index>"
        ) from error


def barrier(name: str) -> None:
    """Wait until all processes have reached the barrier with this name. Signals are handled meanwhile."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        call_in_thread(lambda: multihost_utils.sync_global_devices(name))


def agree(flag: bool) -> bool:
    """Return True if the flag is True in any process. Every process must call this."""
    return bool(gather(np.array(flag)).any())


def gather(values: np.ndarray) -> np.ndarray:
    """Return the arrays of all processes, stacked: ``(processes, *shape)``. Every process must call this.

    Signals are handled while the function waits for the other processes.
    """
    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    return call_in_thread(lambda: np.asarray(multihost_utils.process_allgather(values)))
