"""DX-Net on your own volumes, in nnU-Net's raw format or the Decathlon's.

    python -m xdim_jax.train --config=configs/own_dxnet.py --config.data.root=/data/Dataset001_Name --workdir=runs/own
    python -m xdim_jax.train --config=configs/own_dxnet.py --config.data.dataset=decathlon \\
        --config.data.root=/data/Task01_BrainTumour --workdir=runs/task01

Channels and structures are those of ``dataset.json``. Set ``--config.data.prepare.spacing`` where voxel sizes vary, and
a patch that holds the structures (multiples of 32). Words after the colon: ``fold=K``, ``released``,
``scratch`` (as without it: random weights).
"""

from typing import Any

from configs import common, networks, own


def get_config(arg: str = "") -> Any:
    """The recipe; ``arg`` holds the words after the colon."""
    words = common.parse(arg, flags=("released", "scratch"))
    config = own.get_config(words)
    config.data.patch = (96, 96, 96)
    config.model = networks.dxnet(in_channels=0, out_channels=0, released="released" in words)  # 0: from the data
    return config
