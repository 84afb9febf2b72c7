"""Estimate of the memory that prediction needs, from image headers and the compiled network, before a case is read."""

import math
import os
import resource
from collections.abc import Sequence
from pathlib import Path

import jax

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, gib
from xdim_jax.data.case import Case
from xdim_jax.data.images.image import read_grid, voxel_type
from xdim_jax.data.prepare import needed_bytes, target_shape
from xdim_jax.inference.predictor import Predictor


def log_required_memory(predictor: Predictor, cases: Sequence[Case]) -> int:
    """Log an upper bound of the memory for the cases, and the memory that the process already uses.

    Returns:
        The upper bound for the process in bytes, which on a CPU includes the memory of the device. 0 if there is no
        readable case, or if the network cannot be compiled.
    """
    try:
        host, device = required_bytes(predictor, cases)
    except Exception as error:  # e.g. too little device memory, which prediction then reports for the case
        log.warn(f"the memory that prediction needs cannot be estimated: {type(error).__name__}")
        return 0
    if not device:
        return 0
    shared = jax.default_backend() == "cpu"
    parts = [(used_bytes(), "already in use"), (host, "for images and labels")]
    if shared:
        parts.append((device, "for the network"))
    total = sum(count for count, _ in parts)
    text = ", ".join(f"{gib(count)} {what}" for count, what in parts)
    log.say(f"memory     at most {gib(total)}: {text}" + ("" if shared else f"; {gib(device)} on the device"))
    return total


def required_bytes(predictor: Predictor, cases: Sequence[Case]) -> tuple[int, int]:
    """Estimate the peak memory in bytes for images and labels on the host, and for the network on the device.

    The host needs memory for three cases at once: while a case is predicted, the next one is read, and the labels of
    the previous one are written. Cases whose headers cannot be read are ignored.
    """
    reading = kept = voxels = maps = 0
    groups = predictor.groups
    channels = len(predictor.names) + ("uncertainty" in predictor.extra_outputs)
    volumes: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = [[] for _ in groups]
    for case in cases:
        try:
            grid = read_grid(case.images[0], case.axes)
            stored = [voxel_type(source) for source in case.images]
        except UserError:
            continue  # prediction reports the error of this case
        source = grid.memory_geometry[0][::-1]
        before = 0  # bytes of the case as prepared by earlier groups
        for group, sizes in zip(groups, volumes, strict=True):
            peak, after = needed_bytes(stored, len(case.channels), grid, group.preparation)
            reading, before = max(reading, before + peak), before + after
            sizes.append((target_shape(source, grid.spacing, group.preparation), source))
        kept, voxels = max(kept, before), max(voxels, math.prod(source))
        if predictor.extra_outputs and grid.orientation[-1, 0] != 2:
            # depth is not the slowest axis of the file, so writing one slice touches all pages of the file
            maps = max(maps, 4 * math.prod(source) * channels)
    if not voxels:
        return 0, 0
    in_channels = len(predictor.dataset.channels)
    devices = [g.segmenter.device_bytes(g.weights, v, in_channels) for g, v in zip(groups, volumes, strict=True)]
    device = max(devices) + sum(leaf.nbytes for group in groups[1:] for leaf in jax.tree.leaves(group.weights))
    # the label map, the masks of post-processing, and the files of probabilities and uncertainty
    components = predictor.resolved.largest or predictor.resolved.min_volume
    labels = (11 if components else 4) * voxels + maps
    if len(groups) > 1:  # the averages over groups
        labels += 4 * channels * voxels
    if len(volumes[0]) == 1:
        return max(reading, kept + labels), device
    return reading + kept + labels + 4 * voxels, device


def used_bytes() -> int:
    """Return the resident memory of this process; its peak so far if the system does not report the current value."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
