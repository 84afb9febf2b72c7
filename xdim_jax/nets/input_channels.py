"""Adaptation of the first convolution (the stem), which was trained on RGB images, to another number of channels.

========  =====================================================================  ======================================
rule      kernel of target channel c, for C target channels                      preserves
========  =====================================================================  ======================================
sum       sum over RGB, divided by C                                             the response to a grey image that is
                                                                                 repeated in all C channels
mean      mean over RGB, times one factor that keeps the sum of the squares of   the variance of the output for
          the kernel                                                             independent channels of equal variance
cycle     R, G, B, R, ... times 3 / C; for C = 1 the sum (timm's rule)           the response to a repeated grey image,
                                                                                 if C is 1 or a multiple of 3
map       kernel of source channel ``channel_map[c]``, times one factor that is  the same as ``mean``
          computed as for ``mean``
randn     normal values of standard deviation 1 (the rule of the released code   nothing; for comparisons only. In 2D
          if C is not 1 or 3)                                                    with C = 16, the standard deviation is
                                                                                 8.5 times that of He et al.
========  =====================================================================  ======================================
"""

from collections.abc import Sequence

import numpy as np

from xdim_jax.nets.layers import check_choice

RULES = ("sum", "mean", "cycle", "map", "randn")


def adapt_channels(
    kernel: np.ndarray, channels: int, rule: str, *, channel_map: Sequence[int] = (), seed: int = 0
) -> np.ndarray:
    """Return the kernel of a stem for another number of input channels.

    Args:
        kernel: Array ``(*kernel, source channels, out)``.
        channels: Number C of target channels.
        rule: One of `RULES`; see the table above.
        channel_map: For rule ``map``: one source channel per target channel, counted from 0.
        seed: Random seed for rule ``randn``.

    Returns:
        Array ``(*kernel, C, out)``, in the dtype of ``kernel``.

    Raises:
        ValueError: The rule is unknown, or the map has a wrong length or a channel that the source does not have.
    """
    check_choice("channel rule", rule, RULES)
    found = kernel.shape[-2]
    if rule == "randn":
        shape = (*kernel.shape[:-2], channels, kernel.shape[-1])
        return np.random.default_rng(seed).standard_normal(shape).astype(kernel.dtype)
    if rule == "sum" or (rule == "cycle" and channels == 1):
        return np.repeat(kernel.sum(-2, keepdims=True) / np.asarray(channels, kernel.dtype), channels, -2)
    if rule == "cycle":
        scale = np.asarray(found / channels, kernel.dtype)
        return kernel[..., np.arange(channels) % found, :] * scale
    if rule == "mean":
        out = np.repeat(kernel.mean(-2, keepdims=True), channels, -2)
    else:
        if len(channel_map) != channels or not all(0 <= c < found for c in channel_map):
            raise ValueError(
                f"the channel map {tuple(channel_map)} does not fit: expected one source channel, 0 to {found - 1}, "
                f"for each of {channels} channels"
            )
        out = kernel[..., list(channel_map), :]
    # for independent channels of unit variance, the variance of the output is the sum of the squares of the kernel
    energy, kept = (float(np.square(a, dtype=np.float64).sum()) for a in (kernel, out))
    return out * np.asarray(np.sqrt(energy / kept) if kept else 1.0, kernel.dtype)
