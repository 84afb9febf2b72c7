"""Golden files of the recipes: resolved config, shapes of all arrays, and operations of one training step.

The operations are those of all convolutions and matrix products, forward and backward; a multiply-add counts as two.

    python -m tests.golden          rewrites tests/golden_recipes/<recipe>.json; so does make golden

tests/test_recipes.py compares them with the code, so that every change of a recipe is visible in a diff. Nothing is
compiled, and no weights are loaded. Recipes for a user's own data read the numbers of channels from the data; here the
data have one channel and two structures.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax

from xdim_jax.base.config import load_config, shipped_recipes
from xdim_jax.nets.weights import flatten
from xdim_jax.training.check import resolve_config
from xdim_jax.training.needs import make_settings, step_products
from xdim_jax.training.program import make_program

FOLDER = Path(__file__).parent / "golden_recipes"
OWN_DATA = {
    "channel_names": {"0": "MR"},
    "labels": {"background": 0, "first": 1, "second": 2},
    "numTraining": 0,
    "file_ending": ".nii.gz",
}


def describe(recipe: str) -> dict[str, Any]:
    """Return what the golden file of a recipe holds."""
    with tempfile.TemporaryDirectory() as root:
        overrides = []
        if recipe.startswith("own_"):
            (Path(root) / "dataset.json").write_text(json.dumps(OWN_DATA))
            overrides = [f"--config.data.root={root}"]
        config, dataset = resolve_config(load_config(recipe, overrides), needs_data=False)
    _, params, stats = make_program(config, dataset, per_epoch=1000, abstract=True)
    products, _ = step_products(config, dataset, make_settings(config)[0])
    config.data.root = ""
    return {
        "config": json.loads(config.to_json_best_effort()),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "step_gflop": round(sum(product.flops for product in products) / 1e9, 2),
        "shapes": {
            kind: {name: "x".join(map(str, leaf.shape)) for name, leaf in flatten(tree).items()}
            for kind, tree in (("params", params), ("stats", stats))
        },
    }


def dump(description: dict[str, Any]) -> str:
    """Return the text of a golden file."""
    return json.dumps(description, indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Rewrite all golden files."""
    FOLDER.mkdir(exist_ok=True)
    recipes = shipped_recipes()
    for stale in FOLDER.glob("*.json"):
        if stale.stem not in recipes:
            stale.unlink()
    for recipe in recipes:
        (FOLDER / f"{recipe}.json").write_text(dump(describe(recipe)))


if __name__ == "__main__":
    main()
