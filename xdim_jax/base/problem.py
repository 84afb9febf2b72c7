"""What can be wrong with a data set: one record per finding, and the kinds there are."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from xdim_jax.base.errors import UserError, join_problems

# kind -> what it means; docs, --help and tests read this table
KINDS = {
    "missing_image": "an image, modality or phase of a case is not there",
    "missing_label": "a case has no reference labels where they are needed",
    "missing_view": "a patient lacks a view, an instant or a sequence that others have",
    "missing_info": "a file with the facts of an examination is missing or lacks a fact",
    "missing_file": "a list names a file or patient that does not exist",
    "extra_file": "a file belongs to no case: another modality, a label without an image, a name that fits no pattern",
    "wrong_convention": "files are named as in another convention of the data set",
    "duplicate_case": "one case lies in two places",
    "duplicate_content": "two cases hold the same image",
    "patient_in_two_folds": "a split lists a patient on two sides",
    "unreadable": "a file cannot be read: truncated, damaged, or of another format",
    "shape": "arrays of one case differ in shape, or have a wrong number of axes or channels",
    "affine": "files of one case lie at different places in space",
    "spacing": "voxel sizes of one case differ between its files, or within a series",
    "no_geometry": "a voxel size is zero, or an affine or a slice position is missing or singular",
    "implausible_spacing": "a voxel size outside 0.01 to 50 mm",
    "not_finite": "an image holds NaN or infinite values",
    "constant": "an image has one value everywhere",
    "empty_slice": "a slice inside an image is constant",
    "dtype": "voxels are not numbers, or labels are stored as fractions",
    "label_value": "a label value that the convention does not have",
    "label_scale": "labels look scaled: 0 and 255 where 0 and 1 belong",
    "empty_label": "a label map holds no structure",
    "missing_structure": "a structure that other cases have is absent from a case",
    "slice_count": "numbers of slices differ between the series of a case",
    "slice_gap": "a slice is missing from a series",
    "duplicate_slice": "two slices of a volume are at one place, or are the same image",
    "slice_order": "slices are not in the order of their positions",
    "label_order": "label slices seem to be in reverse order",
    "slice_name": "a label slice is not named after its image",
    "intensity_range": "intensities do not look like the modality",
    "dataset_json": "dataset.json is missing, is not JSON, or contradicts the files",
}
ERROR, WARNING = "error", "warning"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One finding. An error keeps the case from being used; a warning is for a person to look at."""

    kind: str
    path: Path | str
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
        """Plain strings."""
        return {key: str(value) for key, value in dataclasses.asdict(self).items()}


def errors(problems: Iterable[Problem]) -> list[Problem]:
    """Those that keep a case from being used."""
    return [p for p in problems if p.severity == ERROR]


class DataError(UserError):
    """A UserError that carries the findings it was made of."""

    def __init__(self, message: str, problems: list[Problem]):
        super().__init__(message)
        self.problems = problems

    def of_case(self, case_id: str) -> list[Problem]:
        """The findings with the case that they are of, which a reader of files does not know."""
        return [dataclasses.replace(p, case_id=case_id) for p in self.problems]


def data_error(problems: Iterable[Problem], summary: str) -> DataError:
    """One error that lists all findings."""
    problems = list(problems)
    return DataError(str(join_problems([str(p) for p in problems], summary)), problems)
