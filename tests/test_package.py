"""The package as a user gets it: built, installed into an empty environment, and used from elsewhere."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import xdim_jax

REPO = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.xdist_group("package")  # one worker, so that fixtures are made once


@pytest.mark.quick
def test_quick_tests_import_every_folder():
    """`make quick` covers every folder of the packages."""
    texts = [p.read_text(encoding="utf-8") for p in (REPO / "tests").glob("test_*.py")]
    imports = "".join(text for text in texts if "pytest.mark.quick" in text)
    found = set(re.findall(r"^(?:from|import) (xdim_jax\.\w+|weight_port|configs)", imports, re.MULTILINE))
    folders = {f"xdim_jax.{path.parent.name}" for path in (REPO / "xdim_jax").glob("*/__init__.py")}
    assert folders | {"weight_port", "configs"} <= found


def our_imports(path: Path) -> list[tuple[str, str]]:
    """The modules of this repository that a file imports anywhere, with the imported name or an empty string."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [(node.module or "", alias.name) for alias in node.names]
    ours = {"xdim_jax", "weight_port", "configs", "benchmarks", "tests"}
    return [(module, name) for module, name in found if module.split(".")[0] in ours]


@pytest.mark.parametrize("folder", ["benchmarks", "docs", "launch", "xdim_jax", "weight_port", "configs", "tests"])
def test_every_import_of_our_own_names_something_that_exists(folder):
    """Also imports inside functions, and those of scripts that no test runs."""
    missing = []
    for path in sorted((REPO / folder).rglob("*.py")):
        for module, name in our_imports(path):
            try:
                if name and not hasattr(importlib.import_module(module), name):
                    importlib.import_module(f"{module}.{name}")
                else:
                    importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name and error.name.split(".")[0] not in ("torch", "timm", "batchgeneratorsv2"):
                    missing.append(f"{path.relative_to(REPO)}: from {module} import {name}")
    assert not missing


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution, and a wheel that was made from it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, REPO], check=True, capture_output=True)
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


@pytest.mark.slow
def test_what_is_in_the_distributions(built):
    wheel, source = built
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"xdim_jax/py.typed", "weight_port/py.typed", "xdim_jax/_recipes/configs/brats_dxnet.py"} <= names
    pages = "xdim_jax/pages/templates"
    assert {"xdim_jax/_recipes/configs/sweeps/dxnet.py", f"{pages}/sweep.html.j2", f"{pages}/page.css"} <= names
    assert not [n for n in names if n.startswith(("tests/", "docs/", "benchmarks/", "configs/"))]
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "mkdocs.yml", "tests/test_package.py"} <= inside
    assert sum(f.file_size for f in zipfile.ZipFile(wheel).infolist()) < 5e6, "no data, no weights"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_installed_wheel_works_from_elsewhere(built, tmp_path):
    """An environment without torch, timm, or anything of the tests'; a folder without the repository."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    binaries = tmp_path / "env" / "bin"
    constraints = REPO / ("constraints-newest.txt" if sys.version_info >= (3, 12) else "constraints.txt")
    install = [binaries / "python", "-m", "pip", "install", "-q", "-c", constraints, built[0]]
    subprocess.run(install, check=True, capture_output=True)
    home = tmp_path / "home"
    home.mkdir()
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = keep | {"HOME": str(home), "PATH": f"{binaries}:/usr/bin:/bin"}

    def run(*command):
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    code = (
        "import sys, xdim_jax; print(xdim_jax.__version__, *[m for m in ('jax', 'torch', 'timm') if m in sys.modules])"
    )
    assert run(binaries / "python", "-c", code).split() == [xdim_jax.__version__], "jax comes when it is asked for"
    found = json.loads(run(binaries / "xdim-doctor", "--quick", "--json=-"))
    assert found["verdict"].startswith("ready")
    facts = {f["check"]: f["facts"] for f in found["findings"]}
    assert not facts["versions"]["extras"]["port"], "neither torch nor timm"
    scripts = re.findall(r"^(xdim-[\w-]+) =", (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    assert all((binaries / script).is_file() for script in scripts)
    load = "from importlib.metadata import distribution as d; [e.load() for e in d('xdim_jax').entry_points]"
    run(binaries / "python", "-c", load)  # the other commands are run below
    small = ["--config.model.encoder.name=efficientnet_toy", "--config.model.filters=(8,8,8,8,8)"]
    small += ["--config.data.patch=(32,32)", "--config.data.prepare.size=(32,32)", "--config.train.epochs=1"]
    small += ["--config.data.phantom.cases=5", "--config.data.phantom.held_out=1"]
    run(binaries / "xdim-train", "--config=camus_omnianet:phantom", "--workdir=run", *small)
    run(binaries / "xdim-predict", "--workdir=run", "--input=run/phantom/held_out", "--output=pred")
    run(binaries / "xdim-evaluate", "--rules=camus", "--pred=pred", "--ref=run/phantom/held_out", "--out=eval")
    run(binaries / "xdim-report", "--workdir=run", "--eval=eval", "--out=report.html")
    assert (home / "report.html").stat().st_size > 10_000


def test_version_and_changes_agree():
    version = xdim_jax.__version__
    assert re.search(rf"^## {re.escape(version)}\b", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f"version: {version}\n" in (REPO / "CITATION.cff").read_text()
