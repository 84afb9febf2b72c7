"""Train nnU-Net for a given processor time on the cases and the split of a run, for a comparison by Dice.

    /venvs/nnunet/bin/python -m benchmarks.nnunet_training --nnunet=/venvs/nnunet/bin --dataset=camus --views=4CH \
        --root=/data/camus --split=runs/ours/split.json --hours=1 --out=comparison

It runs in the environment of nnU-Net 2 (`pip install nnunetv2`), in which the packages of this project are installed,
too. The cases are written in nnU-Net's raw format, and nnU-Net plans and preprocesses them. Its trainer, with its own
plans, augmentation, loss and test-time flips, then trains for as many steps as fit into --hours of processor time. The
time of a step is measured first. The learning rate follows nnU-Net's schedule over these steps. The validation cases
are predicted at the end.

The split is the file `split.json` of a run of this package. The label maps in --out/predictions have the names, values
and grids of predictions of this package, so both are scored by `xdim_jax.evaluate` with the rules of the challenge, and
compared with `xdim_jax.compare`. --out/record.json has the number of steps, the processor time and the wall time.
Planning and preprocessing are not counted. nnU-Net learns one structure for each label; with --regions, it learns the
regions of the data set, as is usual for BraTS.

nnU-Net's plans are made for a GPU. --spacing, --patch and --batch replace these values of its plan; its network then
has as many stages as nnU-Net's planner chooses for such a patch.
"""

import argparse
import copy
import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from benchmarks.nnunet_plans import DATASET_ID, DATASET_NAME, run_nnunet, write_raw
from xdim_jax.base.errors import UserError
from xdim_jax.data.case import Case, list_cases
from xdim_jax.data.datasets import DATASETS, get_dataset
from xdim_jax.data.images.image import read_grid
from xdim_jax.data.images.nifti import write_volume
from xdim_jax.data.options import add_options, read_section
from xdim_jax.data.reading import encode_label

EPOCH = 10  # training steps of an epoch; one validation step follows


