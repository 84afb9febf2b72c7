"""Generate the reference pages when the site is built: all config values and all public functions."""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AUGMENT_TABLE = ROOT / "xdim_jax" / "training" / "augment_table.py"
sys.path.insert(0, str(ROOT))

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

    If a value is a dictionary on one line, the comment of this line is that of all its keys.
    """
    lines = [key.lineno for key in dictionary.keys if key is not None]
    for key, value in zip(dictionary.keys, dictionary.values, strict=True):
        if isinstance(key, ast.Constant) and len(set(lines)) == len(lines) and dictionary.lineno not in lines:
            yield f"{prefix}.{key.value}", key.lineno
            if isinstance(value, ast.Dict) and value.end_lineno == key.lineno:
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
        "If recipes have different values, each value is followed by the names of its recipes. This page is generated",
        "from the recipes.",
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
            note = meaning(notes.get(key, {}))
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
