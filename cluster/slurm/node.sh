#!/usr/bin/env bash
# Runs on each node of fixed.sbatch: starts Ray and, on the head, the driver. The arguments are those of launch.py train.
set -euo pipefail
. cluster/slurm/common.sh
private_folder
trap 'rm -rf "$RAY_TMPDIR" || true' EXIT

export RAY_ADDRESS=$LEAP_ADDRESS # symmetric-run would otherwise use any Ray instance on the node
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-180} # seconds to wait for all nodes
# The head of a fixed job is never restarted, so the other nodes exit soon after it. The head itself keeps the default,
# because its symmetric-run could not survive the ten seconds that its own `ray stop` may take, and would exit with 1.
[ "${SLURM_NODEID:-0}" = 0 ] || export RAY_gcs_rpc_server_reconnect_timeout_s=10

# shellcheck disable=SC2016 # the inner shell must expand $$, which becomes the driver's process ID
ray symmetric-run --address "$LEAP_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --temp-dir "$RAY_TMPDIR/ray" \
    -- bash -c 'echo $$ > "$LEAP_DRIVER"; exec python launch.py train --address "$LEAP_ADDRESS" "$@"' driver "$@"
