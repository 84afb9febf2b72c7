"""Dense convolution of 3 taps along the first spatial axis with half the products (Winograd 1980; Lavin and Gray 2016).

Four outputs along the axis come from six products instead of twelve, ``y = A^T [(G g) * (B^T d)]``; the other axes keep
their convolution, of six kernels instead of three. The matrices are Toom and Cook's for the points 0, +-3/4, +-3/2 and
infinity: all sums are over numbers of like size, and in float32 the error is 1.3 times that of a plain sum of 432 terms
(points 0, +-1, +-2: twice).
"""

import functools
import math
import operator
from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax.ops.layout import Ints, Pairs, conv_reference, delayed, moved
from xdim_jax.ops.slabs import kernel_gradient

_POINTS = (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2))
_OUTPUTS, _TAPS = 4, 3
_PRODUCTS = 5e8  # fewer take some milliseconds: compiling six small programs in place of one costs more than is saved
_CHANNELS = {4: 40, 5: 16}  # by rank: with fewer, moving the six parts takes longer than their products


def suits(shape: Ints, kernel: Ints, padding: Pairs) -> bool:
    """Whether a convolution of stride 1 is faster this way: measured on CPU."""
    enough = min(kernel[-2:]) >= _CHANNELS[len(shape)] and math.prod(shape[:-1]) * math.prod(kernel) >= _PRODUCTS
    return enough and kernel[0] == _TAPS and padding[0] == (1, 1) and shape[1] >= _OUTPUTS


def winograd(x: jax.Array, kernel: jax.Array, padding: Pairs) -> jax.Array:
    """The convolution, see `suits`."""
    kernels = jnp.tensordot(jnp.asarray(_G, x.dtype), kernel, 1)
    parts = [_inner(part, kernels[j], padding[1:]) for j, part in enumerate(_inputs(x))]
    return functools.reduce(
        operator.add, [moved(_combine(row, parts), i, x.shape[1], _OUTPUTS) for i, row in enumerate(_A.T)]
    )


def _inner(x: jax.Array, kernel: jax.Array, padding: Pairs) -> jax.Array:
    """The convolution of the other axes: of planes; or of rows, as an image with a kernel of one tap across them."""
    if x.ndim == 4:
        return conv_reference(x, kernel[None], (1, 1), ((0, 0), *padding))
    y = conv_reference(x.reshape(-1, *x.shape[2:]), kernel, (1, 1), padding)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _inputs(x: jax.Array) -> list[jax.Array]:
    """The six parts ``B^T d`` of every tile of four: ``(batch, tiles, ..., channels)`` each."""
    planes = _planes(x)
    return [_combine(row, planes) for row in _BT]


def _planes(x: jax.Array) -> list[jax.Array]:
    """Of every tile, the one before it, its four, and the one behind it."""
    tiles = _tiles(x)
    count = tiles.shape[1]
    inside = [tiles[:, :, i] for i in range(_OUTPUTS)]
    return [moved(inside[-1], 1, count), *inside, moved(inside[0], -1, count)]


def _tiles(x: jax.Array) -> jax.Array:
    count = -(-x.shape[1] // _OUTPUTS)
    return moved(x, 0, count * _OUTPUTS).reshape(x.shape[0], count, _OUTPUTS, *x.shape[2:])


def winograd_gradient(x: jax.Array, g: jax.Array, window: Ints, padding: Pairs) -> jax.Array:
    """The kernel's gradient ``G^T [(B^T d) (A g)]``, one product after the other: what each takes is large."""
    grads, done = [], g
    for part, row in zip(_BT, _A, strict=True):
        tiles = _tiles(delayed(g, done))
        given = _combine(row, [tiles[:, :, i] for i in range(_OUTPUTS)])
        pair = (_combine(part, _planes(delayed(x, done))), given)
        if x.ndim == 4:
            grad = kernel_gradient(*pair, (1, *window[1:]), ((0, 0), *padding[1:]))[0]
        else:
            grad = kernel_gradient(*(a.reshape(-1, *a.shape[2:]) for a in pair), window[1:], padding[1:])
        grads.append(grad)
        done = grad
    return jnp.tensordot(jnp.asarray(_G.T, x.dtype), jnp.stack(grads), 1)


def _combine(weights: Sequence[float], parts: Sequence[jax.Array]) -> jax.Array:
    terms = [p if w == 1 else p * np.asarray(w, p.dtype) for w, p in zip(weights, parts, strict=True) if w != 0]
    return functools.reduce(operator.add, terms)


def _matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``A`` (6, 4), ``G`` (6, 3) and ``B^T`` (6, 6): evaluation, scaled evaluation, and the coefficients of the
    polynomials that vanish at all points but one; the last row of each is the point at infinity."""

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
