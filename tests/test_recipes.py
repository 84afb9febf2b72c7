"""The recipes: each is one file, and a change of any of them is visible in its golden file."""

import json
import shutil

import pytest

from tests import golden
from xdim_jax.base.config import load_config, shipped_configs, shipped_recipes
from xdim_jax.training.check import resolve_config


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


@pytest.mark.parametrize(
    ("names", "sided"),
    [
        (("liver", "tumour"), False),
        (("kidney left", "kidney right"), True),
        (("LeftVentricle",), True),
        (("lung_L", "lung_R"), True),
        (("hippocampus-lh",), True),
        (("lesion", "rectum", "larynx", "arteries"), False),
    ],
)
@pytest.mark.parametrize("recipe", ["own_dxnet", "own_omnianet"])
def test_own_recipes_mirror_along_all_axes_that_keep_the_meaning_of_the_structures(recipe, names, sided, tmp_path):
    labels = {"background": 0} | {name: i for i, name in enumerate(names, 1)}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels}))
    config = load_config(f"configs/{recipe}.py", [f"--config.data.root={tmp_path}"])
    resolved, _ = resolve_config(config)
    axes = len(config.data.patch)
    assert resolved.augment.flip.axes == tuple(range(axes - 1 if sided else axes)) and resolved.augment.flip.p == 0.5
    given, _ = resolve_config(
        load_config(f"configs/{recipe}.py", [f"--config.data.root={tmp_path}", "--config.augment.flip.axes=(1,)"])
    )
    assert given.augment.flip.axes == (1,)
