"""Writing a NIfTI file part by part, so that the whole array is never in memory.

A compressed file cannot be written in parts, so its voxels are written to a temporary file, which is then compressed.
nibabel creates the header, but is not used for the voxels, because it can only write a whole array.
"""

import contextlib
import errno
import gzip
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from xdim_jax.base.files import atomic_path
from xdim_jax.data.images.grid import Grid

Write = Callable[[tuple[slice, ...], np.ndarray], None]


_CHUNK = 2**20  # bytes that are compressed at once
_STEPS = 65535  # number of steps in which the values of a compressed file are stored


@contextlib.contextmanager
def stream_volume(
    path: Path, grid: Grid, channels: int = 0, note: str = "", *, maximum: float = 1.0
) -> Iterator[Write]:
    """Create a file of zeros, and yield a function ``write(index, values)`` that assigns parts of its array.

    The array is ``(D, H, W)``, or ``(D, H, W, channels)`` if there are channels. The file is complete when the context
    ends. If the grid is that of a file with two axes, a file without channels has two axes as well. With channels it
    has four, because channels are along the fourth axis; read it with ``axes="stored"``.

    Args:
        path: Name of the file: ``.nii`` for float32 values; ``.nii.gz`` for values of 0 to ``maximum``, which are
            rounded to multiples of ``maximum / 65535`` and stored as 16-bit integers with a slope in the header.
        grid: Grid of the array.
        channels: Length of a fourth axis; 0 for no such axis.
        note: Description for the header, at most 79 ASCII characters.
        maximum: Largest value in a compressed file; not used for ``.nii``.

    Raises:
        UserError: The file cannot be written; the incomplete file is deleted.
    """
    shape = (*grid.shape, channels) if channels else tuple(grid.shape)
    compressed = path.suffix == ".gz"
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(path))
        voxel_file = stack.enter_context(_deleted_at_end(temporary.with_suffix(""))) if compressed else temporary
        template = nib.Nifti1Header() if grid.header is None else grid.header.copy()
        template.set_data_dtype(np.uint16 if compressed else np.float32)
        stored_shape = shape[:2] if grid.flat and not channels else shape
        header = nib.Nifti1Image(np.broadcast_to(np.float32(0), stored_shape), grid.affine, template).header
        header.set_slope_inter(maximum / _STEPS if compressed else 1, 0)
        header["cal_min"] = header["cal_max"] = 0
        header["descrip"] = note.encode("ascii")
        header.extensions.clear()
        stored = header.get_data_dtype()
        with open(voxel_file, "wb") as file:
            header.write_to(file)
            offset = file.tell()
            _reserve(file.fileno(), offset + stored.itemsize * math.prod(shape))
        with open(voxel_file, "r+b") as file:
            pages = mmap.mmap(file.fileno(), 0)
        voxels = grid.to_memory(np.ndarray(shape, stored, pages, offset, order="F"))

        def write(index: tuple[slice, ...], values: np.ndarray) -> None:
            voxels[index] = np.rint(np.clip(values, 0, maximum) * (_STEPS / maximum)) if compressed else values
            if hasattr(mmap, "MADV_DONTNEED"):  # the written pages no longer count as memory of this process
                pages.madvise(mmap.MADV_DONTNEED)

        yield write
        pages.flush()
        if compressed:
            with (
                open(voxel_file, "rb") as source,
                open(temporary, "wb") as file,
                gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as target,
            ):
                shutil.copyfileobj(source, target, _CHUNK)


@contextlib.contextmanager
def _deleted_at_end(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which is deleted at the end."""
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _reserve(file: int, size: int) -> None:
    """Allocate disk space, so that a full disk raises OSError here, instead of SIGBUS when voxels are written.

    The function has no effect on systems without ``posix_fallocate``.
    """
    try:
        os.posix_fallocate(file, 0, size)
    except AttributeError:
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
