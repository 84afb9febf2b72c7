"""Our networks' configs and their PyTorch twins, for test_parity, test_networks, test_port and test_loading."""

import numpy as np
import torch

from tests import twins
from weight_port.sources import import_timm

timm = import_timm()
FILTERS = (16, 16, 8, 8, 8)
CONVENTIONS = {"authors": {"padding": "symmetric", "eps": 1e-5}, "timm": {"padding": "same", "eps": 1e-3}}
IMAGE, VOLUME = (2, 64, 96, 3), (1, 64, 32, 64, 4)


def to_last(array):
    """PyTorch's (N, C, *spatial) to (N, *spatial, C)."""
    return np.moveaxis(array, 1, -1)


def state_of(module):
    return {n: t.detach().numpy().copy() for n, t in module.state_dict().items()}


def relative(a, b):
    """Largest difference relative to the largest value of ``b``."""
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def calibrated(model, channels=3):
    """Random weights, and running statistics that differ from layer to layer but fit them, as trained ones do.

    With statistics drawn at random, or residual branches as large as their input, the values of deep networks grow from
    layer to layer until rounding is all that one compares.
    """
    twins.randomise(model, 0)
    for block in model.modules():
        if getattr(block, "has_skip", False):
            (block.bn3 if hasattr(block, "bn3") else block.bn2).weight.data *= 0.2
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.train()(torch.randn(16, channels, 64, 64, generator=generator))
        for norm in norms:
            norm.momentum = 0.1
            norm.running_mean += 0.05 * norm.running_var.sqrt() * torch.randn(len(norm.weight), generator=generator)
            norm.running_var *= 0.8 + 0.4 * torch.rand(len(norm.weight), generator=generator)
    return model


def unet_case(name, *, encoder="toy", convention="authors", norm="batch", filters=FILTERS, **options):
    """A U-Net's section and its twin."""
    defaults = {"omnianet": ("relu", "nearest", 2, 3), "dxnet": ("silu", "transposed", 3, 4)}
    activation, upsampling, ndim, channels = defaults[name]
    options = {"activation": activation, "upsampling": upsampling, "deep_supervision": False} | options
    section = {"name": name, "in_channels": channels, "out_channels": 3, "norm": norm, "filters": filters, **options}
    section["encoder"] = {"name": f"efficientnet_{encoder}", "drop_path": 0.0, **CONVENTIONS[convention]}
    twin = twins.Omnia(
        encoder, channels, 3, ndim=ndim, norm=norm, filters=filters, **CONVENTIONS[convention], **options
    )
    return section, twin, IMAGE if ndim == 2 else VOLUME


def ds_case(
    depth=128,
    batch=1,
    *,
    encoder="toy",
    convention="authors",
    filters=FILTERS,
    affine=False,
    decoder="transposed",
    **inner,
):
    shared = {"norm": "batch", "filters": filters, "activation": "silu", "upsampling": "transposed"}
    shared |= {"full_resolution": False, **inner}
    section = {"name": "dsnet", "in_channels": 4, "out_channels": 3, "images": 4, "affine": affine, "decoder": decoder}
    section |= {"filters": (4, 4, 6, 8), "inner": dict(shared)}
    section["inner"]["encoder"] = {"name": f"efficientnet_{encoder}", "drop_path": 0.0, **CONVENTIONS[convention]}
    options = {"planes_filters": (4, 4, 6, 8), "affine": affine, "decoder": decoder}
    twin = twins.DS(encoder, 4, 3, inner={**shared, **CONVENTIONS[convention]}, **options)
    return section, twin, (batch, depth, 32, 64, 4)


def b0(case, **options):
    return lambda: case(encoder="b0", filters=(256, 128, 64, 32, 16), **options)


CASES = {
    "omnianet": lambda: unet_case("omnianet"),
    "omnianet timm instance": lambda: unet_case("omnianet", convention="timm", norm="instance"),
    "omnianet lite transposed silu": lambda: unet_case(
        "omnianet", encoder="lite_toy", convention="timm", upsampling="transposed", activation="silu"
    ),
    "dxnet": lambda: unet_case("dxnet", norm="instance"),
    "dxnet timm noaffine": lambda: unet_case("dxnet", convention="timm", norm="instance_noaffine"),
    "dxnet lite batch nearest relu": lambda: unet_case(
        "dxnet", encoder="lite_toy", upsampling="nearest", activation="relu"
    ),
    "dsnet 128": lambda: ds_case(128),
    "dsnet lite 97 timm batch 2": lambda: ds_case(97, 2, encoder="lite_toy", convention="timm"),
    "dsnet 144 paper affine": lambda: ds_case(
        144, decoder="nearest", affine=True, upsampling="nearest", activation="relu", full_resolution=True
    ),
}
SLOW_CASES = {
    "omnianet b0": b0(lambda **o: unet_case("omnianet", **o)),
    "dxnet b0": b0(lambda **o: (*unet_case("dxnet", norm="instance", **o)[:2], (1, 64, 64, 64, 4))),
}
