"""Input channels: a stem that was trained on red, green and blue meets another number of channels.

========  =====================================================================  ======================================
rule      kernel of target channel c, of C                                       preserves
========  =====================================================================  ======================================
sum       sum over RGB, divided by C                                             the response to a grey image, when all
                                                                                 C channels hold it
mean      mean over RGB, times one factor for the layer                          the variance of the output over
                                                                                 independent channels of equal variance
cycle     R, G, B, R, ... times 3 / C; for C = 1 the sum (timm's rule)           the response to a grey image, when C
                                                                                 is 1 or a multiple of 3
map       the source channel that ``channel_map[c]`` names, times one factor     as ``mean``
          for the layer
randn     normal values of standard deviation 1 (the released code's rule for    nothing; kept for comparison: 8.5
          other than 1 or 3 channels)                                            (2D) times He's value at C = 16
========  =====================================================================  ======================================
"""

from collections.abc import Sequence

import numpy as np

from xdim_jax.nets.layers import check_choice

RULES = ("sum", "mean", "cycle", "map", "randn")


def adapt_channels(
    kernel: np.ndarray, channels: int, rule: str, *, channel_map: Sequence[int] = (), seed: int = 0
) -> np.ndarray:
    """A stem kernel for another number of input channels.

    Args:
        kernel: ``(*kernel, source channels, out)``.
        channels: C.
        rule: see above.
        channel_map: of ``map``: one source channel, counted from 0, per target channel.
        seed: of ``randn``.

    Raises:
        ValueError: unknown rule; a map of another length or beyond the source's channels.
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
                f"the channel map {tuple(channel_map)} should name, for each of {channels} channels, "
                f"one of the source's, 0 to {found - 1}"
            )
        out = kernel[..., list(channel_map), :]
    # over independent channels of unit variance the output's variance is the sum of squares
    energy, kept = (float(np.square(a, dtype=np.float64).sum()) for a in (kernel, out))
    return out * np.asarray(np.sqrt(energy / kept) if kept else 1.0, kernel.dtype)
