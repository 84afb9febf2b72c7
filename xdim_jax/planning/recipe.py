"""The text of a planned recipe: a Python file like those in configs/, with the reasons of its values as comments."""

import textwrap
from collections.abc import Mapping
from typing import Any

from xdim_jax.planning.choices import Choices

_WIDTH = 116
_PREPARE = (
    "crop: none or nonzero. spacing: mm along D, H, W to resample to; 0 keeps an axis. size: pixels H, W of a slice. "
    "window: centre and width in HU. ct_statistics: mean and standard deviation in HU. An empty value has no effect"
)


def render(choices: Choices, section: Mapping[str, Any], header: str) -> str:
    """Return the text of a recipe.

    Args:
        choices: The choices.
        section: Name, root and options of the data set: values of the ``data`` section.
        header: First lines of the docstring, which name the data of the recipe.
    """
    parts = [
        _docstring(header, choices),
        "from typing import Any\n\nfrom configs import _shared\n\n",
        '\ndef get_config(arg: str = "") -> Any:\n',
        '    """Return the recipe with the variants in ``arg``, which are separated by commas."""\n',
        '    variants = _shared.parse_variants(arg, flags=("scratch",))\n',
        "    config = _shared.get_config(variants)\n",
        *_data(choices, section),
        *_network(choices),
        *_training(choices),
        "    return config\n",
    ]
    return "".join(parts)


def _docstring(header: str, choices: Choices) -> str:
    lines = [
        header,
        "",
        "Variants (after the colon, separated by commas): ``fold=K``, ``fold=all``, ``scratch`` (random weights).",
    ]
    if choices.notes:
        lines += ["", "Warnings:", *(line for note in choices.notes for line in _wrapped(f"- {note}", "", "  "))]
    return '"""' + "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''") + '\n"""\n\n'


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False)


def _because(choices: Choices, *names: str) -> str:
    """Return the reasons of some attributes as a comment."""
    lines = [line for name in names if choices.reasons.get(name) for line in _comment(choices.reasons[name])]
    return "".join(f"{line}\n" for line in lines)


def _comment(text: str) -> list[str]:
    return _wrapped(text[0].upper() + text[1:] + ".", "    # ", "    # ")


def _set(key: str, value: Any) -> str:
    return f"    config.{key} = {_literal(value)}\n"


def _literal(value: Any) -> str:
    """Return a value as Python, with double quotes where possible."""
    text = repr(value)
    return text if '"' in text else text.replace("'", '"')


def _data(choices: Choices, section: Mapping[str, Any]) -> list[str]:
    prepare = choices.prepare
    return [
        "\n    # -- data --\n\n",
        *(_set(f"data.{key}", value) for key, value in section.items()),
        *([_set("data.split", "official")] if choices.official else []),
        _because(choices, "folds"),
        _set("data.folds", choices.folds),
        _because(choices, "normalise"),
        _because(choices, "spacing"),
        "".join(f"{line}\n" for line in _comment(_PREPARE)),
        "    config.data.prepare = _shared.section(\n        {\n",
        *(f"            {_literal(key)}: {_literal(value)},\n" for key, value in prepare.items()),
        "        }\n    )\n",
        _because(choices, "patch"),
        _set("data.patch", choices.patch),
        _because(choices, "batch"),
        _set("data.batch", choices.batch),
        _set("data.sampling", choices.sampling),
        _because(choices, "foreground"),
        _set("data.foreground", choices.foreground),
        _set("data.patches_per_case", 4),
        '    config.data.phantom = _shared.section({"cases": 0})\n',
        _augmentation(choices),
    ]


def _augmentation(choices: Choices) -> str:
    lines = [
        '\n    for transform in ("scale", "rotate", "translate", "noise", "brightness", "contrast", "gamma"):\n'
        "        config.augment[transform].p = 0.3\n"
        "    config.augment.blur.p = config.augment.lowres.p = 0.1\n"
        "    config.augment.rotate.plane = True  # rotate in the plane of the slices\n",
        "".join(f"{line}\n" for line in _comment(f"flips: {choices.reasons['mirror']}")),
    ]
    if choices.mirror is None:
        lines.append("    config.augment.flip.p = 0.5\n")
    else:
        lines.append("    config.augment.flip.p = 0.0\n")
    return "".join(lines)


def _network(choices: Choices) -> list[str]:
    flat = choices.flat
    lines = ["\n    # -- network --\n\n", _because(choices, "output"), _set("output", choices.output)]
    lines += [_because(choices, "network"), _because(choices, "strides")]
    lines.append(
        "    config.model = _shared.section(\n        {\n"
        f'            "name": "{choices.network}",\n'
        '            "in_channels": 0,  # from the data\n'
        '            "out_channels": 0,  # from the data\n'
        '            "encoder": {"name": "efficientnet_lite0", "eps": 1e-3, "padding": "same", "drop_path": 0.2},\n'
        f'            "norm": "{"batch" if flat else "instance"}",\n'
        f'            "activation": "{"relu" if flat else "silu"}",\n'
        f'            "upsampling": "{"nearest" if flat else "transposed"}",\n'
        '            "filters": (256, 128, 64, 32, 16),  # of the decoder, coarsest first\n'
        '            "deep_supervision": False,\n'
        + (
            ""
            if flat
            else f'            "depth": {{"axis": {choices.axis}, "padding": "zero", "squeeze": "volume", '
            f'"strides": {choices.strides}}},\n'
        )
        + "        }\n    )\n"
    )
    lines.append(_because(choices, "pretrained"))
    name = "tf_efficientnet_lite0.pypi" if choices.pretrained else ""
    lines.append(f'    config.init.weights = "" if "scratch" in variants else "{name}"\n')
    if not flat:
        lines.append(_because(choices, "rule"))
        lines.append(_set("init.inflate", choices.rule))
        lines.append(_set("init.spacing", round(min(max(choices.ratio, 1e-3), 1e3), 3)))
    return lines


def _training(choices: Choices) -> list[str]:
    entropy = "ce" if choices.output == "softmax" else "bce"
    return [
        "\n    # -- training --\n\n",
        _set("loss.name", f"dice_{entropy}"),
        _because(choices, "dice"),
        _set("loss.dice", choices.dice),
        '    config.optim.update({"name": "nadam", "b1": 0.95, "b2": 0.99})\n',
        '    config.optim.lookahead.update({"period": 6, "step_size": 0.5})\n',
        _because(choices, "peak"),
        '    config.optim.schedule.update({"name": "constant_then_cosine", "final": 1e-5})\n',
        _set("optim.schedule.peak", choices.peak),
        _because(choices, "epochs"),
        _set("train.epochs", choices.epochs),
        _set("data.epoch_steps", choices.epoch_steps),
        _set("train.validate_every", choices.validate_every),
        _because(choices, "precision"),
        _set("train.precision", choices.precision),
        '    config.predict = _shared.section({"overlap": 0.5, "threshold": 0.5})\n',
    ]
