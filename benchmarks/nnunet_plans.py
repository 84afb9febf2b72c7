"""Compare planned recipes with the plans of nnU-Net, on the same cases.

    python -m benchmarks.nnunet_plans --nnunet=/venvs/nnunet/bin --dataset=brats --convention=brats2021 \
        --root=/data/BraTS18 --recipe=recipe.py --out=comparison

The benchmark writes the cases to --out in nnU-Net's raw format, runs `nnUNetv2_extract_fingerprint` and
`nnUNetv2_plan_experiment` there, prints the table, and writes it to --out/plans.md. nnU-Net (`pip install nnunetv2`)
is installed in a separate environment. Each structure is a separate label, because regions do not change nnU-Net's
plans.
"""

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from xdim_jax.base.config import Config, load_config
from xdim_jax.base.errors import UserError
from xdim_jax.data.case import Case, Dataset, list_cases
from xdim_jax.data.datasets import DATASETS, get_dataset
from xdim_jax.data.options import add_options, read_section
from xdim_jax.data.reading import read_case
from xdim_jax.scoring.tables import Table

DATASET_ID = 900
DATASET_NAME = f"Dataset{DATASET_ID}_Compared"


def main() -> None:
    """Run the command line, see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet", type=Path, required=True, help="folder of the commands nnUNetv2_*")
    parser.add_argument("--dataset", choices=list(DATASETS), default="nnunet")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--recipe", required=True, help="recipe that was planned for these data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=0, help="number of cases; 0 for all")
    add_options(parser)
    options = parser.parse_args()
    dataset = get_dataset(read_section(options, options.dataset))
    cases = list_cases(dataset, options.root, need_labels=True)[: options.cases or None]
    folder = options.out / "raw" / DATASET_NAME
    for earlier in (folder, options.out / "preprocessed"):
        shutil.rmtree(earlier, ignore_errors=True)
    write_raw(dataset, cases, folder)
    plans = run_nnunet(options.nnunet, options.out)
    table = compare(plans, load_config(options.recipe, []))
    (options.out / "plans.md").write_text(table.markdown())
    print(table.markdown())


def write_raw(dataset: Dataset, cases: list[Case], folder: Path, *, regions: bool = False) -> None:
    """Write cases in nnU-Net's raw format, with one structure for each label, or with the regions of the data set."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for case in cases:
        volume = read_case(case)
        assert volume.label is not None
        depth, height, width = volume.grid.spacing
        affine = np.diag([width, height, depth, 1.0])
        for channel in range(volume.image.shape[3]):
            array = volume.image[..., channel].transpose(2, 1, 0)
            path = folder / "imagesTr" / f"{case.case_id}_{channel:04d}.nii.gz"
            nib.save(nib.Nifti1Image(array, affine), path)
        nib.save(
            nib.Nifti1Image(volume.label.transpose(2, 1, 0), affine), folder / "labelsTr" / f"{case.case_id}.nii.gz"
        )
    ct = dataset.holds_ct and all(case.info.get("modality") == "CT" for case in cases)
    labels: dict[str, Any] = {name: i for i, name in enumerate(dataset.labels.structures)}
    order = {}
    if regions:  # outer regions first, because nnU-Net writes inner ones over them
        sets = dict(sorted(dataset.regions.sets.items(), key=lambda item: -len(item[1])))
        labels = {"background": 0} | {name: sorted(members) for name, members in sets.items()}
        order = {"regions_class_order": [dataset.regions.own_label(name) for name in sets]}
    card = order | {
        "channel_names": {str(i): "CT" if ct else name for i, name in enumerate(dataset.channels)},
        "labels": labels,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(card, indent=2))


def run_nnunet(commands: Path, out: Path) -> Mapping[str, Any]:
    """Run nnU-Net's planner, and return its plans."""
    environment = os.environ | {
        "nnUNet_raw": str((out / "raw").absolute()),
        "nnUNet_preprocessed": str((out / "preprocessed").absolute()),
        "nnUNet_results": str((out / "results").absolute()),
    }
    for command in ("nnUNetv2_extract_fingerprint", "nnUNetv2_plan_experiment"):
        subprocess.run([commands / command, "-d", str(DATASET_ID)], env=environment, check=True)
    path = out / "preprocessed" / DATASET_NAME / "nnUNetPlans.json"
    return json.loads(path.read_text())


def compare(plans: Mapping[str, Any], config: Config) -> Table:
    """Return the table: one column for each configuration of nnU-Net, and one for the recipe."""
    names = [name for name in ("2d", "3d_fullres", "3d_lowres") if name in plans["configurations"]]
    rows = []
    found = [plans["configurations"][name] for name in names]
    prepare = config.data.prepare
    spacing = tuple(prepare.spacing)
    rows.append(("spacing, mm", *(_numbers(c.get("spacing", ())) for c in found), _numbers(spacing)))
    rows.append(("patch", *(_numbers(c.get("patch_size", ())) for c in found), _numbers(config.data.patch)))
    rows.append(("batch", *(str(c.get("batch_size", "-")) for c in found), str(config.data.batch)))
    rows.append(
        (
            "intensities",
            *(
                ", ".join(sorted({n.removesuffix("Normalization") for n in c.get("normalization_schemes", ())}))
                for c in found
            ),
            f"CT, window {_numbers(prepare.window)}" if prepare.window else prepare.normalise,
        )
    )
    rows.append(
        (
            "masked by nonzero",
            *(str(any(c.get("use_mask_for_norm", ()))) for c in found),
            str(prepare.crop == "nonzero"),
        )
    )
    strides = [c.get("architecture", {}).get("arch_kwargs", {}).get("strides", []) for c in found]
    depth = tuple(config.model.depth.strides) if config.model.name == "dxnet" else ()
    rows.append(
        ("depth strides", *(_numbers([s[0] for s in each if len(s) == 3]) for each in strides), _numbers(depth))
    )
    header = ("", *(f"nnU-Net {name}" for name in names), f"planned: {config.model.name}")
    return Table("Plans for the same cases", header, tuple(rows), "Numbers along D, H, W.")


def _numbers(values: Any) -> str:
    return ", ".join(f"{float(v):.3g}" for v in values) or "-"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
