"""Preparation by hand and against scipy's numbers, the store on disk, and the stream of samples."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from xdim_jax.base.errors import UserError
from xdim_jax.data import __main__ as data_main
from xdim_jax.data import phantom, pipeline, store, store_backends
from xdim_jax.data import prepare as preparation
from xdim_jax.data.case import Case, Volume, list_cases
from xdim_jax.data.datasets import get_dataset
from xdim_jax.data.images.grid import Grid
from xdim_jax.data.labels import Labels
from xdim_jax.data.layouts import brats, camus
from xdim_jax.data.prepare import Preparation, nonzero_box, prepare, resample, resample_nearest
from xdim_jax.data.reading import read_case

BRATS = brats.dataset("brats2021")
PAPER = Preparation(crop="nonzero", normalise="zscore_nonzero")
LABELS = Labels("", ("", "a", "b", "c"), (0, 1, 2, 3))


def made(image, label=None, spacing=(1.0, 1.0, 1.0), **info):
    """A case and its volume from arrays (D, H, W, C), without files."""
    affine = np.diag([*(-s for s in spacing[:0:-1]), spacing[0], 1.0])
    grid = Grid(image.shape[2::-1], affine)
    channels = tuple("abcd"[: image.shape[3]])
    return Case("c", "c", (), channels, None, LABELS, info=info), Volume("c", image, label, grid)


# -- preparation --------------------------------------------------------------------------------------------------


def test_box_and_zscore_of_nonzero_voxels_by_hand():
    image = np.zeros((5, 6, 7, 2), np.float32)
    image[1, 2, 3], image[1, 2, 4], image[3, 2, 3] = (1, 0), (3, 0), (5, 7)
    assert nonzero_box(image) == (slice(1, 4), slice(2, 3), slice(3, 5))
    prepared = prepare(*made(image), PAPER)
    assert prepared.box == (slice(1, 4), slice(2, 3), slice(3, 5)) and prepared.source == (5, 6, 7)
    z = prepared.image()
    # 1, 3, 5: mean 3, sd sqrt(8/3)
    np.testing.assert_allclose(z[[0, 0, 2], 0, [0, 1, 0], 0], np.array([-2, 0, 2]) / np.sqrt(8 / 3), rtol=1e-6)
    assert np.count_nonzero(z[..., 0]) == 2 and not z[..., 1].any(), "background and constant channels stay 0"
    zeros = np.zeros((4, 4, 4, 1), np.float32)
    assert nonzero_box(zeros) == (slice(0, 4),) * 3
    assert not prepare(*made(zeros), PAPER).image().any()


def test_zscore_of_all_voxels_by_hand():
    image = np.array([0.0, 2.0, 4.0, 6.0], np.float32).reshape(1, 2, 2, 1)
    z = prepare(*made(image), Preparation()).image()
    np.testing.assert_allclose(z.ravel(), np.array([-3, -1, 1, 3]) / np.sqrt(5), rtol=1e-6)


def test_the_ct_window_clips_ct_alone():
    image = np.array([-1000.0, -100.0, 60.0, 3000.0], np.float32).reshape(1, 2, 2, 1)
    window = Preparation(window=(60, 400), normalise="none")
    ct = prepare(*made(image, modality="CT"), window).image().ravel()
    mr = prepare(*made(image, modality="MR"), window).image().ravel()
    assert ct.tolist() == [-140, -100, 60, 260] and mr.tolist() == image.ravel().tolist()


def test_whole_numbers_are_kept_as_int16_and_nothing_is_lost(rng):
    image = rng.integers(-1024, 3000, (4, 5, 6, 1)).astype(np.float32)
    prepared = prepare(*made(image), Preparation(normalise="none"))
    assert prepared.raw.dtype == np.int16
    np.testing.assert_array_equal(prepared.image(), image)
    assert prepare(*made(image + 0.5), Preparation()).raw.dtype == np.float32
    assert prepare(*made(image * 100), Preparation()).raw.dtype == np.float32, "beyond int16"


def test_a_window_that_meets_no_ct_is_refused(root):
    """In nnU-Net's format the channel's name tells; of two channels only CT is clipped."""
    image = np.array([-1000.0, 3000.0], np.float32).repeat(4).reshape(1, 2, 2, 2)
    case, volume = made(image)
    case = dataclasses.replace(case, channels=("PET", "CT"))
    raw = prepare(case, volume, Preparation(window=(60, 400), normalise="none")).image()
    assert raw[..., 0].min() == -1000 and raw[..., 1].min() == -140 and raw[..., 1].max() == 260
    with pytest.raises(UserError, match=r"window=.*BraTS.*flair, t1, t1ce, t2"):
        fill(root, settings=Preparation(window=(60, 400)))


def test_a_part_has_the_bits_of_the_whole(rng):
    image = rng.integers(0, 4, (6, 7, 8, 2)).astype(np.float32)
    prepared = prepare(*made(image), PAPER)
    part = (slice(1, 4), slice(2, 7), slice(0, 3))
    np.testing.assert_array_equal(prepared.image(part), prepared.image()[part])


def test_resampling_keeps_a_ramp_where_it_is():
    """Linear interpolation of a linear image, at voxel centres: known without any resampler."""
    x = np.arange(12.0, dtype=np.float32)
    image = np.broadcast_to(x[None, None, :, None], (3, 4, 12, 1)).copy()
    finer = resample(image, (3, 8, 24))
    expected = (np.arange(24) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(finer[1, 3, 1:-1, 0], expected[1:-1], atol=1e-5)
    coarser = resample(image, (3, 4, 6))
    np.testing.assert_allclose(coarser[1, 2, 1:-1, 0], np.arange(6)[1:-1] * 2 + 0.5, atol=0.05)


def test_downsampling_does_not_alias():
    stripes = np.zeros((1, 64, 64, 1), np.float32)
    stripes[:, :, ::2] = 1
    # 3.2 stripes per voxel, so that the voxel centres do not all lie at the same place of a stripe
    inner = resample(stripes, (1, 64, 20))[:, :, 2:-2]
    np.testing.assert_allclose(inner, 0.5, atol=0.01)


def test_nearest_takes_the_voxel_under_the_centre():
    label = np.arange(4, dtype=np.uint8).reshape(1, 1, 4)
    assert resample_nearest(label, (1, 1, 8)).ravel().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert resample_nearest(label, (1, 1, 2)).ravel().tolist() == [1, 3]
    assert resample_nearest(label, (2, 1, 4)).tolist() == [[[0, 1, 2, 3]]] * 2


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"spacing": (0, 1.5, 1.5)}, (10, 40, 20)),
        ({"spacing": (5.0, 0, 0)}, (12, 20, 10)),
        ({"size": (64, 32)}, (10, 64, 32)),
        ({"spacing": (6.0, 3.0005, 3.0)}, (10, 20, 10)),
    ],
)
def test_target_shapes(settings, shape):
    """10 slices of 20 x 10 pixels, 6 x 3 x 3 mm; a step below a thousandth is no reason to resample."""
    case, volume = made(np.zeros((10, 20, 10, 1), np.float32), spacing=(6.0, 3.0, 3.0))
    prepared = prepare(case, volume, Preparation(**settings))
    assert prepared.shape == shape
    np.testing.assert_allclose(np.multiply(prepared.spacing, shape), (60, 60, 30), rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"crop": "nonzero"}, {"spacing": (2.0, 2.0, 2.0)}, {"size": (48, 40)}])
def test_restore_brings_labels_back_to_the_source_grid(settings):
    """A smooth object survives there and back; its Dice would not, were it moved by a voxel."""
    z, y, x = np.ogrid[:20, :36, :30]
    ball = ((z - 9) / 6) ** 2 + ((y - 16) / 11) ** 2 + ((x - 14) / 9) ** 2 < 1
    image = np.where(((z - 9) / 8) ** 2 + ((y - 16) / 14) ** 2 + ((x - 14) / 12) ** 2 < 1, 5, 0)[..., None]
    case, volume = made(image.astype(np.float32), ball.astype(np.uint8), spacing=(3.0, 1.0, 1.0))
    prepared = prepare(case, volume, Preparation(**settings))
    back = prepared.restore((prepared.label == 1)[..., None].astype(np.float32))
    assert back.shape == (20, 36, 30, 1)
    found = back[..., 0] > 0.5
    assert 2 * (found & ball).sum() / (found.sum() + ball.sum()) > (0.90 if settings.get("spacing") else 0.98)
    if not settings.get("spacing") and not settings.get("size"):
        np.testing.assert_array_equal(found, ball)


def test_interpolation_does_not_smear_the_brain_into_its_background():
    image = np.zeros((8, 8, 8, 1), np.float32)
    image[:, :, 4:] = 100
    prepared = prepare(*made(image), Preparation(spacing=(1.0, 1.0, 0.5), normalise="zscore_nonzero"))
    assert not np.asarray(prepared.raw)[:, :, :8].any() and (np.asarray(prepared.raw)[:, :, 8:] > 50).all()


def test_settings_that_cannot_work_are_named_at_once():
    with pytest.raises(UserError) as error:
        Preparation(crop="brain", spacing=(1.0,), size=(0, 5), window=(1.0, -2.0), normalise="minmax")
    for words in ("crop='brain'", "spacing=(1.0,)", "size=(0, 5)", "window=(1.0, -2.0)", "normalise='minmax'"):
        assert words in str(error.value)
    for spacing in ((1.0, 1.0, 1.0), (5.0, 0.0, 0.0), (0.0, 0.0, 2.0)):
        with pytest.raises(UserError, match=r"size=\(64, 64\) and spacing=\("):
            Preparation(size=(64, 64), spacing=spacing)
    assert Preparation(size=(64, 64), spacing=(0.0, 0.0, 0.0)).size == (64, 64)
    with pytest.raises(UserError, match="unknown keys: colour"):
        Preparation.from_config({"colour": 1})


# -- the store ----------------------------------------------------------------------------------------------------


@pytest.fixture
def root(phantoms, tmp_path):
    """Three cases that a test may change."""
    for case in sorted(phantoms.glob("BraTS*"))[:3]:
        shutil.copytree(case, tmp_path / "data" / case.name)
    return tmp_path / "data"


def fill(root, **options):
    lines = []
    cases = list_cases(BRATS, root, need_labels=True)
    entries = store.prepare_cases(
        BRATS, cases, options.pop("settings", PAPER), root.parent / "store", say=lines.append, **options
    )
    return entries, lines


def test_the_store_holds_what_preparation_gives(root):
    entries, _ = fill(root)
    for entry, case in zip(entries, list_cases(BRATS, root, need_labels=True), strict=True):
        stored, direct = entry.load(), prepare(case, read_case(case), PAPER)
        assert isinstance(stored.raw, np.memmap) and stored.raw.dtype == np.int16
        np.testing.assert_array_equal(stored.image(), direct.image())
        np.testing.assert_array_equal(stored.label, direct.label)
        assert (stored.box, stored.source, stored.spacing) == (direct.box, direct.source, direct.spacing)
        assert entry.shape == direct.shape and entry.patient == case.patient


def test_the_size_is_said_first_and_a_second_run_prepares_nothing(root):
    _, lines = fill(root)
    assert "0 of 3 cases prepared" in lines[0] and "2 cases to prepare, about" in lines[1] and "free" in lines[1]
    before = {p: p.stat().st_mtime_ns for p in (root.parent / "store").rglob("*")}
    _, lines = fill(root)
    assert "3 of 3 cases prepared" in lines[0] and len(lines) == 1
    assert {p: p.stat().st_mtime_ns for p in (root.parent / "store").rglob("*")} == before


def test_another_setting_is_another_store(root):
    first, _ = fill(root)
    second, lines = fill(root, settings=Preparation(crop="nonzero", normalise="zscore"))
    assert "0 of 3" in lines[0] and first[0].location != second[0].location and first[0].location.exists()


def test_content_decides_and_not_the_date(root):
    """A touched file is not prepared again; a changed one is, even of the same size and date."""
    fill(root)
    path = root / "BraTS2021_00001" / "BraTS2021_00001_t1.nii.gz"
    os.utime(path, ns=(1, 1))
    assert "3 of 3" in fill(root)[1][0]
    path = root / "BraTS2021_00002" / "BraTS2021_00002_t1.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * 2, image.affine), path)
    entries, lines = fill(root)
    assert "2 of 3" in lines[0]
    case = list_cases(BRATS, root, need_labels=True)[2]
    np.testing.assert_array_equal(entries[2].load().image(), prepare(case, read_case(case), PAPER).image())


def test_an_interrupted_preparation_goes_on(root, monkeypatch):
    original, calls = store.prepare, []

    def killed(case, *rest):
        calls.append(case.case_id)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(case, *rest)

    monkeypatch.setattr(store, "prepare", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(root, jobs=1)
    assert not any((root.parent / "store").rglob("*partial*"))

    def half_written(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "prepare", original)
    monkeypatch.setattr(store_backends, "write_text", half_written)
    before = set((root.parent / "store").glob("*/*"))
    with pytest.raises(KeyboardInterrupt):
        fill(root, jobs=1)
    assert set((root.parent / "store").glob("*/*")) == before, "inside a case: nothing of it is left"
    monkeypatch.undo()
    done = len([*(root.parent / "store").glob("*/BraTS*")])
    assert done in (1, 2), "the case that was whole, and one that another thread may have finished"
    assert f"{done} of 3" in fill(root)[1][0]


def test_every_bad_case_is_named_and_the_good_ones_are_prepared(root):
    for n in (0, 2):
        (root / f"BraTS2021_0000{n}" / f"BraTS2021_0000{n}_t2.nii.gz").write_bytes(b"hello")
    with pytest.raises(UserError, match="2 problems") as error:
        fill(root)
    assert "BraTS2021_00000_t2" in str(error.value) and "BraTS2021_00002_t2" in str(error.value)
    assert [p.name[:-17] for p in (root.parent / "store").glob("*/BraTS*")] == ["BraTS2021_00001"]


def test_damaged_entries_are_prepared_again(root):
    entries, _ = fill(root)
    whole = entries[1].load().image()
    for name, content in (("case.json", b"{"), ("case.json", b"[]"), ("case.json", b"\xff\xfe"), ("image.npy", b"hi")):
        (entries[1].location / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{entries[1].location.name}.*(case.json is not|is damaged)"):
            entries[1].load()
        assert "2 of 3" in fill(root)[1][0]
        np.testing.assert_array_equal(entries[1].load().image(), whole)
    for name in ("voxels.npy", "label.npy"):
        (entries[1].location / name).unlink()
        with pytest.raises(UserError, match="is damaged"):
            entries[1].load(), entries[1].random_voxel(np.random.default_rng(0))
        assert "2 of 3" in fill(root)[1][0]
    shutil.rmtree(entries[1].location)
    entries[1].location.write_text("a file where the entry was")
    assert "2 of 3" in fill(root)[1][0]
    np.testing.assert_array_equal(entries[1].load().image(), whole)
    assert not any((root.parent / "store").rglob("*partial*"))


def test_an_entry_that_a_run_may_be_reading_is_never_replaced(tmp_path):
    """In- and out-phase have one case id, one store and one key; switching between them must not change either."""
    phantom.write_chaos(tmp_path / "chaos", cases=1, shape=(64, 64, 16))
    loaded = {}
    for phase in ("in", "out", "in"):
        dataset = get_dataset({"dataset": "chaos", "task": 5, "phase": phase})
        cases = list_cases(dataset, tmp_path / "chaos", need_labels=True)
        lines = []
        entries = store.prepare_cases(dataset, cases, Preparation(), tmp_path / "store", say=lines.append)
        if phase in loaded:
            assert "2 of 2 cases prepared" in lines[0] and entries[0] == loaded[phase][0]
        loaded[phase] = entries[0], entries[0].load().image()
    assert loaded["in"][0].case_id == loaded["out"][0].case_id == "MR_1_T1DUAL"
    assert (loaded["in"][1] != loaded["out"][1]).any()
    np.testing.assert_array_equal(loaded["in"][0].load().image(), loaded["in"][1])


def test_other_labels_are_another_store(tmp_path):
    phantom.write_chaos(tmp_path / "chaos", cases=1, shape=(64, 64, 16))
    keys = {store.store_key(get_dataset({"dataset": "chaos", "task": t}), Preparation())[0] for t in (3, 5)}
    assert len(keys) == 2
    whole, fraction = (store.store_key(BRATS, Preparation(spacing=(n, n, n)))[0] for n in (1, 1.0))
    assert whole == fraction


def write_own_data(root):
    """One case in nnU-Net's format."""
    card = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}}
    for name, array in (
        ("imagesTr/c_0000", np.ones((4, 4, 4), np.int16)),
        ("labelsTr/c", np.ones((4, 4, 4), np.uint8)),
    ):
        path = root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    (root / "dataset.json").write_text(json.dumps(card))


