"""Studies: the plan, its runs, and statistics that are known without the code."""

import csv
import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy.stats import wilcoxon

from tests.packed_runs import small_network
from xdim_jax import study
from xdim_jax.base.errors import UserError
from xdim_jax.base.signals import StopRequest
from xdim_jax.data import phantom
from xdim_jax.data.case import Case
from xdim_jax.data.labels import Labels
from xdim_jax.data.splits import limit_patients, split_cases
from xdim_jax.nets.weights import Weights
from xdim_jax.runs.records import METRICS_FILE, VALIDATIONS_FILE, read_records
from xdim_jax.studies import page, results
from xdim_jax.studies.plan import Grid, Plan, PlannedRun, keep_plan, read_plan
from xdim_jax.studies.results import Scores
from xdim_jax.studies.train import check_plan, train_plan
from xdim_jax.training.check import resolve_config
from xdim_jax.training.run_data import find_cases, split_found_cases

PLAN = """
title = "Toy"
recipe = "camus_omnianet:scratch"
steps = 4
validate_steps = 2
baseline = "low"

[[grid]]
sizes = [1, 2]
seeds = [0]

[[grid]]
sizes = [2]
seeds = [3]

[settings]
"data.patch" = [32, 32]
"data.prepare.size" = [32, 32]
"data.batch" = 2
"data.folds" = 2
"train.log_every" = 1
"model.encoder.name" = "efficientnet_lite_toy"
"model.filters" = [8, 8, 8, 8, 8]

[arms.low]
"optim.schedule.peak" = 1e-4

[arms.high]
"optim.schedule.peak" = 1e-2
"""


def write_plan(folder, text=PLAN):
    path = folder / "my_plan.toml"
    path.write_text(text)
    return path


# -- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_runs_come_in_pairs_of_arms(tmp_path):
    runs = list(read_plan(write_plan(tmp_path)).runs())
    expected = [(1, 0), (1, 0), (2, 0), (2, 0), (2, 3), (2, 3)]
    assert [(r.size, r.seed) for r in runs] == expected
    assert [r.arm for r in runs] == ["low", "high"] * 3
    assert runs[0].workdir(tmp_path) == tmp_path / "low" / "n001" / "seed0"


@pytest.mark.quick
def test_a_run_gets_its_settings(tmp_path):
    plan = read_plan(write_plan(tmp_path))
    config = plan.config(PlannedRun("high", 2, 3), ["--config.data.threads=1"])
    assert (config.seed, config.data.train_patients, config.data.epoch_steps, config.train.epochs) == (3, 2, 2, 2)
    assert config.data.patch == (32, 32) and config.model.filters == (8,) * 5
    assert (config.optim.schedule.peak, config.data.threads, config.train.validate_after_score) == (1e-2, 1, 0.0)


def with_folds(folds, text=PLAN):
    """A plan with these validation folds in both grids."""
    return text.replace("\nseeds =", f"\nfolds = {folds}\nseeds =")


@pytest.mark.quick
def test_runs_of_all_folds(tmp_path):
    plan = read_plan(write_plan(tmp_path, with_folds([0, 1])))
    runs = list(plan.runs())
    blocks = [(r.size, r.seed, r.fold) for r in runs[::2]]
    assert blocks == [(1, 0, 0), (2, 0, 0), (1, 0, 1), (2, 0, 1), (2, 3, 0), (2, 3, 1)]
    assert [r.arm for r in runs] == ["low", "high"] * 6
    assert runs[4].workdir(tmp_path) == tmp_path / "low" / "n001" / "seed0_fold1"
    config = plan.config(runs[4], [])
    assert (config.data.fold, config.seed) == (1, 0)
    assert len({run.workdir(tmp_path) for run in runs}) == len(runs)


@pytest.mark.quick
def test_a_fold_is_in_the_grid_or_in_the_settings(tmp_path):
    text = PLAN.replace('"data.batch" = 2', '"data.fold" = 1')
    assert next(read_plan(write_plan(tmp_path, text)).runs()).fold is None
    for arm in ("[arms.low]", "[settings]"):
        both = with_folds([0, 1], PLAN.replace(arm, f'{arm}\n"data.fold" = 1'))
        with pytest.raises(UserError, match=r"data\.fold cannot be set"):
            read_plan(write_plan(tmp_path, both))


