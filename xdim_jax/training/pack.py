"""Train several runs with one program: parameters, optimiser states and settings are stacked along a new first axis.

Runs can be in the same pack if their programs have the same shapes and operations, see `xdim_jax.training.signature`.
Each of them is still an ordinary run with its own workdir, record and checkpoints, and can be resumed without the
others.

The stack has one of three layouts:

    vmap       the step is vectorised over the runs
    scan       the runs are computed one after the other inside the program; an empty slot costs nothing
    devices    the slots are distributed over the devices, and computed one after the other on each device
"""

import contextlib
import dataclasses
import functools
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xdim_jax import ops
from xdim_jax.base import log
from xdim_jax.base.config import Config, leaves
from xdim_jax.base.errors import UserError, join_problems
from xdim_jax.base.files import write_error
from xdim_jax.base.signals import StopRequest
from xdim_jax.data.case import Dataset
from xdim_jax.inference.output import make_output
from xdim_jax.ops.compilation import needed_bytes
from xdim_jax.runs.state import TrainState
from xdim_jax.training import mesh, program
from xdim_jax.training.check import resolve_config
from xdim_jax.training.compiling import compile_step
from xdim_jax.training.loop import RunController
from xdim_jax.training.open_run import OpenRun, SharedPrograms, open_run
from xdim_jax.training.signature import STACKED_KEYS, signature
from xdim_jax.training.watchdog import Watchdog

LAYOUTS = ("auto", "vmap", "scan", "devices")
_TRIAL = "trial"  # mesh axis of the layout "devices"


def check_packable(config: Config, slots: int, layout: str) -> None:
    """Raise UserError if a pack does not support the config, or if the layout or the number of slots cannot be used."""
    choose_layout(layout, slots)
    problems = []
    if jax.process_count() > 1:
        problems.append("a pack runs in one process, which may have several devices; start without --coordinator")
    for key, expected in (("mesh.space", 1), ("mesh.parallel", "jit"), ("train.profile_steps", 0)):
        section, name = key.split(".")
        if config[section][name] != expected:
            problems.append(f"config.{key}={config[section][name]}: runs of a pack need {expected}")
    for key in ("wandb", "mlflow"):  # their libraries support only one active run per process
        if slots > 1 and config.train[key]:
            problems.append(f"config.train.{key}={config.train[key]}: a tracker cannot record several runs of a pack")
    if problems:
        raise UserError("--pack: " + "\n  ".join(problems))


