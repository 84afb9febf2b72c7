"""Data with a ``dataset.json``: nnU-Net's raw format and the Medical Segmentation Decathlon, so that a user's own
images can be trained on with a short config.

nnU-Net (version 1 and 2): one file per channel, ``dataset.json`` names channels and labels.

    Dataset001_Name/dataset.json
                   /imagesTr/case_0000.nii.gz, case_0001.nii.gz, ...    labelsTr/case.nii.gz    imagesTs/...

Decathlon: one file per case, channels along the fourth axis; ``dataset.json`` lists the files too.

    Task01_Name/dataset.json, imagesTr/case.nii.gz, labelsTr/case.nii.gz, imagesTs/...

Every case counts as a patient of its own. Where several cases are of one patient, write the splits yourself, into
``splits.json`` beside ``dataset.json``: a list of ``{"training": [...], "validation": [...]}`` (nnU-Net's
``splits_final.json`` with ``train`` and ``val`` is read too), and train with ``--config.data.split=official``.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.problem import WARNING, Problem, data_error, errors
from xdim_jax.data.case import Case, Dataset, Scan
from xdim_jax.data.images.image import SUFFIXES, strip
from xdim_jax.data.labels import Labels
from xdim_jax.data.regions import Regions

NNUNET_LAYOUT = "<root>/{dataset.json,imagesTr/<case>_0000.nii.gz,labelsTr/<case>.nii.gz}"
DECATHLON_LAYOUT = "<root>/{dataset.json,imagesTr/<case>.nii.gz,labelsTr/<case>.nii.gz}"
_SUFFIX_DIGITS = 4  # _0000


@dataclasses.dataclass(frozen=True)
class Card:
    """What a ``dataset.json`` says."""

    channels: tuple[str, ...]
    labels: Labels
    regions: Regions
    listed: tuple[str, ...] = ()  # training cases that it names
    count: int | None = None  # of training cases, as it says


def nnunet(root: Path | str) -> Dataset:
    """Data in nnU-Net's raw format, described by their ``dataset.json``. Raises UserError if that cannot be used."""
    return described_nnunet(read_card(Path(root) / "dataset.json"))


def decathlon(root: Path | str) -> Dataset:
    """A task of the Decathlon, described by its ``dataset.json``. Raises UserError if that cannot be used."""
    return described_decathlon(read_card(Path(root) / "dataset.json"))


def described_nnunet(card: Card) -> Dataset:
    """The layout of nnU-Net with what a card says."""
    return _dataset("nnU-Net", NNUNET_LAYOUT, card, one_file_per_channel=True)


def described_decathlon(card: Card) -> Dataset:
    """The layout of the Decathlon with what a card says."""
    return _dataset("Decathlon", DECATHLON_LAYOUT, card, one_file_per_channel=False)


def _dataset(name: str, layout: str, card: Card, *, one_file_per_channel: bool) -> Dataset:
    def scan(folder: Path, need_labels: bool) -> Scan:
        return _scan(folder, card, need_labels, one_file_per_channel)

    return Dataset(name, layout, card.channels, card.labels, card.regions, scan, same_structures=False)


