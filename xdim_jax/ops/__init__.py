"""The operations of the networks. Some of them have two implementations.

Arrays are channels last: ``(batch, *spatial, channels)`` with two or three spatial axes. Kernels are
``(*kernel, in / groups, out)``. Padding is one ``(before, after)`` pair per spatial axis.

Convolutions and norms have a *reference implementation*, which is plain JAX (for a convolution, one ``lax`` call), and
a *fast implementation*, which computes the same sums in an order that XLA compiles to faster code. The implementation
is chosen when a program is traced. On CPU, the default is ``fast``, because XLA's own 3D depthwise and transposed
convolutions are ten or more times slower there. On GPU and TPU, the default is ``library``: the reference
implementation, in which dense and depthwise convolutions use the library of the vendor, but with matrix products for
transposed convolutions. The 1x1 convolution is a matrix product in every implementation. Upsampling and pooling have
one implementation.

`use_implementation` selects an implementation, for example ``use_implementation("reference")`` for debugging and for
tests that compare implementations. `count_implementations` counts which implementations a program uses.
"""

from xdim_jax.ops.compilation import compile_program, compiler_options, gc_disabled, keep_freed_memory
from xdim_jax.ops.convolution import conv, pointwise
from xdim_jax.ops.implementation import (
    IMPLEMENTATIONS,
    active_implementation,
    count_implementations,
    describe_implementation,
    use_implementation,
    with_implementation,
)
from xdim_jax.ops.layout import same_padding, symmetric_padding
from xdim_jax.ops.norm import activate, layer_norm, normalise, squeeze_excite
from xdim_jax.ops.resize import conv_transpose, max_pool, upsample
from xdim_jax.ops.upsampled import TransposedConv, conv_upsampled

__all__ = [
    "IMPLEMENTATIONS",
    "TransposedConv",
    "activate",
    "active_implementation",
    "compile_program",
    "compiler_options",
    "conv",
    "conv_transpose",
    "conv_upsampled",
    "count_implementations",
    "describe_implementation",
    "gc_disabled",
    "keep_freed_memory",
    "layer_norm",
    "max_pool",
    "normalise",
    "pointwise",
    "same_padding",
    "squeeze_excite",
    "symmetric_padding",
    "upsample",
    "use_implementation",
    "with_implementation",
]