def test_a_fold_that_does_not_exist_is_named_before_the_first_run(tmp_path, camus4):
    plan = read_plan(write_plan(tmp_path, with_folds([0, 1, 7])))
    with pytest.raises(UserError, match=r"arm low: .*fold=7(.|\n)*arm high: .*fold=7"):
        check_plan(plan, [f"--config.data.root={camus4}"])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("steps = 4", "steps = 5", ["steps = 5", "validate_steps = 2"]),
        ("steps = 4", "steps = 'many'", ["steps = 'many'", "int"]),
        ('baseline = "low"', 'baseline = "none"', ["'none'", "low, high"]),
        ('baseline = "low"', 'baseline = ["low"]', ["baseline"]),
        ("title", "titel", ["titel", "title is missing"]),
        ("sizes = [1, 2]", "sizes = [0, 2]", ["sizes = [0, 2]", "at least 1"]),
        ("seeds = [3]", "seeds = [3]\nfolds = [1]", ["folds", "all grids"]),
        ("seeds = [3]", "seeds = [3]\nfolds = [-1]", ["folds = [-1]", "at least 0"]),
        ("seeds = [3]", "seed = [3]", ["'seed'", "expected sizes, seeds"]),
        ("seeds = [3]", "seeds = [3, 3]", ["seeds = [3, 3]"]),
        ("[arms.high]", "[arms.'High LR']", ["High LR", "folder"]),
        ('"optim.schedule.peak" = 1e-4', "optim.schedule.peak = 1e-4", ["in quotes"]),
        ('"data.batch" = 2', '"seed" = 2', ["seed"]),
        ('"data.batch" = 2', '"train.validate_after_score" = 0.5', ["train.validate_after_score"]),
        ('"data.batch" = 2', '"train.patience" = 1', ["train.patience"]),
        ("[arms.high]\n", "[arms.low2]\n[arms.high]\n[arms.high]\n", ["not a TOML file"]),
        ("[settings]", "[setting]", ["unknown key 'setting'"]),
    ],
)
def test_a_plan_that_cannot_be_used(old, new, words, tmp_path):
    assert old in PLAN
    with pytest.raises(UserError) as error:
        read_plan(write_plan(tmp_path, PLAN.replace(old, new)))
    assert all(word in str(error.value) for word in [*words, "my_plan.toml"]), error.value


def test_all_problems_come_at_once(tmp_path):
    text = PLAN.replace("steps = 4", "steps = 5").replace('baseline = "low"', 'baseline = "x"')
    with pytest.raises(UserError) as error:
        read_plan(write_plan(tmp_path, text))
    assert "2 values" in str(error.value)


def test_another_plan_is_refused_in_the_same_workdir(tmp_path):
    keep_plan(write_plan(tmp_path), tmp_path / "study")
    keep_plan(write_plan(tmp_path, "# a comment\n" + PLAN), tmp_path / "study")
    with pytest.raises(UserError, match=r"differs from .*plan\.toml.*: steps, arms"):
        other = PLAN.replace("steps = 4", "steps = 6").replace("1e-2", "1e-3")
        keep_plan(write_plan(tmp_path, other), tmp_path / "study")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--plan={plan}", "--workdir={tmp}/s", "--config.data.batch=3"], ["data.batch=3", "the plan"]),
        (["run", "--plan={tmp}/none.toml", "--workdir={tmp}/s"], ["none.toml", "cannot read"]),
        (["report", "--workdir={tmp}"], ["plan.toml"]),
        (["report", "--workdir=gs://bucket/s"], ["gs://bucket/s", "local folder"]),
        (["run", "--plan={plan}", "--workdir=s3://bucket/s"], ["s3://bucket/s", "local folder"]),
        (["report", "--workdir={tmp}", "--config.data.root=x"], ["unknown argument"]),
        (["run", "--plan={plan}", "--workdir={tmp}/s"], ["arm low", "arm high", "no data"]),
    ],
)
def test_misuse(arguments, words, tmp_path):
    plan = write_plan(tmp_path)
    with pytest.raises(UserError) as error:
        study.main([a.format(plan=plan, tmp=tmp_path) for a in arguments])
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "s").exists()


def test_an_arm_with_an_unknown_key_is_named(tmp_path):
    path = write_plan(tmp_path, PLAN.replace('[arms.high]\n"optim', '[arms.high]\n"optimm'))
    with pytest.raises(UserError, match=r"arm high: .*optimm\.schedule\.peak.*did you mean"):
        study.main(["run", f"--plan={path}", f"--workdir={tmp_path / 's'}", f"--config.data.root={tmp_path}"])


