"""The operations of the networks. Some of them have two implementations.

Arrays are channels last: ``(batch, *spatial, channels)`` with two or three spatial axes. Kernels are
``(*kernel, in / groups, out)``. Padding is one ``(before, after)`` pair per spatial axis.

Convolutions and norms have a *reference implementation*, which is plain JAX (for a convolution, one ``lax`` call), and
a *fast implementation*, which computes the same sums in an order that XLA compiles to faster code. The implementation
is chosen when a program is traced. On CPU the default is the fast one: XLA's own 3D depthwise and transposed
convolutions were measured to be ten or more times slower there. On GPU and TPU the default is the reference
implementation, so that dense and depthwise convolutions use the vendor's library. By default, the transposed
convolution and the 1x1 convolution are matrix products on every platform. Upsampling and pooling have one
implementation.

`use_implementation` selects one, for example ``use_implementation("reference")`` for debugging and for the tests that
compare the two. `count_implementations` counts which ones a program uses.
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
