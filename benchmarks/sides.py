"""One side of a comparison: a process that runs one of our networks, or the same network in PyTorch.

benchmarks/compare.py starts this program. It reads the commands ``run`` and ``quit`` from standard input, and answers
each with a line of JSON. All sides compute the same: the networks of the parity tests, with float32 or bfloat16
activations, without stochastic depth and augmentation. A training step computes the loss (soft Dice and cross-entropy)
and its gradient, and applies Nadam and LookAhead.
"""

import argparse
import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and the size of its batch.

    Attributes:
        recipe: Name of our recipe.
        patch: Spatial size of a sample.
        batch: Number of samples.
        channels: Number of channels of the image.
        out: Number of channels of the logits.
    """

    recipe: str
    patch: tuple[int, ...]
    batch: int
    channels: int
    out: int

    @property
    def softmax(self) -> bool:
        """True for the 2D recipes, which have one label per pixel; the 3D recipes have nested regions."""
        return len(self.patch) == 2


def find_case(name: str) -> Case:
    """Return the case with a name ``network:size[@batch]``.

    Examples: ``omnia_b0:256``, ``omnia_b4:512``, ``dsnet:64`` (patch of 128 x 64 x 64), ``dxnet:128@4``.
    """
    name, _, batch = name.partition("@")
    network, _, side = name.partition(":")
    n = int(side)
    if network == "omnia_b0":
        return Case("camus_omnianet", (n, n), int(batch or 8), 1, 4)
    if network == "omnia_b4":
        return Case("chaos_omnianet", (n, n), int(batch or 2), 1, 5)
    if network == "dsnet":
        return Case("brats_dsnet", (128, n, n), int(batch or 1), 4, 3)
    if network == "dxnet":
        return Case("brats_dxnet", (n, n, n), int(batch or 1), 4, 3)
    raise SystemExit(f"unknown network {network}: expected omnia_b0, omnia_b4, dsnet or dxnet")


def make_data(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return a random image, channels last, and random label indices."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(case.batch, *case.patch, case.channels)).astype(np.float32)
    return image, rng.integers(0, 4, (case.batch, *case.patch)).astype(np.uint8)


# -- ours ---------------------------------------------------------------------------------------------------------


def make_ours(case: Case, phase: str, options: argparse.Namespace) -> tuple[Callable[[], None], dict[str, Any]]:
    """Compile our network, and return the function to time and facts about the compilation."""
    from xdim_jax.base.huge_pages import prefer_huge_pages
    from xdim_jax.ops.compilation import cache_programs

    if options.side == "ours":
        cache_programs()
        prefer_huge_pages()  # as the commands of the package do
    import jax
    import jax.numpy as jnp

    from xdim_jax import ops
    from xdim_jax.ops.compilation import needed_bytes

    form = "reference" if options.side == "naive" else "auto"
    with ops.use_implementation(form):
        config, program, params, stats = make_our_program(case, options.precision, options.remat)
        image, label = make_data(case)
        facts: dict[str, Any] = {"versions": {"jax": jax.__version__}, "device": jax.devices()[0].device_kind}
        if phase == "predict":
            return _ours_predict(config, program, params, stats, facts)
        image = jnp.asarray(image)
        begin = time.perf_counter()
        if phase == "infer":
            run = jax.jit(program.forward).lower((params, stats), image)
        else:
            state = jax.jit(program.init)(params, stats)
            state = jax.tree.map(jnp.copy, state)
            batch, key = {"image": image, "label": jnp.asarray(label)}, jax.random.key(0)
            run = jax.jit(program.step, donate_argnums=0).lower(state, batch, key)
        lowered = time.perf_counter()
        if options.side == "ours" and not json.loads(options.xla):
            run = ops.compile_program(run)
        else:
            run = run.compile(compiler_options=json.loads(options.xla))
    memory = run.memory_analysis()
    facts |= {
        "lower_s": lowered - begin,
        "compile_s": time.perf_counter() - lowered,
        "temporaries": memory.temp_size_in_bytes if memory else None,
        "needed": needed_bytes(run) if memory else None,
    }
    if options.hlo:
        Path(options.hlo).write_text(run.as_text())
    if phase == "infer":
        weights = (params, stats)
        del params, stats
        return lambda: jax.block_until_ready(run(weights, image)), facts
    ops.keep_freed_memory()  # as in training
    current = [state]  # a step donates the old state
    del params, stats, state

    def step() -> None:
        current[0], metrics = run(current[0], batch, key)
        float(metrics["loss"])
        jax.block_until_ready(current[0])

    return step, facts


def make_our_program(case: Case, precision: str, remat: str = "") -> tuple[Any, Any, Any, Any]:
    """Return the recipe's config with the settings that all sides share, its program, parameters and statistics."""
    from xdim_jax.base.config import load_config
    from xdim_jax.data.datasets import get_dataset
    from xdim_jax.training.program import make_program

    config = load_config(f"configs/{case.recipe}.py:scratch", [])
    with config.unlocked():
        config.data.root, config.data.patch, config.data.batch = "unused", case.patch, case.batch
        config.model.get("inner", config.model).encoder.drop_path = 0.0
        config.train.precision, config.train.remat = precision, remat
        config.loss.name = "dice_ce" if case.softmax else "dice_bce"
        for section in config.augment.values():
            section.p = 0.0
    return config, *make_program(config, get_dataset(config.data.to_dict()), per_epoch=100)


