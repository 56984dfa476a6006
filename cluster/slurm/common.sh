# shellcheck shell=bash
# Shared part of the Slurm scripts. Each sources it in the directory of submission, which is the repository.

# Use ray and python from the repository's environment, unless the job provides them (a module, a container).
command -v ray > /dev/null || PATH=$PWD/.venv/bin:$PATH
command -v ray > /dev/null || { echo "slurm: no ray here; submit from the repository, after make .venv/installed" >&2; exit 2; }

# Joining the cluster requires the token. It is read from the home directory, which Slurm's nodes share.
export RAY_AUTH_MODE=token
if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
    echo "slurm: no token in ~/.ray/auth_token; make one as cluster/README.md says" >&2
    exit 2
fi

export RAY_USAGE_STATS_ENABLED=0 RAY_worker_killing_policy_by_group=true # if memory runs out, workers go before the server
# Private directory on each node for Ray's sockets, logs and spilled objects. Socket paths must be short.
export RAY_TMPDIR="${LEAP_TMPDIR:-/tmp}/leap-$SLURM_JOB_ID-${SLURM_NODEID:-0}"
private_folder() {
    install -d -m 700 "$RAY_TMPDIR"
}
# The port is outside Ray's worker range (10002 to 19999) and the kernel's ephemeral range (from 32768).
# shellcheck disable=SC2034 # used by the scripts that source this one, like "run" below
port=$((20000 + ${SLURM_JOB_ID##*[!0-9]} % 10000))

# Print an address of a node that the others reach. Debian resolves a machine's own name as 127.0.1.1, where only it answers;
# the scripts that ask run on the head.
address_of() {
    case $1 in *[!0-9.]*) ;; *) echo "$1" && return ;; esac
    local found
    found=$(getent ahostsv4 "$1" | awk '$1 !~ /^127\./ { print $1; exit }')
    echo "${found:-$(hostname -I | awk '{ print $1 }')}"
}
# The same flags start the run and, when the job is requeued or submitted again, continue it.
# shellcheck disable=SC2034
go_on() {
    run=(--resume auto --run-dir "$@")
}
# Put a job that ran out of time back into the queue, where it continues by itself. $1 is the exit code of training; a job
# that only provides a node gives none.
requeue_if_out_of_time() {
    [ "${1:-130}" -eq 130 ] && [ -n "${LEAP_OUT_OF_TIME:-}" ] || return 0
    scontrol requeue "$SLURM_JOB_ID" && echo "slurm: out of time; the job is requeued and continues" >&2
}
# Whether the job's time is up, rather than somebody's patience: --signal comes at most four minutes before the end.
is_out_of_time() {
    local left
    left=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %L 2> /dev/null) || return 1
    case $left in 0:* | [0-3]:[0-5][0-9] | 0[0-3]:[0-5][0-9]) return 0 ;; *) return 1 ;; esac
}
