"""Omnia-Net on your own images, or on the slices of your own volumes, in nnU-Net's raw format or the Decathlon's.

    python -m xdim_jax.train --config=configs/own_omnianet.py --config.data.root=/data/Dataset001_Name \\
        --config.init.weights=b0.safetensors --config.model.encoder.eps=1e-3 --config.init.accept=padding \\
        --workdir=runs/own

Channels and structures are those of ``dataset.json``. An epoch visits every slice once; slices are resampled to the
size of the patch (multiples of 32). Words after the colon: ``fold=K``, ``scratch``
(as without it: random weights).
"""

from typing import Any

from configs import common, networks, own


def get_config(arg: str = "") -> Any:
    """The recipe; ``arg`` holds the words after the colon."""
    config = own.get_config(common.parse(arg, flags=("scratch",)))
    config.data.patch = config.data.prepare.size = (256, 256)
    config.data.sampling = "slices"
    config.data.batch = 8
    config.model = networks.omnianet("b0", in_channels=0, out_channels=0)  # 0: from the data
    return config
