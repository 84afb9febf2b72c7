"""What the log says about a data set, and the warnings about choices that are missing, from values that are known."""

import nibabel as nib
import numpy as np
import pytest

from xdim_jax.base.errors import UserError
from xdim_jax.data.__main__ import main
from xdim_jax.data.case import Case, Volume
from xdim_jax.data.facts import describe, measure
from xdim_jax.data.images.grid import Grid
from xdim_jax.data.labels import Labels
from xdim_jax.data.prepare import Preparation

LABELS = Labels("own", ("background", "liver"), (0, 1))


def case_of(spacing=(2.0, 1.0, 1.0), channels=("CT",), liver=(100.0,)):
    """10 x 10 x 10 voxels of -1000, and a liver of 100 voxels with the given values in turn."""
    image = np.full((10, 10, 10, len(channels)), -1000.0, np.float32)
    label = np.zeros((10, 10, 10), np.uint8)
    label[5] = 1
    image[5, :, :, 0] = np.resize(np.array(liver, np.float32), (10, 10))
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    case = Case("a", "a", (), channels, None, LABELS)
    return case, Volume("a", image, label, Grid((10, 10, 10), affine))


def test_the_facts_of_a_case_by_hand():
    found = measure(*case_of(liver=(0.0, 100.0, 300.0, 500.0)), Preparation(window=(60, 400)))
    assert found["spacing"] == [2, 1, 1] and found["size"] == [10, 10, 10] and found["ct"] == [0]
    assert found["clipped"] == pytest.approx(0.5), "300 and 500 are above 260"
    assert found["percentiles"][0][:2] == [-1000, -1000], "nine tenths of the voxels are air"
    assert measure(*case_of(channels=("T1",)), Preparation(window=(60, 400)))["clipped"] is None
    assert measure(*case_of(), Preparation())["clipped"] is None


def test_the_lines_have_ranges_over_the_cases():
    facts = [measure(*case_of(spacing), Preparation()) for spacing in ((5.0, 0.7, 0.7), (5.0, 0.9, 0.9))]
    lines, _ = describe(facts, ("CT",), Preparation())
    assert len(lines) == 3
    assert "5 x 0.7 to 0.9 x 0.7 to 0.9 mm" in lines[0] and "10 x 10 x 10 voxels" in lines[1]
    assert "CT" in lines[2] and "-1000" in lines[2]


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        (Preparation(), True),
        (Preparation(spacing=(4.0, 1.0, 1.0)), False),
        (Preparation(size=(64, 64)), True),  # the slices still differ
        (Preparation(spacing=(4.0, 0.0, 0.0), size=()), True),
    ],
)
def test_different_voxel_sizes_without_resampling_are_a_warning(settings, warns):
    sizes = ((5.0, 0.7, 0.7), (1.0, 2.9, 2.9))
    facts = [measure(*case_of(s, channels=("MR",)), settings) for s in sizes]
    _, warnings = describe(facts, ("MR",), settings)
    assert bool(warnings) == warns
    if warns:
        assert "prepare.spacing=(3,1.8,1.8)" in warnings[0], "the median"


def test_sizes_within_a_factor_of_two_are_no_warning():
    facts = [measure(*case_of(s, channels=("MR",)), Preparation()) for s in ((2.0, 0.7, 0.7), (3.0, 0.9, 0.9))]
    assert describe(facts, ("MR",), Preparation())[1] == []


def test_ct_without_a_window_is_a_warning():
    _, warnings = describe([measure(*case_of(), Preparation())], ("CT",), Preparation())
    assert len(warnings) == 1 and "centre and width" in warnings[0]


def test_limits_that_are_given_as_centre_and_width_are_an_error_that_tells_the_right_values():
    """-160 to 240 HU is the window that the liver challenges use; read as centre and width it is -280 to -40 HU."""
    settings = Preparation(window=(-160, 240))
    with pytest.raises(UserError, match=r"-280 to -40 HU.*100 %.*give \(40,400\)"):
        describe([measure(*case_of(), settings)], ("CT",), settings)
    settings = Preparation(window=(40, 400))
    assert describe([measure(*case_of(), settings)], ("CT",), settings)[1] == []


def test_a_window_that_clips_some_of_the_foreground_is_a_warning():
    settings = Preparation(window=(60, 400))
    _, warnings = describe([measure(*case_of(liver=(0.0, 100.0, 300.0)), settings)], ("CT",), settings)
    assert len(warnings) == 1 and "clips 33 %" in warnings[0]


def test_prepare_says_what_the_data_look_like(tmp_path, capsys):
    for i, spacing in enumerate((0.7, 2.9)):
        affine = np.diag([-spacing, -spacing, 5.0, 1.0])
        for folder, name, values in (("imagesTr", f"a{i}_0000", (-1000, 100)), ("labelsTr", f"a{i}", (0, 1))):
            (tmp_path / folder).mkdir(exist_ok=True)
            array = np.full((12, 12, 6), values[0], np.int16)
            array[4:8, 4:8, 2:4] = values[1]
            nib.save(nib.Nifti1Image(array + i * (folder == "imagesTr"), affine), tmp_path / folder / f"{name}.nii.gz")
    (tmp_path / "dataset.json").write_text(
        '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "numTraining": 2}'
    )
    for _ in range(2):  # also when the cases are prepared already
        assert main(["prepare", "--dataset=nnunet", f"--root={tmp_path}", f"--store={tmp_path / 'store'}"]) == 0
        out = capsys.readouterr().out
        assert "5 x 0.7 to 2.9 x 0.7 to 2.9 mm" in out
        assert "warning: voxel sizes differ" in out and "warning: CT images are not clipped" in out