def fill_own(root, base):
    """The first line of the log, and the entry."""
    lines, dataset = [], get_dataset({"dataset": "nnunet", "root": str(root)})
    cases = list_cases(dataset, root, need_labels=True)
    (entry,) = store.prepare_cases(dataset, cases, Preparation(), base, say=lines.append)
    return lines[0], entry


def test_the_store_does_not_depend_on_the_name_of_the_folder_of_the_data(tmp_path, monkeypatch):
    write_own_data(tmp_path / "D1")
    line, entry = fill_own(tmp_path / "D1", tmp_path / "store")
    assert "0 of 1 cases prepared" in line
    (tmp_path / "D1").rename(tmp_path / "job7")
    assert fill_own(tmp_path / "job7", tmp_path / "store") == (line.replace("0 of 1", "1 of 1"), entry)
    monkeypatch.chdir(tmp_path / "job7")
    assert fill_own(Path(), tmp_path / "store")[1] == entry
    assert get_dataset({"dataset": "nnunet", "root": "."}).labels.name == "job7"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_store_of_an_earlier_version_is_used(scheme, tmp_path):
    """Its key was computed by the code of that version, for a folder with the name D1."""
    write_own_data(tmp_path / "D1")
    base = f"{scheme}{tmp_path / 'store'}"
    fill_own(tmp_path / "D1", base)
    (new,) = (tmp_path / "store").iterdir()
    new.rename(tmp_path / "store" / "ae02919ae255")
    line, entry = fill_own(tmp_path / "D1", base)
    assert "1 of 1 cases prepared" in line and "ae02919ae255" in str(entry.location)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["ae02919ae255"]


