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

run() { # a command on all hosts; its worst exit status, which gcloud does not pass on; 255: the connection broke
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1; echo \"xdim-status \$?\"" |
        tee "$said" || return 255
    worst=$(sed -n 's/.*xdim-status \([0-9]*\).*/\1/p' "$said" | sort -n | tail -n 1)
    return "${worst:-255}"
}

printf -v arguments ' %q' "--config=$CONFIG" "--workdir=$WORKDIR" "--config.data.root=$DATA" --coordinator=auto "$@"
said=$(mktemp)
trap 'rm -f "$said"; remove' EXIT
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    "${queued[@]}" create "$NAME" --node-id="$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
        --runtime-version="$VERSION" --spot
    until [ "$(state)" = ACTIVE ]; do
        case "$(state)" in FAILED | SUSPENDED) break ;; esac
        sleep "$WAIT"
    done
    while [ "$(state)" = ACTIVE ]; do
        status=0
        { run "python3 -m pip install --quiet '$SOURCE'" && run "python3 -m xdim_jax.train$arguments"; } || status=$?
        case $status in
            75) break ;; # saved: another TPU
            255) sleep "$WAIT" ;; # the connection broke: on this one, if it is still there
            *) exit "$status" ;; # done, or an error that another TPU would not mend
        esac
    done
    remove
done
echo "error: $ATTEMPTS TPUs were taken away before the training was done; run the same command to go on" >&2
exit 75
