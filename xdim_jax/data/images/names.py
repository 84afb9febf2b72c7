"""File names: suffixes in any case, Unicode normal forms, and files that are known not to be images."""

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError

# files that accompany images; all other files that are not read are reported
_COMPANIONS = (
    *(".txt", ".md", ".rst", ".pdf", ".html", ".docx", ".log", ".sha256", ".md5", ".py"),
    *(".json", ".csv", ".tsv", ".xlsx", ".xml", ".yaml", ".yml", ".toml", ".cfg", ".bval", ".bvec"),
)
LABEL_ENDINGS = ("_seg", "-seg", "_gt", "-gt")  # endings of the names of label maps that are not part of the case id
_SYSTEM_FOLDERS = ("__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found")
_SYSTEM_FILES = ("thumbs.db", "desktop.ini", "dicomdir", "license", "readme")
_PIXEL_FILES = (".raw", ".zraw")  # the pixels of a MetaImage header


def normalised(name: str) -> str:
    """Return a file name in Unicode normal form C. (macOS returns names in form D, with accents as own characters.)"""
    return unicodedata.normalize("NFC", name)


def strip(name: str, suffixes: Sequence[str]) -> str | None:
    """Return a file name, in normal form C, without its suffix; None if it has none of the suffixes.

    Args:
        name: File name.
        suffixes: Suffixes in lower case, longer ones first. In the name they can have any case.
    """
    lower = name.lower()
    return next((normalised(name[: -len(s)]) for s in suffixes if lower.endswith(s)), None)


def case_of_label(stem: str) -> str:
    """Return the case id in the name of a label map without suffix: the name without `LABEL_ENDINGS`."""
    for ending in LABEL_ENDINGS:
        stem = stem.removesuffix(ending)
    return stem


def natural_key(path: Path) -> list[Any]:
    """Return a sort key that compares numbers in file names by value: img2 before img10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def is_hidden(path: Path) -> bool:
    """Return whether a file or folder is hidden, or one that an operating system creates, such as a recycle bin."""
    return path.name.startswith(".") or path.name in _SYSTEM_FOLDERS


def is_run(folder: Path) -> bool:
    """Return whether a folder is the workdir of a run, a cross-validation or ``fit``, so that its files are no data."""
    marks = ("config.json", "split.json"), ("recipe.json", "recipe.py"), ("fold0/split.json",)
    # os.path.isfile, because Path.is_file raises an error for a folder that cannot be read
    return any(all(os.path.isfile(folder / name) for name in names) for names in marks)  # noqa: PTH113


def subfolders(folder: Path) -> list[Path]:
    """Return the subfolders of a folder, sorted by name, without those that are hidden and the workdirs of runs."""
    return sorted(path for path in folder.glob("*/") if not is_hidden(path) and not is_run(path))


def files_below(root: Path) -> Iterator[Path]:
    """Yield all files below a folder, sorted by folder and name.

    Hidden files and folders, and the workdirs of runs below the folder, are omitted.

    Raises:
        UserError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}): its cases would be lost; give yourself permission to "
            "read it, or move it to another folder"
        ) from error

    visited = set()
    for folder, folders, names in os.walk(root, onerror=refuse if root.is_dir() else None, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # reached again through a symbolic link
            folders[:] = []
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not is_hidden(Path(f)) and not is_run(Path(folder, f)))
        yield from (path for name in sorted(names) if not is_hidden(path := Path(folder, name)))


def is_companion(path: Path) -> bool:
    """Return whether a file is known to accompany images: text, tables, files of the operating system."""
    name = path.name.lower()
    if path.suffix.lower() in _PIXEL_FILES:
        return any(path.with_suffix(s).exists() for s in (".mhd", ".MHD"))
    return name in _SYSTEM_FILES or path.suffix.lower() in _COMPANIONS
