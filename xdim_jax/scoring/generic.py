"""Any two folders of label maps, with any metrics: what users of their own data ask for."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from xdim_jax.base.errors import UserError
from xdim_jax.data.images.image import strip
from xdim_jax.scoring.masks import METRICS, Geometry, Pair, measure
from xdim_jax.scoring.rules import Coding, LabelMap, Masks, Rules, Values, column, find_files, flat

LAYOUT = "<case id>.nii.gz, .nii, .mha, .mhd or .nrrd, of the same names in both folders"
USUAL = ("dice", "assd_pooled", "hd95_pooled")


def find(folder: Path) -> dict[str, LabelMap]:
    """Every image below the folder; ``_seg`` and ``_gt`` at the end of a name are left out."""

    def name_of(path: Path) -> str | None:
        stem = strip(path.name) or ""
        for ending in ("_seg", "-seg", "_gt"):
            stem = stem.removesuffix(ending)
        return stem

    return {case: LabelMap(case, path, case) for case, path in find_files(folder, LAYOUT, name_of).items()}


def score(
    pred: Masks, ref: Masks, geometry: Geometry, *, metrics: Sequence[str] = USUAL, border: bool = True
) -> Values:
    """Whatever a metric is not defined for is left out of means, and counted; but Dice is 0 where one mask is empty."""
    pred, plane = flat(pred, geometry)
    ref, _ = flat(ref, geometry)
    return {name: measure(Pair(pred[name], ref[name], plane, border=border), metrics) for name in ref}


def worst(ref: Masks, geometry: Geometry, *, metrics: Sequence[str] = USUAL) -> Values:
    """A missing case: overlaps are 0, and there are no distances."""
    none = {m: math.nan if METRICS[m].unit else 0.0 for m in metrics}
    return {name: dict(none) for name in ref}


def read_structures(folder: Path) -> Mapping[str, tuple[int, ...]] | None:
    """The labels of a ``dataset.json`` (nnU-Net) in a folder or above it; None without one.

    Raises:
        UserError: it cannot be used.
    """
    for path in (folder / "dataset.json", folder.parent / "dataset.json"):
        if not path.is_file():
            continue
        try:
            labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
            if all(str(k).isdigit() for k in labels):  # nnU-Net 1, decathlon: value -> name
                labels = {name: int(value) for value, name in labels.items()}
            sets = {n: tuple(int(v) for v in (v if isinstance(v, list) else [v])) for n, v in labels.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{path}: expected "labels": {{name: value, ...}} ({error}); give --labels') from error
        found = {name: values for name, values in sets.items() if values != (0,) and name != "ignore"}
        if not found:
            raise UserError(f"{path} names no structure beside the background; correct its labels, or give --labels")
        return found
    return None


def parse_structures(words: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
    """``["liver=1", "organs=1,2"]`` to sets of values. Raises UserError for words of another form."""
    found = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not name or not equals or not all(v.strip().isascii() and v.strip().isdigit() for v in values.split(",")):
            raise UserError(f"--labels {word}: expected <name>=<value>[,<value>...], e.g. tumour=1,3")
        if name in found:
            raise UserError(f"--labels names {name} twice; give all its values at once: {name}=<value>,<value>")
        found[name] = tuple(int(v) for v in values.split(","))
    return found


def _coding(structures: Mapping[str, tuple[int, ...]] | None, label_map: LabelMap) -> Coding | None:
    return None if structures is None else Coding("--labels", structures, others=tuple(range(256)))


def rules(
    structures: Mapping[str, tuple[int, ...]] | None, metrics: Sequence[str] = USUAL, *, border: bool = True
) -> Rules:
    """Rules for any label maps.

    Args:
        structures: name to values; None: every value but 0 is one.
        metrics: of `xdim_jax.scoring.masks`.
        border: see `xdim_jax.scoring.masks.Pair`.
    """
    return Rules(
        "generic",
        "generic",
        LAYOUT,
        {m: column(m) for m in metrics},
        tuple(metrics)[:4],
        find,
        functools.partial(_coding, structures),
        functools.partial(score, metrics=tuple(metrics), border=border),
        functools.partial(worst, metrics=tuple(metrics)),
        border=border,
    )
