"""Dense convolution of 3 taps along the first spatial axis with half the products (Winograd 1980; Lavin and Gray 2016).

Four outputs along the axis need six products instead of twelve: ``y = A^T [(G g) * (B^T d)]`` for the kernel g and six
inputs d. Each of the six products is a convolution over the other axes. The matrices are those of Toom and Cook for the
points 0, +-3/4, +-3/2 and infinity, with which all terms of the sums have similar magnitudes. In float32, the error is
1.3 times that of a direct sum of 432 terms; with the points 0, +-1, +-2 and infinity, it is twice that error.
"""

import functools
import math
import operator
from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax.ops.layout import Ints, Pairs, conv_reference, delay_until, shift_planes
from xdim_jax.ops.slabs import kernel_gradient

_POINTS = (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2))
_OUTPUTS, _TAPS = 4, 3
# smallest number of products; with fewer, compiling six convolutions instead of one takes more time than is saved
_MIN_PRODUCTS = 5e8
# smallest number of channels, by the number of axes of x; with fewer, copying takes more time than is saved
_MIN_CHANNELS = {4: 40, 5: 16}


def is_suitable(x: jax.Array, kernel: jax.Array, padding: Pairs) -> bool:
    """Return whether the algorithm supports a convolution of stride 1, is exact enough, and is faster.

    It is not used below float32: in bfloat16 its errors are three times those of a direct convolution. It is faster
    within limits that were measured on CPUs.

    Args:
        x: Input, ``(batch, *spatial, in)``.
        kernel: Kernel, ``(*kernel, in, out)``.
        padding: Padding of the convolution.
    """
    return jnp.finfo(x.dtype).bits >= 32 and _is_faster(x.shape, kernel.shape, padding)


def _is_faster(shape: Ints, kernel: Ints, padding: Pairs) -> bool:
    large = min(kernel[-2:]) >= _MIN_CHANNELS[len(shape)] and math.prod(shape[:-1]) * math.prod(kernel) >= _MIN_PRODUCTS
    return large and kernel[0] == _TAPS and padding[0] == (1, 1) and shape[1] >= _OUTPUTS


def winograd(x: jax.Array, kernel: jax.Array, padding: Pairs) -> jax.Array:
    """Compute a convolution of stride 1 that the algorithm supports, see `is_suitable`."""
    kernels = jnp.tensordot(jnp.asarray(_G, x.dtype), kernel, 1)
    parts = [_conv_other_axes(part, kernels[j], padding[1:]) for j, part in enumerate(_inputs(x))]
    return functools.reduce(
        operator.add, [shift_planes(_combine(row, parts), i, x.shape[1], _OUTPUTS) for i, row in enumerate(_A.T)]
    )


def _conv_other_axes(x: jax.Array, kernel: jax.Array, padding: Pairs) -> jax.Array:
    """Compute the convolution over all axes but the first: over the planes of a volume, or the rows of an image."""
    if x.ndim == 4:
        return conv_reference(x, kernel[None], (1, 1), ((0, 0), *padding))
    y = conv_reference(x.reshape(-1, *x.shape[2:]), kernel, (1, 1), padding)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _inputs(x: jax.Array) -> list[jax.Array]:
    """Return the six parts ``B^T d`` of every tile of four planes, each ``(batch, tiles, ..., channels)``."""
    planes = _planes(x)
    return [_combine(row, planes) for row in _BT]


def _planes(x: jax.Array) -> list[jax.Array]:
    """Return the six planes on which a tile of four planes depends: the previous plane, the four, and the next one."""
    tiles = _tiles(x)
    count = tiles.shape[1]
    inside = [tiles[:, :, i] for i in range(_OUTPUTS)]
    return [shift_planes(inside[-1], 1, count), *inside, shift_planes(inside[0], -1, count)]


def _tiles(x: jax.Array) -> jax.Array:
    """Split the first spatial axis into tiles of four planes; the last tile is filled with zeros."""
    count = -(-x.shape[1] // _OUTPUTS)
    return shift_planes(x, 0, count * _OUTPUTS).reshape(x.shape[0], count, _OUTPUTS, *x.shape[2:])


def winograd_gradient(x: jax.Array, g: jax.Array, window: Ints, padding: Pairs) -> jax.Array:
    """Return the gradient of the kernel: ``G^T [(B^T x) (A g)]`` for each six inputs and four output gradients.

    The six products are computed one after another, because the inputs of each are large.

    Args:
        x: Input of the convolution.
        g: Gradient of its output.
        window: Size of the kernel along each axis.
        padding: Padding of the convolution.

    Returns:
        Array ``(*window, in, out)``.
    """
    grads, done = [], g
    for part, row in zip(_BT, _A, strict=True):
        tiles = _tiles(delay_until(g, done))
        g_part = _combine(row, [tiles[:, :, i] for i in range(_OUTPUTS)])
        pair = (_combine(part, _planes(delay_until(x, done))), g_part)
        if x.ndim == 4:
            grad = kernel_gradient(*pair, (1, *window[1:]), ((0, 0), *padding[1:]))[0]
        else:
            grad = kernel_gradient(*(a.reshape(-1, *a.shape[2:]) for a in pair), window[1:], padding[1:])
        grads.append(grad)
        done = grad
    return jnp.tensordot(jnp.asarray(_G.T, x.dtype), jnp.stack(grads), 1)


def _combine(weights: Sequence[float], parts: Sequence[jax.Array]) -> jax.Array:
    """Return the weighted sum of arrays."""
    terms = [p if w == 1 else p * np.asarray(w, p.dtype) for w, p in zip(weights, parts, strict=True) if w != 0]
    return functools.reduce(operator.add, terms)


def _matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the matrices ``A`` (6, 4), ``G`` (6, 3) and ``B^T`` (6, 6).

    A evaluates a polynomial at the six points. G does so too, and scales the values. Row i of ``B^T`` has the
    coefficients of the polynomial that vanishes at all finite points except point i. The last row of each matrix
    belongs to the point at infinity.
    """

    def vanishing(points: Sequence[Fraction]) -> list[Fraction]:
        coefficients = [Fraction(1)]
        for point in points:
            shifted, scaled = [Fraction(0), *coefficients], [-point * c for c in coefficients] + [Fraction(0)]
            coefficients = [a + b for a, b in zip(shifted, scaled, strict=True)]
        return coefficients

    def powers(point: Fraction, count: int) -> list[Fraction]:
        return [point**i for i in range(count)]

    def at_infinity(count: int) -> list[Fraction]:
        return [Fraction(0)] * (count - 1) + [Fraction(1)]

    a = [powers(p, _OUTPUTS) for p in _POINTS] + [at_infinity(_OUTPUTS)]
    g, bt = [], []
    for point in _POINTS:
        others = [q for q in _POINTS if q != point]
        scale = functools.reduce(operator.mul, [point - q for q in others])
        g.append([v / scale for v in powers(point, _TAPS)])
        bt.append([*vanishing(others), Fraction(0)])
    g.append(at_infinity(_TAPS))
    bt.append(vanishing(_POINTS))
    return tuple(np.array([[float(v) for v in row] for row in m]) for m in (a, g, bt))  # pyright: ignore


_A, _G, _BT = _matrices()
