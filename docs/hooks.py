"""Generate the reference pages when the site is built: all config values and all public functions."""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AUGMENT_TABLE = ROOT / "xdim_jax" / "training" / "augment_table.py"
sys.path.insert(0, str(ROOT))

# keys that every recipe sets for itself -> meaning; the comments of the recipes have the reasons for their values
MEANINGS = {
    "data.dataset": "format of the data: brats, camus, chaos, nnunet, decathlon or table",
    "data.views": "views to use: 2CH, 4CH or both",
    "data.instants": "one or more of ED, ES and half_sequence (all frames from one instant to the other)",
    "data.quality": "image qualities used in training and validation; images of unknown quality are used only if all "
    "three are given",
    "data.task": "task of the challenge, 1 to 5; selects CT or MR and the structures",
    "data.patch": "size of a sample in voxels along D, H, W (2D: H, W)",
    "data.batch": "number of samples in a batch, over all devices",
    "data.patches_per_case": "number of patches of each case in an epoch; only for patches",
    "data.foreground": "probability that a patch is placed on a voxel of a structure; only for patches",
    "data.prepare.crop": "nonzero: crop to the box of the voxels that are not 0; none: no crop",
    "data.prepare.spacing": "mm along D, H, W after resampling; 0 keeps an axis, () keeps all",
    "data.prepare.size": "pixels H, W to which every slice is resampled, without preserving the aspect ratio; () keeps "
    "the size",
    "data.prepare.window": "centre and width in HU to which CT is clipped; (): no window",
    "data.prepare.ct_statistics": "mean and standard deviation in HU with which CT is standardised; (): each image by "
    "normalise",
    "data.prepare.normalise": "zscore, zscore_nonzero (only the voxels that are not 0) or none",
    "data.phantom.cases": "number of phantoms that are written if there is no root; 0: a root is required",
    "data.phantom.held_out": "number of additional phantoms in the folder held_out, which are not used in training",
    "data.phantom.shape": "size of a phantom in voxels",
    "data.phantom.noise": "standard deviation of the noise, relative to the signal",
    "data.phantom.bias": "standard deviation of the logarithm of the bias field",
    "model.name": "network: omnianet, dxnet or dsnet",
    "model.in_channels": "number of channels of the image; 0: from the data",
    "model.out_channels": "number of channels of the output; 0: from the data",
    "model.norm": "norm of the network: batch, instance or instance_noaffine",
    "model.activation": "activation of the first block and the decoder: relu or silu",
    "model.upsampling": "upsampling in the decoder: nearest (neighbour) or transposed (convolution)",
    "model.encoder.name": "name of the encoder (docs/networks.md lists all)",
    "model.encoder.eps": "eps of the norms of the encoder",
    "model.encoder.padding": "symmetric, or same (TensorFlow)",
    "model.encoder.drop_path": "largest rate of stochastic depth",
    "model.depth.axis": "axis that the 2D encoder does not have: 0 depth (or time), 1 height, 2 width",
    "model.depth.padding": "padding along this axis: zero (released code), edge or renorm; docs/pretrained.md states "
    "with which settings inflation is exact",
    "model.depth.squeeze": "squeeze-and-excitation averages over the volume (released code) or over each slice",
    "model.depth.strides": "stride along this axis at each level, finest first: 1 or 2",
    "model.decoder": "3D decoder: transposed (released code; one convolution per stage) or nearest (paper; two "
    "convolutions per stage)",
    "model.inner.activation": "activation of the 2D decoder and, if there is one, the first block: relu or silu",
    "model.inner.norm": "norm of the 2D network: batch, instance or instance_noaffine",
    "model.inner.upsampling": "upsampling in the 2D decoder: nearest (neighbour) or transposed (convolution)",
    "model.inner.full_resolution": "True: the 2D network has a first block at full resolution, as Omnia-Net",
    "model.inner.encoder.name": "name of the 2D encoder (docs/networks.md lists all)",
    "model.inner.encoder.eps": "eps of the norms of the 2D encoder",
    "model.inner.encoder.padding": "symmetric, or same (TensorFlow)",
    "model.inner.encoder.drop_path": "largest rate of stochastic depth",
    "optim.lookahead.period": "period in steps; 0: no LookAhead",
    "optim.lookahead.step_size": "fraction of the way from the slow to the fast weights that the slow weights move",
    "predict.overlap": "overlap of neighbouring windows, as a fraction of the patch",
    "predict.threshold": "probability above which a voxel belongs to a region; not used with a softmax",
    "predict.min_et": "an ET of BraTS with fewer voxels is relabelled as NCR; 0: none is",
}

# every folder of the package that has modules, and weight_port
PACKAGES = (
    *sorted({path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "xdim_jax").rglob("*.py")}),
    "weight_port",
)


