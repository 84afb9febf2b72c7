"""The table of data sets by name: their options, preparation, scoring rules, phantoms and display.

To add a data set, write its layout into ``xdim_jax/data/layouts/``, add its entry to `DATASETS`, and add a test.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError
from xdim_jax.data import phantom
from xdim_jax.data.case import Dataset
from xdim_jax.data.layouts import brats, camus, chaos, nnunet, table
from xdim_jax.data.prepare import Preparation

REQUIRED = ""  # default of an option that must be given


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a data set or its phantoms: a key of the config's ``data`` section, and a flag of ``xdim_jax.data``.

    Attributes:
        default: Value if the option is not given; `REQUIRED` if it must be given. On the command line, the values of a
            tuple are separated by commas.
        help: Description for ``--help``.
        choices: Possible values of the flag; empty if the data set itself checks them.
    """

    default: Any
    help: str
    choices: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Phantoms:
    """Settings of the phantoms (synthetic cases) of a data set.

    Attributes:
        write: Function that writes phantoms, see `xdim_jax.data.phantom`.
        shape: Default number of voxels along x, y and, if not 2D, z.
        first: Number of the first case.
        options: Further keyword arguments of ``write``.
    """

    write: Callable[..., list[Path]]
    shape: tuple[int, ...]
    first: int = 1
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DatasetEntry:
    """Entry of a data set in the table `DATASETS`.

    Attributes:
        make: ``make(**options)`` returns the `Dataset`.
        options: Options of ``make``, by name.
        preparation: Preparation in the paper. The window is for CT images only.
        verify_options: Values of the options with which ``xdim_jax.data verify`` checks all files.
        scoring: ``scoring(data)`` returns the name and the options of the scoring rules for a ``data`` section.
        from_description: Function that returns the `Dataset` for the contents of a dataset.json; None if ``make`` reads
            no file.
        phantoms: Settings of the phantoms; None if the data set has none.
        shown_channels: Channels in the figures of a report, as in Fig. 12 of the paper; empty: the first two channels.
        volumetric: True if reports show three orthogonal planes, False if they show slices.
    """

    make: Callable[..., Dataset]
    options: Mapping[str, Option]
    preparation: Preparation = dataclasses.field(default_factory=Preparation)
    verify_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scoring: Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]] = lambda data: ("generic", {})
    from_description: Callable[[nnunet.Description], Dataset] | None = None
    phantoms: Phantoms | None = None
    shown_channels: tuple[str, ...] = ()
    volumetric: bool = True


_ROOT = {"root": Option(REQUIRED, "folder of the data set")}

DATASETS = {
    "brats": DatasetEntry(
        brats.dataset,
        {"convention": Option(REQUIRED, "convention of file names and label values", tuple(brats.CONVENTIONS))},
        # brain crop, z-score of the nonzero voxels of each channel (Sect. 3.1.3)
        Preparation(crop="nonzero", normalise="zscore_nonzero"),
        scoring=brats.scoring,
        phantoms=Phantoms(
            phantom.write_brats,
            (240, 240, 155),
            first=0,
            options={
                "convention": Option("brats2021", "convention of file names and labels", tuple(brats.CONVENTIONS))
            },
        ),
        shown_channels=("t2", "t1ce"),
    ),
    "camus": DatasetEntry(
        camus.dataset,
        {
            "views": Option(camus.VIEWS, f"one or more of {', '.join(camus.VIEWS)}"),
            "instants": Option(camus.INSTANTS, f"one or more of {', '.join(camus.ALL_INSTANTS)}"),
            "quality": Option(camus.QUALITIES, f"one or more of {', '.join(camus.QUALITIES)}"),
        },
        Preparation(normalise="zscore"),  # z-score of each image (Sect. 3.1.1)
        verify_options={"instants": camus.ALL_INSTANTS},
        scoring=camus.scoring,
        phantoms=Phantoms(
            phantom.write_camus,
            (549, 389),
            options={"layout": Option("nifti", "files of the public or the older release", phantom.CAMUS_LAYOUTS)},
        ),
        volumetric=False,
    ),
    "chaos": DatasetEntry(
        chaos.dataset,
        {
            "task": Option(5, "task of the challenge; tasks 1 and 4 have CT and MR", tuple(chaos.TASKS)),
            "phase": Option("in", "phases of T1-DUAL to use", chaos.PHASES),
        },
        # slices of 512 x 512 (Sect. 3.1.2); the window is the usual one for abdominal soft tissue, not from the paper
        Preparation(size=(512, 512), window=(60.0, 400.0)),
        verify_options={"task": 4, "phase": "each"},
        scoring=chaos.scoring,
        phantoms=Phantoms(phantom.write_chaos, (512, 512, 80)),
        volumetric=False,
    ),
    "nnunet": DatasetEntry(nnunet.nnunet, _ROOT, from_description=nnunet.nnunet_from_description),
    "table": DatasetEntry(table.dataset, _ROOT, from_description=table.from_description),
    "decathlon": DatasetEntry(nnunet.decathlon, _ROOT, from_description=nnunet.decathlon_from_description),
}


