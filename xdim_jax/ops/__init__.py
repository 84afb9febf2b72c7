"""The operations the networks are made of, each in a plain and a fast form.

Arrays are channels last: ``(batch, *spatial, channels)`` with two or three spatial axes. Kernels are
``(*kernel, in / groups, out)``. Padding is one ``(before, after)`` pair per spatial axis.

Every operation has a *reference* form (one ``lax`` call) and a *fast* form that computes the same sum in an
order that XLA compiles well. The form is chosen when a program is traced: the fast forms were measured on
CPU, where XLA's own 3D depthwise and transposed convolutions are ten or more times slower than they need be,
so they are taken on CPU; on GPU and TPU dense and depthwise convolutions go to the vendor's library. The
transposed convolution and the pointwise convolution are matrix products on every platform, and resizing and
pooling have one form. What was taken is in the log (`counted`).
``use_form("reference")`` forces one form, for debugging and for the tests that compare the two.
"""

from xdim_jax.ops.compilation import compile_program, compiler_options, keep_freed_memory, uncollected
from xdim_jax.ops.convolution import conv, pointwise
from xdim_jax.ops.form import FORMS, active_form, counted, describe_forms, in_form, use_form
from xdim_jax.ops.layout import same_padding, symmetric_padding
from xdim_jax.ops.norm import activate, layer_norm, normalise, squeeze_excite
from xdim_jax.ops.resize import conv_transpose, max_pool, upsample
from xdim_jax.ops.upsampled import Expand, conv_upsampled

__all__ = [
    "FORMS",
    "Expand",
    "activate",
    "active_form",
    "compile_program",
    "compiler_options",
    "conv",
    "conv_transpose",
    "conv_upsampled",
    "counted",
    "describe_forms",
    "in_form",
    "keep_freed_memory",
    "layer_norm",
    "max_pool",
    "normalise",
    "pointwise",
    "same_padding",
    "squeeze_excite",
    "symmetric_padding",
    "uncollected",
    "upsample",
    "use_form",
]
