#!/usr/bin/env bash
# Train on a Cloud TPU, one process per host. The TPU is requested as a queued resource.
#
#     launch/tpu_queued.sh [--config.<key>=<value> ...]
#
# The script waits until the TPU is active, installs the package on all its hosts, trains, and deletes the TPU. If the
# TPU is preempted (--spot), or training has saved and must be continued (status 75), the script requests another TPU.
# Set the variables below. All hosts need access to data and workdir (use a bucket, or a mounted disk), and to the
# internet, from which a Python that the package supports is installed.
set -euo pipefail

NAME=${NAME:-xdim}
ZONE=${ZONE:-us-central2-b}
TYPE=${TYPE:-v4-32}
VERSION=${VERSION:-tpu-ubuntu2204-base}
CONFIG=${CONFIG:-configs/brats_dxnet.py}
WORKDIR=${WORKDIR:-gs://BUCKET/runs/dxnet}
DATA=${DATA:-/mnt/data/BraTS2021_Training_Data}
BATCH=${BATCH:-16} # samples of a batch, over all chips: a multiple of their number
# what pip installs: the URL of a wheel with extras, or "xdim_jax[tpu,cloud] @ git+https://..."
SOURCE=${SOURCE:?set SOURCE to the package, for example "xdim_jax[tpu,cloud] @ git+https://HOST/REPOSITORY"}
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

printf -v arguments ' %q' "--config=$CONFIG" "--workdir=$WORKDIR" "--config.data.root=$DATA" "--config.data.batch=$BATCH" \
    --coordinator=auto "$@"
install="python3 -m pip install --quiet uv && python3 -m uv venv --quiet --allow-existing --python 3.12 xdim-env &&
    python3 -m uv pip install --quiet --python xdim-env/bin/python $(printf %q "$SOURCE")"
output=$(mktemp)
requested="" # only a TPU that this script has requested is deleted
trap 'rm -f "$output"; if [ -n "$requested" ]; then remove; fi' EXIT
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    "${queued[@]}" create "$NAME" --node-id="$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
        --runtime-version="$VERSION" --spot
    requested=1
    until [ "$(state)" = ACTIVE ]; do
        case "$(state)" in FAILED | SUSPENDED) break ;; esac
        sleep "$WAIT"
    done
    while [ "$(state)" = ACTIVE ]; do
        status=0
        { run "$install" && run "xdim-env/bin/python -m xdim_jax.train$arguments"; } || status=$?
        case $status in
            75) break ;; # training has saved: continue on another TPU
            255) sleep "$WAIT" ;; # the connection broke: try again, if the TPU is still active
            *) exit "$status" ;; # training has ended, or has failed with an error that another TPU would not change
        esac
    done
    remove
    requested=""
done
echo "error: training has not ended after $ATTEMPTS TPUs; run the same command to continue it" >&2
exit 75