def get_entry(name: str) -> DatasetEntry:
    """Return the entry of a data set. Raises UserError, listing the known names, if the name is unknown."""
    if name not in DATASETS:
        raise UserError(f"config.data.dataset={name!r} is unknown; known: {', '.join(DATASETS)}")
    return DATASETS[name]


def get_dataset(data: Mapping[str, Any]) -> Dataset:
    """Return the data set that the ``data`` section of a config describes.

    Raises:
        UserError: The name is unknown, a required option is missing, or an option has a wrong value.
    """
    name = data.get("dataset", "")
    entry = get_entry(name)
    options = {key: data.get(key, option.default) for key, option in entry.options.items()}
    for key, value in options.items():
        if value == REQUIRED:
            option = entry.options[key]
            known = f", one of {', '.join(option.choices)}" if option.choices else ""
            raise UserError(
                f"data set {name} needs {key} ({option.help}{known}): "
                f"give --config.data.{key}=<value>, or --{key}=<value>"
            )
    return entry.make(**options)


def trained_dataset(data: Mapping[str, Any], description: Mapping[str, Any]) -> Dataset:
    """Return the data set on which a network was trained, without reading the data.

    Args:
        data: The ``data`` section of the run's config.
        description: The record of the data in the workdir, made by `xdim_jax.data.case.describe`.

    Raises:
        UserError: See `get_dataset`; also raised if the record cannot be used.
    """
    if from_description := get_entry(data["dataset"]).from_description:
        return from_description(nnunet.read_description(description))
    return get_dataset(data)


def scoring_rules(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the scoring rules for the ``data`` section of a config.

    Returns:
        The value of the flag ``--rules`` of ``xdim_jax.evaluate``, and the values of its other flags by name.
    """
    return get_entry(data["dataset"]).scoring(data)


def write_phantoms(data: Mapping[str, Any], folder: Path, *, seed: int, progress: Callable[[str], None]) -> None:
    """Write the phantoms that the ``data`` section of a config describes, into two folders ``train`` and ``held_out``.

    Args:
        data: Section with the name of the data set, its options, and the section ``phantom``.
        folder: Parent of the two folders.
        seed: Seed of the phantoms.
        progress: Called with a line of text after each case.

    Raises:
        UserError: The data set has no phantoms, a value of the section cannot be used, or a file cannot be written.
    """
    phantoms, options = get_entry(data["dataset"]).phantoms, data["phantom"]
    if phantoms is None:
        raise UserError(f"data set {data['dataset']} has no phantoms: give --config.data.root=<folder of the data>")
    shared = {
        "shape": tuple(options["shape"]),
        "seed": seed,
        "difficulty": phantom.Difficulty(noise=options["noise"], bias=options["bias"]),
        "progress": progress,
        **{key: data[key] for key in phantoms.options if key in data},
    }
    first = phantoms.first
    phantoms.write(folder / "train", cases=options["cases"], first=first, **shared)
    phantoms.write(folder / "held_out", cases=options["held_out"], first=first + options["cases"], **shared)
