"""Devices: one mesh with the axes ``data`` (samples) and ``space`` (depth of a volume), and programs laid out on it.

``jit`` compiles one program for the whole mesh: losses and batch statistics are those of the global batch by
construction, and XLA inserts the communication. ``pmap`` compiles the program of one device, which averages gradients
and statistics by name of the axis; it has the axis ``data`` alone.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xdim_jax import ops
from xdim_jax.base.errors import UserError, first_line

PARALLELS = ("jit", "pmap")
DATA, SPACE = "data", "space"


@dataclasses.dataclass(frozen=True)
class Devices:
    """A mesh, and how programs are laid out on it; see `make_devices`."""

    mesh: Mesh
    parallel: str = "jit"

    @property
    def axis(self) -> str | None:
        """Name of the axis over which a program averages by itself: of ``pmap``."""
        return DATA if self.parallel == "pmap" else None

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's share of a batch on its devices: samples over ``data``, the first spatial axis over ``space``.

        What has no spatial axis lies over ``data``. For ``pmap`` the devices of this process come first:
        ``(devices, samples, ...)``.
        """
        if self.parallel == "pmap":
            here = len(self.mesh.local_devices)
            return {k: jax.numpy.asarray(v.reshape(here, len(v) // here, *v.shape[1:])) for k, v in batch.items()}
        images = NamedSharding(self.mesh, PartitionSpec(DATA, SPACE))
        rows = NamedSharding(self.mesh, PartitionSpec(DATA))
        return {k: jax.make_array_from_process_local_data(images if v.ndim > 2 else rows, v) for k, v in batch.items()}

    def abstract_batch(self, batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """The global batch as `put_batch` lays it out, in shapes."""

        def laid_out(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            if self.parallel == "pmap":
                here = len(self.mesh.local_devices)
                return jax.ShapeDtypeStruct((here, leaf.shape[0] // here, *leaf.shape[1:]), leaf.dtype)
            axes = PartitionSpec(DATA, SPACE) if len(leaf.shape) > 2 else PartitionSpec(DATA)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, axes))

        return {k: laid_out(v) for k, v in batch.items()}

    def put_state(self, tree: Any) -> Any:
        """A tree of arrays, copied to every device; every process has the same values.

        No two results are one array, as LookAhead's two weights are at first: those could not be donated both.
        """
        replicated = NamedSharding(self.mesh, PartitionSpec())

        def put(leaf: Any) -> jax.Array:
            if jax.process_count() == 1:
                return jax.device_put(leaf, replicated, may_alias=False)
            if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
            values = np.array(leaf)
            return jax.make_array_from_callback(values.shape, replicated, lambda index: values[index])

        return jax.tree.map(put, tree)

    def lower(self, step: Callable[..., Any], state: Any, batch: Any, key: Any) -> Any:
        """``step(state, batch, key) -> state, metrics`` lowered for the devices; the state's memory is used again."""
        if self.parallel == "pmap":
            devices = list(self.mesh.devices.flat)
            program = jax.pmap(
                step, axis_name=DATA, in_axes=(None, 0, None), out_axes=None, donate_argnums=0, devices=devices
            )
        else:
            replicated = NamedSharding(self.mesh, PartitionSpec())
            program = jax.jit(step, donate_argnums=0, out_shardings=(replicated, replicated))
        with ops.uncollected(), ops.use_form("sharded") if self.mesh.shape[SPACE] > 1 else contextlib.nullcontext():
            return program.lower(state, batch, key)


def make_devices(data: int, space: int, *, batch: int, parallel: str = "jit", accumulate: int = 1) -> Devices:
    """A mesh of ``data * space`` devices; ``data=-1`` takes all that ``space`` leaves.

    Raises:
        UserError: the numbers do not fit the devices, or the global batch does not divide over ``data`` (and the parts
            that it is taken in, ``accumulate``).
    """
    if parallel not in PARALLELS:
        raise UserError(f"config.mesh.parallel={parallel!r} is unknown; known: {', '.join(PARALLELS)}")
    if parallel == "pmap" and space != 1:
        raise UserError(f"config.mesh.space={space}: pmap has the axis data alone; set mesh.parallel=jit")
    devices, processes = jax.devices(), jax.process_count()
    if space < 1 or len(devices) % space:
        raise UserError(f"config.mesh.space={space} does not divide the {len(devices)} devices")
    if processes > 1 and jax.local_device_count() % space:
        raise UserError(
            f"config.mesh.space={space} does not divide the {jax.local_device_count()} devices of a process: a volume "
            "must lie within one"
        )
    rows = len(devices) // space if data == -1 else data
    if rows < 1 or rows * space > len(devices):
        raise UserError(f"config.mesh asks for {rows} x {space} devices; there are {len(devices)}")
    if processes > 1 and rows * space != len(devices):
        raise UserError(
            f"config.mesh takes {rows} x {space} of {len(devices)} devices; with several processes it must take all: "
            "set mesh.data=-1"
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
    """Arrays that lie on every device of a mesh, as arrays on one device of this process."""
    return jax.tree.map(lambda a: a.addressable_data(0), tree)


def join_processes(coordinator: str, count: int | None, index: int | None) -> None:
    """Joins the processes of a run, before anything else asks JAX for devices.

    Args:
        coordinator: ``host:port`` of process 0, which all can reach; ``auto`` where the launcher tells (SLURM, Open
            MPI, TPU pods, GKE); empty: this process is alone.
        count, index: of the processes, where the launcher does not tell.

    Raises:
        UserError: incomplete or contradictory numbers, or the others cannot be reached.
    """
    if not coordinator:
        if count is not None or index is not None:
            raise UserError("--processes and --process go with --coordinator=<host:port>")
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
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM; see xdim_jax.base.signals
    try:
        jax.distributed.initialize(**{k: v for k, v in known.items() if v is not None})
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--coordinator={coordinator}: the processes could not be joined: {first_line(error)}. Outside "
            "SLURM, Open MPI and TPU pods, give --coordinator=<host:port> --processes=<count> --process=<index>"
        ) from error


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(flag: bool) -> bool:
    """Whether any process has the flag set; every process must ask."""
    return bool(gather(np.array(flag)).any())


def gather(values: np.ndarray) -> np.ndarray:
    """The same array of every process, stacked: ``(processes, *shape)``."""
    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values))