def _ours_predict(config: Any, program: Any, params: Any, stats: Any, facts: dict[str, Any]) -> Any:
    """Return a function that segments a random volume of the size of BraTS, and facts about the compilation."""
    from xdim_jax.data.prepare import Prepared
    from xdim_jax.inference.sliding_window import make_segmenter

    size = VOLUME
    raw = np.random.default_rng(0).normal(size=(*size, 4)).astype(np.float32)
    box = tuple(slice(0, n) for n in size)
    prepared = Prepared(raw, None, (0.0,) * 4, (1.0,) * 4, False, box, size, (1.0,) * 3)  # pyright: ignore
    segmenter = make_segmenter(program.forward, program.output, config.data.patch, config.predict.overlap)
    weights = (params, stats)
    begin = time.perf_counter()
    segmenter.device_bytes(weights, [(size, size)], 4)
    facts["compile_s"] = time.perf_counter() - begin

    def run() -> None:
        segmenter(weights, prepared)

    return run, facts


VOLUME = (155, 240, 240)  # size of a BraTS volume


# -- PyTorch ------------------------------------------------------------------------------------------------------


def make_torch(case: Case, phase: str, options: argparse.Namespace) -> tuple[Callable[[], None], dict[str, Any]]:
    """Return the function to time for PyTorch, and facts.

    The name of the side has ``-cl`` for channels last, and ``-compile`` for ``torch.compile``.
    """
    import torch

    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, x, y = _torch_network(case, device, channels_last="-cl" in options.side)
    forward = torch.compile(net) if "compile" in options.side else net
    facts: dict[str, Any] = {"versions": {"torch": torch.__version__}, "device": _device_name(torch, device)}

    def cast() -> Any:
        return torch.autocast(device, torch.bfloat16, enabled=options.precision == "bfloat16")

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    if phase == "train":
        step = _torch_step(case, net, forward, x, y, cast)

        def train() -> None:
            step()
            wait()

        return train, facts
    net.eval()

    def infer(x: Any = x) -> Any:
        with torch.inference_mode(), cast():
            return forward(x)

    if phase == "predict":
        return _torch_predict(torch, infer, device), facts

    def once() -> None:
        infer()
        wait()

    return once, facts


