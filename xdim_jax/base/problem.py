"""Problems of a data set: the class `Problem`, and the table of all kinds of problems."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from xdim_jax.base.errors import UserError, join_problems

# kind -> its meaning; the documentation, --help and the tests read this table
KINDS = {
    "table": "the table of cases is incomplete or contradicts itself",
    "missing_image": "an image, modality or phase of a case is missing",
    "missing_label": "a case has no reference labels although labels are needed",
    "missing_view": "a patient lacks a view, an instant or a sequence that other patients have",
    "missing_info": "a file that describes an acquisition (Info_2CH.cfg, Info_4CH.cfg) is missing or incomplete",
    "missing_file": "a list names a file or patient that does not exist",
    "extra_file": "a file belongs to no case: unknown modality, label without an image, or unknown name pattern",
    "wrong_convention": "files are named by another convention of the data set",
    "duplicate_case": "one case is stored in two places",
    "duplicate_content": "two cases contain the same image",
    "patient_in_two_folds": "a patient is in two subsets of a split, e.g. in training and in validation",
    "unreadable": "a file cannot be read: truncated, damaged, or in another format",
    "shape": "arrays of one case differ in shape, or have a wrong number of axes or channels",
    "affine": "files of one case differ in position or orientation in space",
    "spacing": "voxel sizes differ between the files of a case, or within a series",
    "no_geometry": "a voxel size is zero, or an affine or a slice position is missing or singular",
    "implausible_spacing": "a voxel size is outside 0.01 to 50 mm",
    "not_finite": "an image contains NaN or infinite values",
    "constant": "an image has the same value everywhere",
    "empty_slice": "a slice between other slices is constant",
    "dtype": "voxels are not numbers, or labels are not integers",
    "label_value": "a label value is not in the convention",
    "label_scale": "labels seem to be scaled, e.g. 0 and 255 instead of 0 and 1",
    "empty_label": "a label map contains no structure",
    "missing_structure": "a case lacks a structure that other cases have",
    "slice_count": "the series of a case differ in their numbers of slices",
    "slice_gap": "a slice is missing from a series",
    "duplicate_slice": "two slices of a volume have the same position or the same image",
    "slice_order": "slices are not sorted by their positions",
    "label_order": "label slices seem to be in reverse order",
    "gantry_tilt": "the slices of a series are tilted against its axis",
    "slice_name": "a label slice is not named after its image",
    "coverage": "an image covers much less of the body than the other images of its case",
    "intensity_range": "intensities are implausible for the modality",
    "dataset_json": "dataset.json is missing, is not JSON, or contradicts the files",
}
ERROR, WARNING = "error", "warning"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem of a data set. As text it reads "<path> <found>; expected <expected>: <suggestion>".

    Attributes:
        kind: Key of `KINDS`.
        path: File or folder with the problem.
        found: What was found, starting with a verb: "has shape (3, 4)".
        expected: What was expected instead.
        suggestion: What the user can do about it.
        case_id: Case with the problem; empty if the problem does not belong to a single case.
        severity: `ERROR` if the case cannot be used; `WARNING` if the user should check it.
    """

    kind: str
    path: Path | str
    _: dataclasses.KW_ONLY
    found: str
    expected: str
    suggestion: str
    case_id: str = ""
    severity: str = ERROR

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def __str__(self) -> str:
        return f"{self.path} {self.found}; expected {self.expected}: {self.suggestion}"

    def to_json(self) -> dict[str, str]:
        """Return all fields as strings."""
        return {key: str(value) for key, value in dataclasses.asdict(self).items()}


def errors(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems that make a case unusable."""
    return [p for p in problems if p.severity == ERROR]


def in_case(case_id: str, problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems with their ``case_id`` set. Functions that read files leave it empty."""
    return [dataclasses.replace(p, case_id=case_id) for p in problems]


class DataError(UserError):
    """A UserError that also carries the problems it reports."""

    def __init__(self, message: str, problems: list[Problem]):
        super().__init__(message)
        self.problems = problems


def data_error(*problems: Problem, summary: str = "problems") -> DataError:
    """Return one error that lists all problems.

    Args:
        problems: One or more problems.
        summary: Noun after the number of problems in the first line, see `xdim_jax.base.errors.join_problems`.
    """
    return DataError(str(join_problems([str(p) for p in problems], summary)), list(problems))
