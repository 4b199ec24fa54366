#!/bin/sh
# Set up .venv with everything the project needs: `make setup` calls this where it is missing or out of date.
set -eu
say() { printf 'miniai: %s\n' "$*" >&2; }
install() { .venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt "$@"; }

find_python() {
    for p in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if "$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$p"; return; fi
    done
    return 1
}

if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    if ! python=$(find_python); then
        say "needs Python 3.11 or newer. Install it, or name it: make PYTHON=/path/to/python3.12 $1"; exit 1
    fi
    if ! err=$("$python" -m venv --clear .venv 2>&1); then
        say "$python cannot make a virtual environment (on Debian or Ubuntu: sudo apt install python3-venv). $(echo "$err" | tail -n 1)"
        rm -rf .venv; exit 1
    fi
fi

if [ "$(uname)" != Linux ]; then say "installing into .venv, 2 GB in all: some minutes"
elif [ -n "${CPU:-}" ]; then
    say "installing PyTorch's build for CPUs, then the rest, into .venv: 2 GB in all"
    # `+cpu` stands in the versions, so that no index can give a build for CUDA instead
    if ! install --no-deps --retries 1 --index-url https://download.pytorch.org/whl/cpu \
        $(sed -n 's/^\(torch\|torchvision\)==.*/&+cpu/p' constraints.txt | grep . || echo torch torchvision); then
        say "PyTorch's index of CPU builds did not give them (the reason stands above). Without CPU=1, make installs the CUDA build: 6 GB, and it runs on CPUs too"
        exit 1
    fi
else say "installing into .venv. torch brings its CUDA libraries, 6 GB in all: some minutes (on a new .venv, make CPU=1 needs 2 GB)"
fi
if ! install --editable '.[dev]'; then
    say "the installation failed; the reason stands above. Run make again to go on where it stopped"; exit 1
fi
touch .venv/.ready
say "everything is installed. make demo draws clothes, make lab opens the notebooks"
