"""Rules for label maps that belong to no challenge: any structures and any metrics."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from xdim_jax.base.errors import UserError
from xdim_jax.data.images.image import strip_suffix
from xdim_jax.scoring.masks import METRICS, Geometry, Pair, measure
from xdim_jax.scoring.rules import Coding, LabelMap, Masks, Rules, Values, column, find_files, squeeze_slice

LAYOUT = "<case id>.nii.gz, .nii, .mha, .mhd or .nrrd, with the same names in both folders"
DEFAULT_METRICS = ("dice", "assd_pooled", "hd95_pooled")


def find(folder: Path) -> dict[str, LabelMap]:
    """Return all images in a folder by case id: the file name without suffix and without ``_seg`` or ``_gt``."""

    def name_of(path: Path) -> str | None:
        stem = strip_suffix(path.name) or ""
        for ending in ("_seg", "-seg", "_gt"):
            stem = stem.removesuffix(ending)
        return stem

    return {case: LabelMap(case, path, case) for case, path in find_files(folder, LAYOUT, name_of).items()}


def score(
    pred: Masks, ref: Masks, geometry: Geometry, *, metrics: Sequence[str] = DEFAULT_METRICS, border: bool = True
) -> Values:
    """Compute the metrics of all structures. A metric that is not defined for a pair of masks is NaN."""
    pred, plane = squeeze_slice(pred, geometry)
    ref, _ = squeeze_slice(ref, geometry)
    return {name: measure(Pair(pred[name], ref[name], plane, border=border), metrics) for name in ref}


def score_missing(ref: Masks, geometry: Geometry, *, metrics: Sequence[str] = DEFAULT_METRICS) -> Values:
    """Return the values of a case without a usable prediction: 0 for overlaps, and NaN for metrics with a unit."""
    values = {m: math.nan if METRICS[m].unit else 0.0 for m in metrics}
    return {name: dict(values) for name in ref}


def read_structures(folder: Path) -> Mapping[str, tuple[int, ...]] | None:
    """Read the structures from a ``dataset.json`` of nnU-Net or of the Medical Segmentation Decathlon.

    Args:
        folder: Folder of label maps. The file is in this folder or in its parent.

    Returns:
        Name of each structure -> its values, without the background and the label "ignore". None if there is no file.

    Raises:
        UserError: The file cannot be read, or names no structure.
    """
    for path in (folder / "dataset.json", folder.parent / "dataset.json"):
        if not path.is_file():
            continue
        try:
            labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
            if all(str(k).isdigit() for k in labels):  # nnU-Net 1 and the Decathlon: value -> name
                labels = {name: int(value) for value, name in labels.items()}
            sets = {n: tuple(int(v) for v in (v if isinstance(v, list) else [v])) for n, v in labels.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path} cannot be used ({error}): expected "labels": {{name: value, ...}}; correct it or give --labels'
            ) from error
        found = {name: values for name, values in sets.items() if values != (0,) and name != "ignore"}
        if not found:
            raise UserError(f"{path} has no structure except the background; correct its labels, or give --labels")
        return found
    return None


def parse_structures(words: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
    """Parse the words of ``--labels``.

    Args:
        words: Structures as ``<name>=<value>[,<value>...]``.

    Returns:
        Name of each structure -> its values.

    Raises:
        UserError: A word has another form, or a name occurs twice.
    """
    found = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not name or not equals or not all(v.strip().isascii() and v.strip().isdigit() for v in values.split(",")):
            raise UserError(f"--labels {word}: expected <name>=<value>[,<value>...], e.g. tumour=1,3")
        if name in found:
            raise UserError(f"--labels has {name} twice; give all its values at once: {name}=<value>,<value>")
        found[name] = tuple(int(v) for v in values.split(","))
    return found


def _coding(structures: Mapping[str, tuple[int, ...]] | None, label_map: LabelMap) -> Coding | None:
    """Return a coding in which all values up to 255 may occur; None if every nonzero value is a structure."""
    return None if structures is None else Coding("--labels", structures, ignored=tuple(range(256)))


def rules(
    structures: Mapping[str, tuple[int, ...]] | None, metrics: Sequence[str] = DEFAULT_METRICS, *, border: bool = True
) -> Rules:
    """Return rules for any label maps.

    Args:
        structures: Name of each structure -> its values. None if every value except 0 is a structure.
        metrics: Names of metrics in `xdim_jax.scoring.masks.METRICS`.
        border: True if positions beyond the edge of the image count as outside, see `xdim_jax.scoring.masks.Pair`.
    """
    return Rules(
        name="generic",
        title="generic",
        layout=LAYOUT,
        columns={m: column(m) for m in metrics},
        main_metrics=tuple(metrics)[:4],
        find=find,
        coding=functools.partial(_coding, structures),
        score=functools.partial(score, metrics=tuple(metrics), border=border),
        score_missing=functools.partial(score_missing, metrics=tuple(metrics)),
        border=border,
    )
