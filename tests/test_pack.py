"""Several runs in one program: they are what they would have been alone."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest
from flax import nnx

from xdim_jax import ops, sweep, train
from xdim_jax.base import signals
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.data import phantom
from xdim_jax.nets import layers, networks
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import STEPS_FILE, read_records
from xdim_jax.sweeps import dry_run, packed, worker
from xdim_jax.sweeps import study as studies
from xdim_jax.training import pack

REPO = Path(__file__).resolve().parents[1]
RECIPE = "configs/camus_omnianet.py:phantom"
# 4 patients of 4 images, two folds: 2 steps in an epoch
SHAPES = [
    "--config.data.patch=(32,32)",
    "--config.data.prepare.size=(32,32)",
    "--config.data.batch=4",
    "--config.data.folds=2",
    "--config.augment.noise.p=0.5",
    "--config.optim.lookahead.period=2",
    "--config.optim.name=nadam_torch",
    "--config.train.log_every=1",
    "--config.train.overlays=0",
]
# every number that runs of a pack have for themselves, and what the program does not see
OWN = [
    {
        "seed": 0, "train.epochs": 3, "optim.schedule.peak": 1e-2, "optim.b1": 0.9, "optim.b2": 0.99, "optim.eps": 1e-8,
        "optim.momentum_decay": 4e-3, "optim.weight_decay": 1e-3, "optim.clip_norm": 0.5, "optim.ema": 0.9,
        "optim.lookahead.step_size": 0.5, "loss.eps": 1e-5, "loss.weights": "(1.0,2.0,3.0,4.0)", "data.fold": 0,
    },
    {
        "seed": 5, "train.epochs": 2, "optim.schedule.peak": 3e-2, "optim.b1": 0.8, "optim.b2": 0.9, "optim.eps": 1e-3,
        "optim.momentum_decay": 4e-2, "optim.weight_decay": 1e-1, "optim.clip_norm": 0.1, "optim.ema": 0.5,
        "optim.lookahead.step_size": 0.8, "loss.eps": 1e-1, "loss.weights": "()", "data.fold": 1,
    },
    {
        "seed": 5, "train.epochs": 4, "optim.schedule.peak": 1e-3, "optim.b1": 0.95, "optim.b2": 0.99, "optim.eps": 0.9,
        "optim.momentum_decay": 1e-3, "optim.weight_decay": 1e-2, "optim.clip_norm": 9.0, "optim.ema": 0.99,
        "optim.lookahead.step_size": 0.1, "loss.eps": 1.0, "loss.weights": "(0.0,1.0,1.0,1.0)", "data.fold": 1,
    },
]  # fmt: skip


class Small(nnx.Module):
    """A convolution, batch norm with SiLU, drop path, and a linear map."""

    stages = ()

    def __init__(self, channels, seed):
        rngs = nnx.Rngs(seed)
        self.kernel = nnx.Param(0.3 * jax.random.normal(rngs.params(), (3, 3, 1, 6)))
        self.norm = layers.Norm(6, layers.Style(2, eps=1e-3), "silu")
        self.drop = layers.DropPath(0.3)
        self.head = nnx.Param(0.3 * jax.random.normal(rngs.params(), (6, channels)))

    def __call__(self, image, rngs=None, levels=False):
        y = ops.conv(image, self.kernel[...], strides=(1, 1), padding=((1, 1), (1, 1)))
        y = self.drop(self.norm(y), rngs)
        logits = y @ self.head[...]
        return [logits] if levels else logits


@contextlib.contextmanager
def shrunk():
    """`Small` in place of every network, compiled quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "build", lambda config, seed: Small(config["out_channels"], seed))
        patch.setenv("XDIM_JAX_CACHE", "off")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def small():
    with shrunk():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four phantom patients of CAMUS. Read only, but for the prepared store beside it."""
    root = tmp_path_factory.mktemp("camus") / "data"
    phantom.write_camus(root, cases=4, shape=(96, 64))
    return root


def overrides(data, own):
    return [*SHAPES, f"--config.data.root={data}", *(f"--config.{k}={v}" for k, v in own.items())]


def load(data, own, *more):
    return load_config(RECIPE, [*overrides(data, own), *more])


def train_alone(data, workdir, own):
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main([f"--config={RECIPE}", f"--workdir={workdir}", *overrides(data, own)]) == 0
    return workdir


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Each of `OWN` as a run of its own. Read only."""
    root = tmp_path_factory.mktemp("alone")
    with shrunk():
        return [train_alone(data, root / f"run{i}", own) for i, own in enumerate(OWN)]


