"""The paper's networks as ``model`` sections, and where paper and released code differ.

Each function gives the network as we recommend it, with the reason at every value that the paper leaves open or the
released code has otherwise; ``released=True`` gives every value of the released code, so that a whole network, or one
trained with that code, can be loaded (see weight_port) and compared. Any value can be overridden on the command line.
"""

from typing import Any

from ml_collections import ConfigDict

FILTERS = (256, 128, 64, 32, 16)  # of the decoders, coarsest first; the last also of the full-resolution block


def encoder(size: str) -> Any:
    """EfficientNet of one size."""
    return ConfigDict(
        {
            "name": f"efficientnet_{size}",
            "eps": 1e-5,  # as in the released code; weights of timm's tf_* models were trained with 1e-3: set it then
            "padding": "symmetric",  # as in the released code; the tf_* weights were trained with "same". Pre-trained
            # features lose nothing but a shift of less than one pixel of their scale
            "drop_path": 0.4,  # as in the released code; the paper does not say, EfficientNet itself has 0.2
        }
    )


def omnianet(size: str, *, in_channels: int, out_channels: int) -> Any:
    """Omnia-Net (paper, Sect. 2.1.1): paper and released code agree."""
    return ConfigDict(
        {
            "name": "omnianet",
            "in_channels": in_channels,
            "out_channels": out_channels,
            "encoder": encoder(size),
            "norm": "batch",
            "activation": "relu",
            "upsampling": "nearest",
            "filters": FILTERS,
            "deep_supervision": False,  # logits of the four coarser decoder stages in the loss; not in the paper
        }
    )


def dxnet(*, in_channels: int, out_channels: int, released: bool = False) -> Any:
    """DX-Net (paper, Sect. 2.2.1)."""
    return ConfigDict(
        {
            "name": "dxnet",
            "in_channels": in_channels,
            "out_channels": out_channels,
            "encoder": encoder("b0"),
            # the paper: instance norm, which does not depend on its batch size of 1; affine, so that scales and shifts
            # of the pre-trained encoder are kept
            "norm": "batch" if released else "instance",
            "activation": "silu",
            "upsampling": "transposed",
            "filters": FILTERS,
            "deep_supervision": False,
            # the axis that the 2D encoder lacks. Zero padding and pooling over the volume are the released code's;
            # "edge" and "slice" make inflation exact (see xdim_jax/nets/inflate.py)
            "depth": {"axis": 0, "padding": "zero", "squeeze": "volume", "strides": (2, 2, 2, 2, 2)},
        }
    )


def dsnet(*, in_channels: int, out_channels: int, released: bool = False) -> Any:
    """DS-Net (paper, Sect. 2.1.2). The paper's text differs from its code in both decoders; the code is what ran.

    The text gives ``inner.upsampling="nearest"``, ``inner.activation="relu"``, ``inner.full_resolution=True``
    ("Omnia-Net") and ``decoder="nearest"`` (two blocks a stage).
    """
    del released
    return ConfigDict(
        {
            "name": "dsnet",
            "in_channels": in_channels,
            "out_channels": out_channels,
            "images": 4,  # 2D images of three channels per volume
            "filters": (16, 32, 48, 96),  # of the 3D levels, finest first
            "affine": False,  # of the 3D instance norms; the paper does not say
            "decoder": "transposed",
            "deep_supervision": False,
            "inner": {
                "encoder": encoder("b0"),
                "norm": "batch",
                "activation": "silu",
                "upsampling": "transposed",
                "filters": FILTERS,
                "full_resolution": False,
            },
        }
    )
