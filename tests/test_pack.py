"""Packs: runs that are trained in one program give the same results as runs that are trained alone."""

import dataclasses
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

from tests.conftest import records
from tests.packed_runs import (
    RECIPE,
    RUNS,
    SHAPES,
    assert_same_run,
    finish_runs,
    load,
    make_pack,
    overrides,
    small_network,
    train_alone,
)
from tests.processes import device_flags
from xdim_jax import sweep, train
from xdim_jax.base import signals
from xdim_jax.base.errors import UserError
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import STEPS_FILE, read_records
from xdim_jax.sweeps import dry_run, packed, worker
from xdim_jax.sweeps import optuna_study as studies
from xdim_jax.sweeps.space import load_space
from xdim_jax.training import loop, pack
from xdim_jax.training.absent_devices import Target

REPO = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.xdist_group("pack")  # one worker, so that fixtures are made once


@pytest.fixture(autouse=True)
def small():
    with small_network():
        yield


# -- together as alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["scan", "vmap"])
def test_runs_of_a_pack_are_what_they_are_alone(layout, camus4, runs_alone, tmp_path):
    """The runs differ in length, learning rate, and settings of optimiser and loss; some differ in seed and fold."""
    group = make_pack(camus4, 3, layout)
    for i, own in enumerate(RUNS):
        group.add(load(camus4, own), tmp_path / f"run{i}")
    finish_runs(group)
    for i, workdir in enumerate(runs_alone):
        assert_same_run(tmp_path / f"run{i}", workdir)
        a, b = (json.loads((w / "config.json").read_text()) for w in (tmp_path / f"run{i}", workdir))
        assert a == b