def test_a_sequence_that_turns_out_to_be_reversed_is_prepared_again(tmp_path):
    """Its files are the same; only the cfg beside them says now that ES comes first."""
    phantom.write_camus(tmp_path / "camus", cases=1, shape=(96, 72), frames=4)
    dataset = camus.dataset(views=("2CH",), instants=("half_sequence",))

    def entry():
        cases = list_cases(dataset, tmp_path / "camus", need_labels=True)
        return store.prepare_cases(dataset, cases, Preparation(), tmp_path / "store")[0].load().image()

    before = entry()
    cfg = tmp_path / "camus" / "database_nifti" / "patient0001" / "Info_2CH.cfg"
    cfg.write_text(cfg.read_text().replace("ED: 1", "ED: 4").replace("ES: 4", "ES: 1"))
    np.testing.assert_array_equal(entry(), before[::-1])


def test_headers_are_parsed_one_at_a_time(tmp_path, monkeypatch):
    """CPython 3.11's parser, which numpy takes for them, is not for threads."""
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    whole, held = np.load, []
    monkeypatch.setattr(np, "load", lambda *a, **k: held.append(store_backends._NPY_LOCK.locked()) or whole(*a, **k))
    assert (
        store_backends._open_npy(tmp_path / "a.npy")[1, 2] == 5
        and held == [True]
        and not store_backends._NPY_LOCK.locked()
    )


