"""The rules by the names of ``--rules``, and the options of the command line that each takes."""

import argparse
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError
from xdim_jax.scoring import brats, camus, chaos, generic, simpson
from xdim_jax.scoring.lesions import COHORTS
from xdim_jax.scoring.masks import METRICS
from xdim_jax.scoring.rules import Rules

NAMES = ("camus", "chaos", "brats2022", "brats2023", "brats2024", "generic")
# option -> the rules that take it
_TAKEN_BY = {
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

OPTIONS = tuple(_TAKEN_BY)
_DEFAULTS = {"cohort": "GLI", "step": "largest", "contour": "official", "border": "outside"}


def takes(name: str, option: str) -> bool:
    """Return whether rules have an option."""
    return name in _TAKEN_BY[option]


def resolved(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The options that change what the rules measure, with the defaults of those that were not given."""
    found = {k: getattr(options, k) for k in OPTIONS}
    found |= {k: found[k] or v for k, v in _DEFAULTS.items() if name in _TAKEN_BY[k]}
    if name.startswith("brats"):
        found["convention"] = found["convention"] or {"brats2022": "brats2021"}.get(name, name)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of all rules."""
    group = parser.add_argument_group("of some rules")
    group.add_argument(
        "--convention",
        choices=sorted(brats.CODINGS),
        help="brats: label values of both folders; ET is 4 in brats2021, 3 since brats2023 (default: brats2021 for "
        "brats2022, else the year's)",
    )
    group.add_argument(
        "--platform_2022",
        action="store_true",
        default=None,
        help="brats2022: also the platform's own sd, median and quartiles, which counted its mean as a case",
    )
    group.add_argument(
        "--tune_min_et",
        action="store_true",
        default=None,
        help="brats2022: also which smallest ET volume (0 to 750 voxels) would give the best mean Dice of ET; the "
        "predictions must have been made with --min_et=0",
    )
    group.add_argument("--cohort", choices=sorted(COHORTS), help="brats2023: part of the challenge (default: GLI)")
    group.add_argument(
        "--task", choices=sorted(chaos.TASKS), action="append", help="chaos: 1 to 5, again for more (default: all)"
    )
    group.add_argument(
        "--step", choices=simpson.STEPS, help="camus: height of the discs in Simpson's rule (default: largest)"
    )
    group.add_argument(
        "--contour", choices=simpson.CONTOURS, help="camus: which part of a ventricle is cut (default: official)"
    )
    group.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME=VALUE[,VALUE]",
        help="generic: structures (default: those of a dataset.json, or every value)",
    )
    group.add_argument(
        "--border",
        choices=["outside", "inside"],
        help="generic: what lies beyond the image's edge: masks end there, or go on (default: outside)",
    )


def make_rules(name: str, options: argparse.Namespace) -> Rules:
    """The rules with the options that were given. Raises UserError for options that they do not take."""
    for option, takers in _TAKEN_BY.items():
        if getattr(options, option, None) is not None and name not in takers:
            raise UserError(f"--{option} is of --rules={' and '.join(takers)}, not of {name}")
    if name.startswith("brats"):
        convention = options.convention or ""
        if convention and convention not in brats.conventions(name):
            known = ", ".join(brats.conventions(name))
            raise UserError(f"--convention={convention}: the structures of {name} need one of {known}")
        also = [name for name in ("platform_2022", "tune_min_et") if getattr(options, name)]
        return brats.rules(name, convention, options.cohort or "GLI", also=also)
    if name == "chaos":
        return chaos.rules(tuple(sorted(set(options.task or ()))))
    if name == "camus":
        return camus.rules(options.step or "largest", options.contour or "official")
    structures = generic.parse_structures(options.labels) if options.labels else None
    metrics = tuple(options.metrics) or generic.USUAL
    if structures is None:
        structures = generic.read_structures(Path(options.ref))
    return generic.rules(structures, metrics, border=options.border != "inside")


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names with commas between them. Raises UserError, listing the known ones."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in METRICS]:
        near = sorted({m for name in unknown for m in METRICS if m.startswith(f"{name}_")})
        hint = f"; of them {' or '.join(near)}?" if near else ""
        raise UserError(f"--metrics: {', '.join(unknown)} unknown; known: {', '.join(METRICS)}{hint}")
    return names
