"""Sliding windows against whole-volume answers that are known without them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.special import softmax

from xdim_jax.base.errors import UserError
from xdim_jax.base.threads import StoppedError
from xdim_jax.data import regions
from xdim_jax.data.case import Case, Volume
from xdim_jax.data.images.grid import Grid
from xdim_jax.data.labels import Labels
from xdim_jax.data.prepare import Preparation, Prepared, prepare
from xdim_jax.inference import output, sliding_window, windows

pytestmark = pytest.mark.usefixtures("optimised")
BRATS = output.Output("sigmoid", regions.BRATS, regions.TISSUES)


@pytest.mark.parametrize(
    ("size", "patch", "overlap", "starts"),
    [
        (64, 64, 0.5, [0]),
        (50, 64, 0.5, [0]),
        (65, 64, 0.5, [0, 1]),
        (128, 64, 0.5, [0, 32, 64]),
        (240, 128, 0.5, [0, 56, 112]),
        (10, 4, 0.0, [0, 3, 6]),
    ],
)
def test_windows_cover_with_the_overlap(size, patch, overlap, starts):
    assert windows.window_starts(size, patch, overlap) == starts
    gaps = np.diff(starts)
    assert all(g <= patch * (1 - overlap) for g in gaps)


def test_gaussian_weights_are_separable_symmetric_and_positive():
    weights = windows.gaussian_weights((4, 6, 9))
    assert weights.shape == (4, 6, 9) and weights.dtype == np.float32
    assert weights.max() == 1 and weights.min() > 0
    np.testing.assert_array_equal(weights, weights[::-1, ::-1, ::-1])
    # sigma is an eighth of the side: one sigma from the middle of 9 voxels is 1.125 voxels
    line = windows.gaussian_weights((1, 1, 9))[0, 0]
    assert line[5] == pytest.approx(np.exp(-0.5 * (1 / 1.125) ** 2), rel=1e-6)


def whole(image, source=None, box=None):
    """A prepared volume that is seen as it is."""
    size = image.shape[:3]
    channels = image.shape[3]
    box = box or tuple(slice(0, n) for n in size)
    return Prepared(image, None, (0.0,) * channels, (1.0,) * channels, False, box, source or size, (1.0,) * 3)


def make(forward, patch, overlap=0.5, out=BRATS, **options):
    cut = {k: options.pop(k) for k in ("batch", "flips") if k in options}
    return sliding_window.Segmenter(forward, out, windows.Windows(patch, (overlap,) * 3, **cut), **options)


def collect(segmenter, weights, prepared):
    """Labels, and everything that the sink is given."""
    found = {}

    def sink(rows, box, values):
        for name, part in values.items():
            into = found.setdefault(name, np.full((*prepared.source, *part.shape[3:]), np.nan, np.float32))
            assert np.isnan(into[(rows, *box)]).all(), "every row comes once"
            into[(rows, *box)] = part

    return segmenter(weights, prepared, sink), found


EXTRA = frozenset({"probabilities", "uncertainty"})
SOFTMAX = output.Output("softmax", regions.Regions({"a": (1,), "b": (2,)}), ("background", "a", "b"))


def voxelwise(weights, x):
    """Three channels that depend on the voxel alone."""
    return jnp.stack([x[..., 0] * weights, x[..., 1], x[..., 0] - x[..., 1]], -1)


def voxelwise_answer(image, weight, out):
    logits = np.stack([image[..., 0] * weight, image[..., 1], image[..., 0] - image[..., 1]], -1)
    return 1 / (1 + np.exp(-logits)) if out is BRATS else softmax(logits, -1)


@pytest.mark.parametrize("out", [BRATS, SOFTMAX], ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("size", [(40, 50, 33), (16, 70, 32), (5, 7, 9)])
@pytest.mark.parametrize(("overlap", "batch"), [(0.0, 1), (0.5, 3)])
def test_a_voxelwise_network_is_blended_to_its_whole_volume_answer(size, overlap, batch, out, rng):
    """Every window gives the right probability at every voxel, so any weights must blend to it."""
    image = rng.normal(size=(*size, 2)).astype(np.float32)
    segmenter = make(voxelwise, (32, 32, 32), overlap, out, batch=batch, extra_outputs=EXTRA)
    label, found = collect(segmenter, jnp.float32(3.0), whole(image))
    expected = voxelwise_answer(image, 3.0, out)
    np.testing.assert_allclose(found["probabilities"], expected, atol=2e-6)
    sure = (np.abs(expected - 0.5).min(-1) > 1e-4) if out is BRATS else np.ptp(np.sort(expected)[..., 1:], -1) > 1e-4
    if out is BRATS:
        by_hand = np.select([expected[..., 2] > 0.5, expected[..., 1] > 0.5, expected[..., 0] > 0.5], [3, 1, 2], 0)
    else:
        by_hand = expected.argmax(-1)
    np.testing.assert_array_equal(label[sure], by_hand[sure])
    np.testing.assert_allclose(found["uncertainty"], 0, atol=1e-6)


@pytest.mark.parametrize("target", [(60, 70, 50), (22, 26, 22), (40, 24, 64), (80, 50, 33)])
def test_probabilities_come_back_to_the_source_grid_row_by_row(target, rng):
    """Finer, coarser, along one axis: the same as scipy's interpolation of the whole array."""
    image = gaussian_filter(rng.normal(size=(40, 50, 33, 2)), (2, 2, 2, 0)).astype(np.float32) * 20
    source = tuple(n + 7 for n in target)
    box = tuple(slice(3, 3 + n) for n in target)
    prepared = whole(image, source, box)
    label, found = collect(make(voxelwise, (16, 24, 16), extra_outputs=EXTRA), jnp.float32(3.0), prepared)
    expected = prepared.restore(voxelwise_answer(image, 3.0, BRATS).astype(np.float32))
    inside = found["probabilities"][box]
    np.testing.assert_allclose(inside, expected[box], atol=2e-6)
    assert np.isnan(found["probabilities"]).sum() == 3 * (np.prod(source) - np.prod(target)), "nothing outside"
    assert label.shape == source and label[box].any()
    assert not label[:3].any() and not label[:, -4:].any()


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_segmentation_that_is_stopped_ends_within_two_windows(after, rng):
    """The 48 windows of this volume would otherwise all be computed."""
    image = rng.normal(size=(64, 64, 48, 2)).astype(np.float32)
    seen = []

    def forward(weights, x):
        jax.debug.callback(lambda: seen.append(1), ordered=True)
        return voxelwise(weights, x)

    segmenter = make(forward, (16, 16, 16), 0.0)
    with pytest.raises(StoppedError):
        segmenter(jnp.float32(1), whole(image), stopped=lambda: len(seen) > after)
    jax.effects_barrier()
    assert len(seen) <= after + 3
    label = segmenter(jnp.float32(1), whole(image))
    np.testing.assert_array_equal(label, make(voxelwise, (16, 16, 16), 0.0)(jnp.float32(1), whole(image)))


