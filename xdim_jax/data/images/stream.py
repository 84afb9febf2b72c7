"""Writing a NIfTI file part by part, so that the whole array is never in memory.

nibabel creates the header. It is not used for the voxels, because it can only write a whole array.
"""

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


@contextlib.contextmanager
def stream_volume(path: Path, grid: Grid, channels: int = 0, note: str = "") -> Iterator[Write]:
    """Create a float32 file of zeros, and yield a function ``write(index, values)`` that assigns parts of its array.

    The array is ``(D, H, W)``, or ``(D, H, W, channels)`` if there are channels. The file is complete when the context
    ends.

    Args:
        path: Name of the file, ``.nii``: compressed files cannot be written in parts.
        grid: Grid of the array.
        channels: Length of a fourth axis; 0 for no such axis.
        note: Description for the header, at most 79 ASCII characters.

    Raises:
        UserError: The file cannot be written; the incomplete file is deleted.
    """
    shape = (*grid.shape, channels) if channels else tuple(grid.shape)
    with atomic_path(path) as temporary:
        template = nib.Nifti1Header() if grid.header is None else grid.header.copy()
        template.set_data_dtype(np.float32)
        header = nib.Nifti1Image(np.broadcast_to(np.float32(0), shape), grid.affine, template).header
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0
        header["descrip"] = note.encode("ascii")
        header.extensions.clear()
        with open(temporary, "wb") as file:
            header.write_to(file)
            offset = file.tell()
            _reserve(file.fileno(), offset + 4 * math.prod(shape))
        with open(temporary, "r+b") as file:
            pages = mmap.mmap(file.fileno(), 0)
        stored = np.dtype(np.float32).newbyteorder(header.endianness)
        voxels = grid.to_memory(np.ndarray(shape, stored, pages, offset, order="F"))

        def write(index: tuple[slice, ...], values: np.ndarray) -> None:
            voxels[index] = values
            if hasattr(mmap, "MADV_DONTNEED"):  # the written pages no longer count as memory of this process
                pages.madvise(mmap.MADV_DONTNEED)

        yield write
        pages.flush()


def _reserve(file: int, size: int) -> None:
    """Allocate the disk space now: a full disk then raises OSError here, and not SIGBUS when voxels are written.

    Does nothing on systems without ``posix_fallocate``.
    """
    try:
        os.posix_fallocate(file, 0, size)
    except AttributeError:
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