def read_card(path: Path) -> Card:
    """Reads a ``dataset.json`` of any of the three kinds.

    Raises:
        DataError: the file is missing, is not JSON, or lacks channels or labels; all findings at once.
    """

    def refuse(found: str, expected: str, step: str) -> Exception:
        return data_error([Problem("dataset_json", path, found, expected, step)], "")

    if not path.is_file():
        raise refuse("does not exist", "a description of the data", "write it, or give the folder that holds it")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise refuse(f"is not JSON ({error})", "JSON", "correct it") from error
    ending = data.get("file_ending", SUFFIXES[0]) if isinstance(data, dict) else SUFFIXES[0]
    if ending not in SUFFIXES:
        raise refuse(f"has the file_ending {ending!r}", ", ".join(SUFFIXES), "convert the images")
    named = data.get("channel_names", data.get("modality")) if isinstance(data, dict) else None
    if not isinstance(named, dict) or sorted(named, key=str) != sorted(map(str, range(len(named)))) or not named:
        expected = '"channel_names": {"0": ..., "1": ...}'
        raise refuse(f"names its channels {named!r}", expected, "number them from 0")
    channels = tuple(str(named[str(i)]) for i in range(len(named)))
    labels = data.get("labels")
    if not isinstance(labels, dict) or len(labels) < 2:
        raise refuse(f"names its labels {labels!r}", '"labels": {"background": 0, "name": 1, ...}', "name them")
    if all(str(key).isdigit() for key in labels):  # Decathlon and nnU-Net 1: value -> name
        labels = {name: int(value) for value, name in labels.items()}
    if "ignore" in labels:
        step = "give those voxels a label of their own, or leave the cases out"
        raise refuse('has a label "ignore"', "labels to learn; voxels to pass over are not supported", step)
    try:
        if any(
            int(v) != v or not 0 <= v < 2**16 for vs in labels.values() for v in (vs if isinstance(vs, list) else [vs])
        ):
            raise ValueError("a value is negative, a fraction, or too large")
        sets = {str(n): tuple(v) if isinstance(v, list) else (int(v),) for n, v in labels.items()}
        values = sorted({int(v) for vs in sets.values() for v in vs} | {0})
        names = {vs[0]: n for n, vs in sets.items() if len(vs) == 1}
        structures = tuple(names.get(v, "background" if v == 0 else f"label {v}") for v in values)
        index = {value: i for i, value in enumerate(values)}
        regions = Regions({n: tuple(index[int(v)] for v in vs) for n, vs in sets.items() if vs != (0,)})
    except (TypeError, ValueError) as error:
        raise refuse(
            f"has labels that cannot be used ({error})",
            "whole numbers, and regions that are nested or apart",
            "correct them",
        ) from error
    entries = data.get("training") or []
    if not isinstance(entries, list) or not all(
        isinstance(e, str) or (isinstance(e, dict) and "image" in e) for e in entries
    ):
        raise refuse("has a list of training cases that cannot be read", '[{"image": ..., "label": ...}]', "correct it")
    listed = tuple(_name(entry) for entry in entries)
    count = data.get("numTraining")
    labelled = Labels(path.parent.name, structures, tuple(values))
    return Card(channels, labelled, regions, listed, count if isinstance(count, int) else None)


def _name(entry: Any) -> str:
    image = entry["image"] if isinstance(entry, dict) else entry
    return strip(Path(str(image)).name) or str(image)


def _scan(root: Path, card: Card, need_labels: bool, one_file_per_channel: bool) -> Scan:
    folders = [root / "imagesTr", *([] if need_labels else [root / "imagesTs"])]
    if not folders[0].is_dir():
        folders = [root]  # a folder of images alone
    cases: dict[str, Case] = {}
    problems: list[Problem] = []
    seen: set[Path] = set()
    for folder in [f for f in folders if f.is_dir()]:
        labels = dict(_images(folder.parent / "labelsTr")) if folder.name == "imagesTr" else {}
        groups, twins = _group(folder, one_file_per_channel)
        problems += twins
        for name, files in groups.items():
            if name in cases:
                found, step = f"holds {name}, which imagesTr has too", "rename one of the two"
                problems.append(Problem("duplicate_case", folder, found, "each case once", step, name))
                continue
            images, wrong = _channels(folder, name, files, card, one_file_per_channel)
            label = labels.get(name)
            seen |= {label} if label else set()
            problems += wrong
            if label is None and need_labels:
                found, step = f"has no {name} in labelsTr", "add it, or move the image to imagesTs"
                problems.append(Problem("missing_label", folder / name, found, "one label map per case", step, name))
            elif not errors(wrong):
                cases[name] = Case(name, name, images, card.channels, label, card.labels)
        for name, path in labels.items():
            if path not in seen:
                found, step = "has no image in imagesTr", "add it, or move the label away"
                problems.append(Problem("extra_file", path, found, "an image for each label", step, name, WARNING))
    named = cases.keys() | {p.case_id for p in errors(problems)}
    if folders[0] != root and (absent := [n for n in card.listed if n not in named]):
        found, step = (
            f"lists {len(absent)} cases that are not there: {shorten(absent)}",
            "fetch them, or correct the list",
        )
        problems.append(Problem("missing_file", root / "dataset.json", found, "the files it lists", step))
    elif need_labels and card.count is not None and card.count != len(named) and (root / "dataset.json").is_file():
        found, step = f"says numTraining {card.count}, but {len(named)} cases are there", "correct the number"
        problems.append(Problem("dataset_json", root / "dataset.json", found, "their number", step, "", WARNING))
    splits, wrong = _splits(root, named)
    return Scan(list(cases.values()), problems + wrong, splits)


