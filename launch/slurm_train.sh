#!/usr/bin/env bash
# Train on the GPUs of one or more nodes of a SLURM cluster, with one process per GPU.
#
#     sbatch launch/slurm_train.sh [--config.<key>=<value> ...]
#
# When the job is preempted, and five minutes before its time limit, the run saves, and the job is requeued. It then
# resumes from the checkpoint. Set the four variables below, and the resources to those of your nodes.
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
BATCH=${BATCH:-${SLURM_NTASKS:-1}} # samples of a batch, over all GPUs: a multiple of their number

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since SLURM 22.05, srun does not take it from sbatch
command=(python -m xdim_jax.train "--config=$CONFIG" "--workdir=$WORKDIR" "--config.data.root=$DATA"
    "--config.data.batch=$BATCH" "$@")
export SLURM_KILL_BAD_EXIT=0 # srun must not end the other processes while they save
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
    command+=(--coordinator=auto)
fi
status=0
srun "${command[@]}" || status=$?
if [ "$status" -eq 75 ]; then # the run has saved, and must be continued
    task=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then # the id of one task of an array is that of the whole array
        task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    scontrol requeue "$task"
fi
exit "$status"
