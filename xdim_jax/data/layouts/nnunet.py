"""Data described by a ``dataset.json``: nnU-Net's raw format and the Medical Segmentation Decathlon.

Users can train on their own images in one of these layouts. nnU-Net (versions 1 and 2) has one file per channel;
``dataset.json`` names channels and labels:

    Dataset001_Name/dataset.json
                   /imagesTr/case_0000.nii.gz, case_0001.nii.gz, ...    labelsTr/case.nii.gz    imagesTs/...

The Decathlon has one file per case, with the channels along the fourth axis; ``dataset.json`` also lists the files:

    Task01_Name/dataset.json, imagesTr/case.nii.gz, labelsTr/case.nii.gz, imagesTs/...

Two entries of ``dataset.json`` describe incomplete annotations. The label ``ignore`` has the value of voxels that are
not annotated. ``"annotated": {"<case>": ["<region>", ...]}``, which is not in nnU-Net's format, names the annotated
regions (names in ``labels``) of each case in which not all regions are annotated. The other regions of the case are
excluded from training and scoring.

Every case is treated as a separate patient. If several cases belong to one patient, write the folds to ``splits.json``
in the folder of ``dataset.json``, as a list of ``{"training": ["<case>", ...], "validation": ["<case>", ...]}``, and
train with ``--config.data.split=official``. nnU-Net's ``splits_final.json`` with ``train`` and ``val`` is also read.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.problem import WARNING, Problem, data_error, errors
from xdim_jax.data.case import Case, Dataset, Scan
from xdim_jax.data.images.image import SUFFIXES, images_in, same_name, strip_suffix, unique_images
from xdim_jax.data.images.names import LABEL_ENDINGS, case_of_label, files_below, normalised
from xdim_jax.data.labels import IGNORE, Labels
from xdim_jax.data.regions import Regions

NNUNET_LAYOUT = "<root>/{dataset.json,imagesTr/<case>_0000.nii.gz,labelsTr/<case>.nii.gz}"
DECATHLON_LAYOUT = "<root>/{dataset.json,imagesTr/<case>.nii.gz,labelsTr/<case>.nii.gz}"
_CHANNEL_DIGITS = 4  # as in _0000
_FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")  # images in any other folder are reported as not read


@dataclasses.dataclass(frozen=True)
class Description:
    """The contents of a ``dataset.json``.

    Attributes:
        channels: Names of the channels.
        labels: Meaning of the label values.
        regions: Regions to predict.
        listed: Names of the training cases in the list ``training``; empty if there is no list.
        count: Number of training cases according to ``numTraining``; None if there is no such key.
        annotated: Case id -> annotated regions, for the cases in which not all regions are annotated (key
            ``annotated``, which is not in nnU-Net's format).
    """

    channels: tuple[str, ...]
    labels: Labels
    regions: Regions
    listed: tuple[str, ...] = ()
    count: int | None = None
    annotated: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def nnunet(root: Path | str) -> Dataset:
    """Return a data set in nnU-Net's raw format. Raises UserError if its ``dataset.json`` cannot be used."""
    return nnunet_from_description(read_dataset_json(Path(root) / "dataset.json"))


def decathlon(root: Path | str) -> Dataset:
    """Return a task of the Decathlon. Raises UserError if its ``dataset.json`` cannot be used."""
    return decathlon_from_description(read_dataset_json(Path(root) / "dataset.json"))


def nnunet_from_description(description: Description) -> Dataset:
    """Return the data set in nnU-Net's raw format that a ``dataset.json`` describes."""
    return _dataset("nnU-Net", NNUNET_LAYOUT, description, one_file_per_channel=True)


def decathlon_from_description(description: Description) -> Dataset:
    """Return the data set in the layout of the Decathlon that a ``dataset.json`` describes."""
    return _dataset("Decathlon", DECATHLON_LAYOUT, description, one_file_per_channel=False)


def _dataset(name: str, layout: str, description: Description, *, one_file_per_channel: bool) -> Dataset:
    return make_dataset(
        name, layout, description, lambda root, need: _scan(root, description, need, one_file_per_channel)
    )


def make_dataset(name: str, layout: str, description: Description, scan: Callable[[Path, bool], Scan]) -> Dataset:
    """Return the data set that a ``dataset.json`` describes, with a function that lists its cases."""
    every = description.regions.names

    def annotated(case: Case) -> tuple[str, ...]:
        return description.annotated.get(case.case_id, every)

    return Dataset(
        name=name,
        layout=layout,
        channels=description.channels,
        labels=description.labels,
        regions=description.regions,
        scan=scan,
        same_structures=False,
        annotated=annotated if description.annotated else None,
        partly_annotated=description.annotated,
    )


def _json_error(path: Path, *, found: str, expected: str, suggestion: str) -> Exception:
    return data_error(Problem("dataset_json", path, found=found, expected=expected, suggestion=suggestion))


def read_dataset_json(path: Path) -> Description:
    """Read a ``dataset.json`` of nnU-Net 1, nnU-Net 2 or the Decathlon.

    Raises:
        DataError: The file does not exist, is not JSON, or has channels, labels or lists that cannot be used.
    """
    data = _read_object(path)
    ending = data.get("file_ending", SUFFIXES[0])
    if ending not in SUFFIXES:
        raise _json_error(
            path,
            found=f"has the file_ending {ending!r}",
            expected=", ".join(SUFFIXES),
            suggestion="convert the images and correct file_ending",
        )
    named = data.get("channel_names", data.get("modality"))
    if not isinstance(named, dict) or sorted(named, key=str) != sorted(map(str, range(len(named)))) or not named:
        raise _json_error(
            path,
            found=f"names its channels {named!r}" if named is not None else "does not name its channels",
            expected='"channel_names": {"0": ..., "1": ...}',
            suggestion="number them from 0",
        )
    channels = tuple(str(named[str(i)]) for i in range(len(named)))
    labels, regions = _read_labels(path, data.get("labels"))
    entries = data.get("training") or []
    if not isinstance(entries, list) or not all(
        isinstance(e, str) or (isinstance(e, dict) and "image" in e) for e in entries
    ):
        raise _json_error(
            path,
            found="has a list of training cases that cannot be read",
            expected='[{"image": ..., "label": ...}]',
            suggestion="correct it",
        )
    listed = tuple(_case_name(entry) for entry in entries)
    count = data.get("numTraining")
    annotated = _read_annotated(path, data.get("annotated") or {}, regions)
    return Description(channels, labels, regions, listed, count if isinstance(count, int) else None, annotated)


def _read_annotated(path: Path, value: Any, regions: Regions) -> dict[str, tuple[str, ...]]:
    """Return the key ``annotated`` of a ``dataset.json``."""
    known = ", ".join(regions.names)
    if not isinstance(value, dict) or not all(isinstance(names, list) for names in value.values()):
        raise _json_error(
            path,
            found=f'has "annotated": {repr(value)[:200]}',
            expected='"annotated": {"<case>": ["<region>", ...]}',
            suggestion="correct it",
        )
    found = {normalised(str(case)): tuple(map(str, names)) for case, names in value.items()}
    if unknown := sorted({name for names in found.values() for name in names} - set(regions.names)):
        raise _json_error(
            path,
            found=f'names regions in "annotated" that are not in "labels": {shorten(unknown)}',
            expected=known,
            suggestion="correct the names",
        )
    return found


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; for another JSON value, return an empty dictionary."""
    if not path.is_file():
        raise _json_error(
            path,
            found="does not exist",
            expected="a description of the data",
            suggestion="write it, or give the folder that contains it",
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _json_error(path, found=f"is not JSON ({error})", expected="JSON", suggestion="correct it") from error
    return data if isinstance(data, dict) else {}


def _read_labels(path: Path, labels: Any) -> tuple[Labels, Regions]:
    """Return the labels and the regions that the key ``labels`` of a ``dataset.json`` defines."""
    by_value = isinstance(labels, dict) and all(str(key).isdigit() for key in labels)  # Decathlon and nnU-Net 1
    names = [str(name) for name in (labels.values() if by_value else labels)] if isinstance(labels, dict) else []
    if len([name for name in names if name != "ignore"]) < 2:
        raise _json_error(
            path,
            found=f"names its labels {labels!r}" if labels is not None else "does not name its labels",
            expected='"labels": {"background": 0, "name": 1, ...}',
            suggestion="name at least the background and one structure",
        )
    if by_value:
        if len(set(names)) < len(names):
            raise _json_error(
                path,
                found=f"gives several label values the same name: {labels!r}",
                expected="one name for each value",
                suggestion="correct the names",
            )
        labels = {str(name): int(value) for value, name in labels.items()}
    ignored = labels.get("ignore")
    labels = {name: value for name, value in labels.items() if name != "ignore"}
    wrong = isinstance(ignored, bool) or not isinstance(ignored, int) or not 0 < ignored < 2**16
    if ignored is not None and (wrong or ignored in _values(labels)):
        raise _json_error(
            path,
            found=f'has the label "ignore" with the value {ignored!r}',
            expected="an integer from 1 to 65535 that no structure has",
            suggestion="correct it",
        )
    try:
        for value in _values(labels):
            if int(value) != value or not 0 <= value < 2**16:
                raise ValueError("a value is negative, not an integer, or too large")
        sets = {str(n): tuple(v) if isinstance(v, list) else (int(v),) for n, v in labels.items()}
        values = sorted({int(v) for vs in sets.values() for v in vs} | {0})
        if len(values) > IGNORE:
            raise ValueError(f"{len(values) - 1} structures, but at most {IGNORE - 1} are possible")
        # checked with label values first, so that error messages contain values and not indices
        Regions({n: tuple(map(int, vs)) for n, vs in sets.items() if vs != (0,)})
        names = {vs[0]: n for n, vs in sets.items() if len(vs) == 1}
        structures = tuple(names.get(v, "background" if v == 0 else f"label {v}") for v in values)
        index = {value: i for i, value in enumerate(values)}
        regions = Regions({n: tuple(index[int(v)] for v in vs) for n, vs in sets.items() if vs != (0,)})
    except (TypeError, ValueError) as error:
        raise _json_error(
            path,
            found=f"has labels that cannot be used ({error})",
            expected="integers from 0 to 65535, and regions that are nested or disjoint, each with exactly one label "
            "that is in no region inside it",
            suggestion="correct them",
        ) from error
    return Labels(path.parent.absolute().name, structures, tuple(values), ignore=ignored), regions


def _values(labels: Mapping[str, Any]) -> list[Any]:
    """Return all values of the labels, unchecked."""
    return [value for values in labels.values() for value in (values if isinstance(values, list) else [values])]


def _case_name(entry: Any) -> str:
    image = entry["image"] if isinstance(entry, dict) else entry
    return strip_suffix(Path(str(image)).name) or normalised(str(image))


def _scan(root: Path, description: Description, need_labels: bool, one_file_per_channel: bool) -> Scan:
    folders = [root / "imagesTr", *([] if need_labels else [root / "imagesTs"])]
    if not any(folder.is_dir() for folder in folders):
        folders = [root]  # a folder of images without labels
    cases: dict[str, Case] = {}
    problems: list[Problem] = []
    for folder in [f for f in folders if f.is_dir()]:
        images = images_in(folder.parent / "labelsTr") if folder.name == "imagesTr" else []
        labels, duplicates = unique_images(images)
        if need_labels:
            problems += duplicates
        else:  # prediction does not need references
            labels = {name: path for name, path in labels.items() if name not in {p.case_id for p in duplicates}}
        groups, duplicates = _group(folder, one_file_per_channel)
        problems += duplicates
        for name, files in groups.items():
            if name in cases:
                problems.append(
                    Problem(
                        "duplicate_case",
                        folder,
                        found=f"contains {name}, which is also in imagesTr",
                        expected="each case once",
                        suggestion="rename one of the two",
                        case_id=name,
                    )
                )
                continue
            images, wrong = _channels(folder, name, files, description, one_file_per_channel)
            label = labels.pop(name, None)
            if need_labels and name.endswith(LABEL_ENDINGS):
                wrong.append(_ending(folder, name))
            problems += wrong
            if label is None and need_labels:
                problems.append(
                    Problem(
                        "missing_label",
                        folder / name,
                        found="has no label map of this name in labelsTr",
                        expected="one label map per case",
                        suggestion="add it, or move the image to imagesTs",
                        case_id=name,
                    )
                )
            elif not errors(wrong):
                cases[name] = Case(name, name, images, description.channels, label, description.labels)
        problems += [
            Problem(
                "extra_file",
                path,
                found="has no image in imagesTr",
                expected="an image for each label",
                suggestion="add the image, or move the label to another folder",
                case_id=name,
                severity=WARNING,
            )
            for name, path in labels.items()
        ]
    if need_labels and folders[0] != root:
        problems += _further_labels(root / "labelsTr", cases)
    named = cases.keys() | {p.case_id for p in errors(problems)}
    problems += _list_problems(root, description, named, need_labels, only_images=folders[0] == root)
    splits, wrong = _splits(root, named) if need_labels else ((), [])
    others: set[Path] = set()
    if folders[0] != root:
        others = {path for name in _FOLDERS for _, path in images_in(root / name)}
    return Scan(list(cases.values()), problems + wrong, splits, known=frozenset(others))


def _ending(folder: Path, name: str) -> Problem:
    """Return the problem of a case id whose ending evaluation removes: it would not find the case."""
    return Problem(
        "wrong_convention",
        folder / name,
        found=f"has the case id {name}; evaluation removes its ending from the names of label maps",
        expected=f"a name that does not end with {', '.join(LABEL_ENDINGS)}",
        suggestion="rename its files in imagesTr and labelsTr",
        case_id=name,
    )


def _further_labels(folder: Path, cases: Mapping[str, Case]) -> list[Problem]:
    """Return a problem for each additional label map of a case in a folder or below it; evaluation would read it."""
    problems = []
    for path in files_below(folder):
        name = case_of_label(strip_suffix(path.name) or "")
        if name in cases and path != (label := cases[name].label):
            problems.append(
                Problem(
                    "duplicate_case",
                    path,
                    found=f"and {label} are label maps of the case {name}",
                    expected="one label map per case in labelsTr and the folders below it",
                    suggestion="move it to another folder",
                    case_id=name,
                )
            )
    return problems


def _list_problems(
    root: Path, description: Description, cases: set[str], need_labels: bool, *, only_images: bool
) -> list[Problem]:
    """Compare the list and the number of training cases in ``dataset.json`` with the existing cases."""
    path = root / "dataset.json"
    if not only_images and (absent := [n for n in description.listed if n not in cases]):
        return [
            Problem(
                "missing_file",
                path,
                found=f"lists {len(absent)} cases that do not exist: {shorten(absent)}",
                expected="only files that exist",
                suggestion="download them, or correct the list",
            )
        ]
    if need_labels and not only_images and (problems := unknown_annotated(root, description, cases, "imagesTr")):
        return problems
    if need_labels and description.count is not None and description.count != len(cases) and path.is_file():
        return [
            Problem(
                "dataset_json",
                path,
                found=f"states numTraining {description.count}, but {len(cases)} cases exist",
                expected="the number of cases",
                suggestion="correct the number",
                severity=WARNING,
            )
        ]
    return []


def unknown_annotated(root: Path, description: Description, cases: Set[str], place: str) -> list[Problem]:
    """Return a problem if the key ``annotated`` of ``dataset.json`` names cases that are not in ``cases``.

    Args:
        root: Folder of the data set.
        description: Contents of its ``dataset.json``.
        cases: Ids of all cases.
        place: Name of the folder or file that contains the cases, for the message.
    """
    if not (unknown := sorted(description.annotated.keys() - cases)):
        return []
    return [
        Problem(
            "dataset_json",
            root / "dataset.json",
            found=f'names {len(unknown)} cases in "annotated" that do not exist: {shorten(unknown)}',
            expected=f"ids of cases in {place}",
            suggestion="correct the names",
        )
    ]


def _group(folder: Path, one_file_per_channel: bool) -> tuple[dict[str, dict[str, Path]], list[Problem]]:
    """Return case -> channel number -> file, and a problem for each further file of the same case and channel."""
    groups: dict[str, dict[str, Path]] = {}
    problems = []
    for name, path in images_in(folder):
        case, _, number = name.rpartition("_")
        if not (one_file_per_channel and len(number) == _CHANNEL_DIGITS and number.isdigit() and case):
            case, number = name, "" if one_file_per_channel else "0"
        files = groups.setdefault(case, {})
        if number in files:
            problems.append(same_name(path, files[number], case))
        else:
            files[number] = path
    return groups, problems


def _channels(
    folder: Path, name: str, files: Mapping[str, Path], description: Description, one_file_per_channel: bool
) -> tuple[tuple[Path, ...], list[Problem]]:
    """Return the files of a case in the order of the channels, and a problem for each missing or extra channel."""
    if not one_file_per_channel:
        return tuple(files.values()), []
    wanted = {f"{i:04d}": channel for i, channel in enumerate(description.channels)}
    missing = [
        Problem(
            "missing_image",
            folder,
            found=f"lacks {name}_{number} ({channel})",
            expected=f"{len(wanted)} channels",
            suggestion="add it; files are named <case>_<channel, 4 digits>",
            case_id=name,
        )
        for number, channel in wanted.items()
        if number not in files
    ]
    extra = [
        Problem(
            "extra_file",
            path,
            found="belongs to no channel in dataset.json",
            expected=", ".join(wanted),
            suggestion="move it to another folder, or name the channel in dataset.json",
            case_id=name,
            severity=WARNING,
        )
        for number, path in files.items()
        if number not in wanted
    ]
    return tuple(files[n] for n in wanted if n in files), missing + extra


def _splits(root: Path, cases: set[str]) -> tuple[tuple[dict[str, tuple[str, ...]], ...], list[Problem]]:
    """Return the folds that come with the data, if there are any, and their problems."""
    path = next((p for p in (root / "splits.json", root / "splits_final.json") if p.is_file()), None)
    if path is None:
        return (), []
    subsets = {"train": "training", "val": "validation", "test": "testing"}
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))
        splits = tuple(
            {str(subsets.get(k, k)): tuple(normalised(str(n)) for n in v) for k, v in fold.items()} for fold in folds
        )
    except (ValueError, AttributeError, TypeError) as error:
        return (), [
            Problem(
                "dataset_json",
                path,
                found=f"cannot be read ({error})",
                expected='[{"training": [...], "validation": [...]}, ...]',
                suggestion="correct it",
            )
        ]
    problems = []
    for number, fold in enumerate(splits):
        problems += [
            Problem(
                "patient_in_two_folds",
                path,
                found=f"lists {name} for training and for validation in fold {number}",
                expected="each case once",
                suggestion="keep it in one list",
                case_id=name,
            )
            for name in sorted(set(fold.get("training", ())) & set(fold.get("validation", ())))
        ]
        if absent := sorted({n for names in fold.values() for n in names} - cases):
            problems.append(
                Problem(
                    "missing_file",
                    path,
                    found=f"lists {len(absent)} cases that do not exist: {shorten(absent)}",
                    expected="cases of this folder",
                    suggestion="correct it",
                    severity=WARNING,
                )
            )
    return splits, problems


def read_description(value: Mapping[str, Any]) -> Description:
    """Read the description of the training data in a workdir.

    Args:
        value: Result of `xdim_jax.data.case.describe`.

    Raises:
        UserError: A key is missing, or has a wrong value.
    """
    try:
        labels = Labels.from_json(value["labels"])
        regions = Regions({k: tuple(v) for k, v in value["regions"].items()})
        annotated = {case: tuple(names) for case, names in value.get("annotated", {}).items()}
        return Description(tuple(value["channels"]), labels, regions, annotated=annotated)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the description of the training data cannot be used ({error})") from error