def test_several_processes_prepare_into_one_store(root):
    """At once, from nothing: all end well, with one entry a case, and every array whole."""
    code = """
import sys; from pathlib import Path
from xdim_jax.data import store
from xdim_jax.data.case import list_cases
from xdim_jax.data.layouts import brats
from xdim_jax.data.prepare import Preparation
dataset, root = brats.dataset("brats2021"), Path(sys.argv[1])
cases = list_cases(dataset, root, need_labels=True)
settings = Preparation(crop="nonzero", normalise="zscore_nonzero")
for entry in store.prepare_cases(dataset, cases, settings, root.parent / "store", jobs=2):
    entry.load().image()
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(root)], stderr=subprocess.PIPE) for _ in range(3)]
    for process in running:
        assert process.communicate(timeout=120)[1] == b"" and process.returncode == 0
    assert len(list((root.parent / "store").glob("*/*/case.json"))) == 3
    assert not any((root.parent / "store").rglob("*partial*"))
    assert "3 of 3" in fill(root)[1][0]


def test_too_little_room_is_said_before_it_is_used(root, monkeypatch):
    monkeypatch.setattr(store_backends.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    with pytest.raises(UserError, match=r"remaining 2 cases .* GiB.* 0\.00 GiB"):
        fill(root)


def test_voxels_of_every_structure_are_drawn_alike(root, rng):
    entry = fill(root)[0][0]
    label = np.asarray(entry.load().label)
    drawn = [int(label[entry.random_voxel(rng)]) for _ in range(600)]
    counts = np.bincount(drawn, minlength=4)
    assert counts[0] == 0 and (counts[1:] > 150).all(), "a structure first, then one of its voxels"


def test_cases_without_structures_have_no_voxel_to_draw(root, rng):
    path = root / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros_like(np.asarray(image.dataobj)), image.affine), path)
    entry = fill(root)[0][0]
    assert entry.random_voxel(rng) is None
    assert pipeline.random_start(entry, (8, 8, 8), 1.0, rng)


# -- the stream ---------------------------------------------------------------------------------------------------


def test_files_of_one_name_size_and_time_in_other_folders_are_other_files(tmp_path):
    """Uncompressed references of two raters, unpacked from an archive with one time for all files."""
    for rater, size in (("r1", 4), ("r2", 8)):
        (tmp_path / rater).mkdir()
        for name in ("image", "label"):
            label = np.zeros((12, 12, 12), np.uint8)
            label[:size, :size, :size] = 1
            path = tmp_path / rater / f"{name}.nii"
            nib.save(nib.Nifti1Image(label if name == "label" else np.ones_like(label), np.eye(4)), path)
            os.utime(path, ns=(10**18, 10**18))
    found = []
    labels = Labels("own", ("background", "organ"), (0, 1))
    for rater in ("r1", "r2", "r1"):
        image, label = tmp_path / rater / "image.nii", tmp_path / rater / "label.nii"
        case = Case("c0", "c0", (image,), ("CT",), label, labels)
        (entry,) = store.prepare_cases(BRATS, [case], Preparation(), tmp_path / "store")
        found.append(int((entry.load().label == 1).sum()))
    assert found == [4**3, 8**3, 4**3]


def test_a_data_set_that_was_moved_is_not_prepared_again(root, tmp_path):
    first = store.prepare_cases(BRATS, list_cases(BRATS, root, need_labels=True), PAPER, tmp_path / "store")
    root.rename(tmp_path / "moved")
    cases = list_cases(BRATS, tmp_path / "moved", need_labels=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "prepare", lambda *_: pytest.fail("prepared again"))
        patch.setattr(store, "_content_digest", lambda case: pytest.fail("read again"))
        again = store.prepare_cases(BRATS, cases, PAPER, tmp_path / "store")
    assert [entry.location for entry in again] == [entry.location for entry in first]


def test_indices_of_a_very_large_label_map_do_not_overflow(monkeypatch):
    """The limit is lowered, because a real one needs 2 GiB."""
    monkeypatch.setattr(store.np, "iinfo", lambda dtype: type("Info", (), {"max": 100}))
    label = np.zeros((5, 5, 5), np.uint8)
    label[4, 4, 4] = 1
    voxels, structures = store._labelled_voxels(label)
    assert voxels.dtype == np.int64 and voxels.tolist() == [124] and structures[0] == [1, 0]


@pytest.fixture(scope="module")
def entries(phantoms, tmp_path_factory):
    cases = list_cases(BRATS, phantoms, need_labels=True)
    return store.prepare_cases(BRATS, cases, PAPER, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Prepared 2D images: four views of ED and ES of CAMUS, all of 64 x 96 pixels."""
    root = tmp_path_factory.mktemp("camus")
    phantom.write_camus(root, cases=1, shape=(96, 72), frames=5)
    dataset = camus.dataset(instants=("ED", "ES", "half_sequence"))
    cases = list_cases(dataset, root, need_labels=True)
    return store.prepare_cases(dataset, cases, Preparation(size=(64, 96)), tmp_path_factory.mktemp("store"))