def test_weights_that_were_trained_on_validation_patients_are_refused(tmp_path, camus4, monkeypatch):
    """Of the two seeds, one has the split of the earlier run; no run is started, and the patients are named."""
    path = write_plan(tmp_path, PLAN.replace("[arms.high]", '[arms.high]\n"init.weights" = "runs/earlier"'))
    plan, overrides = read_plan(path), [f"--config.data.root={camus4}"]
    config, dataset = resolve_config(plan.config(PlannedRun("low", 2, 0), overrides))
    training, validation = split_found_cases(config.data, 0, *find_cases(config.data, dataset, camus4))
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "config.json").write_text(json.dumps(config.to_dict()))
    source = Weights("network", {}, {}, source={"workdir": str(earlier)})
    monkeypatch.setattr("xdim_jax.studies.train.read_initial_weights", lambda init: source)

    def record(training):
        patients = {case.case_id: case.patient for case in training}
        split = {"root": str(camus4), "train": list(patients), "patients": patients}
        (earlier / "split.json").write_text(json.dumps(split))

    record(training)
    monkeypatch.setattr(Plan, "runs", lambda self: iter([PlannedRun(arm, 2, 0) for arm in ("low", "high")]))
    check_plan(plan, overrides)
    record([*training, validation[0]])
    with pytest.raises(UserError, match=f"arm high: seed 0: 1 of 2 .*{validation[0].patient}.*earlier"):
        check_plan(plan, overrides)
    monkeypatch.undo()
    monkeypatch.setattr("xdim_jax.studies.train.read_initial_weights", lambda init: source)
    record(training)
    with pytest.raises(UserError, match=r"arm high: seed 3: .*config\.seed=0"):
        check_plan(plan, overrides)


def test_data_that_cannot_be_read_are_reported_once(tmp_path, monkeypatch):
    plan = read_plan(write_plan(tmp_path))
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError) as error:
        check_plan(plan, [f"--config.data.root={tmp_path / 'data'}"])
    assert str(error.value).count("expected") == 1, error.value


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "[arms.high]",
            '[arms.high]\n"data.fold" = 1',
            ["arm high: seed 0: 16 validation cases", "seed 3", "[settings]"],
        ),
        ("[arms.high]", '[arms.high]\n"data.instants" = ["ED"]', ["arm high: seed 0: 4 training cases", "patient"]),
        ("sizes = [2]", "sizes = [2, 500]", ["arm low: seed 3", "train_patients=500", "has 2 training patients"]),
    ],
)
def test_all_arms_must_have_the_same_cases(old, new, words, tmp_path, camus4):
    """Four patients with two views and two instants, two of them in a fold."""
    plan = read_plan(write_plan(tmp_path, PLAN.replace(old, new)))
    with pytest.raises(UserError) as error:
        check_plan(plan, [f"--config.data.root={camus4}"])
    assert all(word in str(error.value) for word in words), error.value


def test_folds_that_validate_a_patient_twice_are_refused(tmp_path, camus4, monkeypatch):
    """The third fold is the first one again, as in a list of splits that overlap."""
    monkeypatch.setattr(
        "xdim_jax.studies.train.split_found_cases",
        lambda data, seed, cases, official: split_cases(cases, fold=data.fold % 2, folds=2, seed=seed),
    )
    text = PLAN.replace('"data.folds" = 2', '"data.folds" = 3')
    overrides = [f"--config.data.root={camus4}"]
    check_plan(read_plan(write_plan(tmp_path, with_folds([0, 1], text))), overrides)
    with pytest.raises(UserError) as error:
        check_plan(read_plan(write_plan(tmp_path, with_folds([0, 1, 2], text))), overrides)
    found = str(error.value)
    assert found.count("two scores") == 2 and "seed 0, fold 2" in found and "seed 3, fold 2" in found
    assert all(found.count(f"patient000{i}") in (0, 1, 2) for i in range(1, 5)) and "patient000" in found


