"""Ways to misuse the product, each through the command line: one message that says what to do, nothing half-written.

Every case is a line of the table: a main, its arguments, and words of the message. `{...}` are folders that a fixture
makes. What needs a process of its own (a full disk, a kill) is in test_mains.py and test_resume.py.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest

from tests.small_runs import SMALL, use_pixelwise
from weight_port import __main__ as port
from xdim_jax import compare, doctor, evaluate, ops, plan, predict, report, submit, sweep, train, verify_run
from xdim_jax.base.command import run
from xdim_jax.data import __main__ as data_main
from xdim_jax.data import phantom

MAINS = {
    "train": train, "predict": predict, "evaluate": evaluate, "compare": compare, "report": report, "submit": submit,
    "plan": plan, "sweep": sweep, "verify_run": verify_run, "data": data_main, "port": port, "doctor": doctor,
}  # fmt: skip
CAMUS = "--config=configs/camus_omnianet.py:phantom"
RULES = "--rules=generic --metrics=dice"

TABLE = {
    # flags and configs
    "a flag that is not there": ("train", f"{CAMUS} --workdir={{new}} --epochs=3", ["unknown argument --epochs=3"]),
    "no config": ("train", "--workdir={new}", ["--config"]),
    "a recipe that is not there": ("train", "--config=dxnet --workdir={new}", ["dxnet does not exist", "brats_dxnet"]),
    "a variant that is not there": ("train", "--config=brats_dxnet:phantm --workdir={new}", ["known: phantom"]),
    "a key that is misspelt": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.optim.clip_nrom=1.0",
        ["mean --config.optim.clip_norm?"],
    ),
    "a value of another type": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.data.batch=big",
        ["data.batch=big", "int"],
    ),
    "a key without a value": ("train", f"{CAMUS} --workdir={{new}} --config.seed", ["--config.seed has no value"]),
    "values out of range": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.data.batch=0 --config.optim.b1=2.0",
        ["2 values", "config.data.batch=0", "config.optim.b1=2.0"],
    ),
    "a config that is no Python": ("train", "--config={text} --workdir={new}", ["not a Python file"]),
    "a config that is broken Python": ("train", "--config={broken_py} --workdir={new}", ["--config="]),
    "a network that does not exist": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.model.encoder.name=b99",
        ["unknown encoder 'b99'; known:"],
    ),
    "a patch that the network halves": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.data.patch=(97,96)",
        ["does not fit omnianet", "axis H is 97"],
    ),
    "an unknown precision": ("train", f"{CAMUS} --workdir={{new}} --config.train.precision=fp8", ["known: float32"]),
    "an unknown loss": ("train", f"{CAMUS} --workdir={{new}} --config.loss.name=focal", ["'focal' is unknown; known:"]),
    "an unknown optimiser": ("train", f"{CAMUS} --workdir={{new}} --config.optim.name=adam", ["known: nadam"]),
    "a learning rate below zero": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.optim.schedule.peak=-1.0",
        ["expected a positive learning rate"],
    ),
    "a final rate above the peak": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.optim.schedule.peak=1e-6",
        ["optim.schedule.final=", "is above config.optim.schedule.peak=1e-06"],
    ),
    "a schedule without end": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.optim.schedule.warmup_epochs=inf",
        ["optim.schedule.warmup_epochs=inf"],
    ),
    "axes that are letters": ("train", f"{CAMUS} --workdir={{new}} --config.augment.flip.axes=W", ["flip.axes"]),
    "weights that are words": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.loss.weights=balanced",
        ["config.loss.weights", "numbers"],
    ),
    "sides that are fractions": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.data.patch=(96.0,96.0)",
        ["data.patch=(96.0, 96.0)", "not integers"],
    ),
    "a patch of four sides": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.data.patch=(1,1,96,96)",
        ["data.patch=(1, 1, 96, 96)", "4 axes"],
    ),
    "batch statistics of one pixel": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.data.patch=(32,32) --config.data.batch=1 --config.model.norm=batch",
        ["data.patch=(32, 32)", "the coarsest level has one voxel"],
    ),
    "rates that fit no part": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.optim.rates=encodr.*=0",
        ["no parameter; parts of this network"],
    ),
    "stages that do not exist": ("train", f"{CAMUS} --workdir={{new}} --config.train.remat=stem9", ["stem9"]),
    # devices
    "more devices than there are": ("train", f"{CAMUS} --workdir={{new}} --config.mesh.data=64", ["there are 1"]),
    "pmap along depth": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.mesh.parallel=pmap --config.mesh.space=2",
        ["pmap", "mesh.space=2"],
    ),
    "half of the processes' numbers": (
        "train",
        f"{CAMUS} --workdir={{new}} --coordinator=here:1 --processes=2",
        ["needs --processes=<how many>"],
    ),
    "processes without a meeting place": (
        "train",
        f"{CAMUS} --workdir={{new}} --processes=2",
        ["--processes", "--coordinator"],
    ),
    "a layout without a pack": ("train", f"{CAMUS} --workdir={{new}} --layout=scan", ["--layout=scan", "--pack"]),
    "a pack without folds": ("train", f"{CAMUS} --workdir={{new}} --pack=3", ["--pack=3", "fold=all"]),
    # data
    "no data": (
        "train",
        "--config=brats_dxnet:scratch --workdir={new}",
        ["no data: give --config.data.root", ":phantom"],
    ),
    "data that are not there": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.data.root=/nowhere",
        ["/nowhere is not a folder"],
    ),
    "a folder of something else": (
        "train",
        "--config=brats_dxnet:scratch --workdir={new} --config.data.root={camus}",
        ["20 incomplete or misplaced files below"],
    ),
    "another convention's files": (
        "train",
        "--config=brats_dxnet:scratch --workdir={new} --config.data.root={brats} --config.data.convention=brats2023",
        ["convention=brats2021"],
    ),
    "a convention that is not stated": ("data", "verify --dataset=brats --root={brats}", ["--convention"]),
    "too few patients for the folds": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.data.root={{camus}} --config.data.folds=9",
        ["cannot be split"],
    ),
    "a store that cannot be written": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.data.root={{camus}} --config.data.folds=2 --config.data.store=/dev/null/s",
        ["cannot write /dev/null/s", "--config.data.store=<folder>"],
    ),
    "a phantom of no size": ("data", "phantom --dataset=brats --root={new} --shape=64,64", ["expected 3 numbers"]),
    "a data set that does not exist": ("data", "verify --dataset=brain --root={camus}", ["brain"]),
    # weights
    "weights that are not there": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.data.root={{camus}} --config.init.weights=none.safetensors",
        ["config.init.weights=none.safetensors"],
    ),
    "weights that are cut off": (
        "train",
        f"{CAMUS} --workdir={{new}} --config.data.root={{camus}} --config.init.weights={{cut_weights}}",
        ["config.init.weights="],
    ),
    "a model that timm does not have": ("port", "--source=timm --model=b99 --out={new}.safetensors", ["b99"]),
    # workdirs
    "a workdir that is a file": ("train", f"{CAMUS} {{small}} --workdir={{text}}", ["cannot"]),
    "a workdir of another config": (
        "train",
        f"{CAMUS} {{small}} --workdir={{run}} --config.seed=7",
        ["another config", "seed: 0 in config.json, 7 now"],
    ),
    "a workdir that is none": (
        "predict",
        "--workdir={empty} --input={camus} --output={new}",
        ["not the workdir of a run"],
    ),
    "a workdir without a checkpoint": (
        "predict",
        "--workdir={untrained} --input={camus} --output={new}",
        ["has no complete checkpoint", "train first"],
    ),
    "a workdir whose config was changed": (
        "predict",
        "--workdir={changed} --input={camus} --output={new}",
        ["does not fit the network"],
    ),
    "a bucket of an unknown kind": ("train", f"{CAMUS} --workdir=nonsense://a/b", ["xdim_jax[cloud]"]),
    # prediction
    "an input that is not there": ("predict", "--workdir={run} --input=/nowhere --output={new}", ["/nowhere"]),
    "a folder without cases": ("predict", "--workdir={run} --input={empty} --output={new}", ["no CAMUS"]),
    "an unknown preset": ("predict", "--workdir={run} --input={camus} --output={new} --preset=slow", ["slow"]),
    "a threshold that is none": (
        "predict",
        "--workdir={run} --input={camus} --output={new} --threshold=high",
        ["--threshold=high"],
    ),
    "a shard that is none": ("predict", "--workdir={run} --input={camus} --output={new} --shard=5/4", ["--shard=5/4"]),
    # scores
    "predictions that are missing": (
        "evaluate",
        f"{RULES} --pred={{some}} --ref={{labels}} --out={{new}}",
        ["1 of 2 references", "b", "--missing=penalise"],
    ),
    "rules that do not exist": (
        "evaluate",
        "--rules=brats2021 --pred={labels} --ref={labels} --out={new}",
        ["brats2022"],
    ),
    "a metric that does not exist": (
        "evaluate",
        "--rules=generic --metrics=dise --pred={labels} --ref={labels} --out={new}",
        ["dise", "dice"],
    ),
    "predictions in no format": (
        "evaluate",
        f"{RULES} --pred={{empty}} --ref={{labels}} --out={{new}}",
        ["no label map in"],
    ),
    "nothing to evaluate": ("evaluate", f"{RULES} --pred={{labels}}", ["--ref and --out missing"]),
    "scores that are none": ("report", "--eval={empty} --out={new}.html", ["summary.json does not exist"]),
    "nothing to compare": ("compare", "{empty} {empty} --metrics=dice", ["does not exist"]),
    "an upload of nothing": ("submit", "--challenge=chaos --task=5 --pred={empty} --out={new}", ["--pred="]),
    "two runs that are none": ("verify_run", "{empty} {empty}", ["{empty}"]),
    # searches and plans
    "a space that is not there": (
        "sweep",
        f"{CAMUS} --space=none.py --trials=2 --workdir={{new}}",
        ["none.py does not exist"],
    ),
    "a space of other keys": (
        "sweep",
        f"{CAMUS} --space={{bad_space}} --trials=2 --workdir={{new}}",
        ["optim.lr", "is not a key"],
    ),
    "no trials": ("sweep", f"{CAMUS} --space=seeds --trials=0 --workdir={{new}}", ["--trials=0"]),
    "a storage that cannot be reached": (
        "sweep",
        f"{CAMUS} --space=seeds --trials=2 --workdir={{new}} --storage=nodb://x",
        ["--storage=nodb://x cannot be opened"],
    ),
    "a budget that is none": ("plan", f"{CAMUS} --budget=lots", ["--budget=lots: expected a number"]),
    "a search without a budget": ("plan", f"{CAMUS} --largest=patch", ["needs --budget"]),
}


# that need the network itself; the others have a linear map of each pixel in its place
REAL = (
    "a network that does not exist",
    "a patch that the network halves",
    "stages that do not exist",
    "an unknown loss",
)


@pytest.fixture(scope="module")
def places(tmp_path_factory, camus4):
    """Folders and files that are wrong in one way each; ``run`` is a run that is well."""
    root = tmp_path_factory.mktemp("places")
    found = {name: root / name for name in ("run", "empty", "untrained", "changed", "labels", "some", "brats")}
    for name in ("empty", "labels", "some", "untrained"):
        found[name].mkdir()
    small = " ".join([*SMALL, f"--config.data.root={camus4}", "--config.train.epochs=1"])
    with pytest.MonkeyPatch.context() as patch:
        use_pixelwise(patch.setattr)
        patch.setenv("XDIM_JAX_CACHE", "off")
        assert train.main([CAMUS, f"--workdir={found['run']}", *small.split()]) == 0
    config = json.loads((found["run"] / "config.json").read_text())
    (found["untrained"] / "config.json").write_text(json.dumps(config))
    (found["untrained"] / "data.json").write_bytes((found["run"] / "data.json").read_bytes())
    shutil.copytree(found["run"], found["changed"])
    config["model"]["out_channels"] = 7
    (found["changed"] / "config.json").write_text(json.dumps(config))
    for folder, names in (("labels", "ab"), ("some", "a")):
        for name in names:
            label = nib.Nifti1Image(np.eye(8, dtype=np.uint8)[..., None].repeat(8, 2), np.eye(4))
            nib.save(label, found[folder] / f"{name}.nii.gz")
    phantom.write_brats(found["brats"], cases=1, convention="brats2021", shape=(64, 64, 64))
    files = {
        "text": ("notes.txt", "a file"),
        "broken_py": ("broken.py", "def get_config(:\n"),
        "bad_space": ("space.py", "def suggest(trial):\n    trial.suggest_float('optim.lr', 0.1, 1)\n"),
        "cut_weights": ("cut.safetensors", "\x10\x00\x00"),
    }
    for name, (file, text) in files.items():
        found[name] = root / file
        found[name].write_text(text)
    return found | {"camus": camus4, "small": small}


def command_line(main, arguments, monkeypatch, capsys):
    """Exit status and what was said, as a shell sees them."""
    monkeypatch.setattr(sys, "argv", ["xdim", *arguments])
    with pytest.raises(SystemExit) as ended:
        run(main)
    said = capsys.readouterr()
    return ended.value.code, said.out + said.err


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_a_misuse_is_one_clear_message(name, places, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDIM_JAX_CACHE", "off")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name not in REAL:
        use_pixelwise(monkeypatch.setattr)
    module, arguments, words = TABLE[name]
    here = {k: str(v) for k, v in places.items()} | {"new": str(tmp_path / "new")}
    before = sorted(p for p in Path(places["run"]).rglob("*") if p.is_file())
    status, said = command_line(
        MAINS[module].main,
        [a.format(**here) for w in arguments.split() for a in w.format(**here).split()],
        monkeypatch,
        capsys,
    )
    assert status == 2, said
    assert "Traceback" not in said
    for word in words:
        assert word.format(**here) in said, said
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name or "tmp" in p.name]
    assert sorted(p for p in Path(places["run"]).rglob("*") if p.is_file()) == before, "a run that is well stays so"


def test_every_command_is_in_the_table():
    assert {line[0] for line in TABLE.values()} == set(MAINS) - {"doctor"}


# -- what the machine lacks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."),
            ["out of memory on the device", "17179869184", "xdim_jax.plan", "--config.train.accumulate"],
        ),
        (MemoryError("Unable to allocate 3.00 TiB"), ["out of memory on the host", "3.00 TiB", "xdim_jax.plan"]),
        (
            RuntimeError("Unable to initialize backend 'cuda': no device"),
            ["no device to compute on", "JAX_PLATFORMS=cuda", "xdim_jax.doctor"],
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/data/dataset.json"), ["/data/dataset.json", "denied"]),
        (OSError(errno.ESTALE, "Stale file handle", b"/net/config.json"), ["/net/config.json", "Stale file handle"]),
    ],
)
def test_what_the_machine_lacks_is_said(error, words, monkeypatch, capsys):
    def main(argv):
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    status, said = command_line(main, [], monkeypatch, capsys)
    assert status == 2 and said.startswith("error: ") and all(word in said for word in words)


@pytest.mark.parametrize("arguments", ["doctor --quick", "plan --config=camus_omnianet:phantom"])
def test_a_platform_without_a_device_is_named(arguments):
    """JAX has no message for CUDA without a GPU; its own assertion must not reach the user."""
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a GPU")
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    command = [sys.executable, "-m", *f"xdim_jax.{arguments}".split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2) and "no visible device of the platform cuda" in said
    assert "AssertionError" not in said and "Traceback" not in said and "please report" not in said


def test_a_program_that_does_not_fit_ends_a_run_with_a_message(places, tmp_path, monkeypatch, capsys):
    def refuse(lowered):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    use_pixelwise(monkeypatch.setattr)
    monkeypatch.setenv("XDIM_JAX_CACHE", "off")
    monkeypatch.setattr(ops, "compile_program", refuse)
    arguments = [CAMUS, *places["small"].split(), f"--workdir={tmp_path / 'run'}"]
    status, said = command_line(train.main, arguments, monkeypatch, capsys)
    assert status == 2 and "out of memory on the device" in said and "Traceback" not in said


def test_no_device_of_the_kind_that_is_asked_for(tmp_path):
    """For real, in a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "rocm"}
    command = [sys.executable, "-m", "xdim_jax.train", CAMUS, f"--workdir={tmp_path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no device to compute on" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "a bug", "x")])
def test_a_fault_of_our_own_keeps_its_traceback(error, monkeypatch):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["xdim"])
    with pytest.raises(type(error), match="a bug"):
        run(main)
