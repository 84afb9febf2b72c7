"""Trains a network from a config; run again with the same arguments, it resumes."""

import functools
import math
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax import checkpoint, cli, infer, inflate, log, mesh, metrics, models, optim, regions, stem, weights
from xdim_jax.data import brats, phantom, pipeline
from xdim_jax.data.splits import check_fold, split_cases
from xdim_jax.errors import UserError, join_problems
from xdim_jax.files import read_json, write_json
from xdim_jax.loading import read_anywhere
from xdim_jax.loop import InterruptedValidationError, Progress, Run, StopRequest, Validation, catch_signals, fit
from xdim_jax.loss import make_loss
from xdim_jax.step import init_state, make_forward, make_train_step, split_model

# keys that may differ when a run is resumed: they change neither data nor numbers
FREE_KEYS = ("data.root", "data.threads", "train.log_every", "train.checkpoint_minutes")


# smallest and largest value of a key, both allowed
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "init.sigma": (1e-3, 1e3),
    "init.spacing": (1e-3, 1e3),
    "data.batch": (1, math.inf),
    "data.patches_per_case": (1, math.inf),
    "data.threads": (1, math.inf),
    "data.tumour_probability": (0, 1),
    "data.phantom.cases": (0, math.inf),
    "data.phantom.held_out": (0, math.inf),
    "optim.b1": (0, 0.9999),
    "optim.b2": (0, 0.99999),
    "optim.lookahead.period": (0, math.inf),
    "optim.lookahead.step_size": (0, 1),
    "optim.schedule.constant_epochs": (0, math.inf),
    "train.epochs": (1, math.inf),
    "train.log_every": (1, math.inf),
    "train.validate_every": (1, math.inf),
    "train.checkpoint_minutes": (0, math.inf),
    "predict.overlap": (0, 0.99),
    "predict.threshold": (0, 1),
    "predict.min_et": (0, math.inf),
}


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = cli.make_parser(
        "xdim_jax.train",
        (__doc__ or "") + "\n\nWrites to the workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/, best/.",
        "any value of the config can be overridden: --config.<key>=<value>, e.g. --config.data.root=/data/BraTS\n"
        "exit status: 0 done, 2 unusable input, 130 or 143 stopped by Ctrl-C or SIGTERM with everything saved\n\n"
        "examples:\n"
        "  python -m xdim_jax.train --config=configs/brats_dxnet.py:phantom --workdir=runs/demo\n"
        "  python -m xdim_jax.train --config=configs/brats_dxnet.py --workdir=runs/dx \\\n"
        "      --config.data.root=/data/BraTS2021_Training_Data",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:WORDS]", help="a recipe, e.g. configs/brats_dxnet.py")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run; made if it does not exist")
    options, overrides = parser.parse_known_args(argv)
    config = cli.load_config(options.config, overrides)
    check_config(config)
    cli.cache_programs()
    return train(config, options.workdir)


def check_config(config: cli.Config) -> None:
    """Finds what cannot work before anything is read or compiled. Raises UserError."""
    convention = brats.get_convention(config.data.convention)
    if not config.data.root and not config.data.phantom.cases:
        raise UserError(
            "no data: give --config.data.root=<folder> with cases laid out as\n"
            f"  {convention.layout()}\n"
            "or take the variant that needs no data, --config=<recipe>.py:phantom"
        )
    if config.data.root and not Path(config.data.root).is_dir():
        raise UserError(f"--config.data.root={config.data.root} is not a folder; expected {convention.layout()}")
    channels = {"in_channels": len(brats.MODALITIES), "out_channels": len(regions.REGIONS)}
    for key, expected in channels.items():
        if config.model[key] != expected:
            raise UserError(f"config.model.{key}={config.model[key]}: BraTS needs {expected}")
    try:
        models.build_abstract(config.model)
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error
    try:
        models.check_patch(config.model, config.data.patch)
    except ValueError as error:
        raise UserError(str(error)) from error
    problems = []
    for key, (low, high) in RANGES.items():
        value = functools.reduce(lambda section, name: section[name], key.split("."), config)
        if not low <= value <= high:
            problems.append(f"config.{key}={value}: expected {low:g} to {high:g}")
    if config.data.dataset != "brats":
        problems.append(f"config.data.dataset={config.data.dataset!r}: known: brats")
    channel_rules = tuple(rule for rule in stem.RULES if rule != "map")  # a map is for weight_port
    for key, known in (("inflate", inflate.RULES), ("channels", channel_rules), ("part", ("all", "encoder"))):
        if config.init[key] not in known:
            problems.append(f"config.init.{key}={config.init[key]!r}: known: {', '.join(known)}")
    if problems:
        raise join_problems(problems, "values out of range")
    check_fold(config.data.fold, config.data.folds)  # before any phantom is written


