"""Rules for label maps that belong to no challenge: any structures and any metrics."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json
from xdim_jax.data.images.image import strip_suffix
from xdim_jax.data.images.names import case_of_label, normalised
from xdim_jax.scoring.masks import METRICS, Geometry, Pair, measure
from xdim_jax.scoring.rules import Coding, Job, LabelMap, Masks, Rules, Values, column, find_files, squeeze_slice

LAYOUT = "<case id>.nii.gz, .nii, .mha, .mhd or .nrrd, with the same names in both folders"
IGNORE = "ignore"  # name of the label of voxels that are not annotated, as in nnU-Net
DEFAULT_METRICS = ("dice", "assd_pooled", "hd95_pooled")


def find(folder: Path) -> dict[str, LabelMap]:
    """Return all images in a folder by case id, see `xdim_jax.data.images.names.case_of_label`."""

    def name_of(path: Path) -> str | None:
        return case_of_label(strip_suffix(path.name) or "")

    return {case: LabelMap(case, path, case) for case, path in find_files(folder, LAYOUT, name_of).items()}


def score(
    pred: Masks, ref: Masks, geometry: Geometry, *, metrics: Sequence[str] = DEFAULT_METRICS, border: bool = True
) -> Values:
    """Return the metrics of all structures. A metric that is not defined for a pair of masks is NaN."""
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
        Name of each structure -> its values, without the background. The name "ignore" has the value of voxels that are
        not annotated. None if there is no file.

    Raises:
        UserError: The file cannot be read, or names no structure.
    """
    for path in (folder / "dataset.json", folder.parent / "dataset.json"):
        if not path.is_file():
            continue
        try:
            labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
            if all(str(k).isdigit() for k in labels):  # nnU-Net 1 and the Decathlon: value -> name
                if len(set(labels.values())) < len(labels):
                    raise ValueError("two values have the same name")
                labels = {name: int(value) for value, name in labels.items()}
            sets = {n: tuple(int(v) for v in (v if isinstance(v, list) else [v])) for n, v in labels.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path} cannot be used ({error}): expected "labels": {{name: value, ...}}; correct it or give --labels'
            ) from error
        found = {name: values for name, values in sets.items() if values != (0,)}
        if not found.keys() - {IGNORE}:
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
        UserError: A word does not have this form, or a name occurs twice.
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
    if structures is None:
        return None
    scored = {name: values for name, values in structures.items() if name != IGNORE}
    return Coding("--labels", scored, ignored=tuple(range(256)), excluded=structures.get(IGNORE, ()))


def read_annotated(folder: Path) -> Mapping[str, tuple[str, ...]]:
    """Return the annotated structures of incompletely annotated cases, from ``dataset.json``, see `read_structures`.

    Returns:
        Case id -> names of structures; empty if there is no file or no such key.
    """
    for path in (folder / "dataset.json", folder.parent / "dataset.json"):
        if path.is_file():
            data = read_json(path)
            found = data.get("annotated") if isinstance(data, dict) else None
            return {normalised(str(case)): tuple(map(str, names)) for case, names in (found or {}).items()}
    return {}


def _pair(
    annotated: Mapping[str, tuple[str, ...]], pred: Path, references: dict[str, LabelMap]
) -> tuple[list[Job], list[str]]:
    """Return the jobs, with the structures that are annotated in each case, and predictions without a reference."""
    predictions = find(pred)
    jobs = [Job(m, predictions.get(case), m.attributes, annotated.get(case)) for case, m in sorted(references.items())]
    return jobs, sorted(predictions.keys() - references.keys())


def rules(
    structures: Mapping[str, tuple[int, ...]] | None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    border: bool = True,
    annotated: Mapping[str, tuple[str, ...]] | None = None,
) -> Rules:
    """Return rules for any label maps.

    Args:
        structures: Name of each structure -> its values. None if every value except 0 is a structure.
        metrics: Names of metrics in `xdim_jax.scoring.masks.METRICS`.
        border: True if positions beyond the edge of the image count as outside, see `xdim_jax.scoring.masks.Pair`.
        annotated: Annotated structures of the incompletely annotated cases.
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
        pair=functools.partial(_pair, annotated or {}),
    )
