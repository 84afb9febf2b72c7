#!/usr/bin/env bash
# Trains on the GPUs of one or more nodes of a SLURM cluster, one process per GPU:
#
#     sbatch launch/slurm_train.sh [--config.<key>=<value> ...]
#
# Five minutes before its time is up, and when it is preempted, the run saves and goes back into the queue; there it
# goes on from its checkpoint. Set the three lines below, and the resources to what a node has.
#SBATCH --job-name=xdim-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

CONFIG=${CONFIG:-configs/brats_dxnet.py}
WORKDIR=${WORKDIR:-runs/dxnet}
DATA=${DATA:-/data/BraTS2021_Training_Data}

command=(python -m xdim_jax.train "--config=$CONFIG" "--workdir=$WORKDIR" "--config.data.root=$DATA" "$@")
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
    command+=(--coordinator=auto)
fi
status=0
srun "${command[@]}" || status=$?
if [ "$status" -eq 75 ]; then # saved: run the same command again
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
