"""Trains a network from a config; run again with the same arguments, it resumes."""

import dataclasses
import functools
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax import checkpoint, cli, infer, inflate, log, mesh, metrics, models, optim, stem, weights
from xdim_jax.augment import make_augment
from xdim_jax.data import case as data_case
from xdim_jax.data import phantom, pipeline, store
from xdim_jax.data.case import Case, Dataset
from xdim_jax.data.datasets import get_dataset
from xdim_jax.data.prepare import Preparation, check_preparation
from xdim_jax.data.splits import check_fold, official_split, split_cases
from xdim_jax.errors import UserError, join_problems, shorten
from xdim_jax.files import DATA_FILE, read_json, write_json
from xdim_jax.loading import read_anywhere
from xdim_jax.loop import InterruptedValidationError, Progress, Run, StopRequest, Validation, catch_signals, fit
from xdim_jax.loss import make_loss
from xdim_jax.step import init_state, make_forward, make_train_step, split_model

# keys that may differ when a run is resumed: they change neither data nor numbers
FREE_KEYS = ("data.root", "data.store", "data.threads", "train.log_every", "train.checkpoint_minutes")


# smallest and largest value of a key, both allowed
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "init.sigma": (1e-3, 1e3),
    "init.spacing": (1e-3, 1e3),
    "data.batch": (1, math.inf),
    "data.patches_per_case": (1, math.inf),
    "data.threads": (1, math.inf),
    "data.foreground": (0, 1),
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
    dataset = check_config(config)
    cli.cache_programs()
    return train(config, dataset, options.workdir)


def check_config(config: cli.Config) -> Dataset:
    """Finds what cannot work before anything is read or compiled, and fills in what the data decide.

    Raises:
        UserError: every kind of thing that cannot work.
    """
    data = config.data
    if data.root and not Path(data.root).is_dir():
        raise UserError(f"--config.data.root={data.root} is not a folder; give the folder of the {data.dataset} data")
    dataset = get_dataset(data)
    if not data.root and not data.phantom.cases:
        raise UserError(
            "no data: give --config.data.root=<folder> with cases laid out as\n"
            f"  {dataset.layout}\n"
            "or take the variant that needs no data, --config=<recipe>.py:phantom"
        )
    for key, expected in (("in_channels", len(dataset.channels)), ("out_channels", len(dataset.regions.names))):
        config.model[key] = config.model[key] or expected
        if config.model[key] != expected:
            raise UserError(f"config.model.{key}={config.model[key]}: {dataset.name} needs {expected}")
    if dataset.partly_drawn:
        raise UserError(
            f"{dataset.name}, config.data.task={data.get('task')}: {dataset.partly_drawn} are not drawn, so they would "
            "be learnt as background; training on partly drawn cases is not there yet: train on tasks 1 and 5"
        )
    check_preparation(dataset, Preparation.from_config(data.prepare))
    make_augment(config.augment, models.spatial_axes(config.model))
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
        try:
            value = functools.reduce(lambda section, name: section[name], key.split("."), config)
        except KeyError:  # not a key of this recipe
            continue
        if not low <= value <= high:
            problems.append(f"config.{key}={value}: expected {low:g} to {high:g}")
    if data.sampling == "slices" and _size(data.patch)[0] != 1:
        problems.append(f"config.data.sampling=slices: with a 3D patch, {tuple(data.patch)}, sample patches or volumes")
    for key, known in (("sampling", pipeline.SAMPLINGS), ("split", ("folds", "official"))):
        if data[key] not in known:
            problems.append(f"config.data.{key}={data[key]!r}: known: {', '.join(known)}")
    channel_rules = tuple(rule for rule in stem.RULES if rule != "map")  # a map is for weight_port
    for key, known in (("inflate", inflate.RULES), ("channels", channel_rules), ("part", ("all", "encoder"))):
        if config.init[key] not in known:
            problems.append(f"config.init.{key}={config.init[key]!r}: known: {', '.join(known)}")
    if problems:
        raise join_problems(problems, "values out of range")
    if data.split == "folds":
        check_fold(data.fold, data.folds)  # before any phantom is written
    return dataset


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


@dataclasses.dataclass(frozen=True)
class Found:
    """The data of a run: what trains, and what validates."""

    train: list[store.Entry]
    validation: list[tuple[Case, store.Entry]]


