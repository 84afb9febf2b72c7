"""Reports of the three challenges and of own data, opened in a browser: nothing is missing, nothing sticks out."""

import json
import os
import shutil
import subprocess

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from xdim_jax import evaluate, report
from xdim_jax.base.files import write_json
from xdim_jax.data import phantom
from xdim_jax.data.case import list_cases
from xdim_jax.data.datasets import get_dataset
from xdim_jax.data.images.image import read_grid, source_path
from xdim_jax.data.images.nifti import write_volume
from xdim_jax.data.reading import encode_label, read_label
from xdim_jax.pages import figures
from xdim_jax.pages import report as report_page
from xdim_jax.runs import environment
from xdim_jax.scoring.rules import Column, ScoredCase

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell"))), None
)
CONFIGS = {
    "camus": {"dataset": "camus"},
    "chaos": {"dataset": "chaos", "task": 5},
    "brats": {"dataset": "brats", "convention": "brats2021"},
    "nnunet": {"dataset": "nnunet"},
}
RULES = {
    "camus": ["--rules=camus"],
    "chaos": ["--rules=chaos", "--task=5"],
    "brats": ["--rules=brats2022"],
    "nnunet": ["--rules=generic"],
}
FIGURES = {  # box plots; agreement of volumes; five cases
    "camus": 1 + 1 + 5,
    "chaos": 1 + 5,
    "brats": 1 + 5,
    "nnunet": 1 + 5,
}


def write_own(root):
    """Write images of a ball with two channels, in the layout of nnU-Net."""
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    place = np.meshgrid(*(np.arange(n) - n / 2 for n in (48, 40, 24)), indexing="ij")
    for k in range(5):
        ball = sum(p**2 for p in place) < (8 + k) ** 2
        label = np.where(ball & (place[0] > 2), 2, ball).astype(np.uint8)
        for c in range(2):
            image = (100 * label * (c + 1) + rng.normal(0, 20, label.shape)).astype(np.int16)
            nib.save(nib.Nifti1Image(image, np.diag([1, 1, 2, 1])), root / "imagesTr" / f"case{k}_{c:04d}.nii.gz")
        nib.save(nib.Nifti1Image(label, np.diag([1, 1, 2, 1])), root / "labelsTr" / f"case{k}.nii.gz")
    card = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "organ": 1, "lesion": 2}}
    write_json(root / "dataset.json", card | {"numTraining": 5, "file_ending": ".nii.gz"})


def write_data(name, root):
    if name == "camus":
        phantom.write_camus(root, cases=3, shape=(96, 80))
    elif name == "chaos":
        phantom.write_chaos(root / "Train_Sets", cases=3, shape=(64, 64, 16))
    elif name == "brats":
        phantom.write_brats(root, cases=5, shape=(48, 56, 40))
    else:
        write_own(root)


