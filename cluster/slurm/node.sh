#!/usr/bin/env bash
# What fixed.sbatch runs on each of its nodes: Ray, and on the head the driver. Arguments: those of launch.py train.
set -euo pipefail
. cluster/slurm/common.sh
private_folder
trap 'rm -rf "$RAY_TMPDIR" || true' EXIT

export RAY_ADDRESS=$LEAP_ADDRESS # for symmetric-run itself, which would otherwise look for any Ray on the node
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-180} # seconds for all nodes to be there
# The head of a fixed job does not come back, so the others end soon after it. (Not on the head itself: symmetric-run, which is
# connected to it, would not outlive the ten seconds that its own `ray stop` may take, and end with 1.)
[ "${SLURM_NODEID:-0}" = 0 ] || export RAY_gcs_rpc_server_reconnect_timeout_s=10

# shellcheck disable=SC2016 # the inner shell is to expand it: the driver's process is its own
ray symmetric-run --address "$LEAP_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --temp-dir "$RAY_TMPDIR/ray" \
    -- bash -c 'echo $$ > "$LEAP_DRIVER"; exec python launch.py train --address "$LEAP_ADDRESS" "$@"' driver "$@"
