"""Cross-validation folds of patients."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from xdim_jax.base.errors import UserError
from xdim_jax.data.case import Case

ALL_FOLDS = -1  # value of config.data.fold for training all folds, one after the other

T = TypeVar("T")


def assign_folds(patients: Iterable[str], folds: int, seed: int) -> dict[str, int]:
    """Assign patients to folds.

    Patients are sorted by a seeded hash of their names, and assigned to the folds in turn. The result depends only on
    the set of names, not on their order or the machine. The sizes of folds differ by at most one.

    Args:
        patients: Names of patients, which may be repeated.
        folds: Number of folds.
        seed: Seed of the hash.

    Returns:
        Patient -> index of its fold.
    """
    order = _shuffled(patients, str(seed))
    return {patient: i % folds for i, patient in enumerate(order)}


def _shuffled(patients: Iterable[str], key: str) -> list[str]:
    """Return the distinct names in an order that depends only on them and on the key."""
    return sorted(
        set(patients), key=lambda p: hashlib.sha256(f"{key}:{p}".encode(errors="surrogateescape")).hexdigest()
    )


def check_fold(fold: int, folds: int) -> None:
    """Raise UserError if the fold does not exist, or if there are fewer than two folds."""
    if not (folds >= 2 and 0 <= fold < folds):
        raise UserError(f"config.data.fold={fold} of config.data.folds={folds}: expected 0 <= fold < folds, folds >= 2")


def split_cases(cases: Sequence[Case], *, fold: int, folds: int, seed: int) -> tuple[list[Case], list[Case]]:
    """Return the training cases and the validation cases of a fold. All cases of a patient are in the same subset.

    Args:
        cases: All cases.
        fold: Number of the fold with the validation cases, from 0.
        folds: Number of folds.
        seed: Seed of the assignment, see `assign_folds`.

    Raises:
        UserError: The fold does not exist, or there are fewer patients than folds.
    """
    check_fold(fold, folds)
    assigned = assign_folds((c.patient for c in cases), folds, seed)
    if len(assigned) < folds:
        raise UserError(
            f"{len(assigned)} patients cannot be split into config.data.folds={folds}; add cases, or reduce folds"
        )
    train = [c for c in cases if assigned[c.patient] != fold]
    return train, [c for c in cases if assigned[c.patient] == fold]


def limit_patients(cases: Sequence[Case], count: int, seed: int) -> list[Case]:
    """Return the cases of ``count`` patients, or all cases if the count is 0.

    The patients are the first ones in the order of a seeded hash of their names, so a smaller subset is contained in a
    larger one.

    Raises:
        UserError: There are fewer patients.
    """
    if not count:
        return list(cases)
    order = _shuffled((c.patient for c in cases), f"limit:{seed}")
    if count > len(order):
        raise UserError(
            f"config.data.train_patients={count}, but this fold has {len(order)} training patients; give "
            f"{len(order)} or fewer, or 0 for all"
        )
    chosen = set(order[:count])
    return [c for c in cases if c.patient in chosen]


def official_split(
    cases: Sequence[Case], splits: Sequence[Mapping[str, Sequence[str]]], fold: int
) -> tuple[list[Case], list[Case]]:
    """Return the training and the validation cases of a split that comes with the data.

    Args:
        cases: All cases.
        splits: Splits of the data set, see `xdim_jax.data.case.Scan`.
        fold: Number of the split, from 0.

    Raises:
        UserError: The data have no splits, the fold does not exist, or its training or validation subset has no cases.
    """
    if not splits:
        raise UserError(
            "config.data.split=official, but the data have no list of splits; give --config.data.split=folds"
        )
    if not 0 <= fold < len(splits):
        raise UserError(
            f"config.data.fold={fold}: the list that comes with the data has the folds 0 to {len(splits) - 1}"
        )
    train, validation = (
        [c for c in cases if c.patient in set(splits[fold].get(subset, ()))] for subset in ("training", "validation")
    )
    if not train or not validation:
        raise UserError(
            f"fold {fold} of the list of splits has {len(train)} training and {len(validation)} validation cases among "
            f"the {len(cases)} cases; expected at least one of each: correct the list, or give "
            "--config.data.split=folds"
        )
    return train, validation
