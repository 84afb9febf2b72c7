"""Convert predictions to the files that a challenge expects for upload.

    camus   patient0001_{2CH,4CH}_{ED,ES}.mhd with .raw (or .nii.gz), labels 1, 2, 3, in one folder
    chaos   Task{n}/CT/<id>/Results/img000.png ..., Task{n}/MR/<id>/{T1DUAL,T2SPIR}/Results/img000.png ...,
            grey levels 63, 126, 189, 252, slices in the order of the DICOM file names; needs --task
    brats   <case id>.nii.gz with the label values of the predictions, on the grid of the image

--pred is an output folder of xdim_jax.predict. Its predict.json lists the images, and every label map must have the
grid of its image. All label maps are checked before the first file is written.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from xdim_jax.base import log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import atomic_path, read_json
from xdim_jax.scoring import brats, chaos
from xdim_jax.scoring.results import PREDICT_FILE
from xdim_jax.scoring.submission import pack_brats, pack_camus, pack_chaos


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    parser = make_parser("xdim_jax.submit", __doc__ or "", "exit status: 0 done, 2 unusable input")
    parser.add_argument(
        "--challenge", required=True, choices=["camus", "chaos", "brats"], help="challenge whose format is written"
    )
    parser.add_argument("--pred", required=True, type=Path, help="folder of predicted label maps")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; it must not exist")
    parser.add_argument("--zip", action="store_true", help="also write the archive <out>.zip")
    parser.add_argument(
        "--task", choices=sorted(chaos.TASKS), action="append", help="chaos: task (required); repeat for several"
    )
    parser.add_argument("--format", choices=["mhd", "nii.gz"], help="camus: file format (default: mhd)")
    parser.add_argument(
        "--convention",
        choices=sorted(brats.CODINGS),
        help="brats: convention that the label values of the predictions must have; they are not converted (default: "
        "the convention in predict.json)",
    )
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"--out={options.out} exists already; remove it, or give a folder that does not exist")
    for name, challenge in (("task", "chaos"), ("format", "camus"), ("convention", "brats")):
        if getattr(options, name) is not None and options.challenge != challenge:
            raise UserError(f"--{name} is an option of --challenge={challenge}, not of {options.challenge}; remove it")
    if options.challenge == "chaos" and not options.task:
        raise UserError("--challenge=chaos needs --task, one of 1 to 5; repeat it for several tasks")
    if options.zip and Path(f"{options.out}.zip").exists():
        raise UserError(f"{options.out}.zip exists already; remove it, or give another --out")
    if not (options.pred / PREDICT_FILE).is_file():
        raise UserError(
            f"--pred={options.pred} has no {PREDICT_FILE}: expected the folder that was given to xdim_jax.predict as "
            "--output"
        )
    record = read_json(options.pred / PREDICT_FILE)
    if not isinstance(record, dict) or not isinstance(record.get("images"), dict):
        raise UserError(f"{options.pred / PREDICT_FILE} does not list images; predict again with xdim_jax.predict")
    if options.challenge == "camus":
        writers = pack_camus(options.pred, record["images"], options.format or "mhd")
    elif options.challenge == "chaos":
        writers = pack_chaos(options.pred, record["images"], options.task)
    else:
        convention = options.convention or str(record.get("convention"))
        if convention not in brats.CODINGS:
            raise UserError(
                f"the predictions in {options.pred} have the label convention {convention}: expected one of "
                f"{', '.join(brats.CODINGS)}; check --challenge, or give --convention"
            )
        writers = pack_brats(options.pred, record["images"], convention)
    with atomic_path(options.out) as folder:
        folder.mkdir()
        count = sum(write(folder) for write in writers)
    log.say(f"written    {options.out}: {count} files")
    if options.zip:
        with atomic_path(Path(f"{options.out}.zip")) as archive:
            shutil.make_archive(str(archive.with_suffix("")), "zip", options.out)
        log.say(f"archive    {options.out}.zip")
    return 0


def command() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
