#!/usr/bin/env bash
# Everything CI checks, from nothing: set up, lint, types, tests. Arguments go to pytest.
#
#   bash scripts/test.sh                 all
#   bash scripts/test.sh -m "not slow"   without the slow tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# TensorRT-RTX builds T4 engines without a GPU, so its tests run wherever its library installs.
# Ray is half a gigabyte, but there is no other way to see two nodes and the death of one.
extras=dev,ray
if [ "$(uname -sm)" = "Linux x86_64" ]; then extras=dev,ray,tensorrt-rtx; fi
bash scripts/environment.sh "$extras"
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/lint-imports
bash scripts/lint_workflows.sh
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
