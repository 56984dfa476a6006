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

export RAY_USAGE_STATS_ENABLED=0
# Private directory on each node for Ray's sockets, logs and spilled objects. Socket paths must be short.
export RAY_TMPDIR="${LEAP_TMPDIR:-/tmp}/leap-$SLURM_JOB_ID-${SLURM_NODEID:-0}"
private_folder() {
    install -d -m 700 "$RAY_TMPDIR"
}
# The port is outside Ray's worker range (10002 to 19999) and the kernel's ephemeral range (from 32768).
# shellcheck disable=SC2034 # used by the scripts that source this one, like "run" below
port=$((20000 + ${SLURM_JOB_ID##*[!0-9]} % 10000))

# Use --resume if the run directory holds a run, so that a requeued job continues it.
# The run's own settings then apply, and the flags for starting a run are left out.
# shellcheck disable=SC2034
go_on() {
    local run_dir=$1
    if [ -e "$run_dir/config.yaml" ]; then
        run=(--run-dir "$run_dir" --resume)
    else
        run=(--run-dir "$@")
    fi
}
