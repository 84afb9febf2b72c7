"""Segment cases with a trained network, and write label maps on the voxel grid of the images.

The input is a folder in the layout of the training data, one BraTS case folder, or the files of one case, one per
channel (BraTS: in the order flair t1 t1ce t2). In nnU-Net's layout, it can also be a folder of images such as imagesTs.
A network with one channel accepts any folder: all images and all DICOM series in it and in its subfolders are
segmented. Reference labels are not needed.

The label map of a case is <output>/<case id>.nii.gz. If the folder has none of these layouts, the id of an image
consists of the names of its subfolders and its file name, and that of a DICOM series consists of PatientID and
SeriesNumber. Affine and header are those of the image, and label values those of the data set. A label map that was
predicted from another image is never overwritten. --probabilities adds <output>/probabilities/<case id>.nii (float32,
channels along the fourth axis), and --uncertainty adds <output>/uncertainty/<case id>.nii. With --compress, these files
end with .nii.gz.

The networks of several --workdir, or of all folds of a cross-validation, form an ensemble: their probabilities are
averaged. They may differ in architecture, patch and preparation, for example 2D and 3D. Cases whose predictions are up
to date (same networks, settings and images) are skipped.
"""

if __name__ == "__main__":  # this may restart the process, so it comes before the imports, which take seconds
    from xdim_jax.base.huge_pages import prefer_huge_pages

    prefer_huge_pages()

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from xdim_jax.base import bucket, log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.errors import UserError
from xdim_jax.data.layouts import brats
from xdim_jax.inference.predict_cases import predict_paths
from xdim_jax.inference.predictor import Predictor
from xdim_jax.inference.settings import PRESETS, Settings
from xdim_jax.nets.functional import PRECISIONS
from xdim_jax.ops.compilation import cache_programs


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    options = _parser().parse_args(argv)
    settings, shard = _read_settings(options), _read_shard(options.shard)
    cache_programs()
    predictor = Predictor([bucket.fetch(w) for w in options.workdir], settings, convention=options.convention or "")
    failures = predict_paths(
        predictor,
        options.input,
        options.output,
        modality=options.modality,
        series=[word.strip() for word in options.series.split(",") if word.strip()],
        shard=shard,
        overwrite=options.overwrite,
    )
    if failures:
        return 1
    log.say(
        f"done       evaluate with: python -m xdim_jax.evaluate --rules=... --pred={options.output} --ref=<labels> "
        "--out=<folder>"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "xdim_jax.predict",
        __doc__ or "",
        "exit status: 0 all cases are predicted, 1 some cases failed (the others are predicted), 2 unusable input",
    )
    add = parser.add_argument
    add(
        "--workdir",
        required=True,
        nargs="+",
        action="extend",
        help="workdir of a run (also gs://, s3://), or several workdirs for an ensemble",
    )
    add(
        "--input",
        required=True,
        type=Path,
        nargs="+",
        action="extend",
        help="folder of cases, one case folder, folder of DICOM slices, or one file per channel",
    )
    add(
        "--output",
        required=True,
        type=bucket.local_path,
        help="folder for the label maps, created if it does not exist",
    )
    add("--overwrite", action="store_true", help="predict all cases again, also those whose predictions are up to date")
    add(
        "--shard",
        default="",
        metavar="I/N",
        help="predict only cases I, I + N, I + 2N, ... (I from 0), to divide the work among N hosts",
    )
    add(
        "--convention",
        choices=sorted(brats.CONVENTIONS),
        help="file names and labels of BraTS input; default: those of training",
    )
    add(
        "--series",
        default="",
        help="comma-separated DICOM series to predict, each by its number, description, UID or case id; default: all",
    )
    add(
        "--modality",
        choices=["CT", "MR"],
        default="",
        help="modality of the input; needed if the training data had both and DICOM tags do not specify it",
    )
    add(
        "--preset",
        choices=PRESETS,
        default="default",
        help="fast: overlap 0.25; best: overlap 0.5 and test-time flips; default: as in the config of the run",
    )
    add(
        "--overlap",
        type=float,
        help="overlap of neighbouring windows, as a fraction in [0, 1); default: that of the preset",
    )
    add("--flips", help="axes of the test-time flips, e.g. D,W; empty for none; default: those of the preset")
    add(
        "--precision",
        choices=sorted(PRECISIONS),
        default="",
        help="precision of activations; default: that of training",
    )
    add("--batch", type=int, default=0, help="number of windows that are computed at once; default: 1 on CPU, else 4")
    add(
        "--threshold",
        default="",
        help="threshold of probabilities, e.g. 0.4 or WT=0.5,ET=0.4; default: the thresholds that fit chose, otherwise "
        "that of the config",
    )
    add("--min_et", type=int, help="BraTS: smallest ET in voxels, 0 for no limit; default: that of the config")
    add(
        "--largest",
        default="",
        help="comma-separated regions, all or none: keep only their largest component; default: as chosen by fit",
    )
    add(
        "--min_volume",
        default="",
        help="smallest component in ml, e.g. 0.1 or liver=5,lesion=0.1; 0 for no limit; default: as chosen by fit",
    )
    add("--probabilities", action="store_true", help="also write probabilities (4 bytes per voxel and channel)")
    add("--uncertainty", action="store_true", help="also write the variance over networks and test-time flips")
    add("--compress", action="store_true", help="write these files as .nii.gz, rounded to 16 bits per voxel")
    return parser