def test_windows_are_weighted_by_the_gaussian():
    """A network that answers with the position in its window: the blend is the weighted mean, written out."""
    ramp = jnp.arange(4.0).reshape(1, 4, 1, 1, 1)
    forward = lambda weights, x: jnp.broadcast_to(ramp, (1, 4, 4, 4, 1))  # noqa: E731
    one = output.Output("sigmoid", regions.Regions({"a": (1,)}), ("background", "a"))
    prepared = whole(np.zeros((6, 4, 4, 1), np.float32))
    probs = collect(make(forward, (4, 4, 4), out=one, extra_outputs=EXTRA), None, prepared)[1]["probabilities"]
    gauss = windows.gaussian_weights((4, 1, 1))[:, 0, 0]
    sigmoid = 1 / (1 + np.exp(-np.arange(4.0)))
    # voxel 3 is at place 3 of window 0 and at place 1 of window 2
    expected = (gauss[3] * sigmoid[3] + gauss[1] * sigmoid[1]) / (gauss[3] + gauss[1])
    assert probs[3, 2, 2, 0] == pytest.approx(expected, rel=1e-5)
    assert probs[0, 2, 2, 0] == pytest.approx(0.5, rel=1e-5)


def test_an_ensemble_and_mirror_images_are_the_mean_of_their_members(rng):
    """A network that knows where it is in its window, so that mirror images differ."""
    place = jnp.linspace(-1, 1, 8)

    def forward(weights, x):
        more = place[:, None, None] + 2 * place[None, :, None] * weights + 3 * place[None, None, :]
        return jnp.repeat(x * weights + more[..., None], 3, -1)

    image = rng.normal(size=(8, 8, 8, 1)).astype(np.float32)
    members = np.array([0.5, 1.0, -2.0], np.float32)
    flips = sliding_window.all_flips((0, 2))
    assert flips == ((), (0,), (2,), (0, 2))
    segmenter = make(forward, (8, 8, 8), members=3, flips=flips, batch=2, extra_outputs=EXTRA)
    _, found = collect(segmenter, jnp.asarray(members), whole(image))
    every = []
    for member in members:
        for axes in flips:
            x = np.flip(image[..., 0], axes)
            p = np.linspace(-1, 1, 8)
            logits = x * member + p[:, None, None] + 2 * p[None, :, None] * member + 3 * p[None, None, :]
            every.append(np.flip(1 / (1 + np.exp(-logits)), axes))
    np.testing.assert_allclose(found["probabilities"][..., 1], np.mean(every, 0), atol=1e-6)
    np.testing.assert_allclose(found["uncertainty"], np.var(every, 0), atol=1e-6)
    alone = [collect(make(forward, (8, 8, 8), flips=flips, extra_outputs=EXTRA), m, whole(image))[1] for m in members]
    mean = np.mean([a["probabilities"] for a in alone], 0)
    np.testing.assert_allclose(found["probabilities"], mean, atol=1e-6)