def take(entries, count, **options):
    settings = {
        "sampling": "patches", "size": (32, 32, 32), "foreground": 0.5, "patches_per_case": 1, "batch": 2, "seed": 0,
        "start_step": 0, "threads": 1,
    } | options  # fmt: skip
    return list(itertools.islice(pipeline.make_stream(entries, **settings), count))


def same(a, b):
    return all((x[k] == y[k]).all() for x, y in zip(a, b, strict=True) for k in x)


def test_every_sample_has_a_digest_of_what_it_is_and_the_facts_of_its_case(entries):
    facts = {entry.case_id: {"number": np.float32(i)} for i, entry in enumerate(entries)}
    for batch in take(entries, 4, extras=facts):
        for image, label, key, digest in zip(*(batch[k] for k in ("image", "label", "key", "digest")), strict=True):
            assert digest == zlib.crc32(image.tobytes() + label.tobytes() + key.tobytes())
        assert set(batch["number"].tolist()) <= set(range(len(entries)))
    assert "number" not in take(entries, 1)[0]


def test_readers_say_what_they_are_doing():
    activity = pipeline.Activity()
    assert activity.lines() == []
    activity.begin("case a, slice 3")
    assert activity.lines() == ["reading case a, slice 3 for 0 s"]
    activity.end()
    assert activity.lines() == []


