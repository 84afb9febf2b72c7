#!/usr/bin/env bash
# Train on a Cloud TPU, one process per host. The TPU is requested as a queued resource.
#
#     launch/tpu_queued.sh [--config.<key>=<value> ...]
#
# The script waits until the TPU is active, installs the package on all its hosts, trains, and deletes the TPU. If the
# TPU is preempted (--spot), or training has saved and must be continued (status 75), the script requests another TPU.
# Set the variables below. All hosts need access to data and workdir: use a bucket, or a mounted disk.
set -euo pipefail

NAME=${NAME:-xdim}
ZONE=${ZONE:-us-central2-b}
TYPE=${TYPE:-v4-32}
VERSION=${VERSION:-tpu-ubuntu2204-base}
CONFIG=${CONFIG:-configs/brats_dxnet.py}
WORKDIR=${WORKDIR:-gs://BUCKET/runs/dxnet}
DATA=${DATA:-/mnt/data/BraTS2021_Training_Data}
SOURCE=${SOURCE:-"xdim_jax[tpu,cloud]"} # argument of pip install: a name, the URL of a wheel, or git+https://...
ATTEMPTS=${ATTEMPTS:-100}
WAIT=${WAIT:-30} # seconds between two checks of the state

queued=(gcloud compute tpus queued-resources)

state() {
    "${queued[@]}" describe "$NAME" --zone="$ZONE" --format='value(state.state)'
}

remove() {
    "${queued[@]}" delete "$NAME" --zone="$ZONE" --force --quiet || true
}

# Run a command on all hosts. Return the largest exit status, which gcloud does not return; 255 if the connection broke.
run() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1; echo \"xdim-status \$?\"" |
        tee "$output" || return 255
    worst=$(sed -n 's/.*xdim-status \([0-9]*\).*/\1/p' "$output" | sort -n | tail -n 1)
    return "${worst:-255}"
}

printf -v arguments ' %q' "--config=$CONFIG" "--workdir=$WORKDIR" "--config.data.root=$DATA" --coordinator=auto "$@"
output=$(mktemp)
trap 'rm -f "$output"; remove' EXIT
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
            75) break ;; # training has saved: continue on another TPU
            255) sleep "$WAIT" ;; # the connection broke: try again, if the TPU is still active
            *) exit "$status" ;; # training has ended, or has failed with an error that another TPU would not change
        esac
    done
    remove
done
echo "error: training has not ended after $ATTEMPTS TPUs; run the same command to continue it" >&2
exit 75