def initialise(config: cli.Config, params: Any, stats: Any) -> tuple[Any, Any, str]:
    """The weights that the ``init`` section asks for, and where they are from.

    Raises:
        UserError: the file cannot be read, or does not fit the network.
    """
    options = config.init
    if not options.weights:
        return params, stats, "random"
    source = read_anywhere(Path(options.weights))
    accept = tuple(word for word in options.accept.split(",") if word)
    rule = inflate.Inflation(options.inflate, sigma=options.sigma, spacing=options.spacing, seed=config.seed)
    try:
        source = weights.part(source) if options.part == "encoder" else source
        params, stats, done = weights.load(
            config.model, params, stats, source, inflation=rule, channel_rule=options.channels, accept=accept
        )
    except UserError as error:
        raise UserError(f"config.init.weights={options.weights}: {error}") from error
    changed = sorted({what for what in done.values() if what != "copied"})
    return params, stats, f"from {options.weights} ({len(done)} arrays; {', '.join(changed) or 'all copied'})"


def find_data(config: cli.Config, workdir: Path, *, started: bool) -> tuple[list[brats.Case], list[brats.Case]]:
    """Training and validation cases; without a root, phantoms are written below the workdir first.

    Raises:
        UserError: the data cannot be used, or a run that has ``started`` was split otherwise: cases that it trained on
            could come to validate it.
    """
    convention = brats.get_convention(config.data.convention)
    root = Path(config.data.root or workdir / "phantom" / "train")
    if not config.data.root:
        options = config.data.phantom
        shared = {
            "convention": convention,
            "shape": tuple(options.shape),
            "seed": config.seed,
            "difficulty": phantom.Difficulty(noise=options.noise, bias=options.bias),
            "progress": log.say,
        }
        phantom.write_brats(root, cases=options.cases, **shared)
        phantom.write_brats(root.parent / "held_out", cases=options.held_out, first=options.cases, **shared)
    cases = brats.list_cases(root, convention, need_labels=True)
    brats.check_grids(cases)
    train, validation = split_cases(cases, fold=config.data.fold, folds=config.data.folds, seed=config.seed)
    split = {"root": str(root), "train": [c.case_id for c in train], "validation": [c.case_id for c in validation]}
    path = workdir / "split.json"
    if started and path.exists():
        before = read_json(path)
        for side in ("train", "validation"):
            if changed := sorted(set(before[side]) ^ set(split[side])):
                raise UserError(
                    f"the {side} cases are not those that {workdir} began with ({len(changed)} differ: "
                    f"{', '.join(changed[:5])}{', ...' if changed[5:] else ''}). Restore the data in {root} to go on, "
                    "or give another --workdir"
                )
    write_json(path, split)
    return train, validation


