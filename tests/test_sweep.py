"""Sweeps: spaces are checked on a config, and trials of dead workers are resumed."""

import collections
import concurrent.futures
import contextlib
import functools
import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from tests.conftest import records
from tests.sweep_worker import EPOCHS
from xdim_jax import sweep
from xdim_jax.base.errors import UserError
from xdim_jax.base.signals import StopRequest
from xdim_jax.sweeps import optuna_study as studies
from xdim_jax.sweeps import page, space, worker

REPO = Path(__file__).resolve().parents[1]
CAMUS = "configs/camus_omnianet.py:phantom"

# -- spaces -------------------------------------------------------------------------------------------------------


def conditional(trial):
    trial.suggest_float("rate", 1e-4, 1e-2, log=True)
    if trial.suggest_categorical("kind", ["a", "b", "c"]) == "b":
        trial.suggest_int("only_b", 2, 8, step=2)
        if trial.suggest_categorical("inner", [False, True]):
            trial.suggest_categorical("deep", ["x", "y"])


@pytest.mark.quick
def test_every_branch_is_tried_at_both_ends():
    branches, found = space.explore(conditional)
    assert list(found) == ["rate", "kind", "only_b", "inner", "deep"]
    assert {b["rate"] for b in branches} == {1e-4, 1e-2}
    assert {b["kind"] for b in branches} == {"a", "b", "c"} and all(
        "only_b" not in b for b in branches if b["kind"] != "b"
    )
    assert {b.get("only_b") for b in branches} == {None, 2, 8}
    assert {(b.get("inner"), b.get("deep")) for b in branches} == {
        (None, None),
        (False, None),
        (True, "x"),
        (True, "y"),
    }


def test_combinations_of_choices_are_not_tried():
    def suggest(trial):
        for i in range(30):
            trial.suggest_categorical(f"c{i}", ["a", "b", "c"])

    assert len(space.explore(suggest)[0]) == 2 * (1 + 30 * 2)


def test_a_branch_at_the_upper_end_of_a_range_is_tried():
    def suggest(trial):
        if trial.suggest_float("x", 0, 1) > 0.5:
            trial.suggest_categorical("y", ["a", "b"])

    assert {b.get("y") for b in space.explore(suggest)[0]} == {None, "a", "b"}


