"""Several runs in one program: their parameters, optimiser states and settings stacked along a first axis.

Runs fit into one pack when their programs have the same shapes; see `signature`. What they are is ordinary: each has a
workdir of its own, with its record and its checkpoints, and any of them may be gone on with alone.

Three layouts of the stack:

    vmap       one program on arrays that have one axis more
    scan       one after the other inside the program; an empty place costs nothing
    devices    places spread over the devices, one after the other on each
"""

import contextlib
import dataclasses
import functools
import math
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
from xdim_jax.base.errors import UserError
from xdim_jax.base.signals import StopRequest
from xdim_jax.data.case import Dataset
from xdim_jax.inference.output import make_output
from xdim_jax.ops.compilation import needed_bytes
from xdim_jax.runs.state import TrainState
from xdim_jax.training import mesh, open_run, program
from xdim_jax.training.check import FREE_KEYS, check_config
from xdim_jax.training.loop import Course, compile_step
from xdim_jax.training.watchdog import Watchdog

LAYOUTS = ("auto", "vmap", "scan", "devices")
_TRIAL = "trial"  # the mesh axis of layout devices

# numbers of the program that every run has for itself; one that is 0, and so not in the program, is shared
STACKED_KEYS = (
    *(f"optim.{key}" for key in ("b1", "b2", "eps", "momentum_decay", "weight_decay", "clip_norm", "ema")),
    "optim.lookahead.step_size",
    "loss.eps",
    "loss.weights",
)
# what the program does not hold: it reads the learning rate, and batches
_OUTSIDE = (
    *FREE_KEYS,
    "seed",
    "train.epochs",
    "train.patience",
    "train.validate_after_score",
    "train.validate_every",
    *(f"data.{key}" for key in ("fold", "folds", "split", "foreground", "patches_per_case")),
)
_OUTSIDE_SECTIONS = ("optim.schedule.", "init.", "data.phantom.", "data.prepare.")


def signature(config: Config) -> dict[str, Any]:
    """What runs of one pack must share: every value that the program is made of."""
    found: dict[str, Any] = {}
    for key, value in leaves(config):
        if key in _OUTSIDE or key.startswith(_OUTSIDE_SECTIONS):
            continue
        if key in STACKED_KEYS:
            found[key] = value != 0 if isinstance(value, (int, float)) else None
        else:
            found[key] = tuple(value) if isinstance(value, (list, tuple)) else value
    return found


def check_packable(config: Config, slots: int, layout: str) -> None:
    """Raises UserError for settings that a pack does not have, and places that do not fit the devices."""
    choose_layout(layout, slots)
    problems = []
    if jax.process_count() > 1:
        problems.append("a pack is one process, which may have several devices; start without --coordinator")
    for key, expected in (("mesh.space", 1), ("mesh.parallel", "jit"), ("train.profile_steps", 0)):
        section, name = key.split(".")
        if config[section][name] != expected:
            problems.append(f"config.{key}={config[section][name]}: runs of a pack have {expected}")
    if problems:
        raise UserError("--pack: " + "\n  ".join(problems))