def make_pack(data, slots, layout="scan"):
    return pack.Pack(load(data, OWN[0]), slots, layout, signals.StopRequest())


def run_out(group):
    """Steps until no run goes on; they leave as they end."""
    while any(group.members):
        group.step()
        for member in [m for m in group.members if m is not None and not m.running]:
            group.remove(member)


def assert_same(found, expected):
    """The record and the final weights of two workdirs."""
    steps = [read_records(w, STEPS_FILE) for w in (found, expected)]
    assert [s["step"] for s in steps[0]] == [s["step"] for s in steps[1]]
    assert [s["batch"] for s in steps[0]] == [s["batch"] for s in steps[1]], "other batches"
    for key, far in (("loss", 2e-4), ("grad_norm", 2e-3), ("update_norm", 2e-3)):
        np.testing.assert_allclose([s[key] for s in steps[0]], [s[key] for s in steps[1]], rtol=far, err_msg=key)
    scores = [[r for r in read_records(w) if r["kind"] == "validation"] for w in (found, expected)]
    assert len(scores[0]) == len(scores[1]) > 0
    np.testing.assert_allclose([r["dice"] for r in scores[0]], [r["dice"] for r in scores[1]], atol=2e-3)
    rates = [[r["learning_rate"] for r in read_records(w) if r["kind"] == "train"] for w in (found, expected)]
    assert rates[0] == rates[1]
    states = [read_state(w) for w in (found, expected)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def read_state(workdir):
    """The newest state, by orbax alone."""
    import orbax.checkpoint as ocp

    newest = max((workdir / checkpoint.LATEST_FOLDER).glob("[0-9]*"), key=lambda p: int(p.name))
    with ocp.StandardCheckpointer() as reader:
        return reader.restore((newest / "state").absolute())


# -- together as alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["scan", "vmap"])
def test_runs_of_a_pack_are_what_they_are_alone(layout, data, alone, tmp_path):
    """Seeds, folds, lengths, learning rates and every number of optimiser and loss differ."""
    group = make_pack(data, 3, layout)
    for i, own in enumerate(OWN):
        group.add(load(data, own), tmp_path / f"run{i}")
    run_out(group)
    for i, workdir in enumerate(alone):
        assert_same(tmp_path / f"run{i}", workdir)
        a, b = (json.loads((w / "config.json").read_text()) for w in (tmp_path / f"run{i}", workdir))
        assert a == b


@pytest.mark.slow
def test_one_run_per_device(data, alone, tmp_path):
    """Four places on two devices, three of them taken, in a process that has two devices."""
    code = (
        "import sys; from tests import test_pack as t; from pathlib import Path\n"
        "t.networks.build = lambda config, seed: t.Small(config['out_channels'], seed)\n"
        "group = t.make_pack(Path(sys.argv[1]), 4, 'devices')\n"
        "assert group.layout == 'devices'\n"
        "for i, own in enumerate(t.OWN):\n"
        "    group.add(t.load(Path(sys.argv[1]), own), Path(sys.argv[2]) / f'run{i}')\n"
        "assert len(group._state.step.sharding.device_set) == 2\n"
        "t.run_out(group)\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "XDIM_JAX_CACHE": "off"}
    environment |= {"PYTHONPATH": str(REPO), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", code, str(data), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for i, workdir in enumerate(alone):
        assert_same(tmp_path / f"run{i}", workdir)


def test_a_place_is_taken_again_without_a_new_program(data, alone, tmp_path, monkeypatch):
    """Two places for three runs: the second ends first, the third comes while the first is under way."""
    compiled = []
    monkeypatch.setattr(pack, "compile_step", lambda *a: compiled.append(1) or original(*a))
    group = make_pack(data, 2)
    first = group.add(load(data, OWN[0]), tmp_path / "run0")
    second = group.add(load(data, OWN[1]), tmp_path / "run1")
    while second.running:
        group.step()
    group.remove(second)
    group.step()  # alone
    assert first.running and group.free == 1
    group.add(load(data, OWN[2]), tmp_path / "run2")
    run_out(group)
    assert compiled == [1]
    for i, workdir in enumerate(alone):
        assert_same(tmp_path / f"run{i}", workdir)


original = pack.compile_step


@pytest.mark.slow
def test_a_run_goes_on_from_pack_to_alone_and_back(data, alone, tmp_path):
    stop = signals.StopRequest()
    group = pack.Pack(load(data, OWN[0]), 2, "scan", stop)
    members = [group.add(load(data, own), tmp_path / f"run{i}") for i, own in enumerate(OWN[:2])]
    group.step()
    stop.signal = 15
    group.step()
    assert [m.running for m in members] == [False, False] and [m.controller.steps_done for m in members] == [2, 2]
    for member in members:
        group.remove(member)
    train_alone(data, tmp_path / "run0", OWN[0])
    again = make_pack(data, 2)
    again.add(load(data, OWN[1]), tmp_path / "run1")
    run_out(again)
    for i, workdir in enumerate(alone[:2]):
        assert_same(tmp_path / f"run{i}", workdir)


def test_a_run_that_fails_leaves_the_others(data, alone, tmp_path):
    bad = OWN[1] | {"optim.schedule.peak": 1e37, "optim.clip_norm": 1e6, "optim.eps": 1e-16}
    group = make_pack(data, 2)
    group.add(load(data, OWN[0]), tmp_path / "run0")
    member = group.add(load(data, bad), tmp_path / "bad")
    run_out(group)
    assert "not finite" in member.error
    assert member.error in (tmp_path / "bad" / "train.log").read_text()
    assert_same(tmp_path / "run0", alone[0])


def test_runs_that_read_the_same_share_what_is_read(data, tmp_path):
    group = make_pack(data, 3)
    same = [OWN[0] | {"optim.b1": b1} for b1 in (0.8, 0.9)]
    members = [group.add(load(data, own), tmp_path / f"run{i}") for i, own in enumerate([*same, OWN[1]])]
    group.step()
    assert members[0].group == members[1].group != members[2].group and len(group._streams) == 2
    group.remove(members[0])
    group.step()
    assert len(group._streams) == 2
    group.remove(members[1])
    group.remove(members[2])
    assert not group._streams
    records = [read_records(tmp_path / f"run{i}", STEPS_FILE) for i in range(2)]
    assert records[0][0]["batch"] == records[1][0]["batch"] and len(records[1]) == 2


def test_an_empty_place_takes_no_turn(data):
    """The program holds the step once, below a condition."""
    ran = jnp.zeros(3)
    states, metrics = pack._loop_over_slots(
        lambda state, x: (state + x, {"loss": state * jnp.nan}), jnp.array([True, False, True]), ran, (jnp.ones(3),)
    )
    np.testing.assert_array_equal(states, [1, 0, 1])
    np.testing.assert_array_equal(np.isnan(metrics["loss"]), [True, False, True])


# -- what fits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "model.upsampling=transposed",
        "data.batch=2",
        "data.patch=(64,64)",
        "optim.name=nadam",
        "optim.weight_decay=0.0",
        "optim.lookahead.period=3",
        "loss.dice=batch",
        "augment.noise.p=0.4",
        "train.precision=bfloat16",
        "predict.overlap=0.25",
    ],
)
def test_runs_of_other_programs_do_not_fit(override, data):
    assert pack.signature(load(data, OWN[0])) == pack.signature(load(data, OWN[1]))
    other = load(data, OWN[0], f"--config.{override}")
    assert pack.signature(other) != pack.signature(load(data, OWN[0]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.mesh.space=2"], r"config\.mesh\.space=2"),
        (["--config.mesh.parallel=pmap"], r"config\.mesh\.parallel=pmap"),
        (["--config.train.profile_steps=3"], r"config\.train\.profile_steps=3"),
    ],
)
def test_settings_that_a_pack_does_not_have(words, message, data):
    with pytest.raises(UserError, match=message):
        pack.check_packable(load(data, OWN[0], *words), 2, "scan")


def test_layouts(monkeypatch):
    assert pack.choose_layout("auto", 4) == ("scan", 1)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert pack.choose_layout("auto", 8) == ("devices", 4) and pack.choose_layout("auto", 6) == ("devices", 2)
    assert pack.choose_layout("devices", 3) == ("devices", 3) and pack.choose_layout("vmap", 3) == ("vmap", 1)
    with pytest.raises(UserError, match="6 runs do not divide over 4 devices; give --pack=4 or --pack=8"):
        pack.choose_layout("devices", 6)
    with pytest.raises(UserError, match="--layout=stack is unknown"):
        pack.choose_layout("stack", 6)


# -- folds --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_folds_in_one_program(data, tmp_path, capsys):
    own = {k: v for k, v in OWN[0].items() if k != "data.fold"}
    command = [f"--config={RECIPE},fold=all", *overrides(data, own)]
    assert train.main([*command, f"--workdir={tmp_path / 'packed'}", "--pack=2"]) == 0
    assert "pack       2 of 2 runs at a time, layout scan" in capsys.readouterr().out
    assert train.main([*command, f"--workdir={tmp_path / 'alone'}"]) == 0
    found, expected = (json.loads((tmp_path / k / "crossval.json").read_text()) for k in ("packed", "alone"))
    assert found["mean"] == pytest.approx(expected["mean"], abs=2e-3)
    for fold in ("fold0", "fold1"):
        assert_same(tmp_path / "packed" / fold, tmp_path / "alone" / fold)
    with pytest.raises(UserError, match=r"--pack=2.*fold=all"):
        train.main([f"--config={RECIPE}", f"--workdir={tmp_path / 'x'}", "--pack=2", *overrides(data, OWN[0])])


# -- sweeps -------------------------------------------------------------------------------------------------------

SWEPT = {k: v for k, v in OWN[1].items() if k not in ("optim.schedule.peak", "optim.b1")}


def make_worker(folder, data, suggest, trials, stop=None, pruner=None, slots=2):
    study = studies.open_study(studies.open_storage(str(folder / "study.journal")), "toy", pruner=pruner)
    job = worker.Job(RECIPE, overrides(data, SWEPT), suggest, folder, trials)
    stop = stop or signals.StopRequest()
    return study, packed.PackedWorker(study, job, stop, slots=slots, layout="scan", heartbeat=0.2, grace=60.0)


def ends(study):
    """Return the states of all trials in the order of their origins."""
    groups = studies.group_attempts(study)
    return [studies.deciding_attempt(attempts).state.name for _, attempts in sorted(groups.items())]


def test_a_sweep_trains_in_packs_what_it_would_train_alone(data, tmp_path, capsys):
    space = tmp_path / "space.py"
    space.write_text(
        "def suggest(trial):\n"
        "    trial.suggest_float('optim.schedule.peak', 1e-3, 1e-1, log=True)\n"
        "    trial.suggest_categorical('optim.lookahead.period', [0, 2])\n"
    )
    command = [f"--config={RECIPE}", f"--space={space}", "--trials=5", f"--workdir={tmp_path / 'sweep'}", "--pack=2"]
    own = {k: v for k, v in OWN[1].items() if k != "optim.schedule.peak"}
    assert sweep.main([*command, "--seed=1", *overrides(data, own)]) == 0
    study = studies.open_study(studies.open_storage(str(tmp_path / "sweep" / "study.journal")), "sweep", create=False)
    assert ends(study) == ["COMPLETE"] * 5
    periods = {t.params["optim.lookahead.period"] for t in study.trials}
    assert periods == {0, 2}, "two programs"
    for trial in study.trials:
        workdir = tmp_path / "sweep" / f"trial{trial.number:04d}"
        scores = [r["dice"] for r in read_records(workdir) if r["kind"] == "validation"]
        assert trial.value == max(scores) and len(scores) == 1
        assert [trial.intermediate_values[i + 1] for i in range(len(scores))] == scores
    trial = study.trials[3]
    assert_same(tmp_path / "sweep" / "trial0003", train_alone(data, tmp_path / "alone", own | trial.params))
    assert sweep.main([*command, "--seed=1", *overrides(data, own)]) == 0
    assert "5 of 5 trials have ended" in capsys.readouterr().out


def test_the_slot_of_a_failed_or_pruned_trial_is_used_again(data, tmp_path):
    class Pruner(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1

    def suggest(trial):
        peak = 1e37 if trial.number == 0 else 1e-2 + 1e-3 * trial.number
        trial.suggest_float("optim.schedule.peak", peak, peak)

    study, work = make_worker(tmp_path, data, suggest, 5, pruner=Pruner())
    work._job = dataclasses.replace(
        work._job,
        overrides=[*work._job.overrides, "--config.optim.clip_norm=1e6", "--config.optim.eps=1e-16"]
        + ["--config.train.validate_every=1"],
    )
    assert work.run() == 0
    assert ends(study) == ["FAIL", "PRUNED", "COMPLETE", "COMPLETE", "COMPLETE"]
    trials = study.get_trials()
    assert "not finite" in trials[0].user_attrs["error"] and len(trials) == 5
    assert list(trials[1].intermediate_values) == [1] and list(trials[2].intermediate_values) == [1, 2]


def test_a_signal_returns_trials_to_the_queue_and_they_are_resumed(data, tmp_path, monkeypatch):
    def suggest(trial):
        trial.suggest_float("optim.schedule.peak", 1e-3, 1e-2)

    stop, taken = signals.StopRequest(), []
    step = pack.Pack.step

    def stepped(self):
        step(self)
        taken.append(1)
        if len(taken) == 2:
            stop.signal = 15

    monkeypatch.setattr(pack.Pack, "step", stepped)
    study, work = make_worker(tmp_path, data, suggest, 3, stop)
    assert work.run() == signals.REQUEUE
    assert ends(study) == ["FAIL", "FAIL"] and "error" not in study.trials[0].user_attrs
    assert int(checkpoint._newest(tmp_path / "trial0000" / "checkpoints").name) == 3
    stop.signal = 0
    _, again = make_worker(tmp_path, data, suggest, 3, stop)
    taken.extend([1] * 9)
    assert again.run() == 0
    assert ends(study) == ["COMPLETE"] * 3
    steps = [r["step"] for r in read_records(tmp_path / "trial0000", STEPS_FILE)]
    assert steps == list(range(1, len(steps) + 1)), "no step twice, none lost"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pack=-1"], "--pack=-1"),
        (["--pack=2", "--config.mesh.parallel=pmap"], r"config\.mesh\.parallel=pmap"),
    ],
)
def test_sweeps_that_cannot_be_packed(words, message, data, tmp_path):
    space = tmp_path / "space.py"
    space.write_text("def suggest(trial):\n    trial.suggest_float('optim.b1', 0.5, 0.9)\n")
    command = [f"--config={RECIPE}", f"--space={space}", "--trials=2", f"--workdir={tmp_path / 'sweep'}"]
    with pytest.raises(UserError, match=message):
        sweep.main([*command, *words, *overrides(data, {})])
    assert not (tmp_path / "sweep").exists()