def main() -> None:
    """Run the command line, see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet", type=Path, required=True, help="folder of the commands nnUNetv2_*")
    parser.add_argument("--dataset", choices=list(DATASETS), default="nnunet")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--split", type=Path, required=True, help="split.json of a run")
    parser.add_argument("--configuration", default="2d", help="2d or 3d_fullres")
    parser.add_argument("--hours", type=float, default=1.0, help="processor time of training")
    parser.add_argument("--regions", action="store_true", help="train on the regions of the data set")
    parser.add_argument("--spacing", type=parse_numbers, help="mm along (D,)H,W in place of nnU-Net's; with --patch")
    parser.add_argument("--patch", type=parse_numbers, help="voxels along (D,)H,W in place of nnU-Net's")
    parser.add_argument("--batch", type=int, help="in place of nnU-Net's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    add_options(parser)
    options = parser.parse_args()
    if (options.spacing is None) != (options.patch is None):
        parser.error("--spacing and --patch belong together: the patch covers another part of the image otherwise")
    split = json.loads(options.split.read_text())
    dataset = get_dataset(read_section(options, options.dataset))
    wanted = {*split["train"], *split["validation"]}
    cases = [case for case in list_cases(dataset, options.root, need_labels=True) if case.case_id in wanted]
    if missing := wanted - {case.case_id for case in cases}:
        raise UserError(f"{options.split} names cases that {options.root} does not have: {sorted(missing)[:5]}")
    prepare(options, dataset, cases, split)
    train(options, [case for case in cases if case.case_id in set(split["validation"])])


def prepare(options: argparse.Namespace, dataset: Any, cases: list[Any], split: dict[str, list[str]]) -> None:
    """Write the raw cases, plan and preprocess them, and write the split; nothing is done twice.

    Raises:
        UserError: --out was prepared for another split or with other options.
    """
    folder = options.out / "preprocessed" / DATASET_NAME
    marker = options.out / "prepared.json"
    wanted = {"split": split, "configuration": options.configuration, "regions": options.regions}
    wanted |= {"spacing": options.spacing, "patch": options.patch, "batch": options.batch}
    if marker.is_file():
        if json.loads(marker.read_text()) != wanted:
            raise UserError(f"{options.out} was prepared for another split or with other options; give another --out")
        return
    for earlier in ("raw", "preprocessed", "results", "predictions"):
        shutil.rmtree(options.out / earlier, ignore_errors=True)
    write_raw(dataset, cases, options.out / "raw" / DATASET_NAME, regions=options.regions)
    plans = change_plan(run_nnunet(options.nnunet, options.out), options)
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans, indent=1))
    environment = nnunet_environment(options.out)
    command = [options.nnunet / "nnUNetv2_preprocess", "-d", str(DATASET_ID), "-c", options.configuration, "-np", "1"]
    subprocess.run(command, env=environment, check=True)
    splits = [{"train": sorted(split["train"]), "val": sorted(split["validation"])}]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    marker.write_text(json.dumps(wanted))


def change_plan(plans: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return nnU-Net's plans with the spacing, patch and batch of the options, and a network for this patch."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    changed: Any = copy.deepcopy(dict(plans))
    plan = changed["configurations"][options.configuration]
    if options.batch:
        plan["batch_size"] = options.batch
    if options.spacing:
        _, strides, kernels, patch, _ = get_pool_and_conv_props(options.spacing, options.patch, 4, 999999)
        network, stages = plan["architecture"]["arch_kwargs"], len(strides)
        if stages > len(network["features_per_stage"]):
            raise UserError(f"--patch={options.patch}: larger than the patch of nnU-Net's plan, {plan['patch_size']}")
        plan |= {"spacing": options.spacing, "patch_size": [int(n) for n in patch]}
        network |= {"n_stages": stages, "strides": _integers(strides), "kernel_sizes": _integers(kernels)}
        for key in ("features_per_stage", "n_conv_per_stage"):
            network[key] = network[key][:stages]
        network["n_conv_per_stage_decoder"] = network["n_conv_per_stage_decoder"][: stages - 1]
    return changed


def _integers(table: Any) -> list[list[int]]:
    """Return rows of NumPy integers as lists that JSON can hold."""
    return [[int(n) for n in row] for row in table]


def parse_numbers(text: str) -> list[float]:
    """Return the numbers in a text, separated by commas; whole numbers as integers."""
    numbers = [float(word) for word in text.split(",")]
    return [int(n) if n == int(n) else n for n in numbers]


def nnunet_environment(out: Path) -> dict[str, str]:
    """Return the environment variables of nnU-Net, whose data loader then runs in the training process."""
    return os.environ | {
        "nnUNet_raw": str((out / "raw").absolute()),
        "nnUNet_preprocessed": str((out / "preprocessed").absolute()),
        "nnUNet_results": str((out / "results").absolute()),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_compile": "f",
    }


def train(options: argparse.Namespace, validation: list[Case]) -> None:
    """Train and predict the validation cases, and write the record."""
    os.environ.update(nnunet_environment(options.out))
    import torch  # reads the environment, as nnU-Net does
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    folder = options.out / "preprocessed" / DATASET_NAME
    plans, card = (json.loads((folder / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def make_trainer(epochs: int) -> Any:
        torch.manual_seed(options.seed)
        np.random.seed(options.seed)  # noqa: NPY002 - nnU-Net's loader uses the global generator
        own_plans = copy.deepcopy(plans) | {"continue_training": False}
        trainer = nnUNetTrainer(own_plans, options.configuration, 0, card, torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, EPOCH, 1
        trainer.initialize()
        return trainer

    probe = make_trainer(1)
    probe.on_train_start()
    probe.on_train_epoch_start()
    probe.train_step(next(probe.dataloader_train))
    begin = processor_seconds()
    for _ in range(2):
        probe.train_step(next(probe.dataloader_train))
    step = (processor_seconds() - begin) / 2
    epochs = max(int(3600 * options.hours / (step * (EPOCH + 0.4))), 1)
    print(f"a step takes {step:.1f} s of processor time: {epochs} epochs of {EPOCH} steps", flush=True)
    del probe
    shutil.rmtree(options.out / "results", ignore_errors=True)
    trainer = make_trainer(epochs)
    begin, started = processor_seconds(), time.monotonic()
    trainer.run_training()
    trained = processor_seconds() - begin
    trainer.perform_actual_validation()
    export(validation, Path(trainer.output_folder) / "validation", options.out / "predictions")
    record = {
        "steps": epochs * EPOCH,
        "batch": trainer.batch_size,
        "hours": trained / 3600,
        "hours_with_prediction": (processor_seconds() - begin) / 3600,
        "wall_hours": (time.monotonic() - started) / 3600,
    }
    (options.out / "record.json").write_text(json.dumps(record, indent=2))
    print(record)


def export(cases: list[Case], source: Path, target: Path) -> None:
    """Write nnU-Net's label maps of cases with the values and the grids of the data set."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for case in cases:
        label = np.asarray(nib.load(source / f"{case.case_id}.nii.gz").dataobj).transpose(2, 1, 0)
        grid = read_grid(case.images[0], case.axes)
        write_volume(target / f"{case.case_id}.nii.gz", encode_label(case, label.astype(np.uint8)), grid)


def processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
