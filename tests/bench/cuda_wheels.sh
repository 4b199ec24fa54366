#!/usr/bin/env bash
# Gathers, on a machine with a network, the wheels that cuda.sh needs on one without: those of this project's requirements that a
# Python with PyTorch for CUDA has not got. They are few and small (the size is printed), to be carried with the repository.
#
#     bash tests/bench/cuda_wheels.sh [FOLDER]     # .whl if no folder is given
#
#     PY=3.12                       the Python there, on Linux for x86-64
#     HAVE='torch numpy …'          what is there already; a file of its `pip freeze` does as well: HAVE="$(cat freeze.txt)"
#     FASHION=/path/to/images       carries Fashion-MNIST too (30 MB); without it, the stand-in is drawn
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-.whl} py=${PY:-3.12}
# what is large, and what must fit to the packages there (a newer huggingface-hub breaks their transformers)
have=${HAVE:-accelerate contourpy fonttools hf-xet huggingface-hub jupyter kiwisolver lightning-utilities matplotlib numpy pandas pillow
    iniconfig pluggy psutil pyarrow pytest pyyaml regex safetensors scipy setuptools torch torchmetrics torchvision triton uvloop}
python=.venv/bin/python; [ -x "$python" ] || python=python3
target=(--only-binary=:all: --implementation cp --python-version "$py" -qq --disable-pip-version-check)
for n in 5 12 17 24 27 28 31 34 35 39; do target+=(--platform "manylinux_2_${n}_x86_64"); done
target+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT

# What is asked for, without what is there; then the same for what that needs. jupyter is more than a notebook's tests ask for.
missing() { # of the requirements on standard input, those that are not there
    "$python" -c '
import re, sys
def name(o): return re.split("[][=<>;@~! ]", o)[0].lower().replace("_", "-")
have = {"jupyter"} | set(map(name, sys.argv[1].split()))
print("\n".join(o for o in sys.stdin.read().split() if name(o) not in have))' "$have"
}
"$python" -c '
import configparser
cfg = configparser.ConfigParser(delimiters=["="]); cfg.read("settings.ini", encoding="utf-8")
print(cfg["DEFAULT"]["requirements"], cfg["DEFAULT"]["dev_requirements"], "ipykernel")' | missing >"$tmp/ask"
"$python" -m pip install --dry-run --ignore-installed --target "$tmp/none" --report "$tmp/report" "${target[@]}" \
    -c constraints.txt -r "$tmp/ask"
"$python" -c '
import json, sys
for o in json.load(sys.stdin)["install"]: print(o["metadata"]["name"] + "==" + o["metadata"]["version"])' \
    <"$tmp/report" | missing >"$tmp/get"
rm -rf "$folder"; mkdir -p "$folder"; echo "*" >"$folder/.gitignore"
"$python" -m pip download --no-deps -d "$folder" "${target[@]}" -r "$tmp/get"
if [ -n "${FASHION:-}" ]; then mkdir "$folder/fashion-mnist"; cp "$FASHION"/*-ubyte.gz "$folder/fashion-mnist/"; fi
echo "$(ls "$folder"/*.whl | wc -l) wheels, $(du -sm "$folder" | cut -f1) MB in $folder"