def choose_layout(layout: str, slots: int) -> tuple[str, int]:
    """The layout that is meant, and how many devices it takes.

    Raises:
        UserError: it is unknown, or the places do not divide over the devices.
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
            f"--layout=devices: {slots} places do not divide over {devices} devices; "
            f"give --pack={slots // devices * devices} or --pack={-(-slots // devices) * devices}"
        )
    return layout, min(slots, devices)


@dataclasses.dataclass
class Member:
    """A run in a pack.

    Attributes:
        workdir: of the run.
        slot: its place.
        ready: the run.
        course: its steps.
        values: its numbers, by key.
        rates: learning rate of every step.
        group: of the runs that read the same batches at the same steps.
        file: that its lines go to.
        error: why it ended, if it failed.
    """

    workdir: Path
    slot: int
    ready: open_run.Ready
    course: Course
    values: dict[str, np.ndarray]
    rates: np.ndarray
    group: Any
    file: IO[str]
    error: str = ""

    @property
    def running(self) -> bool:
        """Whether it has a further step to take."""
        return self.course.goes_on and not self.error


class Pack:
    """Places for runs that share a program, which is compiled once.

    Args:
        config: of any of the runs.
        slots: places.
        layout: of `LAYOUTS`; ``auto``: devices where there are several, else scan on CPU and vmap elsewhere.
        stop: heard by all runs.

    Raises:
        UserError: the config has settings that a pack does not have, or the places do not divide over the devices.
    """

    def __init__(self, config: Config, slots: int, layout: str, stop: StopRequest):
        check_packable(config, slots, layout)
        dataset = check_config(config)
        self.slots, self.stop = slots, stop
        self.signature = signature(config)
        self.layout, count = choose_layout(layout, slots)
        self.members: list[Member | None] = [None] * slots
        self._channels = len(make_output(config.output, dataset).channels)
        self._mesh = _devices(count)
        self._stacked = NamedSharding(self._mesh, PartitionSpec(_TRIAL))
        self._lone = mesh.make_devices(1, 1, batch=config.data.batch, accumulate=config.train.accumulate)
        self._shared: open_run.Shared | None = None
        self._program: program.Program | None = None
        self._state: Any = None
        self._compiled: Any = None
        self._steps = 0
        self._streams: dict[Any, tuple[Iterator[dict[str, Any]], contextlib.ExitStack, Watchdog]] = {}

    def fits(self, config: Config) -> bool:
        """Whether a run of this config can take a place."""
        return signature(config) == self.signature

    @property
    def free(self) -> int:
        """Empty places."""
        return sum(member is None for member in self.members)

    def add(self, config: Config, workdir: Path) -> Member:
        """A run takes an empty place, from the last checkpoint in its workdir on, if there is one.

        Raises:
            UserError: as `xdim_jax.training.open_run.prepare`.
        """
        if not self.fits(config):
            raise ValueError("the run has another program than this pack")
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / log.LOG_FILE, "a", encoding="utf-8")  # noqa: SIM115
        try:
            with log.into(file):
                member = self._make(config, workdir, file)
                self.members[member.slot] = member
                self._put(member)
                member.course.resume(self._state, validated=member.ready.validated)
        except BaseException as error:
            file.write(f"error: {error}\n")
            file.close()
            raise
        if self._compiled is not None:
            member.course.begin()
        return member

    def remove(self, member: Member) -> None:
        """A run leaves its place. Raises UserError if what it writes cannot be written."""
        self.members[member.slot] = None
        if not any(m.group == member.group for m in self.members if m is not None):
            _, stack, _ = self._streams.pop(member.group, (None, contextlib.ExitStack(), None))
            stack.close()
        with contextlib.closing(member.file), log.into(member.file):
            if member.error:
                log.say(f"error: {member.error}")
            member.ready.close()

    def step(self) -> None:
        """One step of every run that goes on. One that fails gets its `Member.error`; the others go on."""
        read: dict[Any, dict[str, Any] | UserError] = {}
        batches: dict[int, dict[str, np.ndarray]] = {}
        for member in self._running():
            with _kept(member):
                batches[member.slot] = member.course.read(functools.partial(self._next, member, read), self._state)
        running = self._running()
        if not running:
            return
        some = batches[running[0].slot]
        blank = {k: np.zeros_like(v) for k, v in some.items()}
        batch = {k: np.stack([batches.get(slot, blank)[k] for slot in range(self.slots)]) for k in some}
        arguments = self._arguments(running)
        batch = jax.device_put(batch, self._stacked)
        if self._compiled is None:
            self._compiled = compile_step(self._lower, self._state, batch, *arguments)
            for member in running:
                member.course.begin()
        self._state, metrics = self._compiled(self._state, batch, *arguments)
        self._steps += 1
        for member in running:
            with _kept(member):
                member.course.take(dict(metrics), self._state)

    def _running(self) -> list[Member]:
        return [member for member in self.members if member is not None and member.running]

    # -- a run ----------------------------------------------------------------------------------------------------

    def _make(self, config: Config, workdir: Path, file: IO[str]) -> Member:
        slot = self.members.index(None)
        dataset = check_config(config)
        ready = open_run.prepare(config, dataset, workdir, self.stop, self._lone, shared=self._shared)
        self._shared = ready.shared
        self._program = self._program or ready.program
        steps = jnp.arange(ready.run.total)
        rates = jnp.broadcast_to(jax.jit(jax.vmap(ready.run.schedule))(steps), steps.shape)
        read = {k: v for k, v in leaves(config) if k.startswith("data.") or k in ("seed", "output")}
        done = int(ready.state.step)
        return Member(
            workdir=workdir,
            slot=slot,
            ready=ready,
            course=Course(ready.run, done, ready.progress, slot=slot, pick=functools.partial(self._pick, slot)),
            values=_values(config, self._channels),
            rates=np.asarray(rates),
            group=(repr(sorted(read.items())), self._steps - done),
            file=file,
        )

    def _pick(self, slot: int, stacked: Any) -> Any:
        """A run's own state, on one device."""
        return jax.device_put(_take_slot(stacked, slot), NamedSharding(self._lone.mesh, PartitionSpec()))

    def _put(self, member: Member) -> None:
        """A run's state into its place; nothing is compiled anew when another run had been there."""
        if self._state is None:
            blank = jax.tree.map(lambda a: np.zeros((self.slots, *a.shape), a.dtype), member.ready.state)
            self._state = jax.device_put(blank, self._stacked)
        state = jax.device_put(member.ready.state, NamedSharding(self._mesh, PartitionSpec()))
        self._state = _put_slot(self._state, member.slot, state)

    def _next(self, member: Member, read: dict[Any, Any]) -> dict[str, Any]:
        """The run's next batch, which another may have read already."""
        if member.group not in read:
            try:
                if member.group not in self._streams:
                    stack, run = contextlib.ExitStack(), member.ready.run
                    watchdog = stack.enter_context(Watchdog(run.config["watchdog_seconds"], run.activity, log.say))
                    self._streams[member.group] = member.ready.open_stream(), stack, watchdog
                stream, _, watchdog = self._streams[member.group]
                read[member.group] = watchdog.next(stream)
            except UserError as error:
                read[member.group] = error
        if isinstance(read[member.group], UserError):
            raise read[member.group]
        return read[member.group]

    # -- the program ----------------------------------------------------------------------------------------------

    def _arguments(self, running: Sequence[Member]) -> tuple[Any, dict[str, Any], Any]:
        """Keys, values and which places go on; an empty place has what any run has."""
        here = [m if m is not None and m.running else running[0] for m in self.members]
        values = {k: np.stack([m.values[k] for m in here]) for k in running[0].values}
        values["rate"] = np.array([m.rates[m.course.done] for m in here])
        keys = jnp.stack([m.ready.run.key for m in here])
        active = np.array([m is not None and m.running for m in self.members])
        return jax.device_put((keys, values, active), self._stacked)

    def _lower(self, *arguments: Any) -> Any:
        assert self._program is not None
        return _lower(self._program, self.layout, self._mesh, *arguments)


