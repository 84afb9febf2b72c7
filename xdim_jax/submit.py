"""Packs predictions as a challenge wants them uploaded.

    camus   patient0001_{2CH,4CH}_{ED,ES}.mhd and .raw (or .nii.gz), labels 1, 2, 3, in one folder
    chaos   Task{n}/CT/<id>/Results/img000.png ..., Task{n}/MR/<id>/{T1DUAL,T2SPIR}/Results/..., greys 63, 126, 189,
            252, slices in the order of the DICOM files' names; --task says for which tasks
    brats   <case id>.nii.gz with the year's labels, on the grid of its image

--pred is a folder that xdim_jax.predict wrote: its predict.json says where the images are, which every label map is
compared with. Everything is checked before anything is written; --out becomes a folder, and with --zip also an archive.
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
    """The command line, see ``--help``."""
    parser = make_parser("xdim_jax.submit", __doc__ or "", "exit status: 0 done, 2 unusable input")
    parser.add_argument("--challenge", required=True, choices=["camus", "chaos", "brats"])
    parser.add_argument("--pred", required=True, type=Path, help="folder of predicted label maps")
    parser.add_argument("--out", required=True, type=Path, help="folder to make; it must not exist")
    parser.add_argument("--zip", action="store_true", help="also <out>.zip")
    parser.add_argument("--task", choices=sorted(chaos.TASKS), action="append", help="chaos: again for more")
    parser.add_argument("--format", choices=["mhd", "nii.gz"], default="mhd", help="camus (default %(default)s)")
    parser.add_argument(
        "--convention", choices=sorted(brats.CODINGS), help="brats: of the labels; default: that of the predictions"
    )
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"{options.out} exists already; give a folder that does not, or remove it")
    if options.challenge == "chaos" and not options.task:
        raise UserError("--challenge=chaos needs --task=1 to 5, again for more than one")
    if options.zip and Path(f"{options.out}.zip").exists():
        raise UserError(f"{options.out}.zip exists already; remove it, or give another --out")
    if not (options.pred / PREDICT_FILE).is_file():
        raise UserError(
            f"--pred={options.pred} has no {PREDICT_FILE}: it is not what xdim_jax.predict wrote; give its --output"
        )
    record = read_json(options.pred / PREDICT_FILE)
    if not isinstance(record, dict) or not isinstance(record.get("images"), dict):
        raise UserError(f"{options.pred / PREDICT_FILE} has no images; predict with python -m xdim_jax.predict")
    if options.challenge == "camus":
        writers = pack_camus(options.pred, record["images"], options.format)
    elif options.challenge == "chaos":
        writers = pack_chaos(options.pred, record["images"], options.task)
    else:
        convention = options.convention or str(record.get("convention"))
        if convention not in brats.CODINGS:
            raise UserError(
                f"{options.pred} was predicted in the labels of {convention}, which is no BraTS: --challenge?"
            )
        writers = pack_brats(options.pred, record["images"], convention)
    with atomic_path(options.out) as folder:
        folder.mkdir()
        count = sum(write(folder) for write in writers)
    log.say(f"packed     {options.out}: {count} files")
    if options.zip:
        with atomic_path(Path(f"{options.out}.zip")) as archive:
            shutil.make_archive(str(archive.with_suffix("")), "zip", options.out)
        log.say(f"archive    {options.out}.zip")
    return 0


def command() -> NoReturn:
    """The console entry point."""
    run(main)


if __name__ == "__main__":
    command()