def write_space(folder, *lines):
    path = folder / "space.py"
    path.write_text("def suggest(trial):\n" + "".join(f"    {line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trial.suggest_float('optim.schedule.paek', 0, 1)", ["optim.schedule.paek", "did you mean", "schedule.peak"]),
        ("trial.suggest_float('train.epochs', 1, 2)", ["train.epochs", "1.0"]),
        ("trial.suggest_categorical('optim.name', ['nadam', 'adam'])", ["optim.name=adam", "known: nadam"]),
        (
            "trial.suggest_categorical('data.patch', [(64, 64)])",
            ["data.patch", "(64, 64)"],
        ),
        ("trial.suggest_categorical('data.patch', ['(64,64)', '(60,64)'])", ["(60,64)", "axis H is 60"]),
        ("trial.suggest_float('optim.b1', 1, 0)", ["ValueError"]),
        ("pass", ["suggest(trial)"]),
        ("trial.suggest_normal('optim.b1', 0, 1)", ["AttributeError", "suggest_normal"]),
    ],
)
def test_a_space_that_does_not_fit_is_refused_before_anything_starts(line, words, tmp_path):
    path = write_space(tmp_path, line)
    with pytest.raises(UserError) as error:
        sweep.main([f"--config={CAMUS}", f"--space={path}", "--trials=2", f"--workdir={tmp_path / 'sweep'}"])
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_all_problems_of_a_space_are_reported_at_once(tmp_path):
    path = write_space(
        tmp_path, "trial.suggest_float('optim.b3', 0, 1)", "trial.suggest_categorical('los.name', ['a'])"
    )
    with pytest.raises(UserError, match=r"(?s)optim\.b3.*los\.name|los\.name.*optim\.b3"):
        space.check_space(space.load_space(path)[0], path, CAMUS, [])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param("optimiser", "configs/camus_omnianet.py:scratch", marks=pytest.mark.slow),
        pytest.param("optimiser", "configs/brats_dsnet.py:scratch", marks=pytest.mark.slow),
        ("dxnet", "configs/brats_dxnet.py:phantom"),
        ("seeds", CAMUS),
    ],
)
def test_spaces_that_ship_fit_their_recipes(name, config):
    path = Path(f"configs/sweeps/{name}.py")
    found = space.check_space(space.load_space(path)[0], path, config, [])
    assert len(found) == {"seeds": 1, "dxnet": 6, "optimiser": 7}[name]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--space=none.py"], ["none.py does not exist", "configs/sweeps/optimiser.py"]),
        (["--trials=0"], ["--trials=0"]),
        (["--grace=0"], ["--grace=0"]),
        (["--budget=16GiB"], ["--budget=16GiB", "--dry-run"]),
        (["--layout=scan"], ["--layout=scan", "--pack"]),
        (["--seed=-1"], ["--seed=-1"]),
        (["--pruner=median", "--pruner-warmup=-1"], ["--pruner-warmup=-1"]),
        (["--config=nothing.py"], ["nothing.py does not exist"]),
        (["--sampler=grid"], ["optim.schedule.peak is a continuous or a logarithmic range"]),
        (["--storage=mydb://x/y"], ["--storage=mydb://x/y cannot be opened"]),
        (["--storage=postgresql://localhost:1/none"], ["postgresql://localhost:1/none cannot be opened"]),
        (["--config=configs/camus_omnianet.py:scratch"], ["no data: give --config.data.root=<folder>"]),
        (["--config.init.weights=no/b0.safetensors"], ["config.init.weights=no/b0.safetensors", "does not exist"]),
        (["--config.optim.b4=1"], ["config.optim.b4 is not a key", "optim.b"]),
        ([f"--config={CAMUS},fold=all"], ["trains all folds", "fold=<number>"]),
    ],
)
def test_misuse_is_one_clear_message(arguments, words, tmp_path):
    usual = [f"--config={CAMUS}", "--space=configs/sweeps/optimiser.py", "--trials=2", f"--workdir={tmp_path}"]
    with pytest.raises(UserError) as error:
        sweep.main([*usual, *arguments])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_report_without_a_study_says_so(tmp_path):
    with pytest.raises(UserError, match=r"study\.journal does not exist"):
        sweep.main(["report", f"--workdir={tmp_path}", f"--out={tmp_path / 'a.html'}"])
    studies.open_study(studies.open_storage(str(tmp_path / "study.journal")), "mine")
    with pytest.raises(UserError, match=r"--study=other .* mine"):
        sweep.main(["report", f"--workdir={tmp_path}", "--study=other", f"--out={tmp_path / 'a.html'}"])


# -- studies ------------------------------------------------------------------------------------------------------


# JAX warns, because the worker of a test runs in the process of the test, whose threads are those of JAX
_FORKS = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")


@pytest.fixture(params=["journal", "sqlite"])
def storage(request, tmp_path):
    return str(tmp_path / "s.journal") if request.param == "journal" else f"sqlite:///{tmp_path / 's.db'}"


def test_passwords_are_not_shown(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError) as error:
        studies.open_storage("mydb://me:SECRET@host:5/db")
    assert "SECRET" not in str(error.value) and "mydb://me:***@host:5/db" in str(error.value)
    assert studies.without_password("postgresql://me@srv:p/w@h/db") == "postgresql://me@srv:***@h/db"
    assert (
        studies.without_password("postgresql://h/db?user=u&password=p&x=1")
        == "postgresql://h/db?user=u&password=***&x=1"
    )
    for address in ("runs/study.journal", "postgresql://host/db", "postgresql://me@host/db", "sqlite:///runs/a.db"):
        assert studies.without_password(address) == address


def open_toy(storage, **options):
    return studies.open_study(studies.open_storage(storage), "toy", **options)


def test_workers_that_ask_at_once_stay_within_the_limit(storage):
    study = open_toy(storage)

    def ask(_):
        return studies.claim_trial(open_toy(storage), 5)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        taken = [t for t in pool.map(ask, range(12)) if t is not None]
    assert sorted(studies.origin_of(t) for t in taken) == sorted(studies.group_attempts(study)) and len(taken) == 5
    assert studies.claim_trial(study, 5) is None


