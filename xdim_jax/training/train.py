"""Train one run, or several runs one after the other."""

from pathlib import Path

import jax

from xdim_jax import ops
from xdim_jax.base import log
from xdim_jax.base.config import Config
from xdim_jax.base.signals import StopRequest
from xdim_jax.data.case import Dataset
from xdim_jax.nets import networks
from xdim_jax.runs import environment
from xdim_jax.training.check import resolve_config
from xdim_jax.training.choose_ops import is_measured
from xdim_jax.training.loop import fit
from xdim_jax.training.mesh import Devices, make_devices
from xdim_jax.training.open_run import open_run


def train_run(
    config: Config, dataset: Dataset, workdir: Path, stop: StopRequest, *, separate_disks: bool = False
) -> int:
    """Train one run until its end or until a signal arrives. An interrupted run is resumed.

    Args:
        config: Config of a recipe, as `xdim_jax.training.check.resolve_config` returns it.
        dataset: Data set on which the network is trained.
        workdir: Folder of the run.
        stop: Record of received signals.
        separate_disks: True if each process has its own workdir, see `open_run`. Files that are not uploaded count
            as unsaved, so ``stop`` remains busy at the end.

    Returns:
        The exit status of the process; not 0 if a signal has stopped the run.

    Raises:
        UserError: Weights or data cannot be used, or the workdir belongs to another config or cannot be written.
    """
    devices = _make_devices(config)
    opened = open_run(config, dataset, workdir, stop, devices, separate_disks=separate_disks)
    try:
        fit(opened.run, opened.state, opened.progress, opened.open_stream(), validated=opened.validated)
    finally:
        opened.close()
        stop.busy = separate_disks
    if stop.signal:
        return stop.status
    log.say(
        f"done       predict with: python -m xdim_jax.predict --workdir={workdir} --input=<cases> --output=<folder>"
    )
    return 0


def train_one_by_one(runs: list[tuple[Config, Path]], stop: StopRequest, *, separate_disks: bool = False) -> int:
    """Train several runs, one after the other.

    Args:
        runs: Config and workdir of each run.
        stop: Record of received signals.
        separate_disks: True if each process has its own workdir, see `open_run`.

    Returns:
        The first exit status that is not 0, or 0.
    """
    for number, (config, workdir) in enumerate(runs):
        log.say(f"fold       {number} ({number + 1} of {len(runs)}), {workdir}")
        config, dataset = resolve_config(config)
        if status := train_run(config, dataset, workdir, stop, separate_disks=separate_disks):
            return status
    return 0


def _make_devices(config: Config) -> Devices:
    """Return the mesh of devices for a config, and log it with the implementation of the operations."""
    options = config.mesh
    devices = make_devices(
        options.data,
        options.space,
        batch=config.data.batch,
        parallel=options.parallel,
        accumulate=config.train.accumulate,
    )
    rows, space = devices.mesh.shape["data"], devices.mesh.shape["space"]
    networks.check_space(config.model, config.data.patch, space)
    log.say(f"devices    {environment.devices()} in {jax.process_count()} processes")
    log.say(f"mesh       data {rows} x space {space}, {devices.parallel}")
    if is_measured(config.train.ops, devices):
        log.say("operations chosen by measurement before the first step")
    else:
        log.say(f"operations {ops.describe_implementation('sharded' if space > 1 else config.train.ops)}")
    return devices
