"""Measurements of all cases of a data set, from which `xdim_jax.planning` chooses a recipe.

The measurements of a case are stored in ``fingerprint-<key>.json``, in the folder of the prepared cases, and are
computed again only if a file of the case changes.
"""

import concurrent.futures
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import find_objects
from scipy.ndimage import label as connected

from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json, write_json
from xdim_jax.base.problem import DataError, Problem, data_error
from xdim_jax.data.case import Case, Dataset, Volume
from xdim_jax.data.facts import sample
from xdim_jax.data.labels import is_structure
from xdim_jax.data.prepare import ct_channels, nonzero_box
from xdim_jax.data.reading import read_case

_VERSION = 2  # increased when the measurements change
PERCENTILES = tuple(np.linspace(0, 100, 201).tolist())  # percentiles of the intensities, in steps of 0.5

_SAVE_SECONDS = 60  # time after which new measurements are saved, so that a stopped command continues from them

Facts = dict[str, Any]


def measure(case: Case, volume: Volume) -> Facts:
    """Return the measurements of a case as JSON values.

    Args:
        case: Case with a reference.
        volume: Its images and reference.

    Returns:
        A dictionary with the keys

        - ``patient``: Name of the patient.
        - ``size``, ``spacing``: Number of voxels and voxel size in mm along D, H, W.
        - ``nonzero``: Size (D, H, W) of the bounding box of the voxels that are not 0 in some channel.
        - ``ct``: Indices of the channels in HU.
        - ``channels``: For each channel, ``image`` and ``foreground`` (`PERCENTILES` of all voxels, and of the labelled
          voxels), and ``mean`` and ``sd`` of the labelled voxels. Without labelled voxels, ``foreground``, ``mean`` and
          ``sd`` are None.
        - ``foreground``: ``voxels`` (number of labelled voxels), ``slices`` (number of slices with a labelled voxel)
          and ``extent`` (size of their bounding box in mm along D, H, W).
        - ``structures``: Name of each structure that occurs -> the keys of ``foreground`` for this structure,
          ``components`` (number of 26-connected components) and ``largest`` (fraction of the voxels that are in the
          largest component).
    """
    assert volume.label is not None
    spacing = [float(s) for s in volume.grid.spacing]
    mask = is_structure(volume.label)
    return {
        "patient": case.patient,
        "size": [int(n) for n in mask.shape],
        "spacing": spacing,
        "nonzero": [b.stop - b.start for b in nonzero_box(volume.image)],
        "ct": ct_channels(case.channels, case.info.get("modality", "")),
        "channels": [_intensities(channel, mask) for channel in np.moveaxis(volume.image, -1, 0)],
        "foreground": _shape(mask, spacing),
        "structures": {
            name: _shape(volume.label == index, spacing, components=True)
            for index, name in enumerate(case.labels.structures)
            if index and (volume.label == index).any()
        },
    }


def _intensities(channel: np.ndarray, mask: np.ndarray) -> Facts:
    flat, inside = channel.reshape(-1), channel[mask]
    return {
        "image": _percentiles(flat),
        "foreground": _percentiles(inside) if inside.size else None,
        "mean": float(inside.mean(dtype=np.float64)) if inside.size else None,
        "sd": float(inside.std(dtype=np.float64)) if inside.size else None,
    }


def _percentiles(values: np.ndarray) -> list[float]:
    """Return `PERCENTILES`, rounded to six digits. All but the first and last are computed on samples."""
    found = np.percentile(sample(values), PERCENTILES)
    found[0], found[-1] = values.min(), values.max()
    return [float(f"{v:.6g}") for v in found]


def _shape(mask: np.ndarray, spacing: Sequence[float], *, components: bool = False) -> Facts:
    boxes = find_objects(mask.view(np.uint8))
    if not boxes:
        return {"voxels": 0, "slices": 0, "extent": [0.0, 0.0, 0.0]}
    box = boxes[0]
    inside = mask[box]
    facts: Facts = {
        "voxels": int(np.count_nonzero(inside)),
        "slices": int(np.count_nonzero(inside.any((1, 2)))),
        "extent": [float(f"{(b.stop - b.start) * s:.7g}") for b, s in zip(box, spacing, strict=True)],
    }
    if components:
        found: Any = connected(inside, np.ones((3, 3, 3), bool))
        parts, count = found
        sizes = np.bincount(parts.ravel())[1:]
        facts |= {"components": int(count), "largest": round(float(sizes.max() / sizes.sum()), 6)}
    return facts


def measure_cases(
    dataset: Dataset,
    cases: Sequence[Case],
    folder: Path,
    *,
    jobs: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Facts]:
    """Return the measurements of all cases by case id. Those of unchanged cases are read from the file in the folder.

    Args:
        dataset: Data set of the cases.
        cases: Cases with references.
        folder: Folder of the prepared cases.
        jobs: Number of threads; each has one case in memory.
        progress: Called with the number of measured cases and the number of cases to measure.

    Raises:
        DataError: Lists all cases that cannot be read.
        UserError: The measurements cannot be written.
    """
    path = folder / f"fingerprint-{_key(dataset)}.json"
    known = _read_known(path)
    signatures = {case.case_id: _signature(case) for case in cases}
    found = {c: known[c]["facts"] for c, s in signatures.items() if c in known and known[c]["signature"] == s}
    missing = [case for case in cases if case.case_id not in found]
    problems: list[Problem] = []

    def run(case: Case) -> Facts | DataError:
        try:
            return measure(case, read_case(case))
        except DataError as error:
            return error

    def save() -> float:
        kept = {c: {"signature": signatures[c], "facts": facts} for c, facts in found.items()}
        write_json(path, {"version": _VERSION, "dataset": dataset.name, "cases": known | kept})
        return time.monotonic()

    saved = save() if missing else 0.0  # at the start, so that a folder without write permission is noticed
    with concurrent.futures.ThreadPoolExecutor(max(jobs, 1)) as pool:
        for done, (case, outcome) in enumerate(zip(missing, pool.map(run, missing), strict=True), 1):
            if isinstance(outcome, DataError):
                problems += outcome.problems
            else:
                found[case.case_id] = outcome
            progress(done, len(missing))
            if time.monotonic() - saved > _SAVE_SECONDS:
                saved = save()
    if missing:
        save()
    if problems:
        raise data_error(*problems, summary=f"problems in {len(cases) - len(found)} of {len(cases)} cases")
    return {case.case_id: found[case.case_id] | {"patient": case.patient} for case in cases}


