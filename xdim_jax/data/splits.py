"""Cross-validation folds by patient."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from xdim_jax.base.errors import UserError
from xdim_jax.data.case import Case

ALL_FOLDS = -1  # as the number of a fold: all of them, one after the other

T = TypeVar("T")


def assign_folds(patients: Iterable[str], folds: int, seed: int) -> dict[str, int]:
    """Patient to fold. Patients are put in the order of a seeded hash of their names and dealt out like cards.

    The result depends on the set of names alone, not on their order or the machine; folds differ in size by one
    at most.
    """
    order = sorted(set(patients), key=lambda p: hashlib.sha256(f"{seed}:{p}".encode()).hexdigest())
    return {patient: i % folds for i, patient in enumerate(order)}


def check_fold(fold: int, folds: int) -> None:
    """Raises UserError if there is no such fold, or fewer than two."""
    if not (folds >= 2 and 0 <= fold < folds):
        raise UserError(f"config.data.fold={fold} of config.data.folds={folds}: expected 0 <= fold < folds, folds >= 2")


def split_cases(cases: Sequence[Case], *, fold: int, folds: int, seed: int) -> tuple[list[Case], list[Case]]:
    """Training cases, and the validation cases of ``fold``; every patient is on one side only.

    Raises:
        UserError: the fold does not exist, or there are fewer patients than folds.
    """
    check_fold(fold, folds)
    assigned = assign_folds((c.patient for c in cases), folds, seed)
    if len(assigned) < folds:
        raise UserError(
            f"{len(assigned)} patients cannot be split into config.data.folds={folds}; add cases, or lower folds"
        )
    train = [c for c in cases if assigned[c.patient] != fold]
    return train, [c for c in cases if assigned[c.patient] == fold]


def official_split(
    cases: Sequence[Case], splits: Sequence[Mapping[str, Sequence[str]]], fold: int
) -> tuple[list[Case], list[Case]]:
    """Training and validation cases as a list that came with the data has them.

    Raises:
        UserError: the data set has no list, or not this fold, or a side of it has no case.
    """
    if not splits:
        raise UserError("config.data.split=official, but the data come without a list of splits; give split=folds")
    if not 0 <= fold < len(splits):
        raise UserError(f"config.data.fold={fold}: the data come with the folds 0 to {len(splits) - 1}")
    sides = [[c for c in cases if c.patient in set(splits[fold].get(s, ()))] for s in ("training", "validation")]
    if not all(sides):
        raise UserError(
            f"the list of splits, fold {fold}, has {len(sides[0])} training and {len(sides[1])} validation cases among "
            f"the {len(cases)} that are there; expected some of both"
        )
    return sides[0], sides[1]
