"""Metrics against geometry, brute force over point pairs, and the platform's rules for empty masks."""

import math

import numpy as np
import pytest
from scipy.spatial import cKDTree

from xdim_jax import metrics


def box(shape, *bounds):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in bounds)] = True
    return mask


def brute_surface(mask):
    """Voxels with one of the six neighbours outside, the outside of the image included."""
    padded = np.pad(mask, 1)
    inner = padded.copy()
    for axis in range(mask.ndim):
        inner &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    return np.argwhere(padded & ~inner) - 1


def brute_distances(a, b, spacing):
    points_a, points_b = brute_surface(a) * spacing, brute_surface(b) * spacing
    return cKDTree(points_b).query(points_a)[0], cKDTree(points_a).query(points_b)[0]


def test_two_parallel_plates():
    """Plates of one voxel, 5 voxels apart: every distance is 5."""
    a, b = box((20, 12, 12), (3, 4), (2, 10), (2, 10)), box((20, 12, 12), (8, 9), (2, 10), (2, 10))
    assert metrics.hd95_pooled(a, b) == 5
    assert metrics.hd95_pooled(a, b, spacing=(2.0, 1.0, 1.0)) == 10
    scores = metrics.brats2022_region(a, b)
    assert scores == {"dice": 0.0, "hd95": 5.0, "sensitivity": 0.0, "specificity": 1 - 64 / (20 * 144 - 64)}


def test_shifted_cube_by_hand():
    """A 4^3 cube against itself moved by one: |P and G| = 48 of 64."""
    a, b = box((10, 10, 10), (2, 6), (2, 6), (2, 6)), box((10, 10, 10), (3, 7), (2, 6), (2, 6))
    scores = metrics.brats2022_region(a, b)
    assert scores["dice"] == 0.75
    assert scores["sensitivity"] == 0.75
    assert scores["specificity"] == (1000 - 64 - 16) / (1000 - 64)
    assert scores["hd95"] == 1.0


@pytest.mark.parametrize("seed", range(6))
def test_distances_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    spacing = rng.uniform(0.5, 3, 3)
    a, b = (rng.random((9, 11, 7)) > rng.uniform(0.5, 0.99) for _ in range(2))
    a.flat[0] = b.flat[-1] = True  # on the image's edge, where surface voxels are
    for ours, brute in zip(metrics.surface_distances(a, b, spacing), brute_distances(a, b, spacing), strict=True):
        np.testing.assert_allclose(np.sort(ours), np.sort(brute), atol=1e-9)
    pooled = np.concatenate(brute_distances(a, b, spacing))
    assert metrics.hd95_pooled(a, b, spacing) == pytest.approx(np.percentile(pooled, 95), abs=1e-9)


def test_border_decides_whether_the_image_edge_is_surface():
    full = np.ones((3, 3, 3), bool)
    assert metrics.surface(full, border=True).sum() == 26
    assert metrics.surface(full, border=False).sum() == 0


def test_crop_keeps_a_real_image_edge():
    """A mask at the edge of the image and one inside: cropping must neither add nor remove surface."""
    a, b = box((8, 8, 8), (0, 3), (0, 8), (0, 8)), box((8, 8, 8), (2, 5), (2, 6), (2, 6))
    for border in (True, False):
        ours = metrics.surface_distances(a, b, border=border)
        sa, sb = metrics.surface(a, border=border), metrics.surface(b, border=border)
        expected = (
            cKDTree(np.argwhere(sb)).query(np.argwhere(sa))[0],
            cKDTree(np.argwhere(sa)).query(np.argwhere(sb))[0],
        )
        for x, y in zip(ours, expected, strict=True):
            np.testing.assert_allclose(np.sort(x), np.sort(y), atol=1e-12)


def test_empty_masks_by_the_platforms_rules():
    """Spec: challenges, section 3.2; the diagonal of a BraTS volume is 373.1287."""
    shape = (240, 240, 155)
    empty, one = np.zeros(shape, bool), box(shape, (0, 1), (0, 1), (0, 1))
    assert metrics.brats2022_region(empty, empty) == {"dice": 1, "hd95": 0, "sensitivity": 1, "specificity": 1}
    missed = metrics.brats2022_region(empty, one)
    false_alarm = metrics.brats2022_region(one, empty)
    for scores in (missed, false_alarm):
        assert (scores["dice"], scores["sensitivity"]) == (0, 0)
        assert scores["hd95"] == pytest.approx(373.1287, abs=1e-4)
    assert missed["specificity"] == 1
    assert false_alarm["specificity"] == 1 - 1 / empty.size
    with pytest.raises(ValueError, match="empty"):
        metrics.surface_distances(empty, one)
    assert math.isnan(metrics.dice(empty, empty))


def test_conventions_read_label_4_and_3_apart():
    label = np.array([0, 1, 2, 3, 4]).reshape(1, 1, 5)
    for convention, et in (("brats2021", 4), ("brats2023", 3)):
        regions = metrics.BRATS_REGIONS[convention]
        assert (set(regions["WT"]), set(regions["TC"]), set(regions["ET"])) == ({1, 2, et}, {1, et}, {et})
    scores = metrics.brats2022_case(np.where(label == 4, 0, label), np.where(label == 3, 0, label), "brats2021")
    assert scores["ET"]["dice"] == 0 and scores["TC"]["dice"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.brats2022_case(label, label[..., :4], "brats2021")
    with pytest.raises(ValueError, match="brats2030"):
        metrics.brats2022_case(label, label, "brats2030")


def test_summary_by_hand():
    summary = metrics.summarise([0.2, 0.4, 0.6, 0.8, 1.0])
    assert summary == pytest.approx(
        {"count": 5, "mean": 0.6, "sd": math.sqrt(0.1), "median": 0.6, "q25": 0.4, "q75": 0.8, "min": 0.2, "max": 1.0}
    )
    assert metrics.summarise([0.5])["sd"] is None