def _lower(one_program: program.Program, layout: str, devices: Mesh, *arguments: Any) -> Any:
    """The step of a pack, lowered: of states, batches, keys, values and which places go on."""

    def one(state: TrainState, batch: Any, key: jax.Array, values: dict[str, jax.Array]) -> Any:
        own = {k: v for k, v in values.items() if k != "rate"}
        config, graphdef, output = one_program.config, one_program.graphdef, one_program.output
        step = program.make_step(config, graphdef, output, lambda _: values["rate"], values=own)
        return step(state, batch, key)

    def every(states: Any, batches: Any, keys: Any, values: Any, active: jax.Array) -> Any:
        if layout == "vmap":
            return jax.vmap(one)(states, batches, keys, values)
        return _one_after_the_other(one, active, states, (batches, keys, values))

    spec = PartitionSpec(_TRIAL)
    if devices.size > 1:
        every = jax.shard_map(every, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False)
    with ops.uncollected():
        return jax.jit(every, donate_argnums=0, out_shardings=NamedSharding(devices, spec)).lower(*arguments)


def step_bytes(config: Config, dataset: Dataset, slots: int, layout: str) -> int:
    """What the step of a pack takes on each of its devices, by the compiler."""
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
    return Mesh(np.asarray(jax.local_devices()[:count]), (_TRIAL,), axis_types=(AxisType.Auto,))


