#!/usr/bin/env bash
# Trains with several processes on this machine, one per GPU (or on CPU, to try what a cluster will do):
#
#     PROCESSES=4 launch/local.sh --config=configs/brats_dxnet.py --workdir=runs/dxnet
#
# SIGTERM and Ctrl-C reach all of them: they save and end. The exit status is the largest of theirs.
set -euo pipefail

PROCESSES=${PROCESSES:-2}
PORT=${PORT:-12345}

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < PROCESSES; i++)); do
    where=(--coordinator="localhost:$PORT" --processes="$PROCESSES" --process="$i")
    if command -v nvidia-smi >/dev/null; then
        CUDA_VISIBLE_DEVICES=$i python -m xdim_jax.train "$@" "${where[@]}" &
    else
        python -m xdim_jax.train "$@" "${where[@]}" &
    fi
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    while kill -0 "$pid" 2>/dev/null; do # a signal ends the wait, not the process
        code=0
        wait "$pid" || code=$?
    done
    if [ "$code" -gt "$status" ]; then
        status=$code
    fi
done
exit "$status"