def _images(folder: Path) -> list[tuple[str, Path]]:
    """Files by their names without suffix."""
    if not folder.is_dir():
        return []
    found = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    return [(name, p) for p in found if (name := strip(p.name)) is not None]


def _group(folder: Path, one_file_per_channel: bool) -> tuple[dict[str, dict[str, Path]], list[Problem]]:
    """Case to channel number to file, and files that are a second one of the same name."""
    groups: dict[str, dict[str, Path]] = {}
    problems = []
    for name, path in _images(folder):
        case, _, number = name.rpartition("_")
        if not (one_file_per_channel and len(number) == _SUFFIX_DIGITS and number.isdigit() and case):
            case, number = name, "" if one_file_per_channel else "0"
        files = groups.setdefault(case, {})
        if number in files:
            found = f"and {files[number].name} are both {name}"
            problems.append(Problem("duplicate_case", path, found, "one file", "keep one", case))
        else:
            files[number] = path
    return groups, problems


def _channels(
    folder: Path, name: str, files: Mapping[str, Path], card: Card, one_file_per_channel: bool
) -> tuple[tuple[Path, ...], list[Problem]]:
    if not one_file_per_channel:
        return tuple(files.values()), []
    wanted = {f"{i:04d}": channel for i, channel in enumerate(card.channels)}
    problems = []
    for number, channel in wanted.items():
        if number not in files:
            found, step = f"lacks {name}_{number} ({channel})", "add it; files are named <case>_<channel, 4 digits>"
            problems.append(Problem("missing_image", folder, found, f"{len(wanted)} channels", step, name))
    for number, path in files.items():
        if number not in wanted:
            found, step = "is of no channel in dataset.json", "move it away, or name the channel there"
            problems.append(Problem("extra_file", path, found, ", ".join(wanted), step, name, WARNING))
    return tuple(files[n] for n in wanted if n in files), problems


def _splits(root: Path, cases: set[str]) -> tuple[tuple[dict[str, tuple[str, ...]], ...], list[Problem]]:
    path = next((p for p in (root / "splits.json", root / "splits_final.json") if p.is_file()), None)
    if path is None:
        return (), []
    words = {"train": "training", "val": "validation", "test": "testing"}
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))
        splits = tuple({str(words.get(k, k)): tuple(map(str, v)) for k, v in fold.items()} for fold in folds)
    except (ValueError, AttributeError, TypeError) as error:
        found, expected = f"cannot be read ({error})", '[{"training": [...], "validation": [...]}, ...]'
        return (), [Problem("dataset_json", path, found, expected, "correct it")]
    problems = []
    for number, sides in enumerate(splits):
        both = sorted(set(sides.get("training", ())) & set(sides.get("validation", ())))
        for name in both:
            found, step = f"lists {name} on both sides of fold {number}", "keep it on one side"
            problems.append(Problem("patient_in_two_folds", path, found, "each case once", step, name))
        if absent := sorted({n for names in sides.values() for n in names} - cases):
            found, step = f"names {len(absent)} cases that are not there: {shorten(absent)}", "correct it"
            problems.append(Problem("missing_file", path, found, "cases of this folder", step, "", WARNING))
    return splits, problems


def read_description(value: Mapping[str, Any]) -> Card:
    """A card from what `xdim_jax.data.case.describe` wrote into a workdir. Raises UserError if it cannot be used."""
    try:
        labels = Labels.from_json(value["labels"])
        return Card(tuple(value["channels"]), labels, Regions({k: tuple(v) for k, v in value["regions"].items()}))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the description of the training data cannot be used ({error})") from error
