"""The data sets by name, and the keys of a config's ``data`` section that each of them takes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from xdim_jax.base.errors import UserError
from xdim_jax.data.case import Dataset
from xdim_jax.data.layouts import brats, camus, chaos, nnunet
from xdim_jax.data.prepare import Preparation


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a data set is made: ``make(**options)``, with the defaults of its options; and how the paper prepares it."""

    make: Callable[..., Dataset]
    options: Mapping[str, Any]
    preparation: Preparation = dataclasses.field(default_factory=Preparation)
    everything: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # options that leave no file out


_REQUIRED = ""  # an option that has no default

DATASETS = {
    # brain crop, z-score of the non-zero voxels of each channel (Sect. 3.1.3)
    "brats": Entry(brats.dataset, {"convention": _REQUIRED}, Preparation(crop="nonzero", normalise="zscore_nonzero")),
    # z-score of each image (Sect. 3.1.1)
    "camus": Entry(
        camus.dataset,
        {"views": camus.VIEWS, "instants": camus.INSTANTS, "quality": camus.QUALITIES},
        everything={"instants": (*camus.INSTANTS, "half_sequence")},
    ),
    # slices of 512 x 512 (Sect. 3.1.2). The paper names no window: that of abdominal soft tissue
    "chaos": Entry(
        chaos.dataset,
        {"task": 5, "phase": "in"},
        Preparation(size=(512, 512), window=(60.0, 400.0)),
        {"task": 4, "phase": "each"},
    ),
    "nnunet": Entry(nnunet.nnunet, {"root": _REQUIRED}),
    "decathlon": Entry(nnunet.decathlon, {"root": _REQUIRED}),
}


def get_dataset(data: Mapping[str, Any]) -> Dataset:
    """The data set that ``data["dataset"]`` names, made with the options that ``data`` holds.

    Raises:
        UserError: unknown name, an option that is needed is missing, or one has a wrong value.
    """
    name = data.get("dataset")
    if name not in DATASETS:
        raise UserError(f"config.data.dataset={name!r} is unknown; known: {', '.join(DATASETS)}")
    entry = DATASETS[name]
    options = {key: data.get(key, default) for key, default in entry.options.items()}
    for key, value in options.items():
        if value == _REQUIRED:
            known = f" (one of {', '.join(brats.CONVENTIONS)}: it is never guessed)" if key == "convention" else ""
            raise UserError(f"data set {name} needs {key}{known}; give --config.data.{key}, or --{key}")
    return entry.make(**options)


def trained_dataset(data: Mapping[str, Any], description: Mapping[str, Any]) -> Dataset:
    """The data set of a trained network, from its config and what it wrote of its data; the data need not be there.

    Raises:
        UserError: as `get_dataset` does, or the description cannot be used.
    """
    described = {"nnunet": nnunet.described_nnunet, "decathlon": nnunet.described_decathlon}
    if data["dataset"] in described:
        return described[data["dataset"]](nnunet.read_description(description))
    return get_dataset(data)
