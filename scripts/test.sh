#!/usr/bin/env bash
# Everything CI checks, from nothing: set up, lint, types, tests. Arguments go to pytest.
#
#   bash scripts/test.sh                 all
#   bash scripts/test.sh -m "not slow"   without the slow tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# TensorRT-RTX builds T4 engines without a GPU, so its tests run wherever its library installs.
extras=dev,docs
if [ "$(uname -sm)" = "Linux x86_64" ]; then extras=dev,docs,tensorrt-rtx; fi
bash scripts/environment.sh "$extras"
# A server for the tests of export-triton, which skip without it.
bash scripts/tritonserver.sh || echo "no tritonserver: its tests skip" >&2
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/lint-imports
.venv/bin/mypy
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
.venv/bin/python -m pytest "$@"
