"""Normalisation with the activation that follows it, and squeeze-and-excitation."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from xdim_jax.ops.implementation import active_implementation
from xdim_jax.ops.layout import Ints, delay_until

_ACTIVATIONS = (None, "silu", "relu", "relu6", "gelu")


def activate(x: jax.Array, activation: str | None) -> jax.Array:
    """Apply an activation: None, ``silu``, ``relu``, ``relu6`` or ``gelu`` (the exact one, with the error function).

    Raises:
        ValueError: The name is unknown.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {_ACTIVATIONS}")
    if activation == "silu":
        return x * lax.logistic(x)
    if activation == "gelu":
        return jax.nn.gelu(x, approximate=False)
    if activation == "relu6":
        return jnp.clip(x, 0, 6)
    return jnp.maximum(x, 0) if activation == "relu" else x


def normalise(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    axes: Ints,
    eps: float,
    activation: str | None,
    across: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Standardise over ``axes``, scale, shift, and apply an activation.

    The fast implementation keeps only ``x`` and the statistics for the backward pass.

    Args:
        x: Array ``(batch, *spatial, channels)``. Statistics are computed in float32 or better.
        scale: Factor of each channel, ``(channels,)``.
        bias: Shift of each channel, ``(channels,)``.
        axes: The spatial axes for instance norm; the batch axis and the spatial axes for batch norm.
        eps: Number that is added to the (biased) variance.
        activation: See `activate`.
        across: Name of a mapped axis (``pmap``) over whose devices the statistics are averaged. None without
            ``pmap``: with ``jit`` on several devices, the statistics are those of the global batch.

    Returns:
        The result, the mean and the biased variance. The two statistics have size 1 along ``axes``. They are for
        running averages and have no gradient.
    """
    if active_implementation() == "reference" or across is not None:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # cast once, so that its gradient is rounded once
        mean, var = _moments(wide, axes, across)
        z = (wide - mean) * lax.rsqrt(var + eps) * scale + bias
        return activate(z, activation).astype(x.dtype), lax.stop_gradient(mean), lax.stop_gradient(var)
    return _normalise(x, scale, bias, axes, eps, activation)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, *, eps: float) -> jax.Array:
    """Standardise every voxel over its channels, scale and shift (Ba et al. 2016).

    Args:
        x: Array ``(batch, *spatial, channels)``.
        scale: Factor of each channel, ``(channels,)``.
        bias: Shift of each channel, ``(channels,)``.
        eps: Number that is added to the (biased) variance.
    """
    mean, var = _moments(x, (x.ndim - 1,))
    return ((x - mean) * lax.rsqrt(var + eps) * scale + bias).astype(x.dtype)


def squeeze_excite(x: jax.Array, gate: Callable[[jax.Array], jax.Array], *, axes: Ints) -> jax.Array:
    """Multiply every channel by a gate that is computed from the means of the channels (Hu et al. 2018).

    Args:
        x: Array ``(batch, *spatial, channels)``.
        gate: Function from the means (``x`` averaged over ``axes``, which keep size 1) to logits of the same shape.
        axes: Axes of the mean.
    """
    return x * lax.logistic(gate(jnp.mean(x, axes, keepdims=True)))


def _moments(x: jax.Array, axes: Ints, across: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Return mean and biased variance, in float32 or better; see `normalise` for the arguments."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    share = (lambda a: lax.pmean(a, across)) if across else (lambda a: a)
    mean = share(jnp.mean(x, axes, keepdims=True))
    return mean, share(jnp.mean(jnp.square(x - mean), axes, keepdims=True))


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
    mean = delay_until(mean, cotangents[0])
    xhat = (x - mean) * rstd
    dz = cotangents[0].astype(xhat.dtype)
    if activation is not None:
        dz = dz * _derivative(xhat * scale + bias, activation)
    sum_dz = jnp.sum(dz, axes, keepdims=True)
    sum_dz_xhat = jnp.sum(dz * xhat, axes, keepdims=True)
    count = math.prod(x.shape[a] for a in axes)
    dx = (rstd * scale) * (dz - (sum_dz + xhat * sum_dz_xhat) / count)
    to_channels = tuple(range(x.ndim - 1))
    dscale, dbias = jnp.sum(sum_dz_xhat, to_channels), jnp.sum(sum_dz, to_channels)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


def _derivative(z: jax.Array, activation: str) -> jax.Array:
    """Return the derivative of an activation at ``z``."""
    if activation == "relu":
        return (z > 0).astype(z.dtype)
    if activation == "relu6":
        return ((z > 0) & (z < 6)).astype(z.dtype)
    if activation == "gelu":
        return 0.5 * (1 + lax.erf(z / math.sqrt(2))) + z * jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    s = lax.logistic(z)
    return s * (1 + z * (1 - s))


_normalise.defvjp(_normalise_fwd, _normalise_bwd)