def test_stream_is_a_function_of_seed_and_step(entries):
    batches = take(entries, 5)
    assert batches[0]["image"].shape == (2, 32, 32, 32, 4) and batches[0]["label"].dtype == np.uint8
    assert batches[0]["key"].shape == (2, 2) and batches[0]["key"].dtype == np.uint32
    assert same(batches, take(entries, 5, threads=4)), "any number of threads"
    assert same(batches, take(entries, 5, threads=0)), "and none"
    assert same(batches[3:], take(entries, 2, start_step=3)), "resumed"
    assert not same(batches, take(entries, 5, seed=1))
    assert not same(batches[:2], batches[3:]), "the second pass cuts other patches in another order"
    keys = np.concatenate([b["key"] for b in batches])
    assert len(np.unique(keys, axis=0)) == 10, "every sample has random bits of its own, in every epoch"


def test_processes_share_the_global_batch(entries):
    """Also its order: stochastic depth and accumulation depend on the position of a sample in the batch."""
    whole = take(entries, 2, batch=4)
    halves = [take(entries, 2, batch=4, process_index=i, process_count=2) for i in range(2)]
    for step in range(2):
        rows = np.concatenate([halves[i][step]["key"] for i in range(2)])
        np.testing.assert_array_equal(rows, whole[step]["key"])


