"""The whole program through its real command lines, on phantoms and a toy network."""

import csv
import dataclasses
import html.parser
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import records
from xdim_jax import train
from xdim_jax.base import huge_pages
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.data.case import Case
from xdim_jax.scoring import results
from xdim_jax.training import check

REPO = Path(__file__).parent.parent

pytestmark = pytest.mark.xdist_group("mains")  # one worker, so that fixtures are made once
RECIPE = "configs/brats_dxnet.py:phantom"
RULES = "--rules=brats2022"
TOY = [
    "--config.model.encoder.name=efficientnet_toy",
    "--config.model.filters=16,16,8,8,8",
    "--config.data.patch=64,32,32",
    "--config.data.phantom.cases=6",
    "--config.data.phantom.held_out=2",
    "--config.data.phantom.shape=48,48,64",
    "--config.train.epochs=2",
    "--config.train.log_every=3",
    "--config.train.validate_every=1",
    "--config.train.validate_after_score=0.0",
    "--config.predict.min_et=5",
]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Runs a main in the checkout: ``run(module, *arguments)``; programs are compiled once for all tests."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "cache"), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def start(module, *arguments, file_kib=None):
        """``file_kib``: no file may grow beyond it; the system refuses the write, as a full disk does."""
        command = [sys.executable, "-m", f"xdim_jax.{module}", *map(str, arguments)]
        if file_kib is not None:
            command = ["bash", "-c", f'ulimit -f {file_kib}; exec "$@"', "bash", *command]
        return subprocess.Popen(
            command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(module, *arguments, code=0, file_kib=None):
        process = start(module, *arguments, file_kib=file_kib)
        out, err = process.communicate(timeout=280)
        assert process.returncode == code, out + err
        assert "Traceback" not in err, err
        return out + err

    finish.start = start
    return finish


@pytest.fixture(scope="session")
def trained(run, tmp_path_factory):
    """A finished toy run with predictions, scores and report. Read only."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    out = run("train", f"--config={RECIPE}", f"--workdir={workdir}", *TOY)
    (workdir / "out.txt").write_text(out)
    held_out = workdir / "phantom" / "held_out"
    run("predict", f"--workdir={workdir}", "--input", held_out, f"--output={workdir / 'pred'}")
    run("evaluate", RULES, f"--pred={workdir / 'pred'}", f"--ref={held_out}", f"--out={workdir / 'eval'}")
    run("report", f"--workdir={workdir}", f"--eval={workdir / 'eval'}", f"--out={workdir / 'report.html'}")
    return workdir


# -- the straight way ---------------------------------------------------------------------------------------------


def test_training_says_what_it_does_and_records_it(trained):
    out = (trained / "out.txt").read_text()
    for words in (
        "devices    1 x cpu",
        "parameters",
        "starting at step 0",
        "compile    train step took",
        "lr 1.00e-03",
        "left ",
    ):
        assert words in out
    train = records(trained, "train")
    assert {3, 6, 8, 9, 12, 15, 16} <= {r["step"] for r in train}  # more on a slow machine, which logs by time
    assert set(train[0]) >= {
        "loss",
        "dice_loss",
        "entropy_loss",
        "score_WT",
        "score_TC",
        "score_ET",
        "learning_rate",
        "grad_norm",
    }
    assert all(r["loss"] == pytest.approx(r["dice_loss"] + r["entropy_loss"], rel=1e-5) for r in train)
    validation = records(trained, "validation")
    assert [r["step"] for r in validation] == [8, 16]
    assert validation[0]["dice"] == pytest.approx(np.mean([validation[0][f"dice_{r}"] for r in ("WT", "TC", "ET")]))
    assert list((trained / "tensorboard").glob("events.*"))
    split = json.loads((trained / "split.json").read_text())
    assert len(split["train"]) == 4 and len(split["validation"]) == 2
    config = json.loads((trained / "config.json").read_text())
    assert config["model"]["encoder"]["name"] == "efficientnet_toy" and config["optim"]["b1"] == 0.95


def test_predictions_lie_on_the_source_grid_with_the_source_labels(trained):
    for folder in sorted((trained / "phantom" / "held_out").glob("BraTS*")):
        source = nib.load(folder / f"{folder.name}_flair.nii.gz")
        predicted = nib.load(trained / "pred" / f"{folder.name}.nii.gz")
        assert predicted.shape == source.shape and predicted.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(predicted.affine, source.affine)
        assert set(np.unique(predicted.dataobj)) <= {0, 1, 2, 4}


def test_predicting_what_was_trained_on_is_said(trained, tmp_path, monkeypatch, capsys):
    from xdim_jax import predict
    from xdim_jax.inference import predict_cases

    monkeypatch.setattr(predict_cases, "claim_output", lambda *arguments, **options: [])
    split = json.loads((trained / "split.json").read_text())
    names = ", ".join(sorted(split["train"]))
    for folder, said in (("train", True), ("held_out", False)):
        source = trained / "phantom" / folder
        assert predict.main([f"--workdir={trained}", f"--input={source}", f"--output={tmp_path}"]) == 0
        out = "".join(capsys.readouterr())
        assert ("4 of 6 cases" in out and f"({names})" in out) == said
        assert ("used to train" in out) == said


def test_cases_csv_and_summary_agree_with_the_files(trained):
    with open(trained / "eval" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case_id", "structure", "metric", "value"]
    assert len(rows) == 2 * 3 * 4
    name = rows[0]["case_id"]
    pred = np.asarray(nib.load(trained / "pred" / f"{name}.nii.gz").dataobj)
    ref = np.asarray(nib.load(trained / "phantom" / "held_out" / name / f"{name}_seg.nii.gz").dataobj)
    dice = 2 * ((pred > 0) & (ref > 0)).sum() / ((pred > 0).sum() + (ref > 0).sum())
    assert float(rows[0]["value"]) == pytest.approx(dice, rel=1e-12) and rows[0]["metric"] == "dice"
    summary = json.loads((trained / "eval" / "summary.json").read_text())
    values = [float(r["value"]) for r in rows if (r["structure"], r["metric"]) == ("WT", "dice")]
    assert summary["structures"]["WT"]["dice"]["mean"] == pytest.approx(np.mean(values))
    assert summary["structures"]["WT"]["dice"]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert summary["cases"] == 2 and summary["rules"] == "brats2022"
    assert json.loads((trained / "eval" / "evaluate.json").read_text())["cases"][name]["patient"] == name
    assert json.loads((trained / "pred" / "predict.json").read_text())["convention"] == "brats2021"
    assert "| DX-Net (paper, Table 6) | mean | 91.22 | 84.77 | 83.88 |" in (trained / "eval" / "tables.md").read_text()


def test_report_is_one_file_with_its_pictures_inside(trained):
    page = (trained / "report.html").read_text()
    images, links = [], []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            attributes = dict(attrs)
            if tag == "img":
                images.append(attributes)
            links.extend(v for k, v in attributes.items() if k in ("src", "href") and not v.startswith("data:"))

    Reader().feed(page)
    assert not links, "nothing is loaded from elsewhere"
    # box plots, best and worst of two cases, curves
    assert len(images) == 4 and all(i["src"].startswith("data:image/png;base64,") for i in images)
    summary = json.loads((trained / "eval" / "summary.json").read_text())
    for structure in ("WT", "TC", "ET"):
        assert f"<td>{100 * summary['structures'][structure]['dice']['mean']:.2f}</td>" in page
    assert "91.22" in page and "Synthetic cases" in page
    (start,) = json.loads((trained / "environment.json").read_text())
    assert start["step"] == 0 and start["packages"]["jax"] == importlib.metadata.version("jax")
    assert "environment of training</dt>" in page and f"{start['devices']}; " in page


def test_a_case_can_be_given_as_its_files(run, trained, tmp_path):
    folder = sorted((trained / "phantom" / "held_out").glob("BraTS*"))[0]
    files = [folder / f"{folder.name}_{m}.nii.gz" for m in ("flair", "t1", "t1ce", "t2")]
    run("predict", f"--workdir={trained}", "--input", *files, f"--output={tmp_path}")
    for name in (f"{folder.name}.nii.gz",):
        np.testing.assert_array_equal(nib.load(tmp_path / name).dataobj, nib.load(trained / "pred" / name).dataobj)
    out = run("predict", f"--workdir={trained}", "--input", *files[:2], f"--output={tmp_path}", code=2)
    assert "2 files given" in out and "flair, t1, t1ce, t2" in out


def test_one_bad_case_does_not_stop_the_others(run, trained, tmp_path):
    """A damaged file, a missing one; and a map of an earlier run does not stand in for the failed case."""
    shutil.copytree(trained / "phantom" / "held_out", tmp_path / "in")
    bad, good = sorted((tmp_path / "in").glob("BraTS*"))
    shutil.copytree(good, tmp_path / "in" / "BraTS2021_99999")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{bad.name}.nii.gz").touch()
    path = bad / f"{bad.name}_t2.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    out = run("predict", f"--workdir={trained}", "--input", tmp_path / "in", f"--output={tmp_path / 'out'}", code=1)
    assert str(path) in out and f"2 of 3 cases failed: BraTS2021_99999, {bad.name}" in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(f"{good.name}.nii.gz", "predict.json", ".predict.json.lock")
    }


def test_missing_predictions_are_an_error_or_the_worst_score(run, trained, tmp_path):
    shutil.copytree(trained / "pred", tmp_path / "pred")
    gone, kept = sorted((tmp_path / "pred").glob("*.nii.gz"))
    gone.unlink()
    ref = trained / "phantom" / "held_out"
    arguments = (RULES, f"--pred={tmp_path / 'pred'}", f"--ref={ref}", f"--out={tmp_path / 'eval'}")
    out = run("evaluate", *arguments, code=2)
    assert gone.name.removesuffix(".nii.gz") in out and "--missing=penalise" in out
    assert not (tmp_path / "eval").exists()
    kept.write_bytes(kept.read_bytes()[:100])
    run("evaluate", *arguments, "--missing=penalise")
    for case in results.read_cases(tmp_path / "eval" / "cases.csv"):
        for metrics in case.values.values():
            assert metrics == {"dice": 0, "hd95": 374, "sensitivity": 0, "specificity": 0}
    assert len(json.loads((tmp_path / "eval" / "summary.json").read_text())["unreadable"]) == 2
    run("report", f"--workdir={trained}", f"--eval={tmp_path / 'eval'}", f"--out={tmp_path / 'r.html'}")
    assert "No usable prediction" in (tmp_path / "r.html").read_text()


# -- stopping and going on ----------------------------------------------------------------------------------------


def test_a_workdir_of_another_config_is_refused(run, trained):
    out = run("train", f"--config={RECIPE}", f"--workdir={trained}", *TOY, "--config.optim.b1=0.9", code=2)
    assert "optim.b1: 0.95 in config.json, 0.9 now" in out and "another --workdir" in out


def test_a_run_whose_cases_changed_is_not_resumed(run, trained, tmp_path):
    """A new case moves patients between the folds: the run would be validated on what it trained on."""
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("pred", "eval"))
    shutil.copytree(trained / "phantom" / "train", tmp_path / "data")
    data = f"--config.data.root={tmp_path / 'data'}"
    shutil.rmtree(tmp_path / "data" / "BraTS2021_00003")
    out = run("train", f"--config={RECIPE}", f"--workdir={tmp_path / 'run'}", *TOY, data, code=2)
    assert "differ" in out and "BraTS2021_00003" in out and "--workdir" in out
    assert json.loads((tmp_path / "run" / "split.json").read_text()) == json.loads((trained / "split.json").read_text())


# -- wrong input --------------------------------------------------------------------------------------------------

DATA = "--config.data.root={phantoms}"
# of the command line and the config; further ones, of every command, are in tests/test_misuse.py
MISUSES = {
    "typo": ([f"--config={RECIPE}", "--config.optim.lookahed.period=3"], ["mean --config.optim.lookahead.period?"]),
    "section": ([f"--config={RECIPE}", "--config.optim=3"], ["--config.optim is not a key"]),
    "unknown convention": ([f"--config={RECIPE}", "--config.data.convention=x"], ["known: brats2021, brats2023, "]),
    "channels": ([f"--config={RECIPE}", "--config.model.in_channels=1"], ["config.model.in_channels=1: BraTS needs 4"]),
    "fold": ([f"--config={RECIPE}", "--config.data.fold=5"], ["config.data.fold=5"]),
    "several": (
        [f"--config={RECIPE}", "--config.data.batch=0", "--config.predict.overlap=1.0", "--config.train.log_every=0"],
        ["3 values", "config.data.batch=0: expected 1 to inf", "predict.overlap=1.0", "train.log_every=0"],
    ),
    "not finite": (
        [f"--config={RECIPE}", "--config.train.checkpoint_minutes=inf", "--config.optim.clip_norm=nan"],
        ["checkpoint_minutes=inf: expected a finite number", "clip_norm=nan: expected a finite number"],
    ),
    "filters": ([f"--config={RECIPE}", "--config.model.filters=16,16"], ["filters=(16, 16): expected 5 numbers"]),
    "other convention": ([f"--config={RECIPE}", DATA, "--config.data.convention=brats2023"], ["convention=brats2021"]),
    "unknown data set": ([f"--config={RECIPE}", "--config.data.dataset=brain"], ["known: brats, camus, chaos, nnunet"]),
    "no list of splits": ([f"--config={RECIPE}", DATA, "--config.data.split=official"], ["have no list of splits"]),
    "sampling": ([f"--config={RECIPE}", "--config.data.sampling=all"], ["sampling='all'", "patches, slices"]),
    "preparation": ([f"--config={RECIPE}", "--config.data.prepare.crop=brain"], ["crop='brain'", "none, nonzero"]),
    "slices in 3D": ([f"--config={RECIPE}", "--config.data.sampling=slices"], ["sampling=slices", "2D patch"]),
    "cut volumes": ([f"--config={RECIPE}", DATA, "--config.data.sampling=volumes"], ["larger than", "prepare.size"]),
}  # fmt: skip


PROCESSES = ("typo", "several", "other convention")  # through the real command


@pytest.mark.parametrize("misuse", [name for name in MISUSES if name not in PROCESSES])
def test_misuse_of_train_is_one_clear_message(misuse, phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv("XDIM_JAX_CACHE", "off")
    arguments, words = MISUSES[misuse]
    with pytest.raises(UserError) as error:
        train.main([*(a.format(phantoms=phantoms) for a in arguments), f"--workdir={tmp_path / 'run'}"])
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("misuse", PROCESSES)
def test_misuse_ends_the_process_with_its_message_alone(run, misuse, phantoms, tmp_path):
    arguments, words = MISUSES[misuse]
    out = run("train", *(a.format(phantoms=phantoms) for a in arguments), f"--workdir={tmp_path / 'run'}", code=2)
    assert "error: " in out and all(word in out for word in words)


def test_every_main_explains_itself(capsys):
    for name in ("train", "predict", "evaluate", "compare", "report", "data.__main__"):
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"xdim_jax.{name}").main(["--help"])
        out = capsys.readouterr().out
        module = name.removesuffix(".__main__")
        assert ended.value.code == 0 and f"usage: python -m xdim_jax.{module}" in out and "exit status" in out.lower()
    with pytest.raises(SystemExit):
        importlib.import_module("xdim_jax.data.__main__").main(["phantom", "--help"])
    assert "--root" in capsys.readouterr().out


# -- a full disk --------------------------------------------------------------------------------------------------


def test_full_disk_while_writing_phantoms(run, tmp_path):
    out = run(
        "data",
        "phantom",
        "--dataset=brats",
        f"--root={tmp_path}",
        "--shape=64,64,64",
        code=2,
        file_kib=30,
    )
    assert f"cannot write {tmp_path}/BraTS2021_00000: File too large" in out
    assert [p.name for p in tmp_path.iterdir()] == ["phantom.json"]


def test_full_disk_while_predicting(run, trained, tmp_path):
    ref = trained / "phantom" / "held_out"
    out = run(
        "predict",
        f"--workdir={trained}",
        "--input",
        ref,
        f"--output={tmp_path / 'out'}",
        code=1,
        file_kib=5,
    )
    assert len(re.findall(rf"omitted: cannot write {tmp_path}/out/BraTS2021_\d+.nii.gz: File too large", out)) == 2
    assert "2 of 2 cases failed" in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"predict.json", ".predict.json.lock"}


# -- the config in Python -----------------------------------------------------------------------------------------


def test_config_is_the_papers_recipe():
    """Sect. 3.1.3 and 3.2, read off the paper."""
    config = load_config("configs/brats_dxnet.py", [])
    assert tuple(config.data.patch) == (128, 128, 128) and config.data.batch == 1
    assert (config.optim.b1, config.optim.b2) == (0.95, 0.99)
    assert (config.optim.lookahead.period, config.optim.lookahead.step_size) == (6, 0.5)
    schedule = config.optim.schedule
    assert (schedule.peak, schedule.final, schedule.constant_epochs, config.train.epochs) == (1e-3, 1e-5, 40, 90)
    assert config.train.validate_after_score == 0.85
    assert (config.predict.threshold, config.predict.min_et) == (0.5, 200)
    assert (config.model.encoder.name, config.model.norm, config.loss.name) == (
        "efficientnet_b0",
        "instance",
        "dice_bce",
    )
    assert config.data.folds == 5


def test_variants_and_overrides(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the recipe is found where it ships
    config = load_config("configs/brats_dxnet.py:phantom,fold=3", ["--config.data.patch=(32,64,64)", "--config.seed=7"])
    assert config.data.fold == 3 and tuple(config.data.patch) == (32, 64, 64) and config.seed == 7
    assert load_config("brats_dxnet", []).data.fold == 0
    assert load_config("brats_dxnet", ["--config.augment.flip.p=0.5"]).augment.flip.p == 0.5
    with pytest.raises(UserError, match="unknown variant 'fold=x'"):
        load_config("brats_dxnet:fold=x", [])


def test_what_ct_does_not_show_is_said_of_every_ct_case(tmp_path):
    """CHAOS task 4: kidneys and spleen are on CT, and not in its masks."""
    config = load_config("configs/chaos_omnianet.py:scratch", [f"--config.data.root={tmp_path}"])
    dataset = check.resolve_config(config)[1]
    case = Case("c", "c", (), ("image",), None, dataset.labels, info={"modality": "CT"})
    assert dataset.annotated(case) == ("liver",)
    mr = dataclasses.replace(case, info={"modality": "MR"})
    assert dataset.annotated(mr) == ("liver", "right kidney", "left kidney", "spleen")
    assert check.resolve_config(load_config("chaos_omnianet:scratch,task=5,phantom", []))[1].annotated is None


def test_channels_that_do_not_fit_the_data_are_refused():
    config = load_config("configs/camus_omnianet.py:phantom", ["--config.output=sigmoid"])
    with pytest.raises(UserError, match=r"out_channels=4.* 3 .*output=sigmoid.* LV_endo, LV_epi, LA"):
        check.resolve_config(config)


def test_metrics_and_data_do_not_import_jax(tmp_path):
    """Judging and reading must work, and start fast, where jax is not wanted; torch and timm are never needed."""
    code = "import sys, xdim_jax.evaluate, xdim_jax.compare, xdim_jax.data.phantom; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
    code = "import sys; sys.modules['torch'] = sys.modules['timm'] = None; import xdim_jax.train, xdim_jax.predict"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
    code = (
        "import sys, xdim_jax.train, xdim_jax.predict; from xdim_jax.runs import records; "
        "records.open_recorder(records.Path(sys.argv[1]), 0, "
    )
    code += "writes=True); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=REPO)


def test_a_command_starts_anew_on_huge_pages_once(monkeypatch):
    """Where the kernel gives them to those who ask; never for --help, and not where there is an accelerator."""
    started = []
    monkeypatch.setattr(huge_pages.os, "execv", lambda program, arguments: started.append(arguments))
    monkeypatch.setattr(huge_pages.Path, "is_file", lambda path: True)
    monkeypatch.setattr(huge_pages.Path, "exists", lambda path: False)
    monkeypatch.setattr(huge_pages.Path, "read_text", lambda path, encoding: "always [madvise] never")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "xdim_jax.train", "--config=a"])
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    huge_pages.prefer_huge_pages()
    assert not started
    monkeypatch.setattr(sys, "argv", ["train.py", "--config=a"])
    huge_pages.prefer_huge_pages()
    assert started == [[sys.executable, "-m", "xdim_jax.train", "--config=a"]]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    huge_pages.prefer_huge_pages()
    assert len(started) == 1
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr(huge_pages.Path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    huge_pages.prefer_huge_pages()
    assert len(started) == 1