def test_the_ring_holds_a_slab_and_not_the_volume():
    """Ten times deeper, the device holds as much."""
    segmenter = make(voxelwise, (16, 16, 16))
    volumes = [((d, 40, 40), (d, 40, 40)) for d in (40, 400)]
    sizes = [segmenter.device_bytes(jnp.float32(1.0), [volume], 2) for volume in volumes]
    assert sizes[0] == sizes[1] < 400 * 40 * 40 * 3 * 4
    assert segmenter.device_bytes(jnp.float32(1.0), volumes, 2) == sizes[0]


def test_a_large_picture_needs_the_memory_of_one_slice():
    one, nine = (windows.make_layout(windows.Windows((8, 64, 64), (0, 0.5, 0.5), 1, ((),), slices=True), s, s)
                 for s in ((1, 4000, 5000), (9, 4000, 5000)))  # fmt: skip
    assert one.buffer_slices == 1 and nine.buffer_slices == 8
    segmenter = sliding_window.make_segmenter(lambda weights, x: x[..., :1] * jnp.ones(3), BRATS, (64, 64), 0.5)
    few, many = (segmenter.device_bytes(None, [(s, s)], 1) for s in ((1, 4000, 5000), (8, 4000, 5000)))
    assert few < many / 7


@pytest.mark.parametrize("out", [BRATS, output.Output("softmax", regions.BRATS, ("background", "a", "b", "c"))])
def test_nan_is_an_error_if_values_must_be_finite(out):
    """Otherwise it is decoded as background; a run whose validation has NaN continues."""
    volume = whole(np.zeros((4, 8, 8, 1), np.float32))
    segmenter = make(lambda weights, x: jnp.full((*x.shape[:-1], len(out.channels)), jnp.nan), (4, 8, 8), out=out)
    assert not segmenter(None, volume).any()
    segmenter.require_finite = True
    with pytest.raises(UserError, match="NaN"):
        segmenter(None, volume)


