"""Segments cases with a trained network: images in, label maps out on the source grid.

The input is a folder in the layout that the network was trained on (one BraTS case folder too; of nnU-Net's layout,
any folder of images), or the files of one case, one per channel (BraTS: in the order flair t1 t1ce t2). Reference
labels are not needed. Every case becomes <output>/<case id>.nii.gz with the affine, the header and the label values of
its source.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from xdim_jax import checkpoint, cli, infer, log, models, results
from xdim_jax.data import brats
from xdim_jax.data.case import case_from_files, encode_label, read_case, scan_cases, without_label
from xdim_jax.data.datasets import trained_dataset
from xdim_jax.data.image import where
from xdim_jax.data.nifti import write_volume
from xdim_jax.data.prepare import Preparation, prepare
from xdim_jax.data.problem import ERROR
from xdim_jax.errors import UserError
from xdim_jax.files import DATA_FILE, read_json, write_json
from xdim_jax.output import make_output
from xdim_jax.step import make_forward, split_model


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = cli.make_parser(
        "xdim_jax.predict",
        __doc__ or "",
        "exit status: 0 all cases done, 1 some cases failed (named; the others are done), 2 unusable input",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the training run")
    parser.add_argument(
        "--input",
        required=True,
        type=Path,
        nargs="+",
        action="extend",
        help="folder of cases, one case folder, or one file per modality",
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="folder for the label maps; made if it does not exist"
    )
    parser.add_argument(
        "--convention", choices=sorted(brats.CONVENTIONS), help="of BraTS input; default: the training data's"
    )
    parser.add_argument("--overlap", type=float, help="of neighbouring windows, 0 to below 1; default: the config's")
    parser.add_argument("--min_et", type=int, help="smallest ET volume in voxels, 0: off; default: the config's")
    options = parser.parse_args(argv)
    config = cli.read_config(options.workdir)
    for key in ("overlap", "min_et"):
        if getattr(options, key) is not None:
            if key not in config.predict:
                raise UserError(f"--{key} is not a setting of this run's data set, {config.data.dataset}")
            config.predict[key] = getattr(options, key)
    if not 0 <= config.predict.overlap < 1:
        raise UserError(f"--overlap={config.predict.overlap}: expected 0 <= overlap < 1")
    if config.predict.get("min_et", 0) < 0:
        raise UserError(f"--min_et={config.predict.min_et}: expected 0 or more voxels")
    data = config.data.to_dict()
    if options.convention:
        if "convention" not in data:
            raise UserError(f"--convention is of BraTS, but the network was trained on {config.data.dataset}")
        data["convention"] = options.convention
    dataset = trained_dataset(data, read_json(options.workdir / DATA_FILE))
    problems: dict[str, list[str]] = {}
    if len(options.input) == 1 and not options.input[0].is_file():
        scan = scan_cases(dataset, options.input[0], need_labels=False)
        cases = scan.cases
        for problem in scan.problems:
            if problem.severity == ERROR:
                problems.setdefault(problem.case_id or str(problem.path), []).append(str(problem))
            else:
                log.warn(str(problem))
    elif data["dataset"] == "brats":
        cases = [brats.case_from_files(options.input, brats.get_convention(data["convention"]))]
    else:
        cases = [case_from_files(options.input, dataset)]
    settings = Preparation.from_config(data["prepare"])
    cli.cache_programs()

    graphdef, params, stats = split_model(models.build(config.model, seed=0))
    params, stats, source = checkpoint.load_weights(options.workdir, params, stats)
    log.say(f"weights    {options.workdir}, {source}")
    log.say(f"devices    {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})")
    output = make_output(config.output, dataset)
    predict = infer.make_network_predictor(config, make_forward(graphdef), output)
    record = {
        "workdir": str(options.workdir.absolute()),
        "weights": source,
        "images": {case.case_id: [str(where(s).absolute()) for s in case.images] for case in cases},
        "convention": dataset.labels.name,
        "predict": config.predict.to_dict(),
    }
    write_json(options.output / results.PREDICT_FILE, record)

    total, failures = len(cases) + len(problems), list(problems)
    for case_id, messages in problems.items():
        log.warn(f"case {case_id} left out: {'; '.join(messages)}")
        (options.output / f"{case_id}.nii.gz").unlink(missing_ok=True)  # of an earlier run
    for number, case in enumerate(cases, 1):
        begin = time.monotonic()
        path = options.output / f"{case.case_id}.nii.gz"
        try:
            volume = read_case(without_label(case))
        except UserError as error:
            failures.append(case.case_id)
            path.unlink(missing_ok=True)
            log.warn(f"case {number}/{len(cases)} {case.case_id} left out: {error}")
            continue
        prepared = prepare(case, volume, settings)
        label = infer.segment(predict, (params, stats), prepared, output, config.predict)
        write_volume(path, encode_label(case, label), volume.grid)
        log.say(f"case {number}/{len(cases)} {path}  {time.monotonic() - begin:.1f} s")
    if failures:
        log.warn(f"{len(failures)} of {total} cases failed: {', '.join(failures)}")
        return 1
    log.say(
        f"done       evaluate with: python -m xdim_jax.evaluate --pred={options.output} --ref=<labels> --out=<folder>"
    )
    return 0


def command() -> NoReturn:
    """The console entry point."""
    cli.run(main, computes=True)


if __name__ == "__main__":
    command()