@pytest.mark.quick
def test_a_trial_of_a_dead_worker_is_resumed_once_with_its_origin(storage):
    study = open_toy(storage)
    dead = studies.claim_trial(study, 1)
    x = dead.suggest_float("x", 0, 1)
    assert studies.requeue_dead_trials(study, grace=60) == [] and studies.claim_trial(study, 1) is None
    time.sleep(0.3)
    assert studies.requeue_dead_trials(study, grace=0.2) == [0]
    assert studies.requeue_dead_trials(open_toy(storage), grace=0.2) == []
    assert not studies.is_running(study, dead)
    again = studies.claim_trial(study, 1)
    assert studies.origin_of(again) == 0 and again.number == 1 and again.suggest_float("x", 0, 1) == x
    assert not studies.finish_trial(study, dead, "COMPLETE", 0.5), "another worker has taken it over"
    assert not studies.report_score(dead, 0.5, 1) and studies.report_score(again, 0.6, 1)
    assert studies.finish_trial(study, again, "COMPLETE", 0.7)
    assert studies.requeue_dead_trials(study, grace=0.0) == [] and studies.claim_trial(study, 1) is None
    (trials,) = studies.group_attempts(study).values()
    assert studies.has_ended(trials) and studies.deciding_attempt(trials).value == 0.7


@pytest.mark.quick
def test_a_trial_that_two_workers_queue_is_trained_once(storage):
    study = open_toy(storage)
    dead = studies.claim_trial(study, 1)
    studies.finish_trial(study, dead, "FAIL")
    for _ in range(2):  # two workers queue it at the same time
        study.enqueue_trial({}, user_attrs={"origin": 0})
    first = studies.claim_trial(study, 1)
    assert studies.origin_of(first) == 0 and studies.claim_trial(study, 1) is None
    studies.finish_trial(study, first, "COMPLETE", 0.5)
    assert studies.requeue_dead_trials(study) == [] and [len(t) for t in studies.group_attempts(study).values()] == [2]


def test_no_further_attempt_after_an_error_or_after_many_attempts(storage):
    study = open_toy(storage)
    studies.finish_trial(study, studies.claim_trial(study, 2), "FAIL", error="the loss is not finite")
    assert studies.requeue_dead_trials(study) == []
    for _ in range(studies.MAX_ATTEMPTS):
        studies.finish_trial(study, studies.claim_trial(study, 2), "FAIL")
        studies.requeue_dead_trials(study)
    assert studies.claim_trial(study, 2) is None and all(map(studies.has_ended, studies.group_attempts(study).values()))


def test_attempts_that_a_signal_stopped_do_not_count(storage):
    """A trial of six days under a time limit of one day."""
    study = open_toy(storage)
    for _ in range(2 * studies.MAX_ATTEMPTS):
        studies.finish_trial(study, studies.claim_trial(study, 1), "FAIL", stopped=True)
        assert studies.requeue_dead_trials(study) == [0]
    studies.finish_trial(study, studies.claim_trial(study, 1), "COMPLETE", 0.5)
    assert all(map(studies.has_ended, studies.group_attempts(study).values()))


def test_points_of_a_grid_are_trained_once_whatever_the_seeds_of_the_workers(storage):
    distributions = {"a": optuna.distributions.IntDistribution(0, 5)}
    values = []
    for seed in (None, 1, 2, None, 3, 1):
        sampler = studies.make_sampler("grid", distributions, seed)
        study = studies.open_study(studies.open_storage(storage), "toy", sampler=sampler)
        trial = studies.claim_trial(study, 6)
        values.append(trial.suggest_int("a", 0, 5))
        studies.finish_trial(study, trial, "COMPLETE", 0.5)
    assert sorted(values) == list(range(6))


@_FORKS
def test_a_machine_that_cannot_train_leaves_the_trials_to_others(tmp_path):
    """Every training ends at once with status 2, as without a GPU or without the data."""
    study = open_toy(str(tmp_path / "study.journal"))
    command = (sys.executable, "-c", "print('error: no data'); raise SystemExit(2)")
    job = worker.Job("C", (), lambda trial: trial.suggest_float("x", 0, 1), tmp_path / "root", 20, command)
    with pytest.raises(UserError, match=r"3 trials in a row .*no data"):
        worker.run_worker(study, job, StopRequest(), heartbeat=0.5, grace=8.0)
    assert studies.claim_trial(study, 20) is not None and len(studies.group_attempts(study)) == 4


