"""The documentation: tutorials run as they are written, and pages name what there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xdim_jax.base.config import leaves, load_config, shipped_recipes

REPO = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((REPO / "docs" / "tutorials").glob("*.md"))
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), *TUTORIALS, REPO / "CONTRIBUTING.md"]


def blocks(path):
    """The code of a page that is to be run, in order."""
    return re.findall(r"^```bash\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_runs_as_it_is_written(path, tmp_path):
    assert blocks(path)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "HF_HUB_OFFLINE": "1",
    }
    (tmp_path / "here").mkdir()
    script = "set -euo pipefail\n" + "\n".join(blocks(path))
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path / "here", env=environment, capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_what_a_page_names_is_there(path):
    """Modules that are run, recipes, config values, files and tests."""
    text = path.read_text(encoding="utf-8")
    for module in set(re.findall(r"python -m (xdim_jax[\w.]*|weight_port|tests\.\w+)", text)):
        place = REPO / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
    for name in set(re.findall(r"--config=([\w/]+(?:\.py)?(?::[\w=,]+)?)", text)) - {"x"}:
        if not name.startswith(("FILE", "recipe")):
            load_config(name, [])
    for name in set(
        re.findall(r"\b((?:configs|docs|tests|benchmarks|launch|xdim_jax)/[\w/]+\.(?:py|md|sh|yaml))\b", text)
    ):
        assert (REPO / name).is_file(), name
    tests = "".join(p.read_text(encoding="utf-8") for p in (REPO / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {name}(" in tests, name
    known = {key for recipe in ("camus_omnianet", "brats_dxnet", "chaos_omnianet", "brats_dsnet", "own_dxnet")
             for key, _ in leaves(load_config(recipe, []))}  # fmt: skip
    for key in set(re.findall(r"--config\.([\w.]+\w)=", text)):
        assert key in known or key.split(".")[0] in ("key", "x"), key


def test_the_reference_has_every_config_value():
    sys.path.insert(0, str(REPO / "docs"))
    try:
        import hooks
    finally:
        sys.path.remove(str(REPO / "docs"))
    page = hooks.config_page()
    keys = {key for recipe in shipped_recipes() for key, _ in leaves(load_config(recipe, []))}
    assert set(hooks.MEANINGS) <= keys
    for key in sorted(keys):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{key}` |")]
        assert not row.endswith("|  |"), f"{key} has no description"
    (row,) = [line for line in page.splitlines() if line.startswith("| `optim.lookahead.period` |")]
    six, _, none = row.partition("; `0`: ")
    assert (
        "`6`: " in six
        and "brats_dsnet" in six
        and {"camus_omnianet", "chaos_omnianet"} <= set(none.partition(" |")[0].split(", "))
    )
    assert "the run ends after this number of validations without a better score" in page, (
        "comments of the source are the descriptions"
    )
    modules = hooks.python_page()
    assert "::: xdim_jax.inference.predictor\n" in modules and "::: xdim_jax.data.store\n" in modules


def test_every_fact_beside_the_peers_has_a_test_that_is_there(monkeypatch):
    """docs/show_facts.py finds every line of the table in docs/comparison.md, and the tests that it would run."""
    monkeypatch.syspath_prepend(str(REPO / "docs"))
    import show_facts

    text = (REPO / "docs" / "comparison.md").read_text(encoding="utf-8")
    table = text.partition("| property | xdim_jax | nnU-Net |")[2].partition("\n\n")[0]
    found = show_facts.facts(text)
    assert len(found) == len(table.splitlines()) - 2 > 5
    for _, test in found:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (REPO / file).read_text(encoding="utf-8"), test
