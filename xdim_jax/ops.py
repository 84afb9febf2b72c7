"""The operations the networks are made of, each in a plain and a fast form.

Arrays are channels last: ``(batch, *spatial, channels)`` with two or three spatial axes. Kernels are
``(*kernel, in / groups, out)``. Padding is one ``(before, after)`` pair per spatial axis.

Every operation has a *reference* form (one ``lax`` call) and a *fast* form that computes the same sum in an
order that XLA compiles well. The form is chosen when a program is traced: the fast forms were measured on
CPU, where XLA's own 3D depthwise and transposed convolutions are ten or more times slower than they need be,
so they are taken on CPU; on GPU and TPU dense and depthwise convolutions go to the vendor's library. The
transposed convolution and the pointwise convolution are matrix products on every platform.
``use_form("reference")`` forces one form, for debugging and for the tests that compare the two.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Pairs = tuple[tuple[int, int], ...]
Ints = tuple[int, ...]

FORMS = ("auto", "fast", "reference")
_form: contextvars.ContextVar[str] = contextvars.ContextVar("form", default="auto")

_UNROLLED_TAPS = 27  # more taps in one fusion and XLA:CPU stops vectorising the loop
_SLAB_BYTES = 8 << 20  # columns of the weight gradient that stay in the last-level cache
_TREE_ROWS = 16  # rows added element by element before a reduction over space
_ACTIVATIONS = (None, "silu", "relu")


@contextlib.contextmanager
def use_form(form: str) -> Iterator[None]:
    """Forces ``"fast"`` or ``"reference"`` for programs traced inside the block (``"auto"``: by platform)."""
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    token = _form.set(form)
    try:
        yield
    finally:
        _form.reset(token)


def active_form() -> str:
    """The form of the convolutions in a program traced now: ``"fast"`` or ``"reference"``."""
    form = _form.get()
    if form == "auto":
        return "fast" if jax.default_backend() == "cpu" else "reference"
    return form


def same_padding(size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> Pairs:
    """TensorFlow's "SAME" padding, as the ``tf_efficientnet_*`` weights were trained: the odd pixel goes after."""
    pairs = []
    for n, k, s in zip(size, kernel, strides, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pairs.append((total // 2, total - total // 2))
    return tuple(pairs)


def symmetric_padding(kernel: Sequence[int]) -> Pairs:
    """``k // 2`` on both sides, as PyTorch networks are usually written (spec: architecture, section 1)."""
    return tuple((k // 2, k // 2) for k in kernel)


# -- convolution ----------------------------------------------------------------------------------------------


def conv(x: jax.Array, kernel: jax.Array, *, strides: Ints, padding: Pairs, groups: int = 1) -> jax.Array:
    """Convolution without bias.

    Args:
        x: ``(batch, *spatial, in)``.
        kernel: ``(*kernel, in / groups, out)``.
        strides: one per spatial axis.
        padding: zeros ``(before, after)`` per spatial axis.
        groups: 1 (dense) or the number of input channels (depthwise).

    Returns:
        ``(batch, *spatial_out, out)``.

    Raises:
        ValueError: the ranks do not fit, or ``groups`` is neither 1 nor depthwise.
    """
    ndim = x.ndim - 2
    if not kernel.ndim == x.ndim or len(strides) != ndim or len(padding) != ndim:
        raise ValueError(
            f"conv: x{x.shape} has {ndim} spatial axes, but kernel{kernel.shape}, strides {strides} "
            f"and padding {padding} do not"
        )
    channels = x.shape[-1]
    if groups not in (1, channels) or kernel.shape[-2] * groups != channels:
        raise ValueError(f"conv: kernel{kernel.shape} with groups={groups} does not fit x{x.shape}")
    window = kernel.shape[:ndim]
    if groups == 1 and set(window) == {1} and set(strides) == {1} and not any(map(any, padding)):
        return pointwise(x, kernel)
    if active_form() == "reference":
        return conv_reference(x, kernel, strides, padding, groups)
    if groups == 1:
        return _dense(x, kernel, strides, padding)
    if kernel.shape[-1] != channels:
        return conv_reference(x, kernel, strides, padding, groups)
    return _depthwise(x, kernel, strides, padding)


def conv_reference(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs, groups: int = 1) -> jax.Array:
    """The convolution as one ``lax`` call."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=_layout(x.ndim - 2), feature_group_count=groups
    )


def _layout(ndim: int) -> tuple[str, str, str]:
    axes = "DHW"[3 - ndim :]
    return f"N{axes}C", f"{axes}IO", f"N{axes}C"


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1x1 convolution as one matrix product over all voxels."""
    channels, out = kernel.shape[-2:]
    return (x.reshape(-1, channels) @ kernel.reshape(channels, out)).reshape(*x.shape[:-1], out)


def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution whose stride equals its kernel, without bias or padding.

    ``out[s * i + t] = x[i] @ kernel[t]``, PyTorch's index order (``lax.conv_transpose`` does not flip, but
    correlates: it would need the kernel reversed on every spatial axis). No two taps meet, so it is one
    matrix product and a rearrangement, forward and backward, on every platform.

    Args:
        x: ``(batch, *spatial, in)``.
        kernel: ``(*kernel, in, out)``.

    Returns:
        ``(batch, *(spatial * kernel), out)``.
    """
    ndim = x.ndim - 2
    window, (channels, out) = kernel.shape[:ndim], kernel.shape[ndim:]
    if _form.get() == "reference":
        flipped = jnp.flip(kernel, tuple(range(ndim)))
        return lax.conv_transpose(x, flipped, window, "VALID", dimension_numbers=_layout(ndim))
    columns = jnp.moveaxis(kernel, ndim, 0).reshape(channels, -1)
    y = (x.reshape(-1, channels) @ columns).reshape(*x.shape[:-1], *window, out)
    # (B, D, H, W, kd, kh, kw, O) -> (B, D, kd, H, kh, W, kw, O)
    order = [0, *(axis for i in range(ndim) for axis in (1 + i, 1 + ndim + i)), 1 + 2 * ndim]
    shape = (x.shape[0], *(n * k for n, k in zip(x.shape[1:-1], window, strict=True)), out)
    return y.transpose(order).reshape(shape)


# -- dense convolution, fast form -----------------------------------------------------------------------------


def _dense(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs) -> jax.Array:
    """Dense convolution from stride-1 2D convolutions.

    A strided depth axis is unrolled into channels (its taps are the only slices that are read); strided
    in-plane axes are folded by space-to-depth, which turns the convolution into one of stride 1.
    """
    if x.ndim == 5 and strides[0] > 1:
        (x, kernel), strides, padding = _fold_depth(x, kernel, strides[0], padding[0]), strides[1:], padding[1:]
        batch, depth = x.shape[:2]
        y = _dense(x.reshape(batch * depth, *x.shape[2:]), kernel, strides, padding)
        return y.reshape(batch, depth, *y.shape[1:])
    if any(s > 1 for s in strides):
        x, kernel = _space_to_depth(x, kernel, strides, padding)
        padding = ((0, 0),) * len(strides)
    return _dense_unit(x, kernel, padding)


def _fold_depth(x: jax.Array, kernel: jax.Array, stride: int, pad: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """(B, D, H, W, C), (k, kh, kw, C, O) -> (B, D', H, W, k C), (kh, kw, k C, O)."""
    taps, channels = kernel.shape[0], kernel.shape[3]
    x = jnp.pad(x, [(0, 0), pad, (0, 0), (0, 0), (0, 0)])
    depth = (x.shape[1] - taps) // stride + 1
    slices = [lax.slice_in_dim(x, a, a + (depth - 1) * stride + 1, stride, axis=1) for a in range(taps)]
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], taps * channels, -1)
    return jnp.concatenate(slices, -1), kernel


def _space_to_depth(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs) -> tuple[jax.Array, jax.Array]:
    """Folds every strided axis: stride s becomes s-fold channels and a kernel of ceil(k / s) taps."""
    ndim = len(strides)
    pads, blocks = [], []
    for n, k, s, (before, after) in zip(x.shape[1:-1], kernel.shape[:ndim], strides, padding, strict=True):
        out = (n + before + after - k) // s + 1
        taps = -(-k // s)
        length = (out - 1 + taps) * s  # every block that an output reads; the last may need more zeros, or fewer
        pads.append((before, length - n - before, 0))
        blocks.append(taps)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    kernel = jnp.pad(
        kernel,
        [(0, t * s - k) for k, t, s in zip(kernel.shape[:ndim], blocks, strides, strict=True)] + [(0, 0)] * 2,
    )
    inner = [n // s for n, s in zip(x.shape[1:-1], strides, strict=True)]
    x = _split_axes(x, 1, inner, strides)
    kernel = _split_axes(kernel, 0, blocks, strides)
    # the phases move in front of the channels
    x = x.transpose(0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1)
    kernel = kernel.transpose(*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2), 2 * ndim, 2 * ndim + 1)
    x = x.reshape(x.shape[0], *inner, -1)
    return x, kernel.reshape(*blocks, x.shape[-1], kernel.shape[-1])


def _split_axes(x: jax.Array, first: int, outer: Sequence[int], inner: Sequence[int]) -> jax.Array:
    pairs = [n for pair in zip(outer, inner, strict=True) for n in pair]
    return x.reshape(*x.shape[:first], *pairs, *x.shape[first + len(outer) :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense_unit(x: jax.Array, kernel: jax.Array, padding: Pairs) -> jax.Array:
    """Dense convolution of stride 1. 3D: one 2D convolution that gives all depth taps at once, then their sum."""
    if x.ndim == 4:
        return conv_reference(x, kernel, (1, 1), padding)
    batch, depth, height, width, channels = x.shape
    taps, out = kernel.shape[0], kernel.shape[-1]
    planes = x.reshape(batch * depth, height, width, channels)
    columns = kernel.transpose(1, 2, 3, 0, 4).reshape(*kernel.shape[1:4], taps * out)
    y = conv_reference(planes, columns, (1, 1), padding[1:])
    y = y.reshape(batch, depth, *y.shape[1:3], taps, out)
    y = jnp.pad(y, [(0, 0), padding[0]] + [(0, 0)] * 4)
    depth_out = y.shape[1] - taps + 1
    return sum((y[:, a : a + depth_out, :, :, a] for a in range(1, taps)), y[:, :depth_out, :, :, 0])


def _dense_unit_fwd(x, kernel, padding):
    return _dense_unit(x, kernel, padding), (x, kernel)


def _dense_unit_bwd(padding, residuals, g):
    x, kernel = residuals
    window = kernel.shape[:-2]
    # the input's gradient is the same operation: kernel reversed, channels swapped, complementary padding
    back = tuple((k - 1 - before, k - 1 - after) for k, (before, after) in zip(window, padding, strict=True))
    reversed_kernel = jnp.swapaxes(jnp.flip(kernel, tuple(range(len(window)))), -1, -2)
    return _dense_unit(g, reversed_kernel, back), _dense_kernel_gradient(x, g, window, padding)


_dense_unit.defvjp(_dense_unit_fwd, _dense_unit_bwd)


def _dense_kernel_gradient(x: jax.Array, g: jax.Array, window: Ints, padding: Pairs) -> jax.Array:
    """Sum over voxels of x (all taps along W) times g (all shifts along the other axes), slab by slab."""
    if x.ndim == 4:  # a 2D image is a volume of one slice
        grad = _dense_kernel_gradient(x[:, None], g[:, None], (1, *window), ((0, 0), *padding))
        return grad[0]
    batch, depth, height, _, channels = x.shape
    width, out = g.shape[3:]
    kd, kh, kw = window
    x = jnp.pad(x, [(0, 0)] * 3 + [padding[2], (0, 0)])
    shifts = [(k - 1 - before, k - 1 - after) for k, (before, after) in zip(window, padding, strict=True)]
    g = jnp.pad(g, [(0, 0), *shifts[:2], (0, 0), (0, 0)])

    row_bytes = batch * width * (kw * channels + kd * kh * out) * x.dtype.itemsize
    rows = _largest_divisor(height, _SLAB_BYTES // row_bytes)
    planes = _largest_divisor(depth, _SLAB_BYTES // (row_bytes * height)) if rows == height else 1
    steps_h = height // rows

    def slab(i, total):
        d, h = (i // steps_h) * planes, (i % steps_h) * rows
        xs = lax.dynamic_slice(x, (0, d, h, 0, 0), (batch, planes, rows, x.shape[3], channels))
        gs = lax.dynamic_slice(g, (0, d, h, 0, 0), (batch, planes + kd - 1, rows + kh - 1, width, out))
        columns = jnp.concatenate([xs[:, :, :, c : c + width] for c in range(kw)], -1)
        shifted = [
            gs[:, kd - 1 - a : kd - 1 - a + planes, kh - 1 - b : kh - 1 - b + rows]
            for a in range(kd)
            for b in range(kh)
        ]
        product = columns.reshape(-1, kw * channels).T @ jnp.concatenate(shifted, -1).reshape(-1, kd * kh * out)
        return total + product

    zero = jnp.zeros((kw * channels, kd * kh * out), x.dtype)
    grad = lax.fori_loop(0, (depth // planes) * steps_h, slab, zero)
    return grad.reshape(kw, channels, kd, kh, out).transpose(2, 3, 0, 1, 4)


def _largest_divisor(n: int, limit: int) -> int:
    return max((d for d in range(1, n + 1) if n % d == 0 and d <= limit), default=1)


# -- depthwise convolution, fast form -------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs) -> jax.Array:
    """Depthwise convolution as shifted multiply-adds; more than 27 taps loop over the first axis."""
    ndim = len(strides)
    window, taps = kernel.shape[:ndim], kernel.reshape(*kernel.shape[:ndim], -1)
    phases, out = _phases(x, window, strides, padding)
    if math.prod(window) <= _UNROLLED_TAPS:
        return _tap_sum(phases, taps, strides, out, range(window[0]))

    def body(a, y):
        plane = lax.dynamic_index_in_dim(taps, a, 0)
        rows = lax.dynamic_index_in_dim(phases, a % strides[0], 1 + ndim)
        rows = lax.dynamic_slice_in_dim(rows, a // strides[0], out[0], 1)
        return y + _tap_sum(rows, plane, (1, *strides[1:]), out, range(1))

    return lax.fori_loop(0, window[0], body, jnp.zeros((x.shape[0], *out, x.shape[-1]), x.dtype))


def _phases(x: jax.Array, window: Ints, strides: Ints, padding: Pairs) -> tuple[jax.Array, Ints]:
    """Pads, and parts every axis into its stride phases: ``(B, *ceil(n / s), *s, C)``, and the output's size."""
    ndim = len(strides)
    pads, out = [], []
    for n, k, s, (before, after) in zip(x.shape[1:-1], window, strides, padding, strict=True):
        size = (n + before + after - k) // s + 1
        length = (size - 1 + -(-k // s)) * s
        pads.append((before, length - n - before, 0))
        out.append(size)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    x = _split_axes(x, 1, [n // s for n, s in zip(x.shape[1:-1], strides, strict=True)], strides)
    x = x.transpose(0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1)
    return x, tuple(out)


def _tap(phases: jax.Array, tap: Ints, strides: Ints, out: Ints) -> jax.Array:
    """The values that kernel tap ``tap`` meets, one per output voxel."""
    index = [slice(a // s, a // s + n) for a, s, n in zip(tap, strides, out, strict=True)]
    return phases[(slice(None), *index, *(a % s for a, s in zip(tap, strides, strict=True)))]


def _tap_sum(phases: jax.Array, taps: jax.Array, strides: Ints, out: Ints, first: range) -> jax.Array:
    total = jnp.zeros((), phases.dtype)
    for tap in _indices(first, *map(range, taps.shape[1:-1])):
        total = total + _tap(phases, tap, strides, out) * taps[tap]
    return total


def _indices(*ranges: range) -> list[Ints]:
    indices: list[Ints] = [()]
    for r in ranges:
        indices = [(*index, i) for index in indices for i in r]
    return indices


def _depthwise_fwd(x, kernel, strides, padding):
    return _depthwise(x, kernel, strides, padding), (x, kernel)


def _depthwise_bwd(strides, padding, residuals, g):
    x, kernel = residuals
    return (
        _depthwise_input_gradient(g, kernel, x.shape[1:-1], strides, padding),
        _depthwise_kernel_gradient(x, g, kernel.shape, strides, padding),
    )


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)


def _depthwise_input_gradient(g: jax.Array, kernel: jax.Array, size: Ints, strides: Ints, padding: Pairs) -> jax.Array:
    """Each stride phase of the input meets its own taps ``kernel[r::s]``; the phases are computed apart."""
    ndim = len(strides)
    if set(strides) == {1}:
        back = tuple(
            (k - 1 - before, n - m + before)
            for k, n, m, (before, _) in zip(kernel.shape[:ndim], size, g.shape[1:-1], padding, strict=True)
        )
        return _depthwise(g, jnp.flip(kernel, tuple(range(ndim))), strides, back)
    # padded input index u = s j + r receives sum_m kernel[s m + r] g[j - m]
    lengths = [-(-(n + before) // s) for n, s, (before, _) in zip(size, strides, padding, strict=True)]
    parts = []
    for phase in _indices(*map(range, strides)):
        part = kernel[tuple(slice(r, None, s) for r, s in zip(phase, strides, strict=True))]
        taps = part.shape[:ndim]
        if 0 in taps:
            parts.append(jnp.zeros((g.shape[0], *lengths, g.shape[-1]), g.dtype))
            continue
        back = tuple((t - 1, n - m) for t, n, m in zip(taps, lengths, g.shape[1:-1], strict=True))
        parts.append(_depthwise(g, jnp.flip(part, tuple(range(ndim))), (1,) * ndim, back))
    stacked = jnp.stack(parts).reshape(*strides, g.shape[0], *lengths, g.shape[-1])
    # (*s, B, *j, C) -> (B, j0, s0, j1, s1, ..., C)
    order = [ndim, *(axis for i in range(ndim) for axis in (ndim + 1 + i, i)), 2 * ndim + 1]
    full = stacked.transpose(order).reshape(
        g.shape[0], *(n * s for n, s in zip(lengths, strides, strict=True)), g.shape[-1]
    )
    crop = [slice(before, before + n) for n, (before, _) in zip(size, padding, strict=True)]
    return full[(slice(None), *crop)]


def _depthwise_kernel_gradient(
    x: jax.Array, g: jax.Array, shape: Sequence[int], strides: Ints, padding: Pairs
) -> jax.Array:
    """Per tap, the sum over voxels of the input it meets times ``g``; the outer taps are looped over."""
    ndim = len(strides)
    window = tuple(shape[:ndim])
    phases, out = _phases(x, window, strides, padding)
    last, outer = window[-1], window[:-1]

    def body(i, grad):
        rows, index = phases, i
        for axis in reversed(range(ndim - 1)):  # the tap along this axis: a slice of a phase
            a, index = index % outer[axis], index // outer[axis]
            rows = lax.dynamic_index_in_dim(rows, a % strides[axis], 1 + ndim + axis)
            rows = lax.dynamic_slice_in_dim(rows, a // strides[axis], out[axis], 1 + axis)
        inner = (1,) * (ndim - 1) + (strides[-1],)
        sums = [_space_sum(_tap(rows, (0,) * (ndim - 1) + (c,), inner, out), g) for c in range(last)]
        return lax.dynamic_update_index_in_dim(grad, jnp.stack(sums), i, 0)

    grad = lax.fori_loop(0, math.prod(outer), body, jnp.zeros((math.prod(outer), last, x.shape[-1]), x.dtype))
    return grad.reshape(shape)


def _space_sum(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum of ``a * b`` over all axes but the last: some rows element by element, the rest by a product with ones."""
    channels = a.shape[-1]
    rows = _largest_divisor(a.shape[1], _TREE_ROWS)
    n = a.shape[1] // rows
    total = a[:, :n] * b[:, :n]
    for r in range(1, rows):
        total = total + a[:, r * n : (r + 1) * n] * b[:, r * n : (r + 1) * n]
    total = total.reshape(-1, channels)
    return (jnp.ones((1, total.shape[0]), total.dtype) @ total)[0]


# -- normalisation and activation -----------------------------------------------------------------------------


def activate(x: jax.Array, activation: str | None) -> jax.Array:
    """``None``, ``"silu"`` or ``"relu"``."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {_ACTIVATIONS}")
    if activation == "silu":
        return x * lax.logistic(x)
    return jnp.maximum(x, 0) if activation == "relu" else x


def normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, axes: Ints, eps: float, activation: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Standardises over ``axes``, scales, shifts and activates, keeping only ``x`` for the backward pass.

    Args:
        x: ``(batch, *spatial, channels)``; statistics are taken in float32 or better.
        scale, bias: ``(channels,)``.
        axes: the spatial axes for instance norm; the batch axis too for batch norm.
        eps: added to the (biased) variance.
        activation: see `activate`.

    Returns:
        The result, and the mean and biased variance with ``axes`` kept as 1. The two statistics carry no
        gradient: they are for running averages.
    """
    if active_form() == "reference":
        mean, var = _moments(x, axes)
        z = (x - mean) * lax.rsqrt(var + eps) * scale + bias
        return activate(z, activation).astype(x.dtype), lax.stop_gradient(mean), lax.stop_gradient(var)
    return _normalise(x, scale, bias, axes, eps, activation)


def _moments(x: jax.Array, axes: Ints) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(x, axes, keepdims=True)
    return mean, jnp.mean(jnp.square(x - mean), axes, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _normalise(x, scale, bias, axes, eps, activation):
    return _normalise_fwd(x, scale, bias, axes, eps, activation)[0]


def _normalise_fwd(x, scale, bias, axes, eps, activation):
    mean, var = _moments(x, axes)
    rstd = lax.rsqrt(var + eps)
    y = activate((x - mean) * (rstd * scale) + bias, activation).astype(x.dtype)
    return (y, mean, var), (x, scale, bias, mean, rstd)


def _normalise_bwd(axes, eps, activation, residuals, cotangents):
    x, scale, bias, mean, rstd = residuals
    xhat = (x - mean) * rstd
    dz = cotangents[0].astype(xhat.dtype)
    if activation is not None:
        dz = dz * _slope(xhat * scale + bias, activation)
    sum_dz = jnp.sum(dz, axes, keepdims=True)
    sum_dz_xhat = jnp.sum(dz * xhat, axes, keepdims=True)
    count = math.prod(x.shape[a] for a in axes)
    dx = (rstd * scale) * (dz - (sum_dz + xhat * sum_dz_xhat) / count)
    to_channels = tuple(range(x.ndim - 1))
    dscale, dbias = jnp.sum(sum_dz_xhat, to_channels), jnp.sum(sum_dz, to_channels)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


def _slope(z: jax.Array, activation: str) -> jax.Array:
    if activation == "relu":
        return (z > 0).astype(z.dtype)
    s = lax.logistic(z)
    return s * (1 + z * (1 - s))


_normalise.defvjp(_normalise_fwd, _normalise_bwd)
