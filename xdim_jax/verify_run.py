"""Compare two runs bitwise, and report the first step at which they differ.

The result of a run depends on its config, its data and the devices only, so an interrupted and resumed run has the same
result as an uninterrupted one. The command compares

- the configs;
- for each step: the loss, the norms of gradient and update, and a digest of every sample of the batch (image, label and
  random bits of its augmentation);
- all arrays of the checkpoints that both runs have: parameters (fast and slow weights of LookAhead), running
  statistics, optimiser state and moving average of the weights.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp

from xdim_jax.base import log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.config import differences
from xdim_jax.base.errors import UserError, first_line, shorten
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import STEPS_FILE, read_records
from xdim_jax.runs.workdir import read_config
from xdim_jax.training.check import FREE_KEYS
from xdim_jax.training.optim import leaf_name


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The differences between two runs.

    Attributes:
        config: For each config key that differs, a message with both values.
        step: First step that differs; 0 if none differs.
        quantities: For each recorded quantity of this step that differs, a message with both values.
        steps: Number of steps that both runs have recorded.
        alone: Steps that only one run has recorded; empty if one of the runs has recorded no step.
        arrays: For each checkpoint ``<folder>/<step>`` that differs, the names of the arrays that differ.
        checkpoints: Checkpoints that both runs have.
    """

    config: list[str]
    step: int
    quantities: list[str]
    steps: int
    alone: list[int]
    arrays: dict[str, list[str]]
    checkpoints: list[str]

    @property
    def same(self) -> bool:
        """True if no difference was found."""
        return not (self.config or self.step or self.alone or self.arrays)


def compare(a: Path, b: Path) -> Comparison:
    """Compare two runs.

    Args:
        a: Workdir of a run.
        b: Workdir of another run.

    Raises:
        UserError: A folder is not the workdir of a run, or the runs have no step and no checkpoint in common.
    """
    pairs = differences(read_config(a), read_config(b), ignored=FREE_KEYS)
    config = [f"{key}: {x!r} and {y!r}" for key, x, y in pairs]

    steps = [{r["step"]: r for r in read_records(workdir, STEPS_FILE)} for workdir in (a, b)]
    common = sorted(steps[0].keys() & steps[1].keys())
    first, quantities = 0, []
    for step in common:
        x, y = steps[0][step], steps[1][step]
        if differing := [k for k in (x | y) if x.get(k) != y.get(k)]:
            first, quantities = step, [_describe(k, x.get(k), y.get(k)) for k in differing]
            break
    alone = sorted(steps[0].keys() ^ steps[1].keys()) if all(steps) else []

    names = [
        {f"{f}/{p.name}" for f in (checkpoint.LATEST_FOLDER, checkpoint.BEST_FOLDER) for p in (w / f).glob("[0-9]*")}
        for w in (a, b)
    ]
    both = sorted((n for n in names[0] & names[1] if n.rpartition("/")[2].isdigit()), key=_order)
    if not common and not both:
        raise UserError(f"{a} and {b} have no step and no checkpoint in common, so they cannot be compared")
    arrays = {}
    for name in both:
        if differing := _differing(_arrays(a / name), _arrays(b / name)):
            arrays[name] = differing
    return Comparison(config, first, quantities, len(common), alone, arrays, both)


def _order(name: str) -> tuple[str, int]:
    """Return the sort key of a checkpoint ``<folder>/<step>``."""
    folder, _, step = name.partition("/")
    return folder, int(step)


def _describe(key: str, x: Any, y: Any) -> str:
    """Return both values of a quantity as text; for lists with one value per sample, the indices that differ."""
    if isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
        return f"{key}: samples {', '.join(str(i) for i, (p, q) in enumerate(zip(x, y, strict=True)) if p != q)}"
    return f"{key}: {x!r} and {y!r}"


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    """Return dotted name -> array for all arrays of a checkpoint.

    Raises:
        UserError: The checkpoint cannot be read.
    """
    checkpoint.silence_orbax()
    item = next((folder / name for name in ("state", "weights") if (folder / name).is_dir()), folder)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            metadata = reader.metadata(item.absolute()).item_metadata
            if metadata is None:
                raise ValueError("it has no arrays")
            metadata = metadata.tree
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            tree = reader.restore(item.absolute(), args=ocp.args.PyTreeRestore(restore_args=args))
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"the checkpoint {folder} cannot be read: {first_line(error)}") from error
    return {leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _differing(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> list[str]:
    """Return the names of arrays that only one checkpoint has, or whose bits differ."""
    names = sorted(x.keys() | y.keys())
    return [n for n in names if n not in x or n not in y or not _same_bits(x[n], y[n])]


def _same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Return whether two arrays have the same shape, dtype and bits; equal bits of NaN are the same."""
    return x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    parser = make_parser(
        "xdim_jax.verify_run", __doc__ or "", "exit status: 0 the runs are equal, 1 they differ, 2 unusable input"
    )
    parser.add_argument("a", type=Path, metavar="A", help="workdir of a run")
    parser.add_argument("b", type=Path, metavar="B", help="workdir of another run")
    options = parser.parse_args(argv)
    found = compare(options.a, options.b)
    for line in found.config:
        log.say(f"config     {line}")
    if found.step:
        log.say(f"steps      first difference at step {found.step}: {'; '.join(found.quantities)}")
    else:
        log.say(f"steps      {found.steps} recorded in both runs, all equal")
    if found.alone:
        log.say(
            f"steps      {len(found.alone)} recorded in only one of the runs: {shorten(list(map(str, found.alone)))}"
        )
    for name in found.checkpoints:
        differing = found.arrays.get(name, [])
        text = f"{len(differing)} arrays differ: {shorten(differing)}" if differing else "all bits are equal"
        log.say(f"checkpoint {name}: {text}")
    log.say("result     " + ("the runs are equal" if found.same else "the runs differ"))
    return 0 if found.same else 1


def command() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
