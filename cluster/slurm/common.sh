# shellcheck shell=bash
# What the Slurm scripts share: sourced by each of them, in the folder that it was submitted from (the repository).

# ray and python of the repository's environment, unless the job already has them (a module, a container).
command -v ray > /dev/null || PATH=$PWD/.venv/bin:$PATH
command -v ray > /dev/null || { echo "slurm: no ray here; submit from the repository, after make .venv/installed" >&2; exit 2; }

# Nobody joins without the token. It is read from the home directory, which Slurm's nodes share.
export RAY_AUTH_MODE=token
if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
    echo "slurm: no token in ~/.ray/auth_token; make one as cluster/README.md says" >&2
    exit 2
fi

export RAY_USAGE_STATS_ENABLED=0
# Ray's own files, on each node, for nobody else: sockets, logs, what spills. Short, as paths of sockets have to be.
export RAY_TMPDIR="${LEAP_TMPDIR:-/tmp}/leap-$SLURM_JOB_ID-${SLURM_NODEID:-0}"
private_folder() {
    install -d -m 700 "$RAY_TMPDIR"
}
# Outside of Ray's range for workers (10002 to 19999) and of the kernel's for clients (from 32768).
# shellcheck disable=SC2034 # of the scripts that source this one, as is "run" below
port=$((20000 + ${SLURM_JOB_ID##*[!0-9]} % 10000))

# How to go on: with --resume where the run directory holds a run, so that a job that is queued again carries on.
# A run's own settings count then, and the flags that say how to start one are left out.
# shellcheck disable=SC2034
go_on() {
    local run_dir=$1
    if [ -e "$run_dir/config.yaml" ]; then
        run=(--run-dir "$run_dir" --resume)
    else
        run=(--run-dir "$@")
    fi
}