def train(config: cli.Config, workdir: Path) -> int:
    """Runs the recipe to its end, or until a signal. Returns the exit status."""
    devices = mesh.make_mesh(config.mesh.data, config.mesh.space, batch=config.data.batch)
    if config.data.patch[0] % devices.shape["space"]:
        raise UserError(
            f"config.mesh.space={devices.shape['space']} does not divide the depth of "
            f"config.data.patch={tuple(config.data.patch)}"
        )
    graphdef, params, stats = split_model(models.build(config.model, seed=config.seed))
    started = checkpoint.exist(workdir)
    origin = "of the run so far"
    if not started:
        params, stats, origin = initialise(config, params, stats)
    cli.claim_workdir(workdir, config, free=FREE_KEYS, started=started)
    train_cases, validation_cases = find_data(config, workdir, started=started)
    per_epoch = pipeline.steps_per_epoch(len(train_cases), config.data.patches_per_case, config.data.batch)
    total = per_epoch * config.train.epochs

    schedule = optim.make_schedule(config.optim.schedule, epochs=config.train.epochs, per_epoch=per_epoch)
    tx = optim.make_optimizer(config.optim, schedule)
    state = init_state(optim.init_params(config.optim, params), stats, tx)
    # LookAhead's two copies start as one array, which cannot be donated twice
    state = mesh.put_replicated(jax.tree.map(jnp.copy, state), devices)
    progress = Progress([0.0] * len(regions.REGIONS))

    log.say(f"devices    {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})")
    log.say(f"mesh       data {devices.shape['data']} x space {devices.shape['space']}")
    log.say(f"network    {config.model.name}, {models.count_parameters(params):,} parameters, weights {origin}")
    log.say(
        f"data       {len(train_cases)} training, {len(validation_cases)} validation cases, fold {config.data.fold}"
    )
    log.say(f"steps      {config.train.epochs} epochs x {per_epoch} = {total}")
    log.say(f"workdir    {workdir}")
    checkpoints = checkpoint.open_checkpoints(workdir)
    restored = checkpoint.restore_latest(checkpoints, state, log.warn)
    if restored:
        state, progress = restored[0], Progress(**restored[1])
    start = int(state.step)
    log.say(f"resume     from step {start}" if restored else "resume     nothing to resume, starting at step 0")

    stream = pipeline.make_stream(
        train_cases,
        patch=tuple(config.data.patch),
        tumour_probability=config.data.tumour_probability,
        patches_per_case=config.data.patches_per_case,
        batch=config.data.batch,
        seed=config.seed,
        start_step=start,
        threads=config.data.threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with catch_signals() as stop:
        run = Run(
            config=config.train,
            per_epoch=per_epoch,
            step=make_train_step(graphdef, make_loss(config.loss), lambda label: regions.encode(label, jnp), tx),
            key=jax.random.key(config.seed),
            schedule=schedule,
            mesh=devices,
            checkpoints=checkpoints,
            recorder=log.open_recorder(workdir, start, writes=jax.process_index() == 0),
            validate=make_validation(graphdef, validation_cases, tuple(config.data.patch), config.predict),
            stop=stop,
        )
        try:
            fit(run, state, progress, stream, validated=_validated(workdir, start))
        finally:
            log.close_recorder(run.recorder)
            checkpoint.close(checkpoints)
    if stop.signal:
        log.say(f"stopped    by {signal.Signals(stop.signal).name}, all saved; run the same command to go on")
        return 128 + stop.signal
    log.say(
        f"done       predict with: python -m xdim_jax.predict --workdir={workdir} --input=<cases> --output=<folder>"
    )
    return 0


def _validated(workdir: Path, step: int) -> bool:
    return any(r["kind"] == "validation" and r["step"] == step for r in log.read_records(workdir))


def make_validation(
    graphdef: Any, cases: Sequence[brats.Case], patch: tuple[int, int, int], options: Mapping[str, Any]
) -> Validation:
    """Whole-volume validation: mean Dice per region over the cases, post-processed as predictions are.

    A region that is empty in both maps counts 1, as on the BraTS platform.
    """
    predict = infer.make_volume_predictor(make_forward(graphdef), patch=patch, overlap=options["overlap"])

    def validate(weights: Any, stop: StopRequest) -> dict[str, float]:
        scores = []
        for case in cases:
            if stop.signal:
                raise InterruptedValidationError
            volume = brats.read_case(case)
            assert volume.label is not None
            predicted = regions.encode(infer.segment(predict, weights, volume, options))
            reference = regions.encode(volume.label)
            dice = [metrics.dice(predicted[..., r], reference[..., r]) for r in range(len(regions.REGIONS))]
            scores.append(np.nan_to_num(dice, nan=1.0))
        return dict(zip(regions.REGIONS, np.mean(scores, 0).tolist(), strict=True))

    return validate


def command() -> NoReturn:
    """The console entry point."""
    cli.run(main, computes=True)


if __name__ == "__main__":
    command()