def _key(dataset: Dataset) -> str:
    """Return a digest of the data set's channels and labels."""
    values = [dataset.name, list(dataset.channels), dataset.labels.to_json()]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _read_known(path: Path) -> dict[str, Any]:
    """Return the measurements in a file; nothing if it does not exist, or was written by another version."""
    try:
        known = read_json(path) if path.is_file() else {}
    except UserError:
        return {}
    return known["cases"] if isinstance(known, dict) and known.get("version") == _VERSION else {}


def _signature(case: Case) -> list[list[Any]]:
    """Return the properties of the case that affect its measurements, and the state of every file."""
    found: list[list[Any]] = [[case.axes, sorted(case.info.items())]]
    for path in case.files:
        try:
            state = path.stat()
        except OSError:  # reported when the case is read
            return []
        found.append(["/".join(path.absolute().parts[-2:]), state.st_size, state.st_mtime_ns])
    return json.loads(json.dumps(found))  # as in the file


# -- summary ------------------------------------------------------------------------------------------------------


class Fingerprint:
    """Statistics over the cases of a data set, in which every case has the same weight.

    Args:
        cases: Result of `measure_cases`.
        channels: Names of the channels.
        structures: Names of the structures, without the background.

    Attributes:
        cases: Measurements by case id.
        size, spacing: Arrays (cases, 3) of the numbers of voxels, and of the voxel sizes in mm, along D, H, W.
    """

    def __init__(self, cases: Mapping[str, Facts], channels: Sequence[str], structures: Sequence[str]):
        self.cases, self.channels, self.structures = dict(cases), tuple(channels), tuple(structures)
        self.size = np.array([f["size"] for f in cases.values()])
        self.spacing = np.array([f["spacing"] for f in cases.values()])

    @property
    def patients(self) -> set[str]:
        """Names of the patients."""
        return {facts["patient"] for facts in self.cases.values()}

    @property
    def digest(self) -> str:
        """Hexadecimal digest of all measurements."""
        return hashlib.sha256(json.dumps(self.cases, sort_keys=True).encode()).hexdigest()[:12]

    def prepared_sizes(self, spacing: Sequence[float], *, cropped: bool) -> np.ndarray:
        """Return the sizes (cases, 3) after preparation.

        Args:
            spacing: Spacing in mm along D, H, W; 0 keeps an axis.
            cropped: True if preparation crops images to the bounding box of the nonzero voxels.
        """
        sizes = np.array([f["nonzero"] for f in self.cases.values()]) if cropped else self.size
        wanted = np.where(np.array(spacing) > 0, spacing, self.spacing)
        return np.maximum(np.rint(sizes * self.spacing / wanted), 1)

    def percentile(self, channel: int, level: float, kind: str = "foreground") -> float:
        """Return a percentile of a channel over the voxels of all cases.

        Args:
            channel: Index of the channel.
            level: Percentile, 0 to 100.
            kind: ``foreground`` for labelled voxels, ``image`` for all voxels.
        """
        values = np.array([f["channels"][channel][kind] for f in self.cases.values() if f["channels"][channel][kind]])
        middles = (values[:, 1:] + values[:, :-1]) / 2  # each stands for the same fraction of the voxels of a case
        return float(np.percentile(middles, level))

    def moments(self, channel: int) -> tuple[float, float]:
        """Return mean and standard deviation of a channel over the labelled voxels of all cases."""
        pairs = [(c["mean"], c["sd"]) for f in self.cases.values() if (c := f["channels"][channel])["mean"] is not None]
        means, sds = np.array(pairs).T
        mean = float(means.mean())
        return mean, math.sqrt(float((sds**2 + (means - mean) ** 2).mean()))  # not the difference of two large squares

    def having(self, structure: str) -> list[str]:
        """Return the ids of the cases in which a structure occurs."""
        return [case_id for case_id, facts in self.cases.items() if structure in facts["structures"]]

    def share(self, structure: str) -> float:
        """Return the fraction of the voxels that belong to a structure, as median over the cases with it; 0 if none."""
        found = [
            facts["structures"][structure]["voxels"] / math.prod(facts["size"])
            for facts in self.cases.values()
            if structure in facts["structures"]
        ]
        return float(np.median(found)) if found else 0.0

    def volume(self, structure: str) -> list[float]:
        """Return the volumes in ml of a structure in the cases in which it occurs."""
        return [
            facts["structures"][structure]["voxels"] * math.prod(facts["spacing"]) / 1000
            for facts in self.cases.values()
            if structure in facts["structures"]
        ]

    def extent(self) -> np.ndarray:
        """Return the size in mm (D, H, W) of the bounding box of all structures, as median over cases."""
        return np.median([f["foreground"]["extent"] for f in self.cases.values() if f["foreground"]["voxels"]], 0)

    def nonzero_share(self) -> float:
        """Return the fraction of an image in the bounding box of its nonzero voxels, as median over cases."""
        return float(np.median([math.prod(f["nonzero"]) / math.prod(f["size"]) for f in self.cases.values()]))
