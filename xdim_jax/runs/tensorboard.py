"""TensorBoard's event file, written in the calling thread.

The `SummaryWriter` of tensorboardX writes in its own thread. If that thread fails, because the disk is full or the
clock jumps, later calls wait for it forever. Therefore this module uses its parts without the thread.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.files import write_error
from xdim_jax.base.log import warn

FOLDER = "tensorboard"  # in the workdir


class EventFile:
    """An event file. If it cannot be written, a warning is logged, its curves end, and training continues.

    Args:
        workdir: Folder of the run.
        step: Number of completed steps. TensorBoard hides events of later steps, from a run that was killed.

    Raises:
        OSError: The file cannot be created.
    """

    def __init__(self, workdir: Path, step: int):
        self._library = _import()
        self._path = workdir / FOLDER / "events"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        suffix = f".{os.getpid()}.{step}"  # two starts in one second must not have the same file
        self._file: Any = self._library.event_file_writer.EventsWriter(str(self._path), suffix)
        proto = self._library.proto.event_pb2
        start = proto.SessionLog(status=proto.SessionLog.START)
        self._write(proto.Event(step=step + 1, wall_time=time.time(), session_log=start))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write a value."""
        self._add(self._library.summary.scalar(name, value), step)

    def add_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write a picture, uint8 (H, W, 3)."""
        self._add(self._library.summary.image(name, picture, dataformats="HWC"), step)

    def flush(self) -> None:
        """Write buffered events."""
        self._try(lambda file: file.flush())

    def close(self) -> None:
        """Close the file."""
        self._try(lambda file: file.close())
        self._file = None

    def _add(self, summary: Any, step: int) -> None:
        event = self._library.proto.event_pb2.Event(step=step, wall_time=time.time(), summary=summary)
        self._write(event)

    def _write(self, event: Any) -> None:
        self._try(lambda file: file.write_event(event))

    def _try(self, call: Any) -> None:
        if self._file is None:
            return
        try:
            call(self._file)
        except OSError as error:
            self._file = None
            warn(f"TensorBoard's curves end here: {write_error(self._path.parent, error)}")


def _import() -> Any:
    """Import tensorboardX without torch, whose import takes seconds."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        import tensorboardX.event_file_writer
        import tensorboardX.proto.event_pb2
        import tensorboardX.summary
    finally:
        if hidden:
            del sys.modules["torch"]
    return tensorboardX