def test_a_program_that_fails_leaves_the_other_arms(tmp_path, camus4, monkeypatch):
    """The arm ``low`` does not fit into the memory; ``high`` has another program."""
    plan = read_plan(
        write_plan(tmp_path, PLAN.replace("[arms.high]", '[arms.high]\n"model.filters" = [16, 8, 8, 8, 8]'))
    )
    trained = []

    def train(pack, runs, stop):
        pack.failed = "low" in str(runs[0][1])
        trained.extend(workdir for _, workdir in runs if not pack.failed)
        return [f"{workdir}: out of memory" for _, workdir in runs if pack.failed]

    monkeypatch.setattr("xdim_jax.studies.train.train_in_pack", train)
    with pytest.raises(UserError, match=r"3 runs .*\n.*low.n001.seed0: out of memory"):
        train_plan(plan, tmp_path / "s", [f"--config.data.root={camus4}"], StopRequest())
    assert [str(w.relative_to(tmp_path / "s")) for w in trained] == [
        "high/n001/seed0",
        "high/n002/seed0",
        "high/n002/seed3",
    ]


# -- subsets --------------------------------------------------------------------------------------------------------


def cases(patients):
    """Two cases of each patient."""
    labels = Labels("", ("", "x"), (0, 1))
    return [Case(f"{p}-{i}", p, (), ("a",), None, labels) for p in patients for i in (1, 2)]


@pytest.mark.quick
def test_training_patients_are_nested_and_depend_on_the_seed():
    every = cases([f"p{i}" for i in range(12)])
    for seed in range(3):
        chosen = [{c.patient for c in limit_patients(every, n, seed)} for n in range(1, 13)]
        assert [len(c) for c in chosen] == list(range(1, 13))
        assert all(a < b for a, b in itertools.pairwise(chosen))
    assert limit_patients(every, 0, 0) == every
    assert len(limit_patients(every, 3, 0)) == 6, "both cases of a patient"
    assert limit_patients(every[::-1], 3, 0)[::-1] == limit_patients(every, 3, 0), "whatever the order"
    firsts = {limit_patients(every, 1, seed)[0].patient for seed in range(30)}
    assert len(firsts) > 6
    with pytest.raises(UserError, match=r"train_patients=13.*12 training patients"):
        limit_patients(every, 13, 0)


# -- statistics -----------------------------------------------------------------------------------------------------


def scores(last, seeds=None, patients=None):
    """Scores with one validation; ``last`` is (seeds, patients)."""
    last = np.asarray(last, float)
    seeds = seeds or tuple(range(len(last)))
    patients = patients or tuple(f"p{i}" for i in range(last.shape[1]))
    return Scores(seeds, patients, (10,), last[:, None], np.ones(len(last)))


@pytest.mark.quick
def test_a_mean_is_over_patients_and_then_over_seeds():
    """A seed that validates fewer patients counts as much as another one."""
    found = results.interval(np.array([[0.2, 0.4, np.nan], [0.9, 0.9, 0.9]]))
    assert found.mean == pytest.approx((0.3 + 0.9) / 2)
    assert found.low < found.mean < found.high
    same = results.interval(np.full((2, 5), 0.7))
    assert (same.mean, same.low, same.high) == pytest.approx((0.7, 0.7, 0.7))


@pytest.mark.parametrize("value", [1 / 3, 0.25, 0.7])
def test_an_interval_contains_the_mean_of_equal_values(value, monkeypatch):
    """Sums of equal values over different numbers of patients are rounded differently; the page must still be drawn."""
    monkeypatch.setattr(results, "BOOTSTRAP_SAMPLES", 200)
    found = {}
    for seeds, patients in itertools.product((2, 3), (5, 14, 25, 38)):
        table = np.full((seeds, seeds * patients), np.nan)
        for seed in range(seeds):
            table[seed, seed * patients : (seed + 1) * patients] = value  # every seed has its own validation patients
        found["a", patients] = scores(table)
        mean = found["a", patients].mean
        assert mean.low <= mean.mean <= mean.high, (seeds, patients)
    sizes = (5, 14, 25, 38)
    page.draw_sizes(Plan("t", "r", 10, 10, "a", (Grid(sizes, (0, 1)),), {"a": {}, "b": {}}, {}), found)


def test_the_interval_covers_seeds_and_patients():
    """On normal data with known variances: the half width is 1.96 standard errors of the mean of both effects."""
    rng = np.random.default_rng(0)
    seeds, patients = rng.normal(0, 0.1, 80), rng.normal(0, 0.2, 120)
    found = results.interval(0.5 + seeds[:, None] + patients[None])
    expected = 1.96 * np.sqrt(seeds.var() / 80 + patients.var() / 120)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)


