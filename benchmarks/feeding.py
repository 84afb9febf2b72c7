"""Measure whether training steps wait for their input.

    python benchmarks/feeding.py [--case=dxnet:64] [--cases=6] [--steps=10] [--rounds=5] [--threads=2] [--root=FOLDER]

The benchmark writes phantoms of full size, and prepares, samples and augments them as the recipe does. It alternates
between two kinds of blocks of training steps: steps with batches from the input stream, as in training, and steps with
one constant batch that is already on the device. It also measures the stream without training steps, and compares its
samples per second with those of the training steps.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from xdim_jax.base.huge_pages import prefer_huge_pages

if __name__ == "__main__":
    prefer_huge_pages()

import jax

from benchmarks import sides
from xdim_jax import ops
from xdim_jax.base.config import load_config
from xdim_jax.data import pipeline
from xdim_jax.inference.output import make_output
from xdim_jax.nets import networks
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.training import check, run_data
from xdim_jax.training.mesh import make_devices
from xdim_jax.training.program import make_program


def main() -> None:
    """Run the command line, see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--case", default="dxnet:64", help="as in benchmarks/compare.py")
    add("--cases", type=int, default=6, help="number of phantoms; a fifth of them is for validation")
    add("--steps", type=int, default=10, help="number of steps of a block")
    add("--rounds", type=int, default=5, help="number of measured blocks of each kind")
    add("--threads", type=int, default=2, help="number of reading threads")
    add("--precision", default="float32", choices=["float32", "bfloat16"])
    add("--root", type=Path, default=Path(tempfile.gettempdir()) / "xdim_jax_feeding", help="folder of the data")
    options = parser.parse_args()
    cache_programs()
    config = configure(options)
    config, dataset = check.resolve_config(config)
    output = make_output(config.output, dataset)
    found = run_data.find_data(config.data, config.seed, dataset, output, options.root, started=False, first=True)
    devices = make_devices(-1, 1, batch=config.data.batch)
    program, params, stats = make_program(config, dataset, per_epoch=100)
    state = devices.put_state(jax.jit(program.init)(params, stats))
    key = devices.put_state(jax.random.key(0))
    stream = pipeline.make_stream(
        found.train,
        sampling=config.data.sampling,
        size=check.patch_size_3d(config.data.patch),
        flat=networks.spatial_axes(config.model) == 2,
        foreground=config.data.foreground,
        patches_per_case=config.data.patches_per_case,
        batch=config.data.batch,
        seed=0,
        start_step=0,
        threads=options.threads,
        extras=found.facts,
    )
    begin = time.perf_counter()
    for batch in itertools.islice(stream, 2 * options.steps):
        constant = put_batch(devices, batch)
    alone = (time.perf_counter() - begin) / (2 * options.steps)
    step = ops.compile_program(devices.lower(program.step, state, constant, key))
    ops.keep_freed_memory()  # as in training
    times: dict[str, list[float]] = {"constant": [], "fed": []}
    for number in range(options.rounds + 1):
        for kind, values in times.items():
            begin = time.perf_counter()
            for _ in range(options.steps):
                batch = constant if kind == "constant" else put_batch(devices, next(stream))
                state, metrics = step(state, batch, key)
            float(metrics["loss"])
            if number:  # the first block is not measured: caches and reading threads start in it
                values.append((time.perf_counter() - begin) / options.steps)
    fed, constant_batch = statistics.median(times["fed"]), statistics.median(times["constant"])
    print(
        f"{options.case}, batch {config.data.batch}, {jax.devices()[0].device_kind}, {options.threads} reading threads"
    )
    for kind, values in times.items():
        middle, low, high = (1000 * f(values) for f in (statistics.median, min, max))
        print(f"{kind:9} {middle:.1f} ms per step ({low:.1f} to {high:.1f})")
    print(f"ratio     {fed / constant_batch:.3f}")
    provided, used = config.data.batch / alone, config.data.batch / constant_batch
    print(
        f"stream    {1000 * alone:.1f} ms per batch without steps: {provided:.0f} samples per second; steps use "
        f"{used:.1f}"
    )


def configure(options: argparse.Namespace) -> Any:
    """Return the config of a case: its recipe, with phantoms of full size and the augmentation of the recipe."""
    case = sides.find_case(options.case)
    config = load_config(f"configs/{case.recipe}.py:scratch", [])
    with config.unlocked():
        config.data.patch = case.patch
    config.data.batch, config.data.phantom.cases = case.batch, options.cases
    config.train.precision, config.train.accumulate = options.precision, 1
    return config


def put_batch(devices: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Copy a batch of the stream to the devices."""
    return devices.put_batch({k: v for k, v in batch.items() if k != "digest"})


if __name__ == "__main__":
    main()
