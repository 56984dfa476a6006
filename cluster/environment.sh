#!/usr/bin/env bash
# Makes the environment ~/venv of a node. The first node builds it with pip and leaves an archive in DIRECTORY, which all
# nodes share; every later node unpacks that archive, so a replacement node downloads nothing from a package index.
#
#     environment.sh DIRECTORY [ARGUMENTS OF pip install]
#
# TORCH_INDEX=URL names PyTorch's own index of builds for CPUs. Nodes without an NVIDIA driver install that build, which is
# small, and nodes with one install PyPI's, which has CUDA.
#
# The archive's name says what it was made from: requirements, constraints, arguments, Python and processor.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: environment.sh DIRECTORY [ARGUMENTS OF pip install]" >&2; exit 2; }
directory=$1
shift
here=$(cd "$(dirname "$0")/.." && pwd)
venv=$HOME/venv
python=${PYTHON:-python3}

has_driver() { [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; }
if [ -n "${TORCH_INDEX:-}" ] && ! has_driver; then set -- "$@" -c constraints-cpu.txt --extra-index-url "$TORCH_INDEX"; fi

made_from() {
    cat "$here"/requirements.txt "$here"/constraints*.txt
    echo "$venv" "$@"
    "$python" --version
    uname --machine
}
key=$(made_from "$@" | sha256sum | cut -c1-16)
archive=$directory/venv-$key.tar
[ "$(cat "$venv/made-from" 2>/dev/null)" != "$key" ] || exit 0
rm -rf "$venv"

if [ -f "$archive" ]; then
    if tar -xf "$archive" -C "$HOME" && "$venv/bin/python" -c "import torch, ray"; then
        echo "environment: unpacked $archive"
        exit 0
    fi
    echo "environment: $archive cannot be used on this node; it is built anew" >&2
    rm -rf "$venv"
fi

"$python" -m venv "$venv"
(cd "$here" && "$venv/bin/pip" install --quiet -r requirements.txt "$@")
echo "$key" >"$venv/made-from"
if [ -d "$directory" ] && [ -w "$directory" ]; then
    # The archive appears under its name when it is whole, also where two nodes build it at once.
    part=$archive.$(hostname).$$
    if tar -cf "$part" -C "$HOME" "$(basename "$venv")" && mv -f "$part" "$archive"; then
        echo "environment: built, and left in $archive for other nodes"
    else
        rm -f "$part"
        echo "environment: built; it cannot be left in $directory" >&2
    fi
else
    echo "environment: built; $directory cannot be written, so every node builds its own" >&2
fi
