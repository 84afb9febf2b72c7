"""Generate the reference pages when the site is built: all config values and all public functions."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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
    """Return the comment next to, or above, each key in the source of configs/, by the last part of the key."""
    found = {}
    for path in sorted((ROOT / "configs").glob("*.py")):
        above = []
        for line in path.read_text(encoding="utf-8").splitlines():
            stripped = line.strip()
            if stripped.startswith("#"):
                above.append(stripped.lstrip("# "))
                continue
            match = re.match(r'(?:"(\w+)"\s*:|config\.([\w.]+)\s*=)[^#]*(?:#\s*(.*))?$', stripped)
            if match:
                key = (match[1] or match[2]).rpartition(".")[2]
                text = " ".join([*above, match[3] or ""]).strip()
                if text:
                    found.setdefault(key, text)
            above = []
    return found


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
            note = notes.get(key.rpartition(".")[2], "")
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
