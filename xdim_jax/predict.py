"""Segments cases with a trained network: images in, label maps out on the source grid.

The input is a folder in the layout that the network was trained on (one BraTS case folder too; of nnU-Net's layout, any
folder of images), a folder of DICOM slices, or the files of one case, one per channel (BraTS: in the order flair t1
t1ce t2). Reference labels are not needed. Every case becomes <output>/<case id>.nii.gz with the affine, the header and
the label values of its source; with --probabilities and --uncertainty, <output>/probabilities/<case id>.nii (float32,
channels along the fourth axis) and <output>/uncertainty/<case id>.nii.

Several --workdir, or that of a cross-validation, are an ensemble: probabilities are averaged. Cases that are there
already, of the same networks and settings, are skipped.
"""

if __name__ == "__main__":  # before the imports, which take seconds and would be done twice
    from xdim_jax.base.huge_pages import prefer_huge_pages

    prefer_huge_pages()

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from xdim_jax.base import bucket, log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.files import read_json
from xdim_jax.data.case import (
    Case,
)
from xdim_jax.data.layouts import brats
from xdim_jax.inference.predictions import claim_output, predict_cases, remove_prediction
from xdim_jax.inference.predictor import Predictor
from xdim_jax.inference.settings import PRESETS, Settings
from xdim_jax.nets.functional import PRECISIONS
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.runs import environment
from xdim_jax.runs.workdir import SPLIT_FILE, find_members


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = make_parser(
        "xdim_jax.predict",
        __doc__ or "",
        "exit status: 0 all cases done, 1 some cases failed (named; the others are done), 2 unusable input",
    )
    add = parser.add_argument
    add(
        "--workdir",
        required=True,
        nargs="+",
        action="extend",
        help="of a run (gs://, s3:// too), or of several: an ensemble",
    )
    add(
        "--input",
        required=True,
        type=Path,
        nargs="+",
        action="extend",
        help="folder of cases, one case folder, folder of DICOM slices, or one file per modality",
    )
    add("--output", required=True, type=Path, help="folder for the label maps; made if it does not exist")
    add("--overwrite", action="store_true", help="predict anew what is there, whatever it was made with")
    add("--shard", default="", metavar="I/N", help="only every N-th case, from the I-th on (from 0): for several hosts")
    add("--convention", choices=sorted(brats.CONVENTIONS), help="of BraTS input; default: the training data's")
    add("--modality", choices=["CT", "MR"], default="", help="of files or DICOM slices, where training had both")
    add("--preset", choices=PRESETS, default="default", help="fast: little overlap; best: more, and mirror images")
    add("--overlap", type=float, help="of neighbouring windows, 0 to below 1; default: the preset's")
    add("--flips", help="axes to mirror along, of D, H, W, e.g. D,W; none: empty; default: the preset's")
    add("--precision", choices=sorted(PRECISIONS), default="", help="of activations; default: the config's")
    add("--batch", type=int, default=0, help="windows at once; default: 1 on CPU, 4 elsewhere")
    add("--threshold", default="", help="of probabilities: 0.4, or by region: WT=0.5,ET=0.4; default: the config's")
    add("--min_et", type=int, help="BraTS: smallest ET volume in voxels, 0: off; default: the config's")
    add("--largest", default="", help="regions of which only the largest connected part is kept, with commas; or all")
    add("--probabilities", action="store_true", help="write them too: 4 bytes for every voxel and channel")
    add("--uncertainty", action="store_true", help="write the variance over networks and mirror images")
    options = parser.parse_args(argv)
    cache_programs()
    workdirs = [bucket.fetch(w) for w in options.workdir]
    predictor = Predictor(workdirs, read_settings(options), convention=options.convention or "")
    cases, problems = predictor.find_cases(options.input, modality=options.modality)
    for source in predictor.sources:
        log.say(f"weights    {source}")
    log.say(f"devices    {environment.devices()}")
    log.say(f"predict    {predictor.describe()}")
    if trained := _trained(workdirs, cases):
        log.warn(
            f"{len(trained)} of {len(cases)} cases are what these networks were trained on ({shorten(trained)}): their "
            "scores say nothing of new patients; evaluate --workdir predicts what was held out"
        )
    mine = _shard(cases, options.shard)
    todo = claim_output(options.output, predictor, mine, cases, overwrite=options.overwrite)
    failures, total = list(problems), len(mine) + len(problems)
    for name, messages in problems.items():
        log.warn(f"case {name} left out: {'; '.join(messages)}")
        if Path(name).name == name:  # not the path of a stray file
            remove_prediction(options.output, name)
    if len(todo) < len(mine):
        log.say(f"skipped    {len(mine) - len(todo)} of {len(mine)} cases, which are there already")
    failures += predict_cases(predictor, todo, options.output)
    if failures:
        log.warn(f"{len(failures)} of {total} cases failed: {', '.join(failures)}")
        return 1
    log.say(
        f"done       evaluate with: python -m xdim_jax.evaluate --rules=... --pred={options.output} --ref=<labels> "
        "--out=<folder>"
    )
    return 0


def _trained(workdirs: Sequence[Path], cases: Sequence[Case]) -> list[str]:
    """The cases that a network was trained on, by their names and the folder that they lie in."""
    found: set[str] = set()
    for workdir in find_members(workdirs):
        if (workdir / SPLIT_FILE).is_file():
            split = read_json(workdir / SPLIT_FILE)
            names = set(split["train"])
            root = Path(split["root"])
            found |= {c.case_id for c in cases if c.case_id in names and root in c.files[0].absolute().parents}
    return sorted(found)


# -- the command line ---------------------------------------------------------------------------------------------


def read_settings(options: Any) -> Settings:
    """From the flags. Raises UserError for values of another form."""
    flips = None
    if options.flips is not None:
        names = [n.strip().upper() for n in options.flips.split(",") if n.strip()]
        if set(names) - set("DHW"):
            raise UserError(f"--flips={options.flips}: expected D, H and W with commas between them")
        flips = tuple("DHW".index(n) for n in names)
    threshold: float | dict[str, float] | None = None
    try:
        if "=" in options.threshold:
            pairs = (word.split("=", 1) for word in options.threshold.split(","))
            threshold = {name.strip(): float(value) for name, value in pairs}
        elif options.threshold:
            threshold = float(options.threshold)
    except ValueError as error:
        raise UserError(f"--threshold={options.threshold}: expected a number, or <region>=<number>,...") from error
    return Settings(
        options.preset,
        options.overlap,
        flips,
        options.precision,
        options.batch,
        threshold,
        options.min_et,
        tuple(n.strip() for n in options.largest.split(",") if n.strip()),
        options.probabilities,
        options.uncertainty,
    )


def _shard(cases: list[Case], text: str) -> list[Case]:
    if not text:
        return cases
    first, slash, step = text.partition("/")
    if not slash or not text.isascii() or not first.isdigit() or not step.isdigit() or not int(first) < int(step):
        raise UserError(f"--shard={text}: expected I/N with 0 <= I < N, e.g. 0/4")
    return cases[int(first) :: int(step)]


def command() -> NoReturn:
    """The console entry point."""
    run(main)


if __name__ == "__main__":
    command()