def find_data(config: cli.Config, dataset: Dataset, workdir: Path, *, started: bool) -> Found:
    """Prepared training and validation cases; without a root, phantoms are written below the workdir first.

    Raises:
        UserError: the data cannot be used, or a run that has ``started`` was split otherwise: cases that it trained on
            could come to validate it.
    """
    data = config.data
    root = Path(data.root or workdir / "phantom" / "train")
    if not data.root:
        _write_phantoms(config, root.parent)
    scan = data_case.scan_cases(dataset, root, need_labels=True)
    cases = data_case.usable_cases(scan, root)
    for problem in scan.problems:
        log.warn(str(problem))
    data_case.check_grids(cases)
    if data.split == "official":
        train, validation = official_split(cases, scan.splits, data.fold)
    else:
        train, validation = split_cases(cases, fold=data.fold, folds=data.folds, seed=config.seed)
    split = {"root": str(root), "train": [c.case_id for c in train], "validation": [c.case_id for c in validation]}
    path = workdir / "split.json"
    if started and path.exists():
        before = read_json(path)
        for side in ("train", "validation"):
            if changed := sorted(set(before[side]) ^ set(split[side])):
                raise UserError(
                    f"the {side} cases are not those that {workdir} began with ({len(changed)} differ: "
                    f"{shorten(changed)}). Restore the data in {root} to go on, "
                    "or give another --workdir"
                )
    write_json(path, split)
    write_json(workdir / DATA_FILE, data_case.describe(dataset))
    entries = store.prepare_cases(
        dataset,
        [*train, *validation],
        Preparation.from_config(data.prepare),
        Path(data.store) if data.store else store.default_folder(root),
        jobs=data.threads,
        say=log.say,
        progress=log.bar("prepare"),
    )
    chosen = entries[: len(train)]
    pipeline.check_size(chosen, data.sampling, _size(data.patch))
    return Found(chosen, list(zip(validation, entries[len(train) :], strict=True)))


def _write_phantoms(config: cli.Config, folder: Path) -> None:
    options, name = config.data.phantom, config.data.dataset
    write, first = phantom.WRITERS[name]
    shared = {
        "shape": tuple(options.shape),
        "seed": config.seed,
        "difficulty": phantom.Difficulty(noise=options.noise, bias=options.bias),
        "progress": log.say,
    }
    if name == "brats":
        shared["convention"] = config.data.convention
    write(folder / "train", cases=options.cases, first=first, **shared)
    write(folder / "held_out", cases=options.held_out, first=first + options.cases, **shared)


def _size(patch: Sequence[int]) -> pipeline.Size:
    """A patch with three axes; of a 2D network, one slice."""
    d, h, w = (*(1,) * (3 - len(patch)), *patch)
    return d, h, w


def train(config: cli.Config, dataset: Dataset, workdir: Path) -> int:
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
    found = find_data(config, dataset, workdir, started=started)
    count = len(pipeline.records(found.train, config.data.sampling, config.data.patches_per_case))
    per_epoch = pipeline.steps_per_epoch(count, config.data.batch)
    total = per_epoch * config.train.epochs

    schedule = optim.make_schedule(config.optim.schedule, epochs=config.train.epochs, per_epoch=per_epoch)
    tx = optim.make_optimizer(config.optim, schedule)
    state = init_state(optim.init_params(config.optim, params), stats, tx)
    # LookAhead's two copies start as one array, which cannot be donated twice
    state = mesh.put_replicated(jax.tree.map(jnp.copy, state), devices)
    progress = Progress([0.0] * len(dataset.regions.names))

    log.say(f"devices    {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})")
    log.say(f"mesh       data {devices.shape['data']} x space {devices.shape['space']}")
    log.say(f"network    {config.model.name}, {models.count_parameters(params):,} parameters, weights {origin}")
    log.say(
        f"data       {dataset.name}, {len(found.train)} training, {len(found.validation)} validation cases, "
        f"fold {config.data.fold}"
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
        found.train,
        sampling=config.data.sampling,
        size=_size(config.data.patch),
        flat=models.spatial_axes(config.model) == 2,
        foreground=config.data.foreground,
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
            step=make_train_step(
                graphdef,
                make_loss(config.loss),
                lambda label: dataset.regions.encode(label, jnp),
                tx,
                make_augment(config.augment, models.spatial_axes(config.model)),
            ),
            key=jax.random.key(config.seed),
            schedule=schedule,
            mesh=devices,
            checkpoints=checkpoints,
            recorder=log.open_recorder(workdir, start, writes=jax.process_index() == 0),
            validate=make_validation(config, graphdef, dataset, found.validation),
            stop=stop,
            regions=dataset.regions.names,
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
    config: cli.Config, graphdef: Any, dataset: Dataset, cases: Sequence[tuple[Case, store.Entry]]
) -> Validation:
    """Whole-volume validation: mean Dice per region over the cases, post-processed as predictions are.

    A region that is empty in both maps counts 1, as on the BraTS platform.
    """
    predict = infer.make_network_predictor(config, make_forward(graphdef))
    names = dataset.regions.names

    def validate(weights: Any, stop: StopRequest) -> dict[str, float]:
        scores = []
        for case, entry in cases:
            if stop.signal:
                raise InterruptedValidationError
            label = infer.segment(predict, weights, entry.load(), dataset.regions, config.predict)
            predicted = dataset.regions.encode(label)
            reference = dataset.regions.encode(data_case.read_label(case))
            dice = [metrics.dice(predicted[..., r], reference[..., r]) for r in range(len(names))]
            scores.append(np.nan_to_num(dice, nan=1.0))
        return dict(zip(names, np.mean(scores, 0).tolist(), strict=True))

    return validate


def command() -> NoReturn:
    """The console entry point."""
    cli.run(main, computes=True)


if __name__ == "__main__":
    command()
