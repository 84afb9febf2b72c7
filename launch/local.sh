#!/usr/bin/env bash
# Train with several processes on this machine: one per GPU, or several on the CPU as a test for a cluster.
#
#     PROCESSES=4 launch/local.sh --config=configs/brats_dxnet.py --workdir=runs/dxnet --config.data.batch=4
#
# The batch must be a multiple of the number of processes.
# SIGTERM and Ctrl-C are sent to all processes, which save and end. The exit status is the largest one of the processes.
set -euo pipefail

PROCESSES=${PROCESSES:-2}
PORT=${PORT:-12345}

IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES:-}" # the GPUs that are given to this script, if any
if [ "${#gpus[@]}" -gt 0 ] && [ "${#gpus[@]}" -lt "$PROCESSES" ]; then
    echo "PROCESSES=$PROCESSES, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES has fewer GPUs" >&2
    exit 2
fi
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < PROCESSES; i++)); do
    join=(--coordinator="localhost:$PORT" --processes="$PROCESSES" --process="$i")
    if command -v nvidia-smi >/dev/null; then
        CUDA_VISIBLE_DEVICES=${gpus[$i]:-$i} python -m xdim_jax.train "$@" "${join[@]}" &
    else
        python -m xdim_jax.train "$@" "${join[@]}" &
    fi
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    while kill -0 "$pid" 2>/dev/null; do # a signal interrupts wait, but the process still runs
        code=0
        wait "$pid" || code=$?
    done
    if [ "$code" -gt "$status" ]; then
        status=$code
    fi
done
exit "$status"
