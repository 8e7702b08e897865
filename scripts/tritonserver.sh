#!/usr/bin/env bash
# Fetches NVIDIA's tritonserver with its Python backend, for the tests and benchmarks: 75 MB, into .venv/tritonserver.
#
#   bash scripts/tritonserver.sh
#
# The server is taken from the wheel of nvidia-pytriton, without the Python package around it, whose requirements
# (NumPy 1) conflict with ours. Models get NumPy 1 all the same: with a later one the tensors of this release of the
# backend (24.10) are empty. The server holds the Python backend only, and is for Linux on x86-64 with glibc 2.35 or
# later and Python 3.10 to 3.12.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=0.7.0
folder=.venv/tritonserver

[ "$(uname -sm)" = "Linux x86_64" ] || { echo "tritonserver is for Linux on x86-64 only" >&2; exit 1; }
if [ ! -e "$folder/.ready-$version" ]; then
    rm -rf "$folder"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
        --target "$folder" "nvidia-pytriton==$version"
    # The models' environment: this one, with NumPy 1 in front. The backend looks at no PYTHONPATH.
    .venv/bin/python -m venv --without-pip "$folder/models"
    packages=$(echo "$folder"/models/lib/python3.*/site-packages)
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
        --only-binary=:all: --target "$packages" "numpy==1.26.4"
    ours=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$ours')" > "$packages/environment.pth"
    server=$folder/pytriton/tritonserver
    python=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    # The backend runs models in a program that links one release of Python: that of this environment.
    cp "$server/python_backend_stubs/$python/triton_python_backend_stub" "$server/backends/python/"
    chmod +x "$server/bin/tritonserver" "$server/backends/python/triton_python_backend_stub"
    touch "$folder/.ready-$version"
fi