@pytest.mark.parametrize("size", [(8, 8, 8), (9, 3, 40)])
def test_patches_hold_a_structure_when_they_must(entries, size):
    batches = take(entries, 12, size=size, foreground=1.0, batch=4)
    assert all(label.any() for b in batches for label in b["label"])
    assert set(np.unique([b["label"] for b in batches])) == {0, 1, 2, 3}, "each structure is drawn"


def test_foreground_is_a_probability(entries):
    """A patch of one voxel holds a structure when it must; else about as often as structures fill the volume."""
    fill_share = np.mean([np.count_nonzero(e.load().label) / e.load().label.size for e in entries])
    for wanted in (0.0, 0.5, 1.0):
        batches = take(entries, 20, size=(1, 1, 1), foreground=wanted, batch=20)
        labels = np.concatenate([batch["label"] for batch in batches])
        assert abs(labels.any((1, 2, 3)).mean() - (wanted + (1 - wanted) * fill_share)) < 0.08


def test_patches_are_cut_from_one_place_and_padded_with_zeros(entries):
    """Every patch is found again, at one place, in image and label; what lies beyond the volume is 0."""
    size = (16, 200, 24)
    batch = take(entries, 1, size=size, batch=3)[0]
    for image, label in zip(batch["image"], batch["label"], strict=True):
        places = []
        for entry in entries:
            prepared = entry.load()
            d, h, w = entry.shape
            low = (200 - h) // 2
            if image[:, :low].any() or image[:, low + h :].any():
                continue
            inner, inner_label = image[:, low : low + h], label[:, low : low + h]
            for z, x in itertools.product(range(d - 15), range(w - 23)):
                part = (slice(z, z + 16), slice(0, h), slice(x, x + 24))
                if (prepared.label[part][0, :, 0] == inner_label[0, :, 0]).all() and (
                    prepared.image(part) == inner
                ).all():
                    places.append((entry.case_id, z, x))
                    np.testing.assert_array_equal(prepared.label[part], inner_label)
        assert len(places) == 1


def test_slices_visit_every_slice_once_in_an_epoch(entries):
    few = entries[:2]
    count = sum(e.shape[0] for e in few)
    assert len(pipeline.epoch_samples(few, "slices", 1)) == count
    batches = take(few, count, sampling="slices", size=(1, 96, 96), flat=True, batch=1)
    assert batches[0]["image"].shape == (1, 96, 96, 4) and batches[0]["label"].shape == (1, 96, 96)
    sums = sorted(float(b["image"].astype(np.float64).sum()) for b in batches)
    expected = sorted(float(plane.astype(np.float64).sum()) for e in few for plane in e.load().image())
    np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-2)


def test_images_and_sequences_are_slices_too(images):
    assert [e.shape[0] for e in images] == [1, 1, 5, 1, 1, 5]
    batch = take(images, 1, sampling="slices", size=(1, 64, 96), flat=True, batch=14)[0]
    assert batch["image"].shape == (14, 64, 96, 1)
    np.testing.assert_allclose(batch["image"][..., 0].mean((1, 2)), 0, atol=0.2)


