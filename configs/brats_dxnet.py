"""DX-Net on BraTS: dimensional transfer (Messaoudi et al. 2023, Sect. 2.2.1, 3.1.3 and 3.2).

    python -m xdim_jax.train --config=configs/brats_dxnet.py --config.data.root=/data/BraTS2021_Training_Data \\
        --workdir=runs/dxnet
    python -m xdim_jax.train --config=configs/brats_dxnet.py:phantom --workdir=runs/demo      # no data needed, CPU

Words after the colon: ``phantom`` (small phantoms, small patches, minutes on two CPU cores; random weights),
``fold=K`` (0 to 4) or ``fold=all``, ``scratch`` (random weights instead of noisy-student ones), ``released`` (the
network as in the released code; see configs/networks.py).

Hardware: one GPU of 16 GB (the paper used a Tesla P100), patch 128^3, batch 1. Time: the paper reports 1.5 s per image;
1251 cases in 5 folds are 1000 steps an epoch, 90 epochs, so about 38 hours there. Not measured by us on a GPU yet.
Paper's score (Table 6, BraTS 2022 validation), Dice mean / median: WT 91.22 / 94.15, TC 84.77 / 93.46,
ET 83.88 / 89.74.

The network is in configs/networks.py, data and training in configs/brats.py.
"""

from typing import Any

from configs import brats, common, networks


def get_config(arg: str = "") -> Any:
    """The recipe; ``arg`` holds the words after the colon."""
    words = brats.parse(arg)
    config = brats.get_config(words)
    config.model = networks.dxnet(in_channels=4, out_channels=3, released="released" in words)  # there: 1, 5
    common.pretrained(config, config.model.encoder, "b0", words)
    if "phantom" in words:
        brats.shrink(config, patch=(32, 64, 64), shape=(80, 96, 72), epochs=16)
        config.model.encoder.drop_path = 0.1
    return config
