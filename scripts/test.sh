#!/usr/bin/env bash
# Everything CI checks, from nothing: set up, lint, types, tests. Arguments go to pytest.
#
#   bash scripts/test.sh                 all
#   bash scripts/test.sh -m "not slow"   without the slow tests
#   bash scripts/test.sh -n 0            in one process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# TensorRT-RTX builds T4 engines without a GPU, so its tests run wherever its library installs.
# Ray is half a gigabyte, but there is no other way to see two nodes and the death of one.
extras=dev,docs,ray
bash scripts/venv.sh
unpacking=
if [ "$(uname -sm)" = "Linux x86_64" ]; then
    extras=dev,docs,ray,tensorrt-rtx,gpu-images
    # pip unpacks on one core. So two of them take half of the pins each, and nothing else; what is
    # missing then, environment.sh brings.
    if ! compgen -G ".venv/.ready-*" >/dev/null; then
        (
            for half in 0 1; do
                .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
                    --no-deps -r <(grep -v "^pip==" constraints.txt | awk "NR % 2 == $half") &
            done
            wait
        ) &
        unpacking=$!
    fi
fi
# Meanwhile: a server for the tests of export-triton, which skip without it.
{
    bash scripts/tritonserver.sh || echo "no tritonserver: its tests skip" >&2
    bash scripts/lint_workflows.sh
} &
fetching=$!
[ -z "$unpacking" ] || wait "$unpacking" || true
bash scripts/environment.sh "$extras"
# Images of containers often keep Python from writing bytecode. Here some 150 processes would each compile
# PyTorch again: 6 s each, where importing it takes 2.
unset PYTHONDONTWRITEBYTECODE
# What the tests import is compiled here, once, rather than by every worker at its start; so is what
# PyTorch imports with the first export and the first optimizer, and Ray Data, which all of its
# processes would compile at once. The run below says what is wrong.
.venv/bin/python -c 'import pytest, ray.data, torch._dynamo, torch.onnx._internal.exporter._core
pytest.main(["--collect-only", "-qq"])' >/dev/null &
compiling=$!
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/lint-imports
# Types and the site are checked during the tests, some of which only wait; what they say comes last.
said=$(mktemp)
{
    .venv/bin/mypy
    # Not --quiet: then no warning counts.
    NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
} >"$said" 2>&1 &
checking=$!
wait "$fetching"
wait "$compiling" || true
# Each worker on one thread: two threads of one network, or two workers of two threads, would wait for
# each other. A worker more than there are cores, as some tests only wait for other processes, but four
# at most. A file's tests share what they make, so a file stays in one worker.
export OMP_NUM_THREADS=1
workers=$(($(getconf _NPROCESSORS_ONLN) + 1))
status=0
.venv/bin/python -m pytest -n $((workers < 4 ? workers : 4)) --dist loadfile --no-loadscope-reorder \
    --durations 40 "$@" || status=$?
wait "$checking" || status=1
cat "$said"
rm "$said"
exit "$status"
