"""Devices: one mesh with the axes ``data`` (samples) and ``space`` (depth of a volume), and arrays laid out on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xdim_jax.errors import UserError


def make_mesh(data: int, space: int, *, batch: int) -> Mesh:
    """A mesh of ``data * space`` devices; ``data=-1`` takes all that ``space`` leaves.

    Raises:
        UserError: the numbers do not fit the devices, or the global batch does not divide over ``data``.
    """
    devices = jax.devices()
    if space < 1 or len(devices) % space:
        raise UserError(f"config.mesh.space={space} does not divide the {len(devices)} devices")
    rows = len(devices) // space if data == -1 else data
    if rows < 1 or rows * space > len(devices):
        raise UserError(f"config.mesh asks for {rows} x {space} devices; there are {len(devices)}")
    if batch % rows or batch % jax.process_count():
        raise UserError(
            f"config.data.batch={batch} does not divide over {rows} data-parallel devices in {jax.process_count()} "
            f"processes; set --config.data.batch={rows * max(batch // rows, 1)} "
            f"or --config.mesh.data={_divisor(batch, rows)}"
        )
    grid = np.asarray(devices[: rows * space]).reshape(rows, space)
    return Mesh(grid, ("data", "space"), axis_types=(AxisType.Auto, AxisType.Auto))


def _divisor(batch: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if batch % d == 0)


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples over ``data``, the first spatial axis over ``space``."""
    return NamedSharding(mesh, PartitionSpec("data", "space"))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch to one global array per entry; what has no spatial axis lies over ``data``."""
    images, rows = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec("data"))
    return {k: jax.make_array_from_process_local_data(images if v.ndim > 2 else rows, v) for k, v in batch.items()}


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays, copied to every device."""
    return jax.device_put(tree, replicated(mesh))
