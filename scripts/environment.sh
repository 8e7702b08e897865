#!/usr/bin/env bash
# Makes or refreshes .venv: this package and its pinned dependencies (constraints.txt), with pip.
#
#   bash scripts/environment.sh [EXTRAS]      EXTRAS of pyproject.toml, such as dev,tensorrt-rtx
#
# PYTHON names the interpreter to start from (default: python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-}

bash scripts/venv.sh
stamp=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
marker=".venv/.ready-$stamp-${extras:-base}"
if [ ! -e "$marker" ]; then
    echo "installing into .venv, once: 1.2 GB, and several more where pip takes PyTorch's CUDA" \
        "build, the default on Linux; nothing is compiled ..." >&2
    # Off a terminal pip draws no bar, and for minutes there is nothing else to see.
    (while sleep 30; do echo "  ... $(du -sm .venv | cut -f1) MB so far" >&2; done) &
    teller=$!
    trap 'kill "$teller" 2>/dev/null || true' EXIT
    # Without compiling all 16 000 files (half a minute): Python compiles what it imports.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
        -c constraints.txt -e ".${extras:+[$extras]}"
    touch "$marker"
fi