def _read_settings(options: argparse.Namespace) -> Settings:
    """Return the settings that the flags give. Raises UserError if a value cannot be parsed."""
    return Settings(
        preset=options.preset,
        overlap=options.overlap,
        flips=_read_flips(options.flips),
        precision=options.precision,
        batch=options.batch,
        threshold=_read_threshold(options.threshold),
        min_et=options.min_et,
        min_volume=_read_min_volume(options.min_volume),
        largest=tuple(n.strip() for n in options.largest.split(",") if n.strip()),
        probabilities=options.probabilities,
        uncertainty=options.uncertainty,
        compress=options.compress,
    )


def _read_flips(text: str | None) -> tuple[int, ...] | None:
    """Return the axes (0: D, 1: H, 2: W) in a list such as ``D,W``."""
    if text is None:
        return None
    names = [n.strip().upper() for n in text.split(",") if n.strip()]
    if set(names) - set("DHW"):
        raise UserError(f"--flips={text}: expected some of D, H and W, separated by commas")
    return tuple("DHW".index(n) for n in names)


def _read_threshold(text: str) -> float | dict[str, float] | None:
    """Return the threshold in a text such as ``0.4`` or ``WT=0.5,ET=0.4``."""
    try:
        if "=" in text:
            pairs = (word.split("=", 1) for word in text.split(","))
            return {name.strip(): float(value) for name, value in pairs}
        return float(text) if text else None
    except ValueError as error:
        raise UserError(f"--threshold={text}: expected a number, or <region>=<number>,...") from error


def _read_min_volume(text: str) -> dict[str, float] | None:
    """Return the volumes (ml) in a text such as ``liver=5,lesion=0.1``; ``{"": 0.1}`` for one value for all regions."""
    if not text:
        return None
    try:
        if "=" not in text:
            return {"": float(text)}
        return {name.strip(): float(value) for name, value in (word.split("=", 1) for word in text.split(","))}
    except ValueError as error:
        raise UserError(f"--min_volume={text}: expected a number of ml, or <region>=<number>,...") from error


def _read_shard(text: str) -> tuple[int, int]:
    """Return I and N of a text ``I/N``; 0 and 1 if it is empty."""
    if not text:
        return 0, 1
    first, slash, step = text.partition("/")
    if not slash or not text.isascii() or not first.isdigit() or not step.isdigit() or not int(first) < int(step):
        raise UserError(f"--shard={text}: expected I/N with 0 <= I < N, e.g. 0/4")
    return int(first), int(step)


def command() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