@pytest.mark.slow
def test_one_run_per_device(camus4, runs_alone, tmp_path):
    """Four slots for three runs, in a process with two devices: one slot stays empty."""
    code = (
        "import sys; from tests import packed_runs as t; from pathlib import Path\n"
        "from xdim_jax.base.signals import StopRequest; from xdim_jax.training import pack\n"
        "t.networks.build = lambda config, seed: t.SmallNetwork(config['out_channels'], seed or 0)\n"
        "counts, step = set(), pack.Pack.step\n"
        "def stepped(self): step(self); counts.add(len(self._state.step.sharding.device_set))\n"
        "pack.Pack.step = stepped\n"
        "data, folder = map(Path, sys.argv[1:])\n"
        "runs = [(t.load(data, own), folder / f'run{i}') for i, own in enumerate(t.RUNS)]\n"
        "assert pack.train_runs(runs, slots=4, layout='devices', stop=StopRequest()) == 0\n"
        "assert counts == {2}\n"
    )
    environment = os.environ | {"XLA_FLAGS": device_flags(2), "XDIM_JAX_CACHE": "off"}
    environment |= {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code, str(camus4), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for i, workdir in enumerate(runs_alone):
        assert_same_run(tmp_path / f"run{i}", workdir)


def test_a_place_is_taken_again_without_a_new_program(camus4, runs_alone, tmp_path, monkeypatch):
    """Two slots for three runs: the second run ends first, and the third takes its slot while the first still runs."""
    compiled, compile_step = [], pack.compile_step
    monkeypatch.setattr(pack, "compile_step", lambda *a: compiled.append(1) or compile_step(*a))
    group = make_pack(camus4, 2)
    first = group.add(load(camus4, RUNS[0]), tmp_path / "run0")
    second = group.add(load(camus4, RUNS[1]), tmp_path / "run1")
    while second.running:
        group.step()
    group.remove(second)
    group.step()  # alone
    assert first.running and group.free == 1
    assert [r.get("runs", 1) for r in records(tmp_path / "run1", "train")] == [2] * len(records(runs_alone[1], "train"))
    assert not any("runs" in r for r in records(runs_alone[1], "train"))
    group.add(load(camus4, RUNS[2]), tmp_path / "run2")
    finish_runs(group)
    assert compiled == [1]
    for i, workdir in enumerate(runs_alone):
        assert_same_run(tmp_path / f"run{i}", workdir)


@pytest.mark.slow
def test_a_run_goes_on_from_pack_to_alone_and_back(camus4, runs_alone, tmp_path):
    stop = signals.StopRequest()
    group = pack.Pack(load(camus4, RUNS[0]), 2, "scan", stop)
    members = [group.add(load(camus4, own), tmp_path / f"run{i}") for i, own in enumerate(RUNS[:2])]
    group.step()
    stop.signal = 15
    group.step()
    assert [m.running for m in members] == [False, False] and [m.controller.steps_done for m in members] == [2, 2]
    for member in members:
        group.remove(member)
    train_alone(camus4, tmp_path / "run0", RUNS[0])
    again = make_pack(camus4, 2)
    again.add(load(camus4, RUNS[1]), tmp_path / "run1")
    finish_runs(again)
    for i, workdir in enumerate(runs_alone[:2]):
        assert_same_run(tmp_path / f"run{i}", workdir)


def test_a_run_that_fails_leaves_the_others(camus4, runs_alone, tmp_path):
    bad = RUNS[1] | {"optim.schedule.peak": 1e37, "optim.clip_norm": 1e6, "optim.eps": 1e-16}
    group = make_pack(camus4, 2)
    group.add(load(camus4, RUNS[0]), tmp_path / "run0")
    member = group.add(load(camus4, bad), tmp_path / "bad")
    finish_runs(group)
    assert "not finite" in member.error
    assert member.error in (tmp_path / "bad" / "train.log").read_text()
    assert_same_run(tmp_path / "run0", runs_alone[0])


def test_a_program_that_fails_is_the_error_of_each_of_its_runs(camus4, tmp_path, monkeypatch, capsys):
    def fails(self):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(pack.Pack, "step", fails)
    group, runs = make_pack(camus4, 1), [(load(camus4, RUNS[i]), tmp_path / f"run{i}") for i in (0, 1)]
    first, second = pack.train_in_pack(group, runs, signals.StopRequest())
    assert "run0: RuntimeError: RESOURCE_EXHAUSTED" in first and "run1: not trained" in second and group.failed
    assert (
        "Traceback" in capsys.readouterr().out and "RESOURCE_EXHAUSTED" in (tmp_path / "run0" / "train.log").read_text()
    )


def test_a_run_that_fails_while_it_is_added_leaves_its_slot_and_its_workdir(camus4, runs_alone, tmp_path, monkeypatch):
    """A validation that is repeated at the start of a resumed run can fail, for example because a file is damaged."""
    start, failing = loop.RunController.start, [True]

    def start_or_fail(self, state, **options):
        if failing and self.run.workdir.name == "run1":
            raise UserError("a file is damaged")
        return start(self, state, **options)

    monkeypatch.setattr(loop.RunController, "start", start_or_fail)
    group = make_pack(camus4, 2)
    group.add(load(camus4, RUNS[0]), tmp_path / "run0")
    with pytest.raises(UserError, match="a file is damaged"):
        group.add(load(camus4, RUNS[1]), tmp_path / "run1")
    assert group.free == 1 and "a file is damaged" in (tmp_path / "run1" / "train.log").read_text()
    group.step()
    failing.clear()
    group.add(load(camus4, RUNS[1]), tmp_path / "run1")  # its workdir is not locked
    finish_runs(group)
    for i, workdir in enumerate(runs_alone[:2]):
        assert_same_run(tmp_path / f"run{i}", workdir)


def test_runs_that_read_the_same_share_what_is_read(camus4, tmp_path):
    group = make_pack(camus4, 3)
    same = [RUNS[0] | {"optim.b1": b1} for b1 in (0.8, 0.9)]
    members = [group.add(load(camus4, own), tmp_path / f"run{i}") for i, own in enumerate([*same, RUNS[1]])]
    group.step()
    assert members[0].group == members[1].group != members[2].group and len(group._streams) == 2
    group.remove(members[0])
    group.step()
    assert len(group._streams) == 2
    group.remove(members[1])
    group.remove(members[2])
    assert not group._streams
    steps = [read_records(tmp_path / f"run{i}", STEPS_FILE) for i in range(2)]
    assert steps[0][0]["batch"] == steps[1][0]["batch"] and len(steps[1]) == 2


def test_an_empty_place_takes_no_turn(camus4):
    """The step is not computed for an empty slot: its state is unchanged, and its metrics are 0."""
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
def test_runs_of_other_programs_do_not_fit(override, camus4):
    assert pack.signature(load(camus4, RUNS[0])) == pack.signature(load(camus4, RUNS[1]))
    other = load(camus4, RUNS[0], f"--config.{override}")
    assert pack.signature(other) != pack.signature(load(camus4, RUNS[0]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.mesh.space=2"], r"config\.mesh\.space=2"),
        (["--config.mesh.parallel=pmap"], r"config\.mesh\.parallel=pmap"),
        (["--config.train.profile_steps=3"], r"config\.train\.profile_steps=3"),
    ],
)
def test_settings_that_a_pack_does_not_have(words, message, camus4):
    with pytest.raises(UserError, match=message):
        pack.check_packable(load(camus4, RUNS[0], *words), 2, "scan")


def test_layouts(monkeypatch):
    assert pack.choose_layout("auto", 4) == ("scan", 1)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert pack.choose_layout("auto", 8) == ("devices", 4) and pack.choose_layout("auto", 6) == ("devices", 2)
    assert pack.choose_layout("devices", 3) == ("devices", 3) and pack.choose_layout("vmap", 3) == ("vmap", 1)
    with pytest.raises(UserError, match=r"6 runs .* 4 devices.* --pack=4 or --pack=8"):
        pack.choose_layout("devices", 6)
    with pytest.raises(UserError, match="--layout=stack is unknown"):
        pack.choose_layout("stack", 6)


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_trackers_record_one_run_of_a_process(tracker, camus4):
    config = load(camus4, RUNS[0], f"--config.train.{tracker}=name")
    pack.check_packable(config, 1, "scan")
    with pytest.raises(UserError, match=rf"--pack: config\.train\.{tracker}=name"):
        pack.check_packable(config, 2, "scan")


def test_a_workdir_that_cannot_be_made_is_the_error_of_its_run(camus4, runs_alone, tmp_path):
    (tmp_path / "file").write_text("")
    group, stop = make_pack(camus4, 2), signals.StopRequest()
    runs = [(load(camus4, RUNS[1]), tmp_path / "file" / "run"), (load(camus4, RUNS[0]), tmp_path / "run0")]
    (error,) = pack.train_in_pack(group, runs, stop)
    assert str(tmp_path / "file" / "run") in error
    assert_same_run(tmp_path / "run0", runs_alone[0])


# -- folds --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_folds_in_one_program(camus4, tmp_path, capsys):
    own = {k: v for k, v in RUNS[0].items() if k != "data.fold"}
    command = [f"--config={RECIPE},fold=all", *overrides(camus4, own)]
    assert train.main([*command, f"--workdir={tmp_path / 'packed'}", "--pack=2"]) == 0
    assert "pack       2 of 2 runs" in capsys.readouterr().out
    assert train.main([*command, f"--workdir={tmp_path / 'alone'}"]) == 0
    found, expected = (json.loads((tmp_path / k / "crossval.json").read_text()) for k in ("packed", "alone"))
    assert found["mean"] == pytest.approx(expected["mean"], abs=2e-3)
    for fold in ("fold0", "fold1"):
        assert_same_run(tmp_path / "packed" / fold, tmp_path / "alone" / fold)
    with pytest.raises(UserError, match=r"--pack=2.*fold=all"):
        train.main([f"--config={RECIPE}", f"--workdir={tmp_path / 'x'}", "--pack=2", *overrides(camus4, RUNS[0])])


# -- sweeps -------------------------------------------------------------------------------------------------------

SWEPT = {k: v for k, v in RUNS[1].items() if k not in ("optim.schedule.peak", "optim.b1")}


def make_worker(folder, data, suggest, trials, stop=None, pruner=None, slots=2):
    study = studies.open_study(studies.open_storage(str(folder / "study.journal")), "toy", pruner=pruner)
    job = worker.Job(RECIPE, overrides(data, SWEPT), suggest, folder, trials)
    stop = stop or signals.StopRequest()
    return study, packed.PackedWorker(study, job, stop, slots=slots, layout="scan", heartbeat=0.2, grace=60.0)


def ends(study):
    """Return the states of all trials in the order of their origins."""
    groups = studies.group_attempts(study)
    return [studies.deciding_attempt(attempts).state.name for _, attempts in sorted(groups.items())]


def test_a_sweep_trains_in_packs_what_it_would_train_alone(camus4, tmp_path, capsys):
    space = tmp_path / "space.py"
    space.write_text(
        "def suggest(trial):\n"
        "    trial.suggest_float('optim.schedule.peak', 1e-3, 1e-1, log=True)\n"
        "    trial.suggest_categorical('optim.lookahead.period', [0, 2])\n"
    )
    command = [f"--config={RECIPE}", f"--space={space}", "--trials=5", f"--workdir={tmp_path / 'sweep'}", "--pack=2"]
    own = {k: v for k, v in RUNS[1].items() if k != "optim.schedule.peak"}
    assert sweep.main([*command, "--seed=1", *overrides(camus4, own)]) == 0
    study = studies.open_study(studies.open_storage(str(tmp_path / "sweep" / "study.journal")), "sweep", create=False)
    assert ends(study) == ["COMPLETE"] * 5
    periods = {t.params["optim.lookahead.period"] for t in study.trials}
    assert periods == {0, 2}, "the trials must have two programs"
    for trial in study.trials:
        workdir = tmp_path / "sweep" / f"trial{trial.number:04d}"
        scores = [r["dice"] for r in records(workdir, "validation")]
        assert trial.value == max(scores) and len(scores) == 1
        assert [trial.intermediate_values[i + 1] for i in range(len(scores))] == scores
    trial = study.trials[3]
    assert_same_run(tmp_path / "sweep" / "trial0003", train_alone(camus4, tmp_path / "alone", own | trial.params))
    assert sweep.main([*command, "--seed=1", *overrides(camus4, own)]) == 0
    assert "5 of 5 trials have ended" in capsys.readouterr().out


def test_the_slot_of_a_failed_or_pruned_trial_is_used_again(camus4, tmp_path):
    class Pruner(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1

    def suggest(trial):
        peak = 1e37 if trial.number == 0 else 1e-2 + 1e-3 * trial.number
        trial.suggest_float("optim.schedule.peak", peak, peak)

    study, work = make_worker(tmp_path, camus4, suggest, 5, pruner=Pruner())
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


def test_a_machine_that_cannot_train_leaves_the_trials_of_a_pack_to_others(camus4, tmp_path, monkeypatch):
    def suggest(trial):
        trial.suggest_float("optim.schedule.peak", 1e-3, 1e-2)

    def fails(self, config, workdir):
        raise UserError("no GPU")

    monkeypatch.setattr(pack.Pack, "add", fails)
    study, work = make_worker(tmp_path, camus4, suggest, 20)
    with pytest.raises(UserError, match=r"3 trials in a row .*no GPU"):
        work.run()
    assert ends(study) == ["FAIL"] * 3


def test_a_storage_that_restarts_ends_no_pack(camus4, tmp_path, monkeypatch, capsys):
    """Calls fail when the first trial is claimed, while it is trained beside a free slot, and when it ends."""

    def suggest(trial):
        trial.suggest_float("optim.schedule.peak", 1e-3, 1e-2)

    def sometimes(name, fails):
        calls, call = [], getattr(studies, name)

        def restarting(*arguments, **options):
            calls.append(1)
            if fails(len(calls)):
                raise optuna.exceptions.StorageInternalError("server closed the connection")
            return call(*arguments, **options)

        monkeypatch.setattr(studies, name, restarting)

    study, work = make_worker(tmp_path, camus4, suggest, 1)
    work._heartbeat = 0.05
    sometimes("requeue_dead_trials", lambda n: n in (1, 3))
    sometimes("finish_trial", lambda n: n == 1)
    assert work.run() == 0
    assert ends(study) == ["COMPLETE"]
    assert capsys.readouterr().out.count("cannot be reached") == 3


def test_a_signal_returns_trials_to_the_queue_and_they_are_resumed(camus4, tmp_path, monkeypatch):
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
    study, work = make_worker(tmp_path, camus4, suggest, 3, stop)
    assert work.run() == signals.REQUEUE
    assert ends(study) == ["FAIL", "FAIL"] and "error" not in study.trials[0].user_attrs
    assert int(checkpoint._newest(tmp_path / "trial0000" / "checkpoints").name) == 3
    stop.signal = 0
    _, again = make_worker(tmp_path, camus4, suggest, 3, stop)
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
def test_sweeps_that_cannot_be_packed(words, message, camus4, tmp_path):
    space = tmp_path / "space.py"
    space.write_text("def suggest(trial):\n    trial.suggest_float('optim.b1', 0.5, 0.9)\n")
    command = [f"--config={RECIPE}", f"--space={space}", "--trials=2", f"--workdir={tmp_path / 'sweep'}"]
    with pytest.raises(UserError, match=message):
        sweep.main([*command, *words, *overrides(camus4, {})])
    assert not (tmp_path / "sweep").exists()


# -- dry runs -----------------------------------------------------------------------------------------------------


def test_every_program_of_a_space_is_found_once(monkeypatch):
    """All combinations of choices that change the program are found. Other choices, and ranges, add no program."""

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
def test_a_dry_run_refuses_what_does_not_fit(slots, camus4, tmp_path, capsys):
    space = tmp_path / "space.py"
    space.write_text(
        "def suggest(trial):\n"
        "    trial.suggest_categorical('data.batch', [2, 64])\n"
        "    trial.suggest_float('optim.b1', 0.8, 0.9)\n"
    )
    command = [f"--config={RECIPE}", f"--space={space}", "--trials=4", f"--workdir={tmp_path / 'sweep'}", "--dry-run"]
    command += [*overrides(camus4, {}), f"--pack={slots}"]
    assert sweep.main(command) == 0
    out = capsys.readouterr().out
    assert "programs   2," in out and "data.batch=2" in out and "data.batch=64" in out and "does not fit" not in out
    with pytest.raises(UserError) as caught:
        sweep.main([*command, "--budget=10MiB"])
    assert "1 of 2 programs" in str(caught.value) and "0.01 GiB" in str(caught.value)
    assert "data.batch=64: " in str(caught.value)
    assert "data.batch=2:" not in str(caught.value)
    assert ("a smaller --pack" in str(caught.value)) == (slots == 2)
    assert not (tmp_path / "sweep").exists()


def test_a_dry_run_for_absent_devices(camus4, tmp_path, capsys):
    """The memory of the target is the limit. The target of the test is a CPU, whose compiler is always installed."""
    space = tmp_path / "space.py"
    space.write_text("def suggest(trial):\n    trial.suggest_categorical('data.batch', [2, 64])\n")
    target = Target("toy", "1 x toy chip", "cpu", tuple(jax.devices()[:1]), 10 * 2**20)
    suggest, _ = load_space(space)
    with pytest.raises(UserError, match=r"1 of 2 programs need more than 0\.01 GiB") as caught:
        dry_run.dry_run(suggest, RECIPE, overrides(camus4, {}), slots=0, layout="auto", budget=None, target=target)
    assert "data.batch=64: " in str(caught.value) and "1 x toy chip" in capsys.readouterr().out
    dry_run.dry_run(suggest, RECIPE, overrides(camus4, {}), slots=0, layout="auto", budget=2**40, target=target)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--target=h100"], "needs --dry-run"),
        (["--target=h100", "--dry-run", "--pack=2"], "packs are compiled for the devices of this"),
    ],
)
def test_a_target_is_for_dry_runs_without_packs(more, words, camus4, tmp_path):
    command = [f"--config={RECIPE}", "--space=configs/sweeps/optimiser.py", "--trials=4", f"--workdir={tmp_path}"]
    with pytest.raises(UserError, match=words):
        sweep.main([*command, *more, *overrides(camus4, {})])


@pytest.mark.parametrize("layout", ["scan", "vmap"])
def test_what_a_pack_takes_is_told_by_its_own_program(layout, camus4):
    """Twice as many runs need about twice the memory for states and batches."""
    config = load(camus4, RUNS[0])
    config, dataset = pack.resolve_config(config)
    two, four = (pack.step_bytes(config, dataset, slots, layout) for slots in (2, 4))
    batch = 4 * 4 * (32 * 32 * 5 + 8)  # bytes of 4 runs with 4 patches each: image, label, key
    assert four - two > 2 * batch / 4
    assert two < four < 2.5 * two
