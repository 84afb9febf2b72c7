#!/usr/bin/env bash
# Trains on a Cloud TPU that is asked for as a queued resource, one process per host:
#
#     launch/tpu_queued.sh [--config.<key>=<value> ...]
#
# Waits until the TPU is there, installs the package on all its hosts, trains, and deletes the TPU. If it is preempted
# (--spot) or the training saves and asks to be run again, a new one is asked for. Set the lines below; data and workdir
# must be where all hosts see them: a bucket, or a mounted disk.
set -euo pipefail

NAME=${NAME:-xdim}
ZONE=${ZONE:-us-central2-b}
TYPE=${TYPE:-v4-32}
VERSION=${VERSION:-tpu-ubuntu2204-base}
CONFIG=${CONFIG:-configs/brats_dxnet.py}
WORKDIR=${WORKDIR:-gs://BUCKET/runs/dxnet}
DATA=${DATA:-/mnt/data/BraTS2021_Training_Data}
SOURCE=${SOURCE:-"xdim_jax[tpu,cloud]"} # what pip installs: a name, a wheel's address, or git+https://...
ATTEMPTS=${ATTEMPTS:-100}
WAIT=${WAIT:-30} # seconds between looks

queued=(gcloud compute tpus queued-resources)

state() {
    "${queued[@]}" describe "$NAME" --zone="$ZONE" --format='value(state.state)'
}

remove() {
    "${queued[@]}" delete "$NAME" --zone="$ZONE" --force --quiet || true
}

run() { # a command on all hosts
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

printf -v arguments ' %q' "--config=$CONFIG" "--workdir=$WORKDIR" "--config.data.root=$DATA" --coordinator=auto "$@"
trap remove EXIT
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    "${queued[@]}" create "$NAME" --node-id="$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
        --runtime-version="$VERSION" --spot
    until [ "$(state)" = ACTIVE ]; do
        case "$(state)" in FAILED | SUSPENDED) break ;; esac
        sleep "$WAIT"
    done
    status=1
    if [ "$(state)" = ACTIVE ]; then
        status=0
        { run "python3 -m pip install --quiet '$SOURCE'" && run "python3 -m xdim_jax.train$arguments"; } || status=$?
        if [ "$status" -ne 75 ] && [ "$(state)" = ACTIVE ]; then # done, or an error that another TPU would not mend
            exit "$status"
        fi
    fi
    remove
done
echo "error: $ATTEMPTS TPUs were taken away before the training was done; run the same command to go on" >&2
exit 75
