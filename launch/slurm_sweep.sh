#!/usr/bin/env bash
# Run the workers of a sweep as a SLURM job array, with one GPU each.
#
#     sbatch --array=0-7 launch/slurm_sweep.sh [--config.<key>=<value> ...]
#
# All workers run the same command and share one study. More workers can be submitted at any time. If a worker is
# preempted, another one resumes its trial. Set the five variables below.
#SBATCH --job-name=xdim-sweep
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -euo pipefail

CONFIG=${CONFIG:-configs/brats_dxnet.py}
SPACE=${SPACE:-configs/sweeps/dxnet.py}
WORKDIR=${WORKDIR:-runs/sweep}
DATA=${DATA:-/data/BraTS2021_Training_Data}
TRIALS=${TRIALS:-200}

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since SLURM 22.05, srun does not take it from sbatch
command=(python -m xdim_jax.sweep "--config=$CONFIG" "--space=$SPACE" "--trials=$TRIALS" "--workdir=$WORKDIR"
    "--config.data.root=$DATA")
status=0
srun "${command[@]}" "$@" || status=$?
if [ "$status" -eq 75 ]; then # the trial was returned to the queue of the study; requeue this worker
    task=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then # the id of one task of an array is that of the whole array
        task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    scontrol requeue "$task"
fi
exit "$status"