def test_volumes_are_whole_and_padded_to_one_size(entries):
    size = (64, 64, 64)
    batch = take(entries, 1, sampling="volumes", size=size, batch=6)[0]
    totals = sorted(np.count_nonzero(label) for label in batch["label"])
    assert totals == sorted(np.count_nonzero(e.load().label) for e in entries)
    with pytest.raises(UserError, match=r"larger than config.data.patch=\(16, 64, 64\)"):
        pipeline.check_size(entries, "volumes", (16, 64, 64))
    pipeline.check_size(entries, "slices", (1, 64, 64))


def test_an_error_in_a_thread_is_raised_with_its_own_words(entries, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(entries[0].location, folder)
    (folder / "image.npy").unlink()
    broken = store.Entry("x", "x", folder, entries[0].shape, entries[0].structures)
    with pytest.raises(UserError, match=r"copy cannot be read, or is damaged .*image\.npy"):
        take([broken], 3, threads=3)


def test_steps_per_epoch():
    assert pipeline.steps_per_epoch(1000, 1) == 1000
    assert pipeline.steps_per_epoch(14, 4) == 3
    assert pipeline.steps_per_epoch(1, 4) == 1


def test_the_resampled_image_is_scipys(rng):
    """Against an interpolation at coordinates written out here."""
    image = rng.normal(size=(5, 9, 7, 2)).astype(np.float32)
    out = preparation.resample(image, (5, 14, 11))
    y, x = (np.arange(14) + 0.5) * 9 / 14 - 0.5, (np.arange(11) + 0.5) * 7 / 11 - 0.5
    at = np.meshgrid(np.arange(5), y, x, indexing="ij")
    for c in range(2):
        expected = ndimage.map_coordinates(image[..., c], at, order=1, mode="nearest")
        np.testing.assert_allclose(out[..., c], expected, atol=1e-5)


def test_the_record_of_a_case_names_its_sources(root):
    entry = fill(root)[0][0]
    facts = json.loads((entry.location / "case.json").read_text())
    assert len(facts["sources"]) == 5 and facts["sources"][0].endswith("BraTS2021_00000_flair.nii.gz")


# -- the command line ---------------------------------------------------------------------------------------------


def test_prepare_from_a_recipe_and_as_the_paper_does(root, tmp_path, capsys):
    """Both make the same store for BraTS; CHAOS gets slices of 512 x 512 and CT its window."""
    recipe = ["prepare", "--config=configs/brats_dxnet.py", f"--config.data.root={root}", f"--store={tmp_path / 's'}"]
    assert data_main.main(recipe) == 0
    assert "0 of 3 cases prepared" in capsys.readouterr().out
    paper = ["prepare", "--dataset=brats", "--convention=brats2021", f"--root={root}", f"--store={tmp_path / 's'}"]
    assert data_main.main(paper) == 0
    assert "3 of 3 cases prepared" in capsys.readouterr().out
    phantom.write_chaos(tmp_path / "chaos", cases=1, shape=(64, 64, 16))
    assert data_main.main(["prepare", "--dataset=chaos", "--task=5", f"--root={tmp_path / 'chaos'}"]) == 0
    shutil.rmtree(tmp_path / "chaos_prepared")
    assert data_main.main(["prepare", "--dataset=chaos", "--task=4", f"--root={tmp_path / 'chaos'}"]) == 0
    arrays = {p.parent.name[:-17]: np.load(p) for p in (tmp_path / "chaos_prepared").glob("*/*/image.npy")}
    ct = arrays["CT_1"]
    assert ct.shape == (16, 512, 512, 1) and ct.min() == -140 and 200 < ct.max() <= 260
    assert arrays["MR_1_T1DUAL"].shape == (6, 512, 512, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either --config=<recipe>, or --dataset=<name>"),
        (["--config=configs/brats_dxnet.py"], "--config.data.root=<folder of the data>"),
        (["--dataset=camus"], "give --root=<folder of the data>"),
        (["--dataset=camus", "--root=.", "--config.seed=1"], "--config.seed=1"),
        (["--config=configs/brats_dxnet.py", "--root=.", "--task=4"], "--root, --task"),
        (["--dataset=brats", "--root=."], "needs convention"),
        (["--dataset=camus", "--root=.", "--task=1"], "--task is not an option of --dataset=camus"),
        (["--dataset=camus", "--root=.", "--views=3CH"], "expected one or more of 2CH, 4CH"),
        (["--dataset=chaos", "--root=/nowhere"], "/nowhere is not a folder"),
    ],
)
def test_prepare_without_what_it_needs(arguments, words):
    with pytest.raises(UserError) as error:
        data_main.main(["prepare", *arguments])
    assert words in str(error.value)
