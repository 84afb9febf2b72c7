"""What a network starts from: random weights, or those that the ``init`` section of a config names."""

from pathlib import Path
from typing import Any

from xdim_jax.base import bucket
from xdim_jax.base.config import Config
from xdim_jax.base.errors import UserError
from xdim_jax.base.log import say
from xdim_jax.inference.model import read_anywhere
from xdim_jax.nets import inflate, weights
from xdim_jax.nets.weights import Weights

REPORT_FILE = "pretrained.json"


def read_named(name: str) -> Weights:
    """Weights by a name of timm's (from the Hugging Face hub, or its cache), of a file, or of a workdir.

    Raises:
        UserError: nothing usable there; without a network, it says what to do.
    """
    if bucket.is_address(name):
        return read_anywhere(bucket.fetch(name))
    path = Path(name)
    if path.exists() or path.suffix in (".safetensors", ".pth", ".pt") or "/" in name:
        return read_anywhere(path)
    from weight_port import timm_models  # needed for a name alone; it imports neither torch nor timm

    try:
        return timm_models.from_timm(name)
    except UserError as error:
        reason = str(error).replace("--model", "config.init.weights")
        raise UserError(
            f"{reason}\nThen convert it, python -m weight_port --source=timm --model={name} "
            f"--from-file=<that file> --out=<name>.safetensors, and give --config.init.weights=<name>.safetensors; or "
            "train from random weights: --config=<recipe>.py:scratch"
        ) from error


def read_start(config: Config) -> Weights:
    """The weights that a config starts from, by `read_named`.

    Raises:
        UserError: they cannot be had; names the config value.
    """
    try:
        return read_named(config.init.weights)
    except UserError as error:
        raise UserError(f"config.init.weights={config.init.weights}: {error}") from error


def initialise(config: Config, params: Any, stats: Any) -> tuple[Any, Any, dict[str, Any] | None]:
    """The weights that the ``init`` section asks for, and a report of what became of every array (none: random).

    Raises:
        UserError: the file cannot be had, or does not fit the network.
    """
    options = config.init
    if not options.weights:
        say("weights    random")
        return params, stats, None
    accept = tuple(word for word in options.accept.split(",") if word)
    source = read_start(config)
    try:
        rule = inflate.Inflation(options.inflate, sigma=options.sigma, spacing=options.spacing, seed=config.seed)
        chosen = weights.part(source) if options.part == "encoder" else source
        params, stats, done = weights.load(
            config.model,
            params,
            stats,
            chosen,
            inflation=rule,
            channel_rule=options.channels,
            accept=accept,
            require=options.require,
        )
    except UserError as error:
        raise UserError(f"config.init.weights={options.weights}: {error}") from error
    whole = {n: a.size for n, a in (weights.named(params) | weights.named(stats)).items()}
    part = ""
    if chosen.kind == "encoder":
        prefix, _ = weights.encoder_section(config.model)
        whole, part = {n: s for n, s in whole.items() if n.startswith(prefix)}, f" of {prefix[:-1]}"
    loaded = {n for n, what in done.items() if not what.startswith(("dropped", "left out"))} & whole.keys()
    share = sum(whole[n] for n in loaded) / sum(whole.values())
    kinds = {what: sum(w == what for w in done.values()) for what in sorted(set(done.values()))}
    say(
        f"weights    {options.weights}: {100 * share:.4g} %{part}; arrays: "
        + ", ".join(f"{n} {k}" for k, n in kinds.items())
    )
    if digest := source.source.get("sha256"):
        say(f"           sha256 {digest}")
    report = {
        "weights": options.weights,
        "source": source.source,
        "coverage": share,
        "random": sorted(whole.keys() - loaded),
        "arrays": done,
    }
    return params, stats, report