def on_pre_build(config):
    """Write the reference pages before mkdocs collects the files."""
    from xdim_jax.base.files import write_text

    folder = Path(config["docs_dir"]) / "reference"
    folder.mkdir(exist_ok=True)
    for name, text in (("config.md", config_page()), ("python.md", python_page())):
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def comments():
    """Return dotted key -> file of configs/ -> comment next to, or above, the key."""
    found = {}
    for path in (*sorted((ROOT / "configs").glob("*.py")), AUGMENT_TABLE):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        notes = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        for key, line in keys(ast.parse(text)):
            above = line - 1
            while above in notes and lines[above - 1].lstrip().startswith("#"):
                above -= 1
            parts = " ".join(notes[n] for n in range(above + 1, line)), notes.get(line, "")
            if any(parts):
                name = "_shared" if path == AUGMENT_TABLE else path.stem
                found.setdefault(key, {})[name] = "; ".join(filter(None, parts))
    return found


def meaning(notes):
    """Return the text about a key: the comment of all recipes, or the different comments with their recipes."""
    texts = {}
    for name, note in notes.items():
        texts.setdefault(note, []).append(name)
    shared = [note for note, names in texts.items() if "_shared" in names]
    own = [f"{', '.join(names)}: {note}" for note, names in texts.items() if note not in shared]
    return "<br>".join(shared + own)


def keys(tree):
    """Yield the dotted config keys that a recipe sets, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "DEFAULTS":
            yield from inner_keys("augment", node.value)
            continue
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update":
            target, value = node.func.value, node.args[0]
        else:
            continue
        name = ast.unparse(target)
        if not name.startswith("config."):
            continue
        key = name.removeprefix("config.")
        dictionary = value.args[0] if isinstance(value, ast.Call) and value.args else value
        if isinstance(dictionary, ast.Dict):
            yield from inner_keys(key, dictionary)
        else:
            yield key, node.lineno


def inner_keys(prefix, dictionary):
    """Yield the dotted keys of a dictionary that has a line for each key, with their lines.

    In the table of augmentation, each value is a dictionary on one line, whose comment is that of all its keys.
    """
    lines = [key.lineno for key in dictionary.keys if key is not None]
    for key, value in zip(dictionary.keys, dictionary.values, strict=True):
        if isinstance(key, ast.Constant) and len(set(lines)) == len(lines) and dictionary.lineno not in lines:
            yield f"{prefix}.{key.value}", key.lineno
            if isinstance(value, ast.Dict) and value.end_lineno == key.lineno:
                if prefix != "augment":
                    continue
                yield from ((f"{prefix}.{key.value}.{inner.value}", key.lineno) for inner in value.keys)
            elif isinstance(value, ast.Dict):
                yield from inner_keys(f"{prefix}.{key.value}", value)


def config_page():
    """Return the page with a table of all values of all recipes."""
    from xdim_jax.base.config import leaves, load_config, shipped_recipes

    notes = comments()
    configs = {name: dict(leaves(load_config(name, []))) for name in shipped_recipes()}
    keys = list(dict.fromkeys(key for values in configs.values() for key in values))
    lines = [
        "# Config values",
        "",
        "Every value can be set on the command line: `--config.<key>=<value>`; a tuple is written `(64,64,64)`.",
        "If a key is not in all recipes, or has different values, the names of the recipes follow each value. This",
        "page is generated from the recipes.",
        "",
    ]
    for section in dict.fromkeys(key.partition(".")[0] for key in keys):
        lines += [f"## {section}", "", "| key | value | meaning |", "|---|---|---|"]
        for key in keys:
            if key.partition(".")[0] != section:
                continue
            by_value = {}
            for name, values in configs.items():
                if key in values:
                    by_value.setdefault(repr(values[key]), []).append(name)
            if len(by_value) == 1 and len(next(iter(by_value.values()))) == len(configs):
                text = f"`{next(iter(by_value))}`"
            else:
                text = "; ".join(f"`{value}`: {', '.join(names)}" for value, names in by_value.items())
            note = "<br>".join(filter(None, [MEANINGS.get(key), meaning(notes.get(key, {}))]))
            if key.startswith("augment.") and key.endswith(".p"):
                note = "probability of the transform"
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{key}`", text, note)) + " |")
        lines.append("")
    return "\n".join(lines)


def python_page():
    """Return the page with mkdocstrings directives for all modules that have public names."""
    lines = ["# Python", "", "Public functions and classes by module. Names with a leading underscore are private.", ""]
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if path.stem.startswith("__"):
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            kinds = (ast.FunctionDef, ast.ClassDef)
            if any(isinstance(node, kinds) and not node.name.startswith("_") for node in tree.body):
                lines += [f"::: {name}", ""]
    return "\n".join(lines)