def test_one_seed_and_one_patient_have_no_interval():
    for values in ([[0.8]], [[0.8, np.nan]], [[np.nan], [0.8]]):
        found = results.interval(np.array(values))
        assert found.mean == 0.8 and np.isnan([found.low, found.high]).all() and str(found) == "0.800 [-]"
        assert found.signed() == "+0.800 [-]"


def test_tests_are_paired_by_seed_and_patient():
    rng = np.random.default_rng(1)
    base = rng.uniform(0.5, 0.9, (2, 12))
    gain = rng.normal(0.05, 0.02, (2, 12))
    # the other arm lists seeds and patients in another order, and has one more of each
    order = tuple(f"p{i}" for i in reversed(range(13)))
    other = np.full((3, 13), 0.99)
    other[2, 1:], other[0, 1:] = (base + gain)[0, ::-1], (base + gain)[1, ::-1]
    found = {
        ("a", 5): scores(base),
        ("b", 5): scores(other, seeds=(1, 7, 0), patients=order),
        ("c", 5): scores(base),
        ("a", 9): scores(base),
    }
    tests = results.compare_arms(found, [5, 9], ["a", "b", "c"])
    assert [(t.size, t.a, t.b) for t in tests] == [(5, "a", "b"), (5, "a", "c"), (5, "b", "c")]
    first = tests[0]
    assert (first.seeds, first.patients) == (2, 12)
    assert first.difference.mean == pytest.approx(gain.mean())
    assert first.p == pytest.approx(wilcoxon(gain.mean(0)).pvalue)
    assert first.p_holm == pytest.approx(3 * first.p) and first.significant
    assert tests[1].p == tests[1].p_holm == 1.0 and not tests[1].significant


