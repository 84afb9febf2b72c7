"""Experiment trackers, in addition to the files of the workdir: Weights & Biases and MLflow, offline by default."""

import importlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from xdim_jax.base.config import Config, leaves
from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.files import write_text

_own_uris: set[str] = set()  # databases in workdirs; MLflow writes the current one to MLFLOW_TRACKING_URI


class Tracker(Protocol):
    """Interface of an experiment tracker."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record finite values by name."""

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Record pictures by name, uint8 (H, W, 3)."""

    def close(self) -> None:
        """End the run of the tracker."""


class _Wandb:
    """A run of Weights & Biases. A resumed run keeps its id, which is stored in the workdir."""

    def __init__(self, project: str, workdir: Path, config: Config):
        wandb = _import("wandb")
        os.environ.setdefault("WANDB_MODE", "offline")
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=workdir.absolute().name,
            id=_stored_id(workdir / "wandb_run", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            dir=str(workdir),
            config=config.to_dict(),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        self._run.log({f"validation/{k}": self._wandb.Image(v) for k, v in pictures.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """A run of MLflow. A resumed run keeps its id, which is stored in the workdir."""

    def __init__(self, experiment: str, workdir: Path, config: Config):
        mlflow = _import("mlflow")
        if os.environ.get("MLFLOW_TRACKING_URI", "") in {"", *_own_uris}:
            uri = f"sqlite:///{workdir.absolute() / 'mlflow.db'}"
            _own_uris.add(uri)
            mlflow.set_tracking_uri(uri)
            if mlflow.get_experiment_by_name(experiment) is None:
                mlflow.create_experiment(experiment, artifact_location=(workdir.absolute() / "mlartifacts").as_uri())
        mlflow.set_experiment(experiment)
        id_file = workdir / "mlflow_run"
        resumed = id_file.exists()
        name = workdir.absolute().name
        run = mlflow.start_run(run_id=id_file.read_text(encoding="ascii").strip() if resumed else None, run_name=name)
        _stored_id(id_file, lambda: run.info.run_id)
        if not resumed:
            mlflow.log_params({key: str(value) for key, value in leaves(config)})
        self._mlflow = mlflow

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self._mlflow.log_image(Image.fromarray(picture), f"validation/{name}_{step}.png")

    def close(self) -> None:
        self._mlflow.end_run()


def open_trackers(config: Config, workdir: Path) -> list[Tracker]:
    """Open the trackers of ``config.train.wandb`` and ``config.train.mlflow``.

    Args:
        config: Config of the run, which is recorded.
        workdir: Folder of the run, where ids and offline files are stored.

    Raises:
        UserError: A package is not installed, or a tracker cannot be opened.
    """
    opened: list[Tracker] = []
    for key, kind in (("wandb", _Wandb), ("mlflow", _Mlflow)):
        name = config.train[key]
        if not name:
            continue
        try:
            opened.append(kind(name, workdir, config))
        except UserError:
            raise
        except Exception as error:  # each tracker has its own errors: no server, no account, a locked file
            reason = first_line(error)
            raise UserError(
                f"config.train.{key}={name}: cannot be opened: {reason}; to train without it: --config.train.{key}=''"
            ) from error
    return opened


def _stored_id(path: Path, make: Callable[[], str]) -> str:
    """Return the id in a file; if the file does not exist, write it with a new id from ``make``."""
    if not path.exists():
        write_text(path, make())
    return path.read_text(encoding="utf-8").strip()


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"config.train.{module} needs the package {module}: pip install 'xdim_jax[{module}]', or set "
            f"--config.train.{module}=''"
        ) from error
