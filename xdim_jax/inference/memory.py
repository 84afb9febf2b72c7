"""What predicting takes at the most, found before it begins: by the headers of the images and the compiler's count."""

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


def say_needs(predictor: Predictor, cases: Sequence[Case]) -> int:
    """Says the peak of `needs` with what the process has now; returns that of the process, in bytes, 0 without a case.

    On a CPU the process has the device's part too.
    """
    try:
        host, device = needs(predictor, cases)
    except Exception as error:  # a device without room for the program: told of the case that asks for it
        log.warn(f"what prediction will take cannot be told: {type(error).__name__}")
        return 0
    if not device:
        return 0
    shared = jax.default_backend() == "cpu"
    parts = [(held(), "as it is"), (host, "for images and labels"), *([(device, "for the network")] if shared else [])]
    total = sum(count for count, _ in parts)
    text = ", ".join(f"{gib(count)} {what}" for count, what in parts)
    log.say(f"memory     at most {gib(total)}: {text}" + ("" if shared else f"; {gib(device)} on the device"))
    return total


def needs(predictor: Predictor, cases: Sequence[Case]) -> tuple[int, int]:
    """Bytes that cases take at the most on the host and on the device; those whose headers cannot be read take none.

    While a case is predicted the next one is read, and the labels of the last are written.
    """
    reading = kept = voxels = beside = 0
    volumes = []
    for case in cases:
        try:
            grid = read_grid(case.images[0], case.axes)
            stored = [voxel_type(source) for source in case.images]
        except UserError:
            continue  # it is told when its turn comes
        source = grid.in_memory[0][::-1]
        peak, stays = needed_bytes(stored, len(case.channels), grid, predictor.preparation)
        reading, kept, voxels = max(reading, peak), max(kept, stays), max(voxels, math.prod(source))
        if predictor.segmenter.want and grid.orientation[-1, 0] != 2:  # rows of such a file lie on all of its pages
            beside = max(beside, 4 * math.prod(source) * (predictor.segmenter.channels - 1))
        volumes.append((target_shape(source, grid.spacing, predictor.preparation), source))
    if not volumes:
        return 0, 0
    device = predictor.segmenter.device_bytes(predictor.weights, volumes, len(predictor.dataset.channels))
    # the map, and masks that post-processing makes of it; and what is written beside it
    labels = (11 if predictor.settings.largest else 4) * voxels + beside
    if len(volumes) == 1:
        return max(reading, kept + labels), device
    return reading + kept + labels + 4 * voxels, device


def held() -> int:
    """Bytes of this process that lie in memory; where the system does not tell, the most that ever did."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