# -- dry runs -----------------------------------------------------------------------------------------------------


def test_every_program_of_a_space_is_found_once(monkeypatch):
    """Choices of the program are combined; ranges and choices outside of the program do not add programs."""

    def suggest(trial):
        trial.suggest_float("optim.schedule.peak", 1e-4, 1e-2)
        trial.suggest_categorical("data.fold", [0, 1])
        trial.suggest_categorical("loss.eps", [1e-5, 1e-3])
        trial.suggest_categorical("optim.lookahead.period", [0, 6])
        if trial.suggest_categorical("optim.name", ["nadam", "nadam_torch"]) == "nadam_torch":
            trial.suggest_categorical("optim.clip_norm", [0.0, 1.0])

    found = dry_run.distinct_programs(suggest, RECIPE, SHAPES)
    keys = ("optim.lookahead.period", "optim.name", "optim.clip_norm")
    expected = [(p, *rest) for p in (0, 6) for rest in (("nadam", None), ("nadam_torch", 0.0), ("nadam_torch", 1.0))]
    assert sorted((tuple(p.get(k) for k in keys) for p, _ in found.values()), key=str) == expected

    def many(trial):
        for key in ("rotate", "noise", "scale", "gamma", "blur"):
            trial.suggest_categorical(f"augment.{key}.p", [0.0, 0.5])

    monkeypatch.setattr(dry_run, "MAX_PROGRAMS", 20)
    with pytest.raises(UserError, match=r"more than 20 programs.*augment\.blur\.p"):
        dry_run.distinct_programs(many, RECIPE, SHAPES)