def choose_layout(layout: str, slots: int) -> tuple[str, int]:
    """Return the layout and the number of devices that it uses. The layout ``auto`` is resolved, see `Pack`.

    Raises:
        UserError: The layout is unknown, or the devices would have unequal numbers of slots.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--layout={layout} is unknown; known: {', '.join(LAYOUTS)}")
    if slots < 1:
        raise UserError(f"--pack={slots}: expected a number above 0")
    devices = jax.local_device_count()
    if layout == "auto":
        if math.gcd(slots, devices) > 1:
            return "devices", math.gcd(slots, devices)
        return ("scan" if jax.default_backend() == "cpu" else "vmap"), 1
    if layout != "devices":
        return layout, 1
    if slots > devices and slots % devices:
        raise UserError(
            f"--layout=devices: {slots} runs do not divide over {devices} devices; "
            f"give --pack={slots // devices * devices} or --pack={-(-slots // devices) * devices}"
        )
    return layout, min(slots, devices)


@dataclasses.dataclass
class Member:
    """A run in a pack.

    Attributes:
        workdir: Folder of the run.
        slot: Index along the first axis of the stack.
        opened: The run.
        controller: Controller that records, saves and validates the run.
        values: Config key -> value of this run, for the `STACKED_KEYS` that are part of the program.
        rates: Learning rate of every step.
        group: Key that is equal for runs that need the same batch in every step of the pack.
        file: Log file of the run.
        error: Message of the error that ended the run; empty if there is none.
    """

    workdir: Path
    slot: int
    opened: OpenRun
    controller: RunController
    values: dict[str, np.ndarray]
    rates: np.ndarray
    group: Any
    file: IO[str]
    error: str = ""

    @property
    def running(self) -> bool:
        """True if the run has steps left and has not failed."""
        return not (self.controller.finished or self.error)


class Pack:
    """Slots for runs that share one program, which is compiled once.

    Args:
        config: Config of any of the runs.
        slots: Number of slots.
        layout: One of `LAYOUTS`. ``auto`` is ``devices`` if the numbers of slots and devices have a common
            divisor above 1; otherwise it is ``scan`` on CPU and ``vmap`` elsewhere.
        stop: Record of received signals; a signal stops all runs.

    Attributes:
        failed: True if the program has failed.

    Raises:
        UserError: A pack does not support the config, or the devices would have unequal numbers of slots.
    """

    def __init__(self, config: Config, slots: int, layout: str, stop: StopRequest):
        config, dataset = resolve_config(config)
        check_packable(config, slots, layout)
        self.slots, self.stop = slots, stop
        self.signature = signature(config)
        self.layout, count = choose_layout(layout, slots)
        self.members: list[Member | None] = [None] * slots
        self._channels = len(make_output(config.output, dataset).channels)
        self._mesh = _devices(count)
        self._stacked = NamedSharding(self._mesh, PartitionSpec(_TRIAL))
        self._one_device = mesh.make_devices(1, 1, batch=config.data.batch, accumulate=config.train.accumulate)
        self._shared: SharedPrograms | None = None
        self._program: program.Program | None = None
        self._state: Any = None
        self._compiled: Any = None
        self._steps = 0
        self.failed = False
        self._streams: dict[Any, tuple[Iterator[dict[str, Any]], contextlib.ExitStack, Watchdog]] = {}

    def fits(self, config: Config) -> bool:
        """Return whether a run with this config can join the pack."""
        return signature(resolve_config(config)[0]) == self.signature

    @property
    def free(self) -> int:
        """Number of empty slots."""
        return sum(member is None for member in self.members)

    def add(self, config: Config, workdir: Path) -> Member:
        """Put a run into an empty slot. If its workdir has a checkpoint, the run is resumed.

        Args:
            config: Config of the run.
            workdir: Folder of the run.

        Raises:
            UserError: See `xdim_jax.training.open_run.open_run`.
            ValueError: The run needs another program, see `fits`.
        """
        config, dataset = resolve_config(config)
        if signature(config) != self.signature:
            raise ValueError("the program of this run differs from that of the pack")
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            file = open(workdir / log.LOG_FILE, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise write_error(workdir / log.LOG_FILE, error) from error
        member = None
        try:
            with log.redirect_to(file):
                member = self._make_member(config, dataset, workdir, file)
                self.members[member.slot] = member
                self._put(member)
                member.controller.start(self._state, validated=member.opened.validated)
        except BaseException as error:
            if member is None:
                file.write(f"error: {error}\n")
                file.close()
            else:
                member.error = str(error)
                with contextlib.suppress(UserError):  # closing its files may fail as well; the original error is raised
                    self.remove(member)
            raise
        if self._compiled is not None:
            member.controller.program_is_compiled()
        return member

    def remove(self, member: Member) -> None:
        """Remove a run from its slot, and close it. Raises UserError if its files cannot be written."""
        self.members[member.slot] = None
        if not any(m.group == member.group for m in self.members if m is not None):
            _, stack, _ = self._streams.pop(member.group, (None, contextlib.ExitStack(), None))
            stack.close()
        if self.free == self.slots:
            self._state = None  # the memory may be needed for another program
        with contextlib.closing(member.file), log.redirect_to(member.file):
            if member.error:
                log.say(f"error: {member.error}")
            member.opened.close()

    def step(self) -> None:
        """Compute one step of every run that is not finished.

        If a run fails, its `Member.error` is set, and the other runs continue.
        """
        read: dict[Any, dict[str, Any] | UserError] = {}
        batches: dict[int, dict[str, np.ndarray]] = {}
        for member in self._running():
            with _own_log_and_error(member):
                next_batch = functools.partial(self._next_batch, member, read)
                batches[member.slot] = member.controller.next_batch(next_batch, self._state)
        running = self._running()
        if not running:
            return
        first = batches[running[0].slot]
        blank = {k: np.zeros_like(v) for k, v in first.items()}
        batch = {k: np.stack([batches.get(slot, blank)[k] for slot in range(self.slots)]) for k in first}
        arguments = self._arguments(running)
        batch = jax.device_put(batch, self._stacked)
        if self._compiled is None:
            self._compiled = compile_step(self._lower, self._state, batch, *arguments)
            for member in running:
                member.controller.program_is_compiled()
        self._state, metrics = self._compiled(self._state, batch, *arguments)
        self._steps += 1
        for member in running:
            with _own_log_and_error(member):
                member.controller.after_step(dict(metrics), self._state, runs=len(running))

    def _running(self) -> list[Member]:
        """Return the runs that have a further step."""
        return [member for member in self.members if member is not None and member.running]

    # -- one run --------------------------------------------------------------------------------------------------

    def _make_member(self, config: Config, dataset: Dataset, workdir: Path, file: IO[str]) -> Member:
        """Open a run for the first empty slot."""
        slot = self.members.index(None)
        opened = open_run(config, dataset, workdir, self.stop, self._one_device, shared=self._shared)
        self._shared = opened.shared
        self._program = self._program or opened.program
        steps = jnp.arange(opened.run.total)
        rates = jnp.broadcast_to(jax.jit(jax.vmap(opened.run.schedule))(steps), steps.shape)
        read = {k: v for k, v in leaves(config) if k.startswith("data.") or k in ("seed", "output")}
        done = int(opened.state.step)
        extract = functools.partial(self._extract, slot)
        return Member(
            workdir=workdir,
            slot=slot,
            opened=opened,
            controller=RunController(opened.run, done, opened.progress, slot=slot, extract=extract),
            values=_values(config, self._channels),
            rates=np.asarray(rates),
            group=(repr(sorted(read.items())), self._steps - done),
            file=file,
        )

    def _extract(self, slot: int, stacked: Any) -> Any:
        """Return the state of the run in a slot, on one device."""
        return jax.device_put(_take_slot(stacked, slot), NamedSharding(self._one_device.mesh, PartitionSpec()))

    def _put(self, member: Member) -> None:
        """Copy the state of a run into its slot. The slot is a traced argument, so `_put_slot` is compiled once."""
        if self._state is None:
            blank = jax.tree.map(lambda a: np.zeros((self.slots, *a.shape), a.dtype), member.opened.state)
            self._state = jax.device_put(blank, self._stacked)
        state = jax.device_put(member.opened.state, NamedSharding(self._mesh, PartitionSpec()))
        self._state = _put_slot(self._state, member.slot, state)

    def _next_batch(self, member: Member, read: dict[Any, Any]) -> dict[str, Any]:
        """Return the next batch of a run.

        ``read`` maps each group to the batch (or the error) of this step, so that the runs of a group share one batch.
        """
        if member.group not in read:
            try:
                if member.group not in self._streams:
                    stack, run = contextlib.ExitStack(), member.opened.run
                    watchdog = stack.enter_context(Watchdog(run.config["watchdog_seconds"], run.activity, log.say))
                    self._streams[member.group] = member.opened.open_stream(), stack, watchdog
                stream, _, watchdog = self._streams[member.group]
                read[member.group] = watchdog.next(stream)
            except UserError as error:
                read[member.group] = error
        if isinstance(read[member.group], UserError):
            raise read[member.group]
        return read[member.group]

    # -- the program ----------------------------------------------------------------------------------------------

    def _arguments(self, running: Sequence[Member]) -> tuple[Any, dict[str, Any], Any]:
        """Return random keys, values and the mask of active slots.

        The other slots get the random key and the values of the first active run.
        """
        filled = [m if m is not None and m.running else running[0] for m in self.members]
        values = {k: np.stack([m.values[k] for m in filled]) for k in running[0].values}
        values["rate"] = np.array([m.rates[m.controller.steps_done] for m in filled])
        keys = jnp.stack([m.opened.run.key for m in filled])
        active = np.array([m is not None and m.running for m in self.members])
        return jax.device_put((keys, values, active), self._stacked)

    def _lower(self, *arguments: Any) -> Any:
        """Lower the step of the pack, see the function `_lower`."""
        assert self._program is not None
        return _lower(self._program, self.layout, self._mesh, *arguments)


def _lower(one_program: program.Program, layout: str, devices: Mesh, *arguments: Any) -> Any:
    """Lower the step of a pack: a function of stacked states, batches, random keys and values, and a mask of slots."""

    def step_one(state: TrainState, batch: Any, key: jax.Array, values: dict[str, jax.Array]) -> Any:
        traced = {k: v for k, v in values.items() if k != "rate"}
        config, graphdef, output = one_program.config, one_program.graphdef, one_program.output
        step = program.make_step(config, graphdef, output, lambda _: values["rate"], traced=traced)
        return step(state, batch, key)

    def step_all(states: Any, batches: Any, keys: Any, values: Any, active: jax.Array) -> Any:
        if layout == "vmap":
            return jax.vmap(step_one)(states, batches, keys, values)
        return _loop_over_slots(step_one, active, states, (batches, keys, values))

    spec = PartitionSpec(_TRIAL)
    if devices.size > 1:
        step_all = jax.shard_map(step_all, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False)
    with ops.gc_disabled():
        return jax.jit(step_all, donate_argnums=0, out_shardings=NamedSharding(devices, spec)).lower(*arguments)


def step_bytes(config: Config, dataset: Dataset, slots: int, layout: str) -> int:
    """Return the memory in bytes that the compiler reserves on each device for the step of a pack.

    Args:
        config: Config of any of the runs.
        dataset: Data set of the runs.
        slots: Number of slots.
        layout: One of `LAYOUTS`.
    """
    layout, count = choose_layout(layout, slots)
    devices = _devices(count)
    made, params, stats = program.make_program(config, dataset, per_epoch=1, abstract=True)
    values = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in _values(config, len(made.output.channels)).items()}
    values["rate"] = jax.ShapeDtypeStruct((), jnp.float32)
    one = (*program.step_arguments(made, dataset, params, stats), values, jax.ShapeDtypeStruct((), jnp.bool_))
    stacked = NamedSharding(devices, PartitionSpec(_TRIAL))
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct((slots, *a.shape), a.dtype, sharding=stacked), one)
    return needed_bytes(ops.compile_program(_lower(made, layout, devices, *arguments)))


def _devices(count: int) -> Mesh:
    """Return a mesh of the first ``count`` devices of this process."""
    return Mesh(np.asarray(jax.local_devices()[:count]), (_TRIAL,), axis_types=(AxisType.Auto,))


def _values(config: Config, channels: int) -> dict[str, np.ndarray]:
    """Return config key -> value for the `STACKED_KEYS` that are part of the program.

    These are ``loss.weights`` and the keys whose value is not 0. An operation whose value is 0 is not part of the
    program.
    """
    numbers = dict(leaves(config))
    values = {key: numbers[key] for key in STACKED_KEYS if numbers[key] != 0}
    values["loss.weights"] = numbers["loss.weights"] or (1.0,) * channels
    return {key: np.asarray(value, np.float32) for key, value in values.items()}


def train_runs(runs: Sequence[tuple[Config, Path]], *, slots: int, layout: str, stop: StopRequest) -> int:
    """Train runs with the same program, up to ``slots`` of them at the same time, until all end or a signal arrives.

    Args:
        runs: Config and workdir of each run.
        slots: Number of runs that are trained at the same time.
        layout: One of `LAYOUTS`.
        stop: Record of received signals.

    Returns:
        The exit status of the process.

    Raises:
        UserError: Runs have failed. The error is raised after the other runs have ended.
    """
    # with more runs than devices, every device needs the same number of slots; some of them may then stay empty
    if layout != "devices" or len(runs) <= jax.local_device_count():
        slots = min(slots, len(runs))
    pack = Pack(runs[0][0], slots, layout, stop)
    log.say(
        f"pack       {min(pack.slots, len(runs))} of {len(runs)} runs at a time, layout {pack.layout}; each logs to "
        f"{log.LOG_FILE} in its workdir"
    )
    errors = train_in_pack(pack, runs, stop)
    return finish(errors, stop)


def finish(errors: Sequence[str], stop: StopRequest) -> int:
    """Return the exit status after the training of several runs.

    After a signal, the status is that of the signal, because the other runs can be resumed; the errors are logged.

    Raises:
        UserError: Runs have failed, and there was no signal.
    """
    if errors and not stop.signal:
        raise join_problems(list(errors), "runs have failed")
    for error in errors:
        log.warn(error)
    return stop.status if stop.signal else 0


def train_in_pack(pack: Pack, runs: Sequence[tuple[Config, Path]], stop: StopRequest) -> list[str]:
    """Train runs in an empty pack, until the last one ends or a signal arrives.

    Args:
        pack: A pack without runs.
        runs: Config and workdir of each run.
        stop: Record of received signals.

    Returns:
        A message for each run that has failed. If the program fails, for example because memory is exhausted, there is
        a message for each run that was not finished.
    """
    waiting, errors = list(runs), []

    def finish(member: Member) -> None:
        try:
            pack.remove(member)
        except UserError as error:
            member.error = member.error or str(error)
        if member.error:
            errors.append(f"{member.workdir}: {member.error}")
        log.say(f"{'failed' if member.error else 'ended':<10} {member.workdir} at step {member.controller.steps_done}")

    try:
        while pack.members.count(None) < pack.slots or (waiting and not stop.signal):
            while waiting and pack.free and not stop.signal:
                config, workdir = waiting.pop(0)
                try:
                    pack.add(config, workdir)
                except UserError as error:
                    errors.append(f"{workdir}: {error}")
            try:
                pack.step()
            except Exception as error:  # the program failed
                text = f"{type(error).__name__}: {error}"
                log.warn(f"the program of {len(runs)} runs failed:\n{''.join(traceback.format_exception(error))}")
                for member in [m for m in pack.members if m is not None]:
                    member.error = member.error or text
                    finish(member)
                errors += [f"{workdir}: not trained, because its program failed: {text}" for _, workdir in waiting]
                pack.failed = True
                break
            for member in [m for m in pack.members if m is not None and not m.running]:
                finish(member)
    finally:
        for member in [m for m in pack.members if m is not None]:
            finish(member)
    return errors


def _loop_over_slots(step_one: Callable[..., Any], active: jax.Array, states: Any, others: Any) -> Any:
    """Compute ``step_one(state, *others)`` for one active slot after the other. The states are updated in place."""
    metrics = jax.eval_shape(lambda s, o: step_one(_take_slot(s, 0), *_take_slot(o, 0))[1], states, others)
    blank = jax.tree.map(lambda a: jnp.zeros((active.size, *a.shape), a.dtype), metrics)

    def compute(slot: jax.Array, carry: Any) -> Any:
        state = _take_slot(carry[0], slot)
        return _put_slot(carry, slot, step_one(state, *_take_slot(others, slot)))

    def compute_if_active(slot: jax.Array, carry: Any) -> Any:
        return jax.lax.cond(active[slot], lambda: compute(slot, carry), lambda: carry)

    return jax.lax.fori_loop(0, active.size, compute_if_active, (states, blank))


@jax.jit
def _take_slot(stacked: Any, slot: Any) -> Any:
    """Return the tree at an index of the first axis of a stack of trees."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, keepdims=False), stacked)


@functools.partial(jax.jit, donate_argnums=0)
def _put_slot(stacked: Any, slot: Any, tree: Any) -> Any:
    """Return a stack of trees with the tree at an index replaced."""
    return jax.tree.map(lambda s, a: jax.lax.dynamic_update_index_in_dim(s, a, slot, 0), stacked, tree)


@contextlib.contextmanager
def _own_log_and_error(member: Member) -> Iterator[None]:
    """Log to the file of the run inside the block, and set its error if the block raises UserError."""
    with log.redirect_to(member.file):
        try:
            yield
        except UserError as error:
            member.error = str(error)