@_FORKS
def test_a_machine_that_has_trained_goes_on_after_trials_that_do_not_fit(tmp_path):
    """The first trial writes a step; the others fail before their first one, as patches that are too large do."""
    study = open_toy(str(tmp_path / "study.journal"))
    program = (
        "import sys, pathlib; w = pathlib.Path([a for a in sys.argv if 'workdir' in a][0].split('=')[1]);"
        "first = w.name.endswith('0000'); first and (w / 'steps.jsonl').write_text('{}'); raise SystemExit(2)"
    )
    command = (sys.executable, "-c", program)
    job = worker.Job("C", (), lambda trial: trial.suggest_float("x", 0, 1), tmp_path / "root", 6, command)
    assert worker.run_worker(study, job, StopRequest(), heartbeat=0.5, grace=60.0) == 0
    assert len(study.get_trials()) == 6


@_FORKS
def test_training_continues_while_the_storage_cannot_be_reached(tmp_path, monkeypatch, capsys):
    """The database restarts during the first epochs."""
    study = open_toy(str(tmp_path / "study.journal"))
    command = (sys.executable, "-m", "tests.sweep_worker", "train")
    job = worker.Job("C", (), lambda trial: trial.suggest_float("x", 0, 0.5), tmp_path / "root", 1, command)
    failures, report = [], studies.report_score

    def restarting(*arguments):
        if len(failures) < 3:
            failures.append(1)
            raise optuna.exceptions.StorageInternalError("server closed the connection")
        return report(*arguments)

    monkeypatch.setattr(studies, "report_score", restarting)
    assert worker.run_worker(study, job, StopRequest(), heartbeat=0.2, grace=60.0) == 0
    (trial,) = study.get_trials()
    assert len(failures) == 3 and trial.state.name == "COMPLETE" and len(trial.intermediate_values) == EPOCHS
    assert "cannot be reached" in capsys.readouterr().out


@_FORKS
@pytest.mark.parametrize("where", ["claim_trial", "finish_trial", "requeue_dead_trials", "group_attempts"])
def test_a_storage_that_restarts_ends_no_worker(where, tmp_path, monkeypatch, capsys):
    """Each of the first calls of a function of the study fails, then the storage is back."""
    study = open_toy(str(tmp_path / "study.journal"))
    command = (sys.executable, "-c", "pass")
    job = worker.Job("C", (), lambda trial: trial.suggest_float("x", 0, 0.5), tmp_path / "root", 2, command)
    failures, call = [], getattr(studies, where)

    def restarting(*arguments, **options):
        if len(failures) < 2:
            failures.append(1)
            raise optuna.exceptions.StorageInternalError("server closed the connection")
        return call(*arguments, **options)

    monkeypatch.setattr(studies, where, restarting)
    monkeypatch.setattr(worker, "validation_scores", lambda workdir: [0.5])
    assert worker.run_worker(study, job, StopRequest(), heartbeat=0.2, grace=60.0) == 0
    assert len(failures) == 2 and [t.state.name for t in study.get_trials()] == ["COMPLETE"] * 2
    assert "cannot be reached" in capsys.readouterr().out


def test_an_error_that_does_not_go_away_is_raised(monkeypatch):
    monkeypatch.setattr(studies, "wait", lambda stop, seconds: None)
    calls = []

    def missing():
        calls.append(1)
        raise FileNotFoundError("a file of the run")

    with pytest.raises(FileNotFoundError):
        studies.retry(missing, StopRequest(), 20.0)
    assert len(calls) == 30


@_FORKS
def test_a_trial_whose_workdir_was_deleted_is_a_failure(tmp_path):
    study = open_toy(str(tmp_path / "study.journal"))
    program = "import sys, shutil; shutil.rmtree([a for a in sys.argv if 'workdir' in a][0].split('=')[1]); sys.exit(1)"
    job = worker.Job(
        "C", (), lambda t: t.suggest_float("x", 0, 1), tmp_path / "root", 1, (sys.executable, "-c", program)
    )
    assert worker.run_worker(study, job, StopRequest(), heartbeat=0.2, grace=60.0) == 0
    assert [t.state.name for t in study.get_trials()] == ["FAIL"]