@pytest.mark.parametrize("slots", [0, 2])
def test_a_dry_run_refuses_what_does_not_fit(slots, data, tmp_path, capsys):
    space = tmp_path / "space.py"
    space.write_text(
        "def suggest(trial):\n"
        "    trial.suggest_categorical('data.batch', [2, 64])\n"
        "    trial.suggest_float('optim.b1', 0.8, 0.9)\n"
    )
    command = [f"--config={RECIPE}", f"--space={space}", "--trials=4", f"--workdir={tmp_path / 'sweep'}", "--dry-run"]
    command += [*overrides(data, {}), f"--pack={slots}"]
    assert sweep.main(command) == 0
    out = capsys.readouterr().out
    assert "programs   2," in out and "data.batch=2" in out and "data.batch=64" in out and "does not fit" not in out
    with pytest.raises(UserError) as caught:
        sweep.main([*command, "--budget=10MiB"])
    assert "1 of 2 programs need more than 0.01 GiB" in str(caught.value) and "data.batch=64: " in str(caught.value)
    assert "data.batch=2:" not in str(caught.value)
    assert ("a smaller --pack" in str(caught.value)) == (slots == 2)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("layout", ["scan", "vmap"])
def test_what_a_pack_takes_is_told_by_its_own_program(layout, data):
    """State and batches of twice as many runs are twice as much."""
    config = load(data, OWN[0])
    config, dataset = pack.resolve_config(config)
    two, four = (pack.step_bytes(config, dataset, slots, layout) for slots in (2, 4))
    batch = 4 * 4 * (32 * 32 * 5 + 8)  # float image, uint8 label, key
    assert four - two > 2 * batch / 4
    assert two < four < 2.5 * two