def _values(config: Config, channels: int) -> dict[str, np.ndarray]:
    """The numbers that a run of a pack has for itself."""
    numbers = dict(leaves(config))
    values = {key: numbers[key] for key in STACKED_KEYS if numbers[key] != 0}
    values["loss.weights"] = numbers["loss.weights"] or (1.0,) * channels
    return {key: np.asarray(value, np.float32) for key, value in values.items()}


def train_all(runs: Sequence[tuple[Config, Path]], slots: int, layout: str, stop: StopRequest) -> None:
    """Trains runs of one program, given by config and workdir, up to ``slots`` at a time, until the last or a signal.

    Raises:
        UserError: of runs that failed, after the others have ended.
    """
    pack = Pack(runs[0][0], min(slots, len(runs)), layout, stop)
    log.say(f"pack       {pack.slots} of {len(runs)} runs at a time, layout {pack.layout}; see {log.LOG_FILE} of each")
    waiting, errors = list(runs), []

    def leave(member: Member) -> None:
        try:
            pack.remove(member)
        except UserError as error:
            member.error = member.error or str(error)
        if member.error:
            errors.append(f"{member.workdir}: {member.error}")
        log.say(f"{'failed' if member.error else 'ended':<10} {member.workdir} at step {member.course.done}")

    try:
        while pack.members.count(None) < pack.slots or (waiting and not stop.signal):
            while waiting and pack.free and not stop.signal:
                config, workdir = waiting.pop(0)
                try:
                    pack.add(config, workdir)
                except UserError as error:
                    errors.append(f"{workdir}: {error}")
            pack.step()
            for member in [m for m in pack.members if m is not None and not m.running]:
                leave(member)
    finally:
        for member in [m for m in pack.members if m is not None]:
            leave(member)
    if errors:
        raise UserError("\n  ".join(errors))


def _one_after_the_other(one: Callable[..., Any], active: jax.Array, states: Any, others: Any) -> Any:
    """``one(state, *others)`` of every active place; states stay where they are in memory."""
    metrics = jax.eval_shape(lambda s, o: one(_take_slot(s, 0), *_take_slot(o, 0))[1], states, others)
    blank = jax.tree.map(lambda a: jnp.zeros((active.size, *a.shape), a.dtype), metrics)

    def turn(slot: jax.Array, carry: Any) -> Any:
        return jax.lax.cond(active[slot], lambda: _turn(slot, carry), lambda: carry)

    def _turn(slot: jax.Array, carry: Any) -> Any:
        state = _take_slot(carry[0], slot)
        return _put_slot(carry, slot, one(state, *_take_slot(others, slot)))

    return jax.lax.fori_loop(0, active.size, turn, (states, blank))


@jax.jit
def _take_slot(stacked: Any, slot: Any) -> Any:
    """One of several trees that are stacked along a first axis."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, keepdims=False), stacked)


@functools.partial(jax.jit, donate_argnums=0)
def _put_slot(stacked: Any, slot: Any, tree: Any) -> Any:
    """The stack with one of its trees replaced."""
    return jax.tree.map(lambda s, a: jax.lax.dynamic_update_index_in_dim(s, a, slot, 0), stacked, tree)


@contextlib.contextmanager
def _kept(member: Member) -> Iterator[None]:
    """What the run says goes to its file, and what fails it is kept."""
    with log.into(member.file):
        try:
            yield
        except UserError as error:
            member.error = str(error)