def test_a_worker_that_is_stopped_does_not_wait_for_the_storage(tmp_path, monkeypatch):
    study, stop = open_toy(str(tmp_path / "study.journal")), StopRequest()

    def down(*arguments):
        stop.signal = 15
        raise optuna.exceptions.StorageInternalError("server closed the connection")

    monkeypatch.setattr(studies, "claim_trial", down)
    job = worker.Job("C", (), lambda trial: None, tmp_path / "root", 2)
    assert worker.run_worker(study, job, stop, heartbeat=60.0, grace=60.0) == stop.status


def test_a_space_in_another_folder_is_not_replaced_by_one_that_ships(tmp_path):
    assert space.load_space(Path("dxnet"))[1] == space.load_space(Path("configs/sweeps/dxnet.py"))[1]
    for missing in (tmp_path / "dxnet.py", Path("mine/dxnet.py")):
        with pytest.raises(UserError, match="does not exist"):
            space.load_space(missing)


def test_workers_of_a_study_have_the_same_settings(storage):
    study = open_toy(storage)
    studies.record_search(study, {"config": "a.py", "space": "x"})
    studies.record_search(open_toy(storage), {"config": "a.py"})
    with pytest.raises(UserError, match=r"--study=toy .* config: 'a\.py'.* 'b\.py'"):
        studies.record_search(study, {"config": "b.py"})


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_workers_with_one_seed_draw_different_trials(name, storage):
    """Workers, one after the other, and again in another storage: a seed gives the same trials, each once.

    tpe learns from ten finished trials; then it draws in another way.
    """

    def suggest(trial):
        return trial.suggest_float("a", 0, 1), trial.suggest_float("b", 0, 1)

    def draw(where):
        drawn = []
        for number in range(14):
            if number % workers == 0:
                study = open_toy(where, sampler=studies.make_sampler(name, space.explore(suggest)[1], seed=7))
            trial = studies.claim_trial(study, 20)
            drawn.append(suggest(trial))
            studies.finish_trial(study, trial, "COMPLETE", 0.5 + 0.01 * drawn[-1][0])
        return drawn

    workers = 1
    first = draw(storage)
    assert len({a for a, _ in first}) == 14 and all(a != b for a, b in first)
    workers = 5  # a worker draws five trials
    assert draw(f"{storage}2") == first


def test_another_study_has_its_own_folder(tmp_path, monkeypatch):
    roots = []
    monkeypatch.setattr(sweep, "_work", lambda study, job, options, stop: roots.append(str(job.root)) or 0)
    usual = [f"--config={CAMUS}", "--space=configs/sweeps/optimiser.py", "--trials=2", f"--workdir={tmp_path}"]
    for more in ([], ["--study=second"]):
        assert sweep.main([*usual, *more]) == 0
    assert roots == [str(tmp_path), f"{tmp_path}/second"]


def test_a_grid_has_all_combinations_of_the_space(tmp_path):
    def suggest(trial):
        trial.suggest_categorical("a", ["x", "y"])
        trial.suggest_float("b", 0, 1, step=0.5)
        trial.suggest_int("c", 1, 2)

    study = open_toy(
        str(tmp_path / "s.journal"), sampler=studies.make_sampler("grid", space.explore(suggest)[1], seed=0)
    )
    seen = set()
    for _ in range(12):
        trial = studies.claim_trial(study, 12)
        suggest(trial)
        seen.add(tuple(trial.params.values()))
        studies.finish_trial(study, trial, "COMPLETE", 0.0)
    assert seen == {(a, b, c) for a in "xy" for b in (0.0, 0.5, 1.0) for c in (1, 2)}


# -- workers ------------------------------------------------------------------------------------------------------


def start(storage, root, trials, *pruner):
    arguments = ["work", storage, str(root), str(trials), *pruner]
    return subprocess.Popen([sys.executable, "-m", "tests.sweep_worker", *arguments], cwd=REPO)


@contextlib.contextmanager
def workers(storage, root, trials, count):
    found = [start(storage, root, trials) for _ in range(count)]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()


def wait_until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


