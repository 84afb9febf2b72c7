"""Selection of scoring rules by the names of ``--rules``, and the command-line options of each."""

import argparse
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError
from xdim_jax.scoring import brats, camus, chaos, generic, simpson
from xdim_jax.scoring.lesions import COHORTS
from xdim_jax.scoring.masks import METRICS
from xdim_jax.scoring.rules import Rules

NAMES = ("camus", "chaos", "brats2022", "brats2023", "brats2024", "generic")
# option -> rules that accept it
_ACCEPTED_BY = {
    "convention": ("brats2022", "brats2023", "brats2024"),
    "platform_2022": ("brats2022",),
    "tune_min_et": ("brats2022",),
    "cohort": ("brats2023",),
    "task": ("chaos",),
    "step": ("camus",),
    "contour": ("camus",),
    "labels": ("generic",),
    "border": ("generic",),
}

OPTIONS = tuple(_ACCEPTED_BY)
_DEFAULTS = {"cohort": "GLI", "step": "largest", "contour": "official", "border": "outside"}


def accepts(name: str, option: str) -> bool:
    """Return whether rules accept an option."""
    return name in _ACCEPTED_BY[option]


def resolve_options(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return all options in `OPTIONS` with their values. An option that was not given has its default value.

    The value is None if the rules do not accept the option, or if it was not given and has no default.

    Args:
        name: One of `NAMES`.
        options: Parsed options, see `add_options`.
    """
    found = {k: getattr(options, k) for k in OPTIONS}
    found |= {k: found[k] or v for k, v in _DEFAULTS.items() if name in _ACCEPTED_BY[k]}
    if name.startswith("brats"):
        found["convention"] = found["convention"] or {"brats2022": "brats2021"}.get(name, name)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all rules to a parser."""
    group = parser.add_argument_group("options of individual rules")
    group.add_argument(
        "--convention",
        choices=sorted(brats.CODINGS),
        help="brats: convention of the label values in both folders; ET is 4 in brats2021, and 3 in brats2023 and "
        "brats2024 (default: brats2021 for --rules=brats2022, otherwise the convention with the name of the rules)",
    )
    group.add_argument(
        "--platform_2022",
        action="store_true",
        default=None,
        help="brats2022: also compute sd, median and quartiles as the platform did: it appended each statistic to the "
        "column of values, and computed the next one over all of them",
    )
    group.add_argument(
        "--tune_min_et",
        action="store_true",
        default=None,
        help="brats2022: also find the threshold (0 to 750 voxels) with the best mean Dice of ET; ET is removed from a "
        "prediction with fewer voxels of ET. Needs predictions that were made with --min_et=0",
    )
    group.add_argument("--cohort", choices=sorted(COHORTS), help="brats2023: part of the challenge (default: GLI)")
    group.add_argument(
        "--task",
        choices=sorted(chaos.TASKS),
        action="append",
        help="chaos: task to score; repeat for several (default: those with predictions in folders Task1 to Task5, or "
        "else those whose modalities have references)",
    )
    group.add_argument(
        "--step",
        choices=simpson.STEPS,
        help="camus: height of the discs in Simpson's rule: the largest height of the four masks of a patient, or the "
        "larger height of the two views at each instant (default: largest)",
    )
    group.add_argument(
        "--contour",
        choices=simpson.CONTOURS,
        help="camus: contour that is divided into discs: the first one that is found, as in the official code, or that "
        "of the largest part of the cavity (default: official)",
    )
    group.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME=VALUE[,VALUE]",
        help="generic: structures and their label values (default: those in the dataset.json in --ref or its parent "
        "folder; if there is none, each nonzero value is a structure)",
    )
    group.add_argument(
        "--border",
        choices=["outside", "inside"],
        help="generic: whether positions beyond the edge of the image are outside or inside of a mask; with outside, "
        "mask voxels at the edge belong to its surface (default: outside)",
    )


def make_rules(name: str, options: argparse.Namespace) -> Rules:
    """Return the rules with the given options.

    Args:
        name: One of `NAMES`.
        options: Parsed options, see `add_options`, and also ``metrics`` and ``ref``.

    Raises:
        UserError: The rules do not accept an option, or its value.
    """
    check_options(name, options)
    if name.startswith("brats"):
        also = [option for option in ("platform_2022", "tune_min_et") if getattr(options, option)]
        return brats.rules(name, options.convention or "", options.cohort or "GLI", also=also)
    if name == "chaos":
        return chaos.rules(tuple(sorted(set(options.task or ()))))
    if name == "camus":
        return camus.rules(options.step or "largest", options.contour or "official")
    structures = generic.parse_structures(options.labels) if options.labels else None
    metrics = tuple(options.metrics) or generic.DEFAULT_METRICS
    if structures is None:
        structures = generic.read_structures(Path(options.ref))
    annotated = generic.read_annotated(Path(options.ref))
    return generic.rules(structures, metrics, border=options.border != "inside", annotated=annotated)


def check_options(name: str, options: argparse.Namespace) -> None:
    """Check the options of rules without reading a file.

    Raises:
        UserError: The rules do not accept an option, or its value.
    """
    for option, accepted_by in _ACCEPTED_BY.items():
        if getattr(options, option, None) is not None and name not in accepted_by:
            raise UserError(f"--{option} is an option of --rules={' and '.join(accepted_by)}, not of {name}; remove it")
    if name.startswith("brats"):
        convention = options.convention or ""
        if convention and convention not in brats.conventions(name):
            known = " or ".join(brats.conventions(name))
            raise UserError(f"--convention={convention} does not have the structures of {name}; give {known}")
    if options.labels:
        generic.parse_structures(options.labels)


METRIC_ALIASES = {"hd95": "hd95_pooled", "assd": "assd_pooled"}


def parse_metrics(text: str) -> tuple[str, ...]:
    """Return the metric names in a comma-separated list; ``hd95`` means ``hd95_pooled``, and ``assd`` ``assd_pooled``.

    Raises:
        UserError: A name is unknown.
    """
    words = [name.strip() for name in text.split(",") if name.strip()]
    names = tuple(dict.fromkeys(METRIC_ALIASES.get(name, name) for name in words))
    if unknown := [name for name in names if name not in METRICS]:
        variants = sorted({m for name in unknown for m in METRICS if m.startswith(f"{name}_")})
        hint = f"; did you mean {' or '.join(variants)}?" if variants else ""
        raise UserError(f"--metrics: unknown {', '.join(unknown)}; expected {', '.join(METRICS)}{hint}")
    return names
