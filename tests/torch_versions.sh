#!/usr/bin/env bash
# Test what depends most on torch (export, compilation, precision, decoding) with several versions of it, and with the
# least version of everything that setup.cfg allows.
#
#   tests/torch_versions.sh FOLDER [VERSION ...]
#
# VERSION is one of torch, such as 2.12, or minima; by default minima, the version before the newest, and the newest.
# FOLDER gets a virtual environment for each, of several GB, and keeps it for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?"usage: tests/torch_versions.sh FOLDER [VERSION ...]"}
shift
tests=(tests/inference/test_export.py tests/models/test_fast_paths.py tests/runtime/test_precision.py tests/data/test_decod*.py)
# With the least versions, something of each library: charts, tables, pictures, lists, pages, jobs, peers.
more=(tests/common tests/data/test_images.py tests/data/test_catalogues.py tests/models/test_peer_weights.py tests/pages
    tests/runs/test_checkpoint.py tests/security/test_minima.py tests/slurm/test_submit.py tests/test_config.py)

# prepare NAME [PACKAGE ...]: make the environment NAME, with these packages in these versions
prepare() {
    local name=$1
    shift
    [[ -x $folder/$name/bin/python ]] || python3 -m venv "$folder/$name"
    "$folder/$name/bin/pip" install -q -e ".[test]" "$@"
}

prepare_minima() {
    [[ -x $folder/minima/bin/python ]] || python3 -m venv "$folder/minima"
    "$folder/minima/bin/pip" install -q packaging
    "$folder/minima/bin/python" tests/minima.py >"$folder/minima/constraints.txt"
    prepare minima -c "$folder/minima/constraints.txt"
}

if (($#)); then
    names=("$@")
    for name in "${names[@]}"; do
        if [[ $name == minima ]]; then prepare_minima; else prepare "$name" "torch==$name.*"; fi
    done
else
    prepare newest
    newest=$("$folder/newest/bin/python" -c 'import torch; print(torch.__version__)')
    IFS=. read -r major minor _ <<<"$newest"
    previous=$major.$((minor - 1))
    prepare_minima
    prepare "$previous" "torch==$previous.*"
    names=(minima "$previous" newest)
fi

failed=()
for name in "${names[@]}"; do
    "$folder/$name/bin/python" -c 'import torch, torchvision; print("torch", torch.__version__, "torchvision", torchvision.__version__)'
    if [[ $name == minima ]]; then chosen=("${tests[@]}" "${more[@]}"); else chosen=(-m "not slow" "${tests[@]}"); fi
    "$folder/$name/bin/python" -m pytest "${chosen[@]}" || failed+=("$name")
done
if ((${#failed[@]})); then
    echo "failed with torch ${failed[*]}" >&2
    exit 1
fi
