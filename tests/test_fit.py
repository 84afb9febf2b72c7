"""The command that does everything: its steps in order, resumed and stopped; a table of cases through all of them."""

import csv
import json
import os
import shutil

import numpy as np
import pytest

from tests.small_runs import use_pixelwise, use_three_convolutions
from tests.test_planning import write_card, write_case
from xdim_jax import fit, predict
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.data import __main__ as data_main
from xdim_jax.data.images.image import read_volume
from xdim_jax.inference.output import make_output
from xdim_jax.planning import machine, plan_data
from xdim_jax.training.check import resolve_config
from xdim_jax.training.needs import Need
from xdim_jax.training.run_data import find_data

SHORT = ("--config.train.epochs=1", "--config.data.epoch_steps=2", "--config.model.encoder.name=efficientnet_toy")
SHORT += (
    "--config.init.weights=",
    "--config.data.threads=1",
    "--config.data.patch=(32,32,32)",
    "--config.data.batch=1",
)


@pytest.fixture
def quick(monkeypatch):
    """A network that compiles in seconds, and a machine that need not be measured."""
    use_pixelwise(monkeypatch.setattr)
    monkeypatch.setenv("XDIM_JAX_CACHE", "off")
    monkeypatch.setattr(machine.needs, "measure", lambda *_: Need(2**20, 0, 0, 0))
    monkeypatch.setattr(machine, "measure_step", lambda *_: 0.01)


def make_cases(root, count=4):
    write_card(root, ("CT",), ("organ",))
    rng = np.random.default_rng(0)
    for number in range(count):
        label = np.zeros((16, 32, 32), np.uint8)
        label[4:12, 8:20, 8 + number : 24] = 1
        image = (np.where(label, 100, -900) + rng.normal(0, 20, label.shape)).astype(np.int16)
        write_case(root, f"c{number}", image, label, (2.0, 1.0, 1.0))
    return root


def command(root, workdir, *more):
    return [f"--root={root}", f"--workdir={workdir}", "--hours=1", "--folds=2", "--jobs=1", *more]


