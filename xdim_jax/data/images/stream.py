"""NIfTI files that are written part by part, so that the whole array is never in memory."""

import contextlib
import errno
import math
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from xdim_jax.base.files import atomic_path
from xdim_jax.data.images.grid import Grid

Write = Callable[[tuple[slice, ...], np.ndarray], None]
_OFFSET = 352  # bytes before the voxels of a NIfTI-1 file without extensions


@contextlib.contextmanager
def stream_volume(path: Path, grid: Grid, channels: int = 0, note: str = "") -> Iterator[Write]:
    """Makes a file of zeros, float32; gives ``write(index, values)`` into its array ``(D, H, W)``, with ``channels``
    ``(D, H, W, channels)``.

    Args:
        path: ``.nii``: compressed files cannot be written in parts.
        grid: of the image.
        channels: of a fourth axis in the file; 0: none.
        note: for the header's description, at most 79 letters.

    Raises:
        UserError: the file cannot be written; nothing is left of it.
    """
    shape = (*grid.shape, channels) if channels else tuple(grid.shape)
    with atomic_path(path) as temporary:
        template = nib.Nifti1Header() if grid.header is None else grid.header.copy()
        template.set_data_dtype(np.float32)
        image = nib.Nifti1Image(np.broadcast_to(np.float32(0), shape), grid.affine, template)
        header = image.header
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0
        header["vox_offset"], header["magic"], header["descrip"] = _OFFSET, b"n+1", note.encode("ascii")
        with open(temporary, "wb") as file:
            file.write(header.binaryblock + bytes(_OFFSET - len(header.binaryblock)))
            _reserve(file.fileno(), _OFFSET + 4 * math.prod(shape))
        with open(temporary, "r+b") as file:
            pages = mmap.mmap(file.fileno(), 0)
        stored = np.dtype(np.float32).newbyteorder(header.endianness)
        voxels = grid.to_memory(np.ndarray(shape, stored, pages, _OFFSET, order="F"))

        def write(index: tuple[slice, ...], values: np.ndarray) -> None:
            voxels[index] = values
            if hasattr(mmap, "MADV_DONTNEED"):  # written pages stay with the system and are no longer the process's
                pages.madvise(mmap.MADV_DONTNEED)

        yield write
        pages.flush()


def _reserve(file: int, size: int) -> None:
    """A full disk is told now, not by SIGBUS when voxels are written; not every system can."""
    try:
        os.posix_fallocate(file, 0, size)
    except AttributeError:
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
