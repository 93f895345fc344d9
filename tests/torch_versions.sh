#!/usr/bin/env bash
# Test what depends most on torch (export, compilation, precision, decoding) with several versions of it.
#
#   tests/torch_versions.sh FOLDER [VERSION ...]
#
# VERSION is one of torch, such as 2.12; by default the oldest that setup.cfg allows, the one before the newest, and the
# newest. FOLDER gets a virtual environment for each, of several GB, and keeps it for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?"usage: tests/torch_versions.sh FOLDER [VERSION ...]"}
shift
tests=(tests/inference/test_export.py tests/models/test_fast_paths.py tests/runtime/test_precision.py tests/data/test_decod*.py)

lowest() { sed -n "s/^ *$1>=\([0-9.]*\)$/\1/p" setup.cfg | head -n 1; }

# prepare NAME [PACKAGE ...]: make the environment NAME, with these packages in these versions
prepare() {
    local name=$1
    shift
    [[ -x $folder/$name/bin/python ]] || python3 -m venv "$folder/$name"
    "$folder/$name/bin/pip" install -q -e ".[test]" "$@"
}

if (($#)); then
    names=("$@")
    for name in "${names[@]}"; do prepare "$name" "torch==$name.*"; done
else
    prepare newest
    newest=$("$folder/newest/bin/python" -c 'import torch; print(torch.__version__)')
    IFS=. read -r major minor _ <<<"$newest"
    previous=$major.$((minor - 1))
    oldest=$(lowest torch)
    prepare "$oldest" "torch==$oldest.*" "torchvision==$(lowest torchvision).*"
    prepare "$previous" "torch==$previous.*"
    names=("$oldest" "$previous" newest)
fi

failed=()
for name in "${names[@]}"; do
    "$folder/$name/bin/python" -c 'import torch, torchvision; print("torch", torch.__version__, "torchvision", torchvision.__version__)'
    "$folder/$name/bin/python" -m pytest -m "not slow" "${tests[@]}" || failed+=("$name")
done
if ((${#failed[@]})); then
    echo "failed with torch ${failed[*]}" >&2
    exit 1
fi