@contextlib.contextmanager
def held(root, count):
    """Pause trials after their first epoch; the yielded function waits until ``count`` trials are paused."""
    root.mkdir()
    (root / "hold").touch()
    yield lambda: wait_until(lambda: len(list(root.glob("trial*/checkpoint"))) >= count, 120)
    (root / "hold").unlink()


def check_all_ended_once(storage, root, trials):
    storage = studies.open_storage(storage) if isinstance(storage, str) else storage
    groups = studies.group_attempts(studies.open_study(storage, "toy"))
    assert len(groups) == trials and all(map(studies.has_ended, groups.values()))
    for origin, attempts in groups.items():
        last = studies.deciding_attempt(attempts)
        if "error" in last.user_attrs:
            assert last.params["x"] > 0.9 and "too high" in last.user_attrs["error"]
            continue
        assert [t.state.name for t in attempts].count("COMPLETE") == 1
        assert len({t.params["x"] for t in attempts if t.params}) == 1, "one origin, one setting"
        assert last.value == pytest.approx(1 - abs(last.params["x"] - 0.5))
        epochs = (worker.local_workdir(root, origin) / "epochs").read_text().split()
        # each epoch once; an attempt that dies between record and checkpoint repeats the epoch
        counts = collections.Counter(map(int, epochs))
        assert set(counts) == set(range(1, EPOCHS + 1)) and sum(counts.values()) - EPOCHS <= len(attempts) - 1


@pytest.mark.slow
def test_a_killed_worker_of_two_loses_no_trial(tmp_path):
    storage, root = str(tmp_path / "s.journal"), tmp_path / "trials"
    with workers(storage, root, 5, 2) as (first, second):
        with held(root, 2) as wait:
            wait()
            first.send_signal(signal.SIGKILL)
        assert second.wait(120) == 0
    check_all_ended_once(storage, root, 5)
    assert any(len(t) > 1 for t in studies.group_attempts(open_toy(storage)).values()), "a trial was taken over"


def test_a_stopped_worker_returns_its_trial_to_the_queue(tmp_path):
    storage, root = str(tmp_path / "s.journal"), tmp_path / "trials"
    open_toy(storage).enqueue_trial({"x": 0.3})
    with workers(storage, root, 1, 1) as (first,), held(root, 1) as wait:
        wait()
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75
    (trials,) = studies.group_attempts(open_toy(storage)).values()
    assert not studies.has_ended(trials) and trials[-1].state.name == "FAIL"
    assert start(storage, root, 1).wait(60) == 0
    check_all_ended_once(storage, root, 1)


def test_trials_that_lag_behind_are_pruned(tmp_path):
    storage, root = str(tmp_path / "s.journal"), tmp_path / "trials"
    study = open_toy(storage)
    for dice in (0.9, 0.92, 0.94, 0.95, 0.96):  # the pruner wants five to compare with
        trial = studies.claim_trial(study, 6)
        trial.suggest_float("x", 0, 1)
        for epoch in range(1, EPOCHS + 1):
            trial.report(dice, epoch)
        studies.finish_trial(study, trial, "COMPLETE", dice)
    study.enqueue_trial({"x": 0.05})
    with held(root, 1):  # it waits after its first epoch, until it is pruned
        assert start(storage, root, 6, "median").wait(60) == 0
    last = study.get_trials()[-1]
    assert last.state.name == "PRUNED" and 1 <= len(last.intermediate_values) < EPOCHS
    assert (root / "trial0005" / "epochs").read_text().split()[-1] != str(EPOCHS)


POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").is_dir() else []


