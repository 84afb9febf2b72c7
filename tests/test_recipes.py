"""The recipes: each is one file, and a change of any of them is visible in its golden file."""

import json
import shutil

import pytest

from tests import golden
from xdim_jax.base.config import load_config, shipped_configs, shipped_recipes


def flat(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_a_recipe_is_what_its_golden_file_says(recipe):
    written = flat(json.loads((golden.FOLDER / f"{recipe}.json").read_text()))
    found = flat(json.loads(golden.dump(golden.describe(recipe))))
    changed = {
        key: (written.get(key), found.get(key))
        for key in sorted(written.keys() | found.keys())
        if written.get(key) != found.get(key)
    }
    assert not changed, "if this change is intended, rewrite the golden files: python -m tests.golden"


@pytest.mark.quick
def test_every_golden_file_has_a_recipe():
    assert {path.stem for path in golden.FOLDER.iterdir()} == set(shipped_recipes())


def test_a_recipe_needs_no_other_recipe(tmp_path):
    """One file shows one recipe in full: with only the shared defaults next to it, it still loads."""
    for recipe in shipped_recipes():
        folder = tmp_path / recipe / "configs"
        folder.mkdir(parents=True)
        for name in (f"{recipe}.py", "_shared.py"):
            shutil.copy(shipped_configs() / name, folder / name)
        alone = load_config(str(folder / f"{recipe}.py"), [])
        assert alone.to_dict() == load_config(recipe, []).to_dict()


@pytest.mark.quick
def test_files_with_an_underscore_are_not_recipes():
    files = {path.stem for path in shipped_configs().glob("*.py")}
    assert "_shared" in files and not [name for name in shipped_recipes() if name.startswith("_")]
    assert files - set(shipped_recipes()) == {"__init__", "_shared"}
