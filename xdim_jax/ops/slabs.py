"""The gradient of the kernel of a dense convolution of stride 1, computed slab by slab."""

import jax
import jax.numpy as jnp
from jax import lax

from xdim_jax.ops.layout import Ints, Pairs, largest_divisor

_SLAB_BYTES = 8 << 20  # largest size of the arrays of a slab, so that they fit into the last-level cache


def kernel_gradient(x: jax.Array, g: jax.Array, window: Ints, padding: Pairs) -> jax.Array:
    """Return the gradient of a kernel as a sum of matrix products, one for each slab of the volume.

    A slab consists of some rows of a plane, or of some planes. The factors of its matrix product are the copies of
    ``x`` shifted by each tap along W, and the copies of ``g`` shifted by each pair of taps along D and H.

    Args:
        x: Input of the convolution, ``(batch, *spatial, in)`` with two or three spatial axes.
        g: Gradient of its output, ``(batch, *spatial_out, out)``.
        window: Size of the kernel along each axis.
        padding: Padding of the convolution.

    Returns:
        Array ``(*window, in, out)``.
    """
    if x.ndim == 4:  # a 2D image is a volume of one slice
        grad = kernel_gradient(x[:, None], g[:, None], (1, *window), ((0, 0), *padding))
        return grad[0]
    batch, depth, height, _, channels = x.shape
    width, out = g.shape[3:]
    kd, kh, kw = window
    x = jnp.pad(x, [(0, 0)] * 3 + [padding[2], (0, 0)])
    shifts = [(k - 1 - before, k - 1 - after) for k, (before, after) in zip(window, padding, strict=True)]
    g = jnp.pad(g, [(0, 0), *shifts[:2], (0, 0), (0, 0)])

    row_bytes = batch * width * (kw * channels + kd * kh * out) * x.dtype.itemsize
    rows = largest_divisor(height, _SLAB_BYTES // row_bytes)
    planes = largest_divisor(depth, _SLAB_BYTES // (row_bytes * height)) if rows == height else 1
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
        factors = columns.reshape(-1, kw * channels).T, jnp.concatenate(shifted, -1).reshape(-1, kd * kh * out)
        return total + jnp.matmul(*factors, preferred_element_type=wide)

    wide = jnp.promote_types(x.dtype, jnp.float32)  # a sum of hundreds of slabs in bfloat16 would stop growing
    zero = jnp.zeros((kw * channels, kd * kh * out), wide)
    grad = lax.fori_loop(0, (depth // planes) * steps_h, slab, zero).astype(x.dtype)
    return grad.reshape(kw, channels, kd, kh, out).transpose(2, 3, 0, 1, 4)