@pytest.fixture
def postgres(tmp_path_factory):
    """Start a PostgreSQL server on a free port."""
    if not POSTGRES or not shutil.which("runuser"):
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    from tests.conftest import free_port

    base = Path("/tmp") / f"xdim_jax_postgres_{os.getpid()}"
    port, programs = free_port(), POSTGRES[-1]
    base.mkdir()
    user = ["runuser", "-u", "postgres", "--"] if getpass.getuser() == "root" else []
    if user:
        shutil.chown(base, "postgres")
    data = base / "data"

    def call(*command):
        subprocess.run([*user, *map(str, command)], check=True, cwd=base, capture_output=True)

    call(programs / "initdb", "-D", data, "-A", "trust", "-U", "sweeper")
    options = f"-p {port} -k {base} -c listen_addresses=localhost -c fsync=off"
    call(programs / "pg_ctl", "-D", data, "-w", "-l", base / "log", "-o", options, "start")
    try:
        call(programs / "createdb", "-h", "localhost", "-p", port, "-U", "sweeper", "sweeps")
        yield f"postgresql://sweeper@localhost:{port}/sweeps"
    finally:
        call(programs / "pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(base)


@pytest.mark.slow
def test_eight_workers_on_postgresql_three_of_them_killed(postgres, tmp_path):
    root = tmp_path / "trials"
    with workers(postgres, root, 20, 8) as found:
        with held(root, 8) as wait:
            wait()
            for process in found[:3]:
                process.send_signal(signal.SIGKILL)
        assert [process.wait(200) for process in found[3:]] == [0] * 5
    storage = studies.open_storage(postgres)
    check_all_ended_once(storage, root, 20)
    storage.remove_session()
    storage.engine.dispose()


# -- the page -----------------------------------------------------------------------------------------------------


def test_the_page_shows_every_trial_from_best_to_worst(tmp_path):
    study = open_toy(str(tmp_path / "s.journal"))
    studies.record_search(
        study, {"config": "configs/a.py", "overrides": ["--config.seed=1"], "space": "def suggest(trial): ..."}
    )
    for i in range(12):
        trial = studies.claim_trial(study, 14)
        rate = trial.suggest_float("optim.schedule.peak", 1e-4, 1e-2, log=True)
        kind = trial.suggest_categorical("optim.name", ["nadam", "nadam_torch"])
        if kind == "nadam_torch":
            trial.suggest_float("optim.momentum_decay", 1e-3, 1e-2)
        dice = 0.9 - 10 * rate
        for epoch in range(1, 6):
            trial.report(dice * epoch / 5, epoch)
        if i == 3:
            studies.finish_trial(study, trial, "FAIL", error="failed with status 2: <b>too hot</b>")
        elif i == 4:
            studies.finish_trial(study, trial, "PRUNED")
        else:
            studies.finish_trial(study, trial, "COMPLETE", dice)
    out = tmp_path / "sweep.html"
    assert sweep.main(["report", f"--storage={tmp_path / 's.journal'}", "--study=toy", f"--out={out}"]) == 0
    text = out.read_text()
    assert text.count("<figure>") == 3 and text.count("data:image/png") == 3
    assert "10 complete" in text and "1 fail" in text and "1 pruned" in text
    assert "&lt;b&gt;too hot" in text and "<b>too" not in text
    ranked = page.rank_trials(studies.group_attempts(study))
    places = [text.index(f"<th>trial{origin:04d}</th>") for origin, _ in ranked]
    assert places == sorted(places)
    best = max((t for t in study.get_trials() if t.state.name == "COMPLETE"), key=lambda t: t.value)
    assert f"Best: trial{studies.origin_of(best):04d}, Dice {best.value:.4f}" in text


def test_the_time_after_a_worker_died_is_no_training_time(tmp_path):
    study = open_toy(str(tmp_path / "s.journal"))
    trial = studies.claim_trial(study, 1)
    time.sleep(1.2)
    studies.requeue_dead_trials(study, grace=0.1)
    (dead, _) = study.get_trials()
    assert dead.state.name == "FAIL" and dead.duration.total_seconds() > 1
    assert studies.training_seconds(dead) < 0.9
    trial = studies.claim_trial(study, 1)
    assert studies.training_seconds(study.get_trials()[1]) is None
    time.sleep(0.3)
    studies.finish_trial(study, trial, "COMPLETE", 0.5)
    assert studies.training_seconds(study.get_trials()[1]) > 0.25


@pytest.mark.quick
def test_the_page_of_a_study_that_has_just_begun(tmp_path):
    study = open_toy(str(tmp_path / "s.journal"))
    studies.claim_trial(study, 3).suggest_float("x", 0, 1)
    text = page.render(study)
    assert "Best:" not in text and "1 running" in text and "fewer than 4 trials" in text
    assert optuna.logging.get_verbosity() >= optuna.logging.WARNING


@pytest.mark.quick
@pytest.mark.parametrize("with_b", [0, 1, 2, 11])
def test_the_page_of_a_study_with_a_parameter_of_some_trials(tmp_path, with_b):
    study = open_toy(str(tmp_path / "s.journal"))
    for i in range(12):
        trial = studies.claim_trial(study, 12)
        trial.suggest_float("a", 0, 1)
        if 12 - i <= with_b:
            trial.suggest_float("b", 0, 1)
        studies.finish_trial(study, trial, "COMPLETE", 0.5 + 0.01 * i)
    text = page.render(study)
    assert "12 complete" in text and text.count("<figure>") == 2
    assert ("`b`" in text) == (with_b in (1, 11))  # Optuna warns if one trial has or lacks a parameter


@pytest.mark.quick
def test_the_page_of_a_study_with_a_parameter_of_pruned_trials_only(tmp_path):
    study = open_toy(str(tmp_path / "s.journal"))
    for i in range(6):
        trial = studies.claim_trial(study, 6)
        trial.suggest_float("a", 0, 1)
        if i == 5:
            trial.suggest_float("b", 0, 1)
        studies.finish_trial(study, trial, *(("PRUNED",) if i == 5 else ("COMPLETE", 0.5 + 0.01 * i)))
    assert "5 complete" in page.render(study)


@pytest.mark.quick
def test_a_trial_with_a_dice_of_zero_is_before_one_without_a_dice(tmp_path):
    study = open_toy(str(tmp_path / "s.journal"))
    studies.claim_trial(study, 3)  # still running
    studies.finish_trial(study, studies.claim_trial(study, 3), "COMPLETE", 0.0)
    studies.finish_trial(study, studies.claim_trial(study, 3), "COMPLETE", 0.5)
    ranked = page.rank_trials(studies.group_attempts(study))
    assert [origin for origin, _ in ranked] == [2, 1, 0]


# -- real training ------------------------------------------------------------------------------------------------


@_FORKS
def test_a_sweep_of_real_runs(tmp_path, monkeypatch):
    """Two trials of a small network on phantoms: each is an ordinary workdir, and the page names the better one."""
    assert worker.Job("", (), None, "", 0).command == (sys.executable, "-m", "xdim_jax.train")
    monkeypatch.setattr(
        sweep, "Job", functools.partial(worker.Job, command=(sys.executable, "-m", "tests.packed_runs"))
    )
    path = write_space(tmp_path, "trial.suggest_categorical('optim.schedule.peak', [1e-9, 3e-3])")
    arguments = [f"--config={CAMUS}", f"--space={path}", "--trials=2", "--sampler=grid"]
    toy = [
        "model.encoder.name=efficientnet_toy",
        "model.filters=(8,8,8,8,8)",
        "data.patch=(32,32)",
        "data.prepare.size=(32,32)",
    ]
    toy += ["train.epochs=3", "data.phantom.cases=5", "data.phantom.held_out=0", "train.validate_every=1"]
    toy += ["optim.schedule.final=1e-9"]  # not above either peak
    command = [*arguments, f"--workdir={tmp_path / 'sweep'}", *(f"--config.{word}" for word in toy)]
    assert sweep.main(command) == 0
    assert sweep.main(command) == 0  # nothing is left to do
    study = studies.open_study(studies.open_storage(str(tmp_path / "sweep" / "study.journal")), "sweep", create=False)
    assert [t.state.name for t in study.get_trials()] == ["COMPLETE"] * 2
    assert {trial.params["optim.schedule.peak"] for trial in study.get_trials()} == {1e-9, 3e-3}
    for trial in study.get_trials():
        workdir = tmp_path / "sweep" / f"trial{trial.number:04d}"
        scores = [r["dice"] for r in records(workdir, "validation")]
        assert trial.value == max(scores) and (workdir / "best").is_dir() and len(scores) == 3
        trained = json.loads((workdir / "config.json").read_text())
        assert trained["optim"]["schedule"]["peak"] == trial.params["optim.schedule.peak"]
    out = tmp_path / "sweep.html"
    assert sweep.main(["report", f"--workdir={tmp_path / 'sweep'}", f"--out={out}"]) == 0
    best = max(study.get_trials(), key=lambda trial: trial.value)
    assert f"Best: trial{best.number:04d}" in out.read_text()