def test_segment_puts_the_box_back_and_drops_small_et():
    image = np.zeros((6, 7, 8, 4), np.float32)
    image[2:5, 1:6, 3:7] = np.random.default_rng(0).normal(5, 1, (3, 5, 4, 4))
    case = Case("case", "case", (Path("a.nii"),), ("a", "b", "c", "d"), None, Labels("", ("", "x"), (0, 1)))
    volume = Volume("case", image, None, Grid((8, 7, 6), np.eye(4)))
    prepared = prepare(case, volume, Preparation(crop="nonzero", normalise="zscore_nonzero"))
    logits = np.full((3, 5, 4, 3), -9.0, np.float32)
    logits[0, 0, 0] = (2, 2, 2)
    logits[2, 4, 3] = (0.4, -1, -2)
    segmenter = make(lambda weights, x: jnp.asarray(logits)[None], (3, 5, 4))
    label = output.postprocess(segmenter(None, prepared), regions.BRATS)
    assert label.shape == (6, 7, 8) and np.count_nonzero(label) == 2
    assert label[2, 1, 3] == regions.ET and label[4, 5, 6] == regions.ED
    label = output.postprocess(segmenter(None, prepared), regions.BRATS, min_et=2)
    assert label[2, 1, 3] == regions.NCR
    strict = make(lambda weights, x: jnp.asarray(logits)[None], (3, 5, 4), threshold={"WT": 0.7, "TC": 0.5, "ET": 0.9})
    label = strict(None, prepared)
    assert label[2, 1, 3] == regions.NCR and label[4, 5, 6] == 0, "sigmoid(2) is 0.88, sigmoid(0.4) is 0.6"


def test_a_2d_network_sees_every_slice_once_and_in_order(rng):
    """Its answer for a slice depends on that slice alone, so blending must give it back at its place."""
    image = rng.normal(size=(19, 32, 32, 1)).astype(np.float32)
    seen = []

    def forward(weights, x):
        jax.debug.callback(lambda n: seen.append(int(n)), x.shape[0])
        return jnp.broadcast_to(x.mean((1, 2), keepdims=True), (*x.shape[:-1], 3))

    segmenter = sliding_window.make_segmenter(forward, BRATS, (32, 32), 0.5, extra_outputs=EXTRA)
    probs = collect(segmenter, None, whole(image))[1]["probabilities"]
    jax.effects_barrier()
    expected = 1 / (1 + np.exp(-image.mean((1, 2), keepdims=True)))
    np.testing.assert_allclose(probs, np.broadcast_to(expected, probs.shape), atol=1e-6)
    assert seen == [8, 8, 8], "in batches of slices"
    sliding_window.make_segmenter(forward, BRATS, (32, 32), 0.5)(None, whole(image[:1]))
    jax.effects_barrier()
    assert seen[3:] == [1], "a single image is not filled up"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("count", [5, 19])
def test_a_slice_of_a_2d_network_is_blended_whatever_its_batch(batch, count, rng):
    """A network that knows where it is in its window: equal slices give what a single slice gives."""
    place = jnp.linspace(-2, 2, 32)[None, None, :, None]
    image = rng.normal(size=(1, 32, 80, 1)).astype(np.float32)

    def predict(image, batch):
        options = {"batch": batch, "extra_outputs": EXTRA, "flips": sliding_window.all_flips((2,))}
        forward = lambda weights, x: jnp.repeat(x + place, 3, -1)  # noqa: E731
        segmenter = sliding_window.make_segmenter(forward, BRATS, (32, 32), 0.5, **options)
        return collect(segmenter, None, whole(image))

    label, expected = predict(image, 1)
    labels, found = predict(np.repeat(image, count, 0), batch)
    for name, values in found.items():
        np.testing.assert_allclose(values, np.broadcast_to(expected[name], values.shape), atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(labels, np.broadcast_to(label, labels.shape))
