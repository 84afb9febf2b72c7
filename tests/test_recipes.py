"""The recipes: each is one file, and a change of any of them is visible in its golden file."""

import json
import shutil
import sys

import pytest

from tests import golden
from xdim_jax import ops
from xdim_jax.base.config import load_config, shipped_configs, shipped_recipes
from xdim_jax.base.errors import UserError
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


@pytest.mark.parametrize("folder", ["run", "2024:01", "own:fold=0"])
def test_a_recipe_is_found_in_folders_of_any_name(folder, tmp_path, monkeypatch):
    """Colons are part of a path, and a user's package with the name configs does not hide that of the recipes."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # as if it were the working directory
    path = tmp_path / folder / "recipe.py"
    path.parent.mkdir()
    shutil.copy(shipped_configs() / "own_dxnet.py", path)
    assert load_config(f"{path}:fold=3", []).data.fold == 3
    assert load_config(str(path), []).data.fold == load_config("own_dxnet", []).data.fold
    with pytest.raises(UserError, match="absent does not exist"):
        load_config("absent:fold=3", [])


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
        (("LKidney", "RKidney"), True),
        (("kidneyL",), True),
        (("LUL", "RUL"), True),
        (("lkid", "rkid"), True),
        (("lesion", "rectum", "larynx", "arteries"), False),
        (("Liver", "Rectum", "LungVessels", "EL"), False),
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


@pytest.mark.parametrize("name", [name for name in ops.IMPLEMENTATIONS if name not in ("auto", "sharded")])
def test_a_distributed_depth_has_operations_of_its_own(name):
    """Any other implementation would replace those that a distributed depth needs."""
    config = load_config("configs/brats_dxnet.py:scratch", ["--config.mesh.space=2", f"--config.train.ops={name}"])
    with pytest.raises(UserError, match=f"config.train.ops={name}.*auto"):
        resolve_config(config, needs_data=False)
