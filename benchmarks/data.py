"""Measure time and memory of preparing cases, and the time of reading them from the store.

    python benchmarks/data.py [--cases=50] [--shape=240,240,155] [--jobs=2] [--root=FOLDER] [--json=FILE]

The benchmark writes BraTS phantoms of full size (--root keeps them for the next call), prepares them as the BraTS
recipes do, and streams patches of 128^3 voxels from the store. Each measurement runs in its own process. Its peak
memory is the largest resident set of this process; the value before preparation is given separately.
"""

import argparse
import itertools
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from xdim_jax.base.files import write_json

PATCHES = 40  # number of patches that are streamed


def _peak() -> float:
    """Return the largest resident set of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_phantoms(root: Path, cases: int, shape: tuple[int, int, int], first: int) -> None:
    """Write every second phantom, from number ``first``, unless it exists."""
    from xdim_jax.data import phantom
    from xdim_jax.data.layouts import brats

    generation = brats.get_convention("brats2021")
    for n in range(first, cases, 2):
        target = root / f"BraTS2021_{n:05d}"
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=root.parent) as folder:
                (made,) = phantom.write_brats(
                    Path(folder) / "one", cases=1, first=n, shape=shape, convention=generation.name
                )
                made.replace(target)


def measure(root: Path, store: Path, jobs: int, task: str) -> dict[str, Any]:
    """Measure one task, ``prepare`` or ``stream``. Called in a separate process."""
    from xdim_jax.data import pipeline
    from xdim_jax.data.case import list_cases
    from xdim_jax.data.layouts import brats
    from xdim_jax.data.prepare import Preparation, prepare
    from xdim_jax.data.reading import read_case
    from xdim_jax.data.store import prepare_cases

    dataset = brats.dataset("brats2021")
    settings = Preparation(crop="nonzero", normalise="zscore_nonzero")
    cases = list_cases(dataset, root, need_labels=True)
    before, begin = _peak(), time.perf_counter()
    if task == "prepare":
        prepare_cases(dataset, cases, settings, store, jobs=jobs)
        size = sum(p.stat().st_size for p in store.rglob("*.npy"))
        return {
            "seconds": time.perf_counter() - begin,
            "before_gib": before,
            "peak_gib": _peak(),
            "store_gib": size / 2**30,
        }
    entries = prepare_cases(dataset, cases, settings, store, jobs=jobs)
    found = time.perf_counter() - begin
    options: dict[str, Any] = {"sampling": "patches", "size": (128, 128, 128), "foreground": 0.67, "batch": 1}
    options |= {"patches_per_case": 1, "seed": 0, "start_step": 0, "threads": jobs}
    begin = time.perf_counter()
    for _ in itertools.islice(pipeline.make_stream(entries, **options), PATCHES):
        pass
    patches = (time.perf_counter() - begin) / PATCHES
    begin = time.perf_counter()
    for case in cases[:3]:
        prepare(case, read_case(case), settings).image()
    return {
        "find_seconds": found,
        "patch_seconds": patches,
        "nifti_seconds": (time.perf_counter() - begin) / 3,
        "peak_gib": _peak(),
    }


def main() -> None:
    """Run the command line, see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--shape", default="240,240,155")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "xdim_jax_benchmark")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    x, y, z = map(int, options.shape.split(","))
    root, store = options.root / "data", options.root / "store"
    root.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_phantoms, args=(root, options.cases, (x, y, z), first)) for first in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    shutil.rmtree(store, ignore_errors=True)
    numbers = {}
    for task in ("prepare", "stream"):
        with context.Pool(1) as pool:
            numbers[task] = pool.apply(measure, (root, store, options.jobs, task))
    p, s = numbers["prepare"], numbers["stream"]
    each = p["seconds"] / options.cases
    patch, whole = 1000 * s["patch_seconds"], 1000 * s["nifti_seconds"]
    print(f"{options.cases} cases of {x}x{y}x{z} x 4, {options.jobs} threads")
    print(f"prepare   {each:.2f} s per case, store {p['store_gib']:.2f} GiB")
    print(f"          peak memory {p['peak_gib']:.2f} GiB, {p['before_gib']:.2f} GiB before preparation")
    print(f"start     {s['find_seconds']:.2f} s to find all prepared cases")
    print(f"read      {patch:.0f} ms per patch of 128^3 x 4 from the store, {whole:.0f} ms per case from NIfTI")
    print(f"          peak memory {s['peak_gib']:.2f} GiB")
    if options.json:
        write_json(options.json, numbers)


if __name__ == "__main__":
    main()
