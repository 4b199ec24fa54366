#!/usr/bin/env bash
# Everything on a GPU: every notebook through nbdev_test, tests/, and gpu.py, within 12 minutes on 16 cores, without a network.
#
#     bash tests/bench/cuda.sh [FOLDER]     # $OUT or _run/cuda if no folder is given
#
# FOLDER holds, from the first minute on: summary.txt (a line for each result, as they come), summary.json (the same for programs)
# and logs.txt (what each said); and of gpu.py, gpu.json and gpu.png. The logs one by one are in _run/cuda/logs.
# It runs with .venv where that is usable, else with a python3 that has PyTorch, to which it adds the wheels in $WHEELS (.whl);
# `bash tests/bench/cuda_wheels.sh` gathers them beforehand. What can be set:
#     LIMIT=690       seconds for everything      NOTEBOOKS='nbs/1*.ipynb'    a choice of notebooks
#     EACH=300        seconds for each job        TESTS='tests/test_fid.py'   a choice of tests; '' for none
#     WORKERS=16      processes at a time         GPU=''                      without gpu.py
#     DEVICE=cpu      without a GPU, to try this script itself
set -euo pipefail
out=${1:-${OUT:-}}
case ${out:-/} in /*) ;; *) out=$PWD/$out;; esac
cd "$(dirname "$0")/../.."
WHEELS=${WHEELS:-.whl}
[ "${DEVICE:-cuda}" = cuda ] || export CUDA_VISIBLE_DEVICES=
NEEDED='accelerate, datasets, diffusers, fastprogress, nbdev, pytest, torch, torcheval, torchmetrics, torchvision'
usable() { "$1" -c "import $NEEDED" 2>/dev/null; }

with_wheels() { # an environment of its own on top of a python3 that has PyTorch
    local outer=$1 env=_run/cuda/venv
    "$outer" -c 'import torch' 2>/dev/null && ls "$WHEELS"/*.whl >/dev/null 2>&1 || return 1
    rm -rf "$env"; "$outer" -m venv --without-pip "$env"
    # `outer` may be a virtual environment itself, whose packages --system-site-packages would not find
    local folders='import site; print("\n".join(site.getsitepackages()))'
    "$outer" -c "$folders" >"$("$env/bin/python" -c "$folders" | head -n 1)/outer.pth"
    local install="$outer -m pip --python $env/bin/python install -q --no-index --no-deps --disable-pip-version-check"
    $install --no-compile "$WHEELS"/*.whl
    $install --no-build-isolation -e . || echo "miniai itself could not be installed: tests of its commands will fail" >&2
    usable "$env/bin/python"
}

for python in ${PYTHON:-} .venv/bin/python python3; do
    if usable "$python"; then break; fi
    if with_wheels "$python"; then python=_run/cuda/venv/bin/python; break; fi
    python=
done
if [ -z "$python" ]; then
    echo "no usable Python: make setup, or carry the wheels that cuda_wheels.sh gathers in $WHEELS to a python3 with PyTorch" >&2; exit 1
fi
[ ! -d "$WHEELS/fashion-mnist" ] || export MINIAI_DATA=${MINIAI_DATA:-$PWD/$WHEELS/fashion-mnist}
exec "$python" tests/bench/cuda.py "${out:-_run/cuda}"