@pytest.fixture(scope="module", params=CONFIGS)
def made(request, tmp_path_factory):
    """Return the name, and a folder with data, predictions (references with growing shifts) and the report."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    root = folder / "data"
    write_data(name, root)
    dataset = get_dataset({**CONFIGS[name], "root": str(root)})
    images = {}
    for k, case in enumerate(list_cases(dataset, root, need_labels=True)):
        label = np.roll(read_label(case), (k // 2, k % 4), (1, 2))
        grid = read_grid(case.images[0], case.axes)
        write_volume(folder / "pred" / f"{case.case_id}.nii.gz", encode_label(case, label), grid)
        images[case.case_id] = [str(source_path(source)) for source in case.images]
    write_json(folder / "pred" / "predict.json", {"images": images, "environment": environment.describe()})
    ref = root / "labelsTr" if name == "nnunet" else root
    arguments = [*RULES[name], f"--pred={folder / 'pred'}", f"--ref={ref}", f"--out={folder / 'eval'}", "--jobs=1"]
    assert evaluate.main(arguments) == 0
    assert report.main([f"--eval={folder / 'eval'}", f"--out={folder / 'report.html'}"]) == 0
    return name, folder


@pytest.mark.quick
def test_a_report_has_all_figures_and_facts(made):
    name, folder = made
    page = (folder / "report.html").read_text()
    assert page.count("<img ") == FIGURES[name]
    for role in ("Best", "75th percentile", "Median", "25th percentile", "Worst"):
        assert f"{role}: " in page
    assert "environment of prediction" in page and f"Python {environment.describe()['python']}" in page
    assert "no config: --workdir was not given" in page
    published = {"camus": "0.945", "chaos": "69.32", "brats": "91.22", "nnunet": None}[name]
    assert ('<tr class="paper">' in page) == (published is not None)
    assert published is None or published in page
    rows = page[page.index("<h2>All cases</h2>") :].count("<tr>") - 1
    assert rows == len(list((folder / "pred").glob("*.nii.gz")))


PROBE = """<script>window.onload = () => {
  const page = document.documentElement;
  const wide = [...document.querySelectorAll("body *")].filter(
    e => !e.closest(".wide, pre") && e.getBoundingClientRect().right > page.clientWidth + 1).map(e => e.outerHTML.slice(0, 80));
  const found = {
    images: [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight]),
    overflow: page.scrollWidth - page.clientWidth, wide,
    loaded: performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:")),
    height: page.scrollHeight, headings: [...document.querySelectorAll("h2")].map(h => h.innerText),
  };
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
}</script></body>"""  # noqa: E501


def browse(tmp_path, *arguments):
    """Run a headless browser that cannot reach any other host."""
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ]
    command += [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the PATH, e.g. apt install chromium")
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_all_of_it(made, width, tmp_path):
    name, folder = made
    page = (folder / "report.html").read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", PROBE))
    dom = browse(tmp_path, f"--window-size={width},900", "--virtual-time-budget=10000", "--dump-dom", probed.as_uri())
    found = json.loads(dom[dom.index('<pre id="found">') + len('<pre id="found">') : dom.index("</pre>")])
    assert len(found["images"]) == FIGURES[name]
    assert all(complete and wide >= 300 and high >= 80 for complete, wide, high in found["images"])
    assert found["overflow"] <= 0 and not found["wide"], "wider than the window"
    assert not found["loaded"], "nothing comes from elsewhere"
    assert found["headings"][:2] == ["Scores", "Cases"] and found["height"] > 1500

    out = os.environ.get("XDIM_SCREENSHOTS")
    picture = (tmp_path if out is None else folder.parent / out) / f"{name}_{width}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    browse(
        tmp_path,
        f"--window-size={width},{found['height']}",
        f"--screenshot={picture}",
        (folder / "report.html").as_uri(),
    )
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape[1] == width
    assert (pixels.std(2) > 20).mean() > 0.002, "some colour"
    blank = (pixels.reshape(len(pixels), -1) == pixels[0, 0, 0]).all(1)
    assert blank.mean() < 0.6, "mostly empty"


@pytest.mark.parametrize(
    ("reference", "images"),
    [
        ("c1/c1_seg.nii.gz", ["c1/c1_flair.nii.gz", "c1/c1_t1.nii.gz"]),
        ("c1/c1-seg.nii.gz", ["c1/c1-t2f.nii.gz"]),
        ("p1/p1_2CH_ED_gt.nii.gz", ["p1/p1_2CH_ED.nii.gz"]),
        ("data/labelsTr/c1.nii.gz", ["data/imagesTr/c1_0000.nii.gz", "data/imagesTr/c1_0001.nii.gz"]),
        ("data/labelsTr/c1.nii.gz", ["data/imagesTr/c1.nii.gz"]),
        ("follow/labels/c1.nii.gz", ["follow/images/c1.nii.gz"]),
        ("flat/c1_seg.nii.gz", ["flat/c1_t1.nii.gz"]),
        ("follow/labels/c3.nii.gz", ["follow/images/c3_0000.nii.gz"]),
        ("refs/c1.nii.gz", []),
    ],
)
def test_images_beside_the_references_are_found(reference, images, tmp_path):
    """Without predict.json; files of other cases and other label maps are not taken for images."""
    others = [
        "c1/c10_flair.nii.gz",
        "p1/p1_2CH_ES.nii.gz",
        "data/imagesTr/c11_0000.nii.gz",
        "refs/c2.nii.gz",
        "c1/c1_gt.nii",
        *("follow/labels/c1_2.nii.gz", "follow/images/c1_2.nii.gz"),  # another case
        *("follow/labels/c3_2.nii.gz", "follow/images/c3_2.nii.gz"),
        *("flat/c1_2_seg.nii.gz", "flat/c1_2.nii.gz"),
    ]
    for name in (reference, *images, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert report_page._images_beside(tmp_path / reference) == [tmp_path / name for name in images]


def test_one_case_has_no_box_plot_and_two_have_one():
    cases = [ScoredCase(f"c{i}", f"c{i}", {}, {"liver": {"dice": 0.8 + i / 10}}, {}) for i in range(2)]
    assert figures.draw_boxes({"all": cases[:1]}, {"dice": Column("Dice")}) == []
    assert len(figures.draw_boxes({"all": cases}, {"dice": Column("Dice")})) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_the_best_and_the_worst_case_are_shown_as_such(count):
    """By hand: with two cases there is no median, with four the worst is not the 25th percentile."""
    cases = [ScoredCase(f"c{i}", f"c{i}", {}, {"liver": {"dice": i / 10}}, {}) for i in range(count)]
    chosen, _ = report_page.choose_cases(cases, [])
    names = {role: case.case_id for role, case in chosen.items()}
    expected = {"Best": f"c{count - 1}"} | ({"Worst": "c0"} if count > 1 else {})
    assert names | expected == names
    assert len(names) == len(set(names.values())) == min(count, 5)
    assert list(names) == [role for role, _ in report_page.ROLES if role in names]


def test_two_structures_never_share_a_colour():
    """Names of the challenges beside others, as in AMOS."""
    names = ["spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver"]
    colours = figures.structure_colours(names)
    assert len(set(colours.values())) == len(names) and not set(colours.values()) & set(figures.ERROR_COLOURS.values())
    assert colours["liver"] == figures.COLOURS["liver"]


def test_a_structure_has_one_colour_in_all_pictures(tmp_path):
    """The first case lacks a structure, so the order of the structures differs between the cases."""
    found = []
    for k, values in enumerate(((1, 3), (1, 2, 3))):
        label = np.zeros((16, 16, 4), np.uint8)
        for value in values:
            label[4 * value : 4 * value + 3, 4:12] = value
        for folder in ("ref", "pred"):
            (tmp_path / folder).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / folder / f"c{k}.nii.gz")
    draw = figures.draw_case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            figures,
            "draw_case",
            lambda view, title, scores, colours: found.append((view, colours)) or draw(view, title, scores, colours),
        )
        folders = [f"--{name}={tmp_path / name}" for name in ("ref", "pred")]
        assert evaluate.main(["--rules=generic", *folders, f"--out={tmp_path / 'eval'}", "--jobs=1"]) == 0
        assert report.main([f"--eval={tmp_path / 'eval'}", f"--out={tmp_path / 'r.html'}"]) == 0
    assert len(found) == 2 and found[0][1] == found[1][1]
    for view, colours in found:
        assert len({colours[name] for name in view.ref}) == len(view.ref)


def test_omitted_cases_are_named_in_the_results(tmp_path):
    label = np.zeros((8, 8, 4), np.uint8)
    label[2:5, 2:5] = 1
    for name in ("ref/a", "ref/b", "pred/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / f"{name}.nii.gz")
    folders = [f"--{name}={tmp_path / name}" for name in ("ref", "pred")]
    arguments = ["--rules=generic", *folders, f"--out={tmp_path / 'eval'}", "--jobs=1", "--missing=skip"]
    assert evaluate.main(arguments) == 0
    assert report.main([f"--eval={tmp_path / 'eval'}", f"--out={tmp_path / 'r.html'}"]) == 0
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["skipped"] == ["b"]
    assert "omitted: b" in (tmp_path / "eval" / "tables.md").read_text()
    assert "omitted; the mean scores may be too good:</strong> b" in (tmp_path / "r.html").read_text()


def test_more_structures_than_a_byte_can_count():
    """A parcellation; the later structures are drawn over the earlier ones."""
    masks = {str(i): np.arange(300).reshape(1, 1, 300) >= i for i in range(300)}
    np.testing.assert_array_equal(figures.label_map(masks, list(masks)).ravel(), np.arange(1, 301))
