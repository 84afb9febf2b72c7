"""DS-Net on BraTS: a pre-trained 2D network inside a 3D one (Messaoudi et al. 2023, Sect. 2.1.2 and 3.1.3).

    python -m xdim_jax.train --config=configs/brats_dsnet.py --config.data.root=/data/BraTS2021_Training_Data \\
        --workdir=runs/dsnet
    python -m xdim_jax.train --config=configs/brats_dsnet.py:phantom --workdir=runs/dsnet-demo     # no data needed, CPU

Words after the colon: ``phantom`` (small phantoms, small patches, minutes on two CPU cores; random weights),
``fold=K`` (0 to 4) or ``fold=all``, ``scratch`` (random weights instead of noisy-student ones), ``released`` (the
network as in the released code, which is this one but for the encoder's eps).

Hardware: one GPU of 16 GB (the paper used a Tesla P100), patch 128^3, batch 1. Not measured by us on a GPU yet.
Paper's score (Table 5, BraTS 2022 validation), Dice mean / median: WT 91.69 / 93.45, TC 83.23 / 93.10,
ET 81.75 / 89.17.

The network is in configs/networks.py, data and training in configs/brats.py.
"""

from typing import Any

from configs import brats, common, networks


def get_config(arg: str = "") -> Any:
    """The recipe; ``arg`` holds the words after the colon."""
    words = brats.parse(arg)
    config = brats.get_config(words)
    config.model = networks.dsnet(in_channels=4, out_channels=3, released="released" in words)
    common.pretrained(config, config.model.inner.encoder, "b0", words)
    if "phantom" in words:  # the depth must compress to three planes: 97 to 144
        brats.shrink(config, patch=(97, 32, 64), shape=(110, 64, 72), epochs=10)
        config.model.inner.encoder.drop_path = 0.1
    return config
