#!/usr/bin/env bash
# Makes .venv with a recent pip, unless it is there: environment.sh fills it.
#
# PYTHON names the interpreter to start from (default: python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

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
    # Python's own takes twice as long to find and unpack everything.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
        -c constraints.txt --upgrade pip || echo "pip stays as it came with Python" >&2
fi