def test_from_a_folder_to_a_report(quick, tmp_path, capsys):
    root, workdir = make_cases(tmp_path / "Dataset001_Own"), tmp_path / "run"
    assert fit.main(command(root, workdir, "--steps=plan")) == 0
    assert not (workdir / "fold0").exists() and "labelled voxels have" in (workdir / "recipe.py").read_text()
    # the recipe may be edited before the training
    recipe = workdir / "recipe.py"
    recipe.write_text(recipe.read_text().replace("config.data.foreground = 0.5", "config.data.foreground = 0.75"))
    capsys.readouterr()
    assert fit.main(command(root, workdir, *SHORT)) == 0
    out = capsys.readouterr().out
    assert "already verified" in out and "exists and is used" in out
    assert json.loads((workdir / "fold1" / "config.json").read_text())["data"]["foreground"] == 0.75
    splits = [json.loads((workdir / f"fold{i}" / "split.json").read_text())["validation"] for i in (0, 1)]
    assert sorted(splits[0] + splits[1]) == ["c0", "c1", "c2", "c3"]
    assert sorted(p.name for p in (workdir / "predictions").glob("*.nii.gz")) == [f"c{i}.nii.gz" for i in range(4)]
    assert len(json.loads((workdir / "evaluation" / "evaluate.json").read_text())["cases"]) == 4
    assert "organ" in (workdir / "report.html").read_text()
    assert (workdir / "postprocessing.json").read_bytes() == (workdir / "fold0" / "postprocessing.json").read_bytes()

    # again: nothing is computed, and the results remain
    stamps = {p: p.stat().st_mtime_ns for p in (workdir / "predictions").glob("*.nii.gz")}
    assert fit.main(command(root, workdir, *SHORT)) == 0
    assert "train step took" not in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (workdir / "predictions").glob("*.nii.gz")} == stamps

    # a killed run goes on with the fold that is missing
    shutil.rmtree(workdir / "fold1")
    for name in ("postprocessing.json", "report.html"):
        (workdir / name).unlink()
    assert fit.main(command(root, workdir, *SHORT)) == 0
    out = capsys.readouterr().out
    assert out.count("train step took") == 1 and (workdir / "report.html").is_file()

    # the ensemble predicts other cases, and says how well they agree with a reference
    assert predict.main([f"--workdir={workdir}", f"--input={root}", f"--output={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "2 networks" in out and out.count("Dice organ ") == 4
    assert read_volume(tmp_path / "out" / "c0.nii.gz")[0].shape == (16, 32, 32)


def test_other_options_do_not_replace_a_recipe(quick, tmp_path):
    root, workdir = make_cases(tmp_path / "Dataset001_Own"), tmp_path / "run"
    assert fit.main(command(root, workdir, "--steps=plan")) == 0
    with pytest.raises(UserError, match=r"recipe\.py was planned with .*hours"):
        fit.main([*command(root, workdir, "--steps=plan"), "--hours=2"])
    with pytest.raises(UserError, match=r"recipe\.py was planned with .*store"):
        fit.main([*command(root, workdir, "--steps=plan"), f"--store={tmp_path / 'elsewhere'}"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--fold=3",), "unknown arguments --fold=3"),
        (("--steps=plan", "--config.data.batch=4"), "has no effect on the plan"),
        (("--workdir=gs://bucket/run",), "expected a local folder"),
        (("--hours=0",), "--hours=0"),
        (("--hours=inf",), "--hours=inf"),
        (("--hours=nan",), "--hours=nan"),
    ],
)
def test_wrong_flags_are_noticed_first(flags, words, quick, tmp_path):
    with pytest.raises(UserError, match=words):
        fit.main(command(make_cases(tmp_path / "Dataset001_Own"), tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


def test_folds_are_not_trained_on_data_with_different_meanings(quick, tmp_path):
    """The description of the data changes after fold 0: neither fit nor train continues."""
    root, workdir = make_cases(tmp_path / "Dataset001_Own"), tmp_path / "run"
    path = root / "dataset.json"
    card = json.loads(path.read_text()) | {"labels": {"background": 0, "core": [1, 2], "tip": 2}}
    path.write_text(json.dumps(card))
    assert fit.main(command(root, workdir, "--steps=train", *SHORT)) == 0
    shutil.rmtree(workdir / "fold1")
    before = (workdir / "fold0" / "data.json").read_text()

    def find_again():
        config, dataset = resolve_config(load_config(f"{workdir / 'recipe.py'}:fold=0", list(SHORT)))
        output = make_output(config.output, dataset)
        find_data(config.data, config.seed, dataset, output, workdir / "fold0", started=True, first=True)

    for key, value, changed in (
        ("labels", {"background": 0, "core": [1, 2], "tip": 1}, "regions"),
        ("labels", {"tip": 2, "background": 0, "core": [1, 2]}, "regions"),  # their order is that of the channels
        ("channel_names", {"0": "ct"}, "channels"),
        ("annotated", {"c0": ["core"]}, "annotated"),
    ):
        path.write_text(json.dumps(card | {key: value}))
        with pytest.raises(UserError, match=rf"recipe\.py was planned with .*{changed}"):
            fit.main(command(root, workdir, "--steps=train", *SHORT))
        with pytest.raises(UserError, match=rf"fold0 was started with other .*{changed}"):
            find_again()
        assert (workdir / "fold0" / "data.json").read_text() == before and not (workdir / "fold1").exists()
    path.write_text(json.dumps(card))
    find_again()


@pytest.mark.parametrize("place", ["Dataset001_Own", ".", "link"])
def test_results_are_not_written_among_the_data(place, quick, tmp_path):
    """The workdir is not the folder of the data, nor one that contains it."""
    root = make_cases(tmp_path / "Dataset001_Own")
    (tmp_path / "link").symlink_to(root)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="folder of the data"):
        fit.main(command(root, tmp_path / place, "--steps=verify"))
    assert sorted(tmp_path.rglob("*")) == before
    assert fit.main(command(root, root / "run", "--steps=verify")) == 0


def test_other_networks_get_a_choice_of_their_own(quick, tmp_path):
    """Trained anew: what was chosen for the earlier weights is not used."""
    root, workdir = make_cases(tmp_path / "Dataset001_Own"), tmp_path / "run"
    assert fit.main(command(root, workdir, *SHORT)) == 0
    path = workdir / "postprocessing.json"
    record = json.loads(path.read_text())
    record["chosen"]["min_volume"] = {"organ": 1000.0}
    path.write_text(json.dumps(record))
    assert fit.main(command(root, workdir, *SHORT)) == 0
    assert json.loads(path.read_text())["chosen"]["min_volume"] == {"organ": 1000.0}, (
        "for the same networks, it is kept"
    )
    for fold in ("fold0", "fold1"):
        shutil.rmtree(workdir / fold)
    assert fit.main(command(root, workdir, *SHORT, "--config.seed=1")) == 0
    again = json.loads(path.read_text())
    assert again["networks"] != record["networks"] and again["chosen"]["min_volume"] != {"organ": 1000.0}
    assert (workdir / "fold0" / "postprocessing.json").read_text() == path.read_text()


def test_a_workdir_and_a_store_inside_of_the_data(quick, tmp_path, monkeypatch, capsys):
    """Files that the command writes are not new data; and a relative store is the same from every folder."""
    root = make_cases(tmp_path / "Dataset001_Own")
    workdir = root / "2024:01"
    monkeypatch.chdir(tmp_path)
    arguments = command(root, workdir, "--steps=prepare", "--store=Dataset001_Own/store")
    assert fit.main(arguments) == 0 and list((root / "store").iterdir())
    capsys.readouterr()
    assert fit.main(arguments) == 0 and "already verified" in capsys.readouterr().out
    monkeypatch.chdir(root)
    fit.main([*arguments[:-1], "--store=store"])
    assert "already verified" in capsys.readouterr().out
    assert load_config(str(workdir / "recipe.py"), []).data.store == str(root / "store")


def test_a_recipe_without_its_record_is_not_trained(quick, tmp_path):
    root, workdir = make_cases(tmp_path / "Dataset001_Own"), tmp_path / "run"
    workdir.mkdir()
    (workdir / "recipe.py").write_text("")
    with pytest.raises(UserError, match=r"Restore recipe\.json, or delete .*recipe\.py"):
        fit.main(command(root, workdir, "--steps=plan"))


def test_errors_of_the_data_end_it(quick, tmp_path, capsys):
    root = make_cases(tmp_path / "Dataset001_Own")
    (root / "labelsTr" / "c1.nii.gz").unlink()
    assert fit.main(command(root, tmp_path / "run")) == 1
    assert "missing_label" in capsys.readouterr().out and not (tmp_path / "run" / "recipe.py").exists()
    with pytest.raises(UserError, match=r"absent.*does not exist"):
        fit.main(command(tmp_path / "absent", tmp_path / "run"))


def test_changed_data_are_checked_again(quick, tmp_path, capsys):
    root = make_cases(tmp_path / "Dataset001_Own")
    fit.main(command(root, tmp_path / "run", "--steps=verify"))
    capsys.readouterr()
    os.utime(root / "labelsTr" / "c1.nii.gz", (1, 1))
    fit.main(command(root, tmp_path / "run", "--steps=verify"))
    assert "already verified" not in capsys.readouterr().out


def test_a_table_goes_through_all_steps(quick, tmp_path, capsys):
    """Patients, folds, a case in which the organ is not annotated, and voxels that are not annotated."""
    raw = make_cases(tmp_path / "raw")
    root = tmp_path / "table"
    write_card(root, ("CT",), ("organ",))
    card = json.loads((root / "dataset.json").read_text())
    card["labels"] |= {"vessel": 2, "ignore": 3}
    (root / "dataset.json").write_text(json.dumps(card))
    lines = ["image,label,patient,fold,annotated"]
    lines += [
        f"../raw/imagesTr/c{i}_0000.nii.gz,../raw/labelsTr/c{i}.nii.gz,P{i // 2},{i // 2},{'organ' if i == 3 else ''}"
        for i in range(4)
    ]
    (root / "cases.csv").write_text("\n".join(lines))
    workdir = tmp_path / "run"
    arguments = [f"--root={root}", f"--workdir={workdir}", "--dataset=table", "--hours=1", "--jobs=1", *SHORT]
    assert fit.main(arguments) == 0
    splits = [json.loads((workdir / f"fold{i}" / "split.json").read_text())["validation"] for i in (0, 1)]
    assert splits == [["c0", "c1"], ["c2", "c3"]]
    with open(workdir / "evaluation" / "cases.csv", newline="") as file:
        rows = {(r["case_id"], r["structure"], r["metric"]): r["value"] for r in csv.DictReader(file)}
    evaluation = json.loads((workdir / "evaluation" / "evaluate.json").read_text())
    assert {c: v["patient"] for c, v in evaluation["cases"].items()} == {"c0": "P0", "c1": "P0", "c2": "P1", "c3": "P1"}
    assert rows["c3", "organ", "dice"] and ("c3", "vessel", "dice") not in {
        k for k, v in rows.items() if v not in ("", "nan")
    }
    assert raw.is_dir() and "vessel occurs in no case" in capsys.readouterr().out


# -- data plan --------------------------------------------------------------------------------------------------------


def test_the_plan_is_the_same_again(quick, tmp_path):
    root = make_cases(tmp_path / "Dataset001_Own")
    out = [tmp_path / name / "recipe.py" for name in ("a", "b")]
    for path in out:
        assert data_main.main(["plan", f"--root={root}", f"--out={path}", "--hours=1"]) == 0
    assert out[0].read_bytes() == out[1].read_bytes()
    assert out[0].with_suffix(".html").read_bytes() == out[1].with_suffix(".html").read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--out=recipe.txt",), "expected the name of a Python file"),
        (("--out=r.py", "--hours=0"), "--hours=0"),
        (("--out=r.py", "--memory=many"), "--memory=many"),
        (("--out=r.py", "--folds=9"), "--folds=9: expected 2 to 4"),
        (("--out=r.py", "--memory=1KiB"), "--memory=.*is not enough"),
        (("--out=r.py", "--convention=brats2021"), "--convention is not an option"),
    ],
)
def test_plans_that_cannot_be(flags, words, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = make_cases(tmp_path / "Dataset001_Own")
    with pytest.raises(UserError, match=words):
        data_main.main(["plan", f"--root={root}", *flags])
    assert not list(tmp_path.glob("r*.py"))


def test_one_case_is_too_few(quick, tmp_path):
    root = make_cases(tmp_path / "Dataset001_Own", 1)
    with pytest.raises(UserError, match="at least two"):
        plan_data.plan_recipe({"dataset": "nnunet", "root": str(root)}, tmp_path / "r.py")


def test_a_real_step_is_measured(tmp_path, monkeypatch):
    """A small network, compiled and timed on this machine. The tutorial own_data does it with Lite0."""
    use_three_convolutions(monkeypatch.setattr)
    monkeypatch.setenv("XDIM_JAX_CACHE", "off")
    root = make_cases(tmp_path / "Dataset001_Own")
    assert data_main.main(["plan", f"--root={root}", f"--out={tmp_path / 'r.py'}", "--hours=1"]) == 0
    (times,) = json.loads((tmp_path / "Dataset001_Own_prepared" / "step_times.json").read_text()).values()
    assert 0 < times < 60
    assert "patch 16x32x32, batch 2: a step needs" in (tmp_path / "r.py").read_text().lower()
