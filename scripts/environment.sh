#!/usr/bin/env bash
# Makes or refreshes .venv: this package and its pinned dependencies (constraints.txt), with pip.
#
#   bash scripts/environment.sh [EXTRAS]      EXTRAS of pyproject.toml, such as dev,tensorrt-rtx
#
# PYTHON names the interpreter to start from (default: python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    if ! "${PYTHON:-python3}" -m venv .venv >/dev/null 2>&1; then
        # Debian ships Python without venv.
        rm -rf .venv
        echo "python3 has no venv: installing Debian's python3-venv" >&2
        as_root=""
        [ "$(id -u)" = 0 ] || as_root=sudo
        $as_root apt-get update -qq
        $as_root apt-get install -y -qq python3-venv >/dev/null
        "${PYTHON:-python3}" -m venv .venv
    fi
fi

stamp=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
marker=".venv/.ready-$stamp-${extras:-base}"
if [ ! -e "$marker" ]; then
    echo "installing into .venv (once; a few minutes) ..." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -c constraints.txt -e ".${extras:+[$extras]}"
    touch "$marker"
fi
