"""Measure the peak memory of predicting one large volume, 512 x 512 x 800 voxels and 5 classes by default.

    python benchmarks/predict_memory.py [--shape=512,512,800] [--patch=64,128,128] [--json=FILE]

The benchmark writes a NIfTI file of int16, and predicts it as xdim_jax.predict does, with a very small, randomly
initialised network. It compares the largest resident set of the process with two bounds: the maximum that the
prediction logs, and twice the size of the float32 image plus 1 GB. On a CPU, the resident set includes the memory of
the device. The exit status is 1 if a bound is exceeded.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from xdim_jax.base.files import write_json

ALLOWANCE = 10**9  # bytes that are allowed in addition to twice the image


def main() -> int:
    """Run the command line, see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="512,512,800", help="voxels along x,y,z")
    parser.add_argument("--patch", default="64,128,128", help="size D,H,W of a window")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = tuple(map(int, options.shape.split(",")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data", shape)
        found = predict(folder, options.patch)
    image = int(np.prod(shape)) * 4
    found |= {"shape": shape, "image": image, "bound": 2 * image + ALLOWANCE}
    print(f"image       {image / 2**30:.2f} GiB as float32")
    print(f"bound       {found['bound'] / 2**30:.2f} GiB: twice the image plus 1 GB")
    print(f"announced   {found['said'] / 2**30:.2f} GiB at most")
    peak, before = found["peak"] / 2**30, found["before"] / 2**30
    print(f"peak        {peak:.2f} GiB resident ({before:.2f} GiB before prediction), {found['seconds']:.0f} s")
    if options.json:
        write_json(options.json, found)
    return 0 if found["peak"] <= min(found["bound"], found["said"]) else 1


def write_data(root: Path, shape: tuple[int, ...]) -> None:
    """Write one CT in nnU-Net's layout, with 4 structures and the background: 5 classes."""
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    rng = np.random.default_rng(0)
    volume = np.empty(shape, np.int16, order="F")
    for z in range(shape[2]):
        volume[:, :, z] = rng.integers(-1000, 1000, shape[:2], np.int16)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), root / "imagesTr" / "a_0000.nii.gz")
    labels = {"background": 0, "a": 1, "b": 2, "c": 3, "d": 4}
    card = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(card))


def predict(folder: Path, patch: str) -> dict:
    """Predict the CT in this process. Return its largest resident set before and after, and the announced maximum."""
    from xdim_jax.base.config import load_config
    from xdim_jax.base.files import write_json
    from xdim_jax.data import case as data_case
    from xdim_jax.data.datasets import get_dataset
    from xdim_jax.inference import memory, predict_cases, predictor
    from xdim_jax.nets import networks
    from xdim_jax.nets.functional import split_model
    from xdim_jax.ops.compilation import cache_programs
    from xdim_jax.runs import checkpoint
    from xdim_jax.runs.workdir import CONFIG_FILE, DATA_FILE

    cache_programs()
    config = load_config("configs/own_dxnet.py", [])
    with config.unlocked():
        config.data.dataset, config.data.root, config.output = "nnunet", str(folder / "data"), "softmax"
        config.data.patch = tuple(map(int, patch.split(",")))
        config.model.encoder.name, config.model.filters = "efficientnet_toy", (16, 16, 8, 8, 8)
    dataset = get_dataset(config.data.to_dict())
    config.model.in_channels, config.model.out_channels = 1, 5
    workdir = folder / "run"
    write_json(workdir / CONFIG_FILE, config.to_dict())
    write_json(workdir / DATA_FILE, data_case.describe(dataset))
    _, params, stats = split_model(networks.build(config.model, seed=0))
    checkpoints = checkpoint.open_checkpoints(workdir)
    checkpoint.save_best(checkpoints, 1, params, stats, 0.5)
    checkpoint.close(checkpoints)
    del params, stats
    ready = predictor.Predictor(workdir)
    case = data_case.case_from_files([folder / "data" / "imagesTr" / "a_0000.nii.gz"], dataset)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin = time.monotonic()
    announced = memory.used_bytes() + sum(memory.required_bytes(ready, [case]))
    failures = predict_cases.predict_cases(ready, [case], folder / "out")
    assert not failures, failures
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "before": before, "said": announced, "seconds": time.monotonic() - begin}


if __name__ == "__main__":
    sys.exit(main())