def _torch_network(case: Case, device: str, *, channels_last: bool) -> tuple[Any, Any, Any]:
    """Return the network in PyTorch, its input, and the targets, in one memory layout."""
    import torch

    from tests import twins

    torch.manual_seed(0)
    if case.recipe == "brats_dsnet":
        net = twins.DS("b0", 4, 3)
    elif case.recipe == "brats_dxnet":
        net = twins.dxnet("b0", 4, 3)
    else:
        net = twins.omnianet("b4" if case.recipe.startswith("chaos") else "b0", 1, case.out)
    image, label = make_data(case)
    x = torch.from_numpy(np.moveaxis(image, -1, 1).copy()).to(device)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    net = net.to(device)
    for module in net.modules():  # a network with 2D and 3D parts needs both layouts
        for parameter in module.parameters(recurse=False):
            if parameter.ndim in formats:
                parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
    x = x.contiguous(memory_format=formats.get(x.ndim, torch.contiguous_format))
    y = torch.from_numpy(label.astype(np.int64)).to(device)
    if not case.softmax:  # regions WT, TC, ET from the labels NCR, ED, ET
        y = torch.stack([y > 0, (y == 1) | (y == 3), y == 3], 1).float()
    return net, x, y


def _torch_step(case: Case, net: Any, forward: Any, x: Any, y: Any, cast: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that computes a training step: loss, gradient, Nadam and LookAhead."""
    import torch
    import torch.nn.functional as F

    net.train()
    optimiser = torch.optim.NAdam(net.parameters(), lr=1e-3, betas=(0.95, 0.99))
    slow = [p.detach().clone() for p in net.parameters()]
    count = [0]

    def loss_of(logits: Any) -> Any:
        logits = logits.float()
        axes = tuple(range(2, logits.ndim))
        if case.softmax:
            probabilities, entropy = logits.softmax(1), F.cross_entropy(logits, y)
            target = F.one_hot(y, case.out).movedim(-1, 1).float()
        else:
            probabilities, target = logits.sigmoid(), y
            entropy = F.binary_cross_entropy_with_logits(logits, y)
        overlap = (probabilities * target).sum(axes)
        dice = 2 * overlap / (probabilities.sum(axes) + target.sum(axes) + 1e-5)
        return 1 - dice.mean() + entropy

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with cast():
            logits = forward(x)
        loss = loss_of(logits)
        loss.backward()
        optimiser.step()
        count[0] += 1
        if count[0] % 6 == 0:  # LookAhead
            with torch.no_grad():
                fast = list(net.parameters())
                torch._foreach_lerp_(slow, [p.detach() for p in fast], 0.5)
                torch._foreach_copy_([p.detach() for p in fast], slow)
        loss.item()

    return step


def _device_name(torch: Any, device: str) -> str:
    """Return the name of the GPU, or cpu."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _torch_predict(torch: Any, infer: Callable[[Any], Any], device: str) -> Callable[[], None]:
    """Return a function that segments a volume as PyTorch code usually does: windows are blended in one large array."""
    from xdim_jax.inference.windows import gaussian_weights, window_starts

    volume = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 4, *VOLUME)).astype(np.float32))
    gauss = torch.from_numpy(gaussian_weights((128,) * 3)).to(device)
    starts = [window_starts(n, 128, 0.5) for n in VOLUME]

    def run() -> None:
        total = torch.zeros(3, *VOLUME, device=device)
        norm = torch.zeros(VOLUME, device=device)
        for z in starts[0]:
            for y in starts[1]:
                for x in starts[2]:
                    part = (slice(z, z + 128), slice(y, y + 128), slice(x, x + 128))
                    p = infer(volume[(slice(None), slice(None), *part)].to(device))[0].float().sigmoid()
                    total[(slice(None), *part)] += p * gauss
                    norm[part] += gauss
        found = (total / norm > 0.5).cpu()
        del found

    return run


# -- the protocol -------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the protocol with benchmarks/compare.py."""
    parser = argparse.ArgumentParser()
    for name in ("side", "case", "phase"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--remat", default="")
    parser.add_argument("--xla", default="{}", help="compiler options as JSON, instead of ours")
    parser.add_argument("--hlo", default="", help="file for the text of the compiled program")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # XLA uses one thread for each of these cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    make = make_torch if options.side.startswith("torch") else make_ours
    run, facts = make(find_case(options.case), options.phase, options)
    begin = time.perf_counter()
    run()
    facts["first_s"] = time.perf_counter() - begin
    if options.phase != "predict":
        run()
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak": peak * (1 if sys.platform == "darwin" else 1024)}), flush=True)


if __name__ == "__main__":
    main()