def test_the_folds_of_a_seed_are_one_row(tmp_path, monkeypatch):
    """Four patients in two folds; the second fold of the arm ``high`` is not finished."""
    plan = read_plan(write_plan(tmp_path, with_folds([0, 1], PLAN.replace("sizes = [1, 2]", "sizes = [2]"))))
    dice = {"low": (0.2, 0.4, 0.6, 0.8), "high": (0.3, 0.7, 0.0, 0.0)}  # mean of the cases of patients a to d
    for run in plan.runs():
        if (run.arm, run.seed, run.fold) == ("high", 0, 1):
            continue
        folder = run.workdir(tmp_path)
        folder.mkdir(parents=True)
        patients = "ab" if run.fold == 0 else "cd"
        cases = {f"{p}{i}": p for p in patients for i in (1, 2)}
        (folder / "split.json").write_text(json.dumps({"patients": cases}))
        values = {
            c: {"LV": dice[run.arm]["abcd".index(p)] + (0.05 if c[1] == "1" else -0.05)} for c, p in cases.items()
        }
        (folder / VALIDATIONS_FILE).write_text(
            "".join(json.dumps({"step": step, "cases": values}) + "\n" for step in (2, 4))
        )
    found = results.collect(plan, tmp_path)
    low, high = found["low", 2], found["high", 2]
    assert (low.seeds, low.patients, low.runs, high.runs) == ((0, 3), tuple("abcd"), 4, 3)
    np.testing.assert_allclose(low.last, [dice["low"]] * 2)
    np.testing.assert_allclose(high.last, [[0.3, 0.7, np.nan, np.nan], dice["high"]])
    # seed 0 gains 0.1 and 0.3 over two patients; seed 3 gains 0.1 and 0.3, and loses 0.6 and 0.8
    (test,) = results.compare_arms(found, [2], ["low", "high"])
    assert (test.seeds, test.patients) == (2, 4) and test.difference.mean == pytest.approx((0.2 + (0.4 - 1.4) / 4) / 2)
    # over the patients that both have, low has (0.3 + 0.5) / 2, and high (0.5 + 0.25) / 2
    assert results.verdict(2, ["low", "high"], found, [test]).startswith("no difference found between low (highest")
    results.write_results(tmp_path / "results.csv", plan, tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 * 2 * 4
    row = next(r for r in rows if (r["arm"], r["seed"], r["fold"], r["case"]) == ("low", "3", "1", "d2"))
    assert float(row["dice"]) == pytest.approx(0.75) and row["patient"] == "d"
    assert "7 of 8 are finished" in page.render(plan, "", found, [test])


def test_verdicts():
    rng = np.random.default_rng(2)
    base = rng.uniform(0.5, 0.6, (3, 20))
    found = {("a", 5): scores(base), ("b", 5): scores(base + 0.2 + rng.normal(0, 0.01, (3, 20)))}
    tests = results.compare_arms(found, [5], ["a", "b"])
    assert results.verdict(5, ["a", "b"], found, tests) == "b is best"
    text = results.verdict(5, ["a", "b", "unfinished"], found, tests)
    assert text.startswith("b is best of the arms with finished runs") and "unfinished" not in text
    found["c", 5] = scores(base + 0.2 + rng.normal(0, 0.01, (3, 20)))
    tests = results.compare_arms(found, [5], ["a", "b", "c"])
    text = results.verdict(5, ["a", "b", "c"], found, tests)
    assert re.fullmatch(r"no difference found between [bc] \(highest mean\) and [bc]", text)
    # one arm alone, and a further seed with easy patients
    assert results.verdict(5, ["a", "z"], {("a", 5): scores(base)}, []) == "only a has finished runs"
    assert results.verdict(9, ["a"], found, []) == "no run is finished"
    more = np.concatenate([base - 0.1, np.full((1, 20), 0.99)])
    found = {("a", 5): scores(base), ("b", 5): scores(more, seeds=(0, 1, 2, 3))}
    tests = results.compare_arms(found, [5], ["a", "b"])
    assert results.verdict(5, ["a", "b"], found, tests) == "a is best"
    found = {("a", 5): scores(base), ("b", 5): scores(base, seeds=(7, 8, 9))}
    assert "in common" in results.verdict(5, ["a", "b"], found, [])
    # other validation patients
    found = {
        ("a", 5): scores(base),
        ("b", 5): dataclasses.replace(scores(base), patients=tuple("x" * i for i in range(20))),
    }
    assert "in common" in results.verdict(5, ["a", "b"], found, results.compare_arms(found, [5], ["a", "b"]))
    # the arm that is best over the common seed is worse over the seeds of the two arms
    found = {
        ("a", 5): scores(base),
        ("b", 5): scores(base + np.array([[-0.1], [0.2], [0.3]])),
        ("c", 5): scores(base[:1] - 0.2),
    }
    tests = [
        dataclasses.replace(t, p_holm=0.001, difference=results.Mean(0.13, 0.05, 0.2))
        for t in results.compare_arms(found, [5], ["a", "b"])
    ]
    assert results.verdict(5, ["a", "b", "c"], found, tests) != "a is best"
    # seeds that disagree: every patient gains with one seed and loses with the other
    found = {("a", 5): scores(base[:2]), ("b", 5): scores(base[:2] + np.array([[0.2], [-0.1]]))}
    (test,) = results.compare_arms(found, [5], ["a", "b"])
    assert test.p_holm < 0.05 and not test.significant, "the interval over seeds contains 0"


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study of six runs of four steps, with one run left out at first; its folder and the folder of the data."""
    folder = tmp_path_factory.mktemp("study")
    phantom.write_camus(folder / "data", cases=4, shape=(96, 64))
    return folder


@pytest.fixture
def small():
    with small_network():
        yield


def test_a_study_from_plan_to_page(trained, small, capsys):
    root, workdir = trained / "data", trained / "study"
    command = ["run", f"--plan={write_plan(trained)}", f"--workdir={workdir}", f"--config.data.root={root}"]
    assert study.main(command) == 0
    out = capsys.readouterr().out
    assert "6 of 6 runs remain" in out and "6 of 6" in (workdir / "study.html").read_text()
    splits = {p: json.loads((p / "split.json").read_text()) for p in sorted(workdir.glob("*/n*/seed*"))}
    assert len(splits) == 6
    for arm in ("low", "high"):
        small, large = (splits[workdir / arm / f"n00{n}" / "seed0"] for n in (1, 2))
        assert set(small["train"]) < set(large["train"]) and small["validation"] == large["validation"]
        assert len({large["patients"][c] for c in large["train"]}) == 2
        assert not {large["patients"][c] for c in large["train"]} & {large["patients"][c] for c in large["validation"]}
        assert small == splits[workdir / "low" / "n001" / "seed0"], "the same patients for all arms"
    # the first batches of both arms are the same, and so are the weights they start from
    first = [read_records(workdir / arm / "n001" / "seed0", "steps.jsonl")[0] for arm in ("low", "high")]
    assert first[0]["batch"] == first[1]["batch"] and first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    # one number of the table follows from the files of the runs
    by_seed = []
    for seed in (0, 3):
        run = workdir / "high" / "n002" / f"seed{seed}"
        (last,) = [r for r in read_records(run, VALIDATIONS_FILE) if r["step"] == 4]
        patients = {}
        for case, regions in last["cases"].items():
            patients.setdefault(splits[run]["patients"][case], []).append(np.mean(list(regions.values())))
        by_seed.append(np.mean([np.mean(v) for v in patients.values()]))
        scored = [r["dice"] for r in read_records(run) if r["kind"] == "validation" and r["step"] == 4]
        assert scored == pytest.approx([np.mean([list(v.values()) for v in last["cases"].values()])])
    assert "| high | " in (workdir / "tables.md").read_text()
    for name in ("sizes.png", "steps.png"):
        assert np.ptp(np.asarray(Image.open(workdir / name).convert("L"))) > 100, "something is drawn"
    assert f"{np.mean(by_seed):.3f} [" in (workdir / "tables.md").read_text()
    run = workdir / "low" / "n001" / "seed0"
    seconds = np.mean([r["seconds_per_step"] for r in read_records(run) if r["kind"] == "train"])
    cost = (workdir / "tables.md").read_text().partition("Cost")[2]
    assert f"| low | 1 | 1 | {4 * seconds:.0f} | {seconds:.3f} |" in cost
    with open(workdir / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["step"] for r in rows} == {"2", "4"} and {r["region"] for r in rows} == {"LV_endo", "LV_epi", "LA"}

    assert study.main(command) == 0
    assert "0 of 6 runs remain" in capsys.readouterr().out
    (workdir / "low" / "n002" / "seed3" / VALIDATIONS_FILE).unlink()
    assert study.main(["report", f"--workdir={workdir}"]) == 0
    assert "5 of 6" in (workdir / "study.html").read_text()


def test_the_time_of_a_run_that_shared_its_steps_is_not_known(tmp_path):
    for runs, expected in (({}, 3.0), ({"runs": 2}, np.nan)):
        found = [{"kind": "train", "step": 1, "seconds_per_step": 2.0}, {"kind": "validation", "step": 2}]
        found += [{"kind": "train", "step": 2, "seconds_per_step": 4.0} | runs]
        (tmp_path / METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in found))
        np.testing.assert_equal(results._seconds_per_step(tmp_path), expected)


def test_curves_and_tables_of_a_study_without_training():
    """A seed that validates other patients, and an arm that is not finished for one size."""
    rng = np.random.default_rng(0)
    plan = Plan("t", "r", 20, 10, "a", (Grid((3, 9), (0, 1)),), {"a": {}, "b": {}, "c": {}}, {})

    def some(level):
        dice = np.clip(rng.normal(level, 0.02, (2, 2, 6)), 0, 1)
        dice[0, :, :3] = dice[1, :, 3:] = np.nan
        return Scores((0, 1), tuple("pqrstu"), (10, 20), dice, np.array([1.0, np.nan]))

    found = {("a", 3): some(0.5), ("b", 3): some(0.8), ("a", 9): some(0.9)}
    tests = results.compare_arms(found, plan.sizes, list(plan.arms))
    tables = {t.title: t for t in page.make_tables(plan, found, tests)}
    score = tables["Dice after 20 steps"]
    assert score.header == ("arm", "3 training patients", "9 training patients") and score.rows[2] == ("c", "-", "-")
    assert tables["Cost"].rows[0] == ("a", "3", "2", "20", "1.000"), "of the run whose time is known"
    packed = found | {("a", 3): dataclasses.replace(found["a", 3], seconds_per_step=np.full(2, np.nan))}
    assert page.make_tables(plan, packed, tests)[-1].rows[0] == ("a", "3", "2", "-", "-")
    (row,) = tables["Difference from a"].rows
    assert row[:3] == ("3", "b", "a") and float(row[3].split()[0]) == pytest.approx(0.3, abs=0.05)
    html = page.render(plan, "the plan", found, tests)
    assert html.count("data:image/png;base64") == 2 and "the plan" in html
