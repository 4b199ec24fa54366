#!/bin/sh
# Fetch the Debian/Ubuntu package of Fashion-MNIST and unpack it, without root, to where `fashion_mnist()` looks.
set -eu
say() { printf 'miniai: %s\n' "$*"; }
dest=${XDG_CACHE_HOME:-$HOME/.cache}/miniai/fashion-mnist
for d in /usr/share/datasets/fashion-mnist "$dest"; do
    if [ -f "$d/train-images-idx3-ubyte.gz" ]; then say "Fashion-MNIST is in $d already"; exit 0; fi
done
if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    say "there is no apt here. The notebooks load Fashion-MNIST from the Hugging Face hub; or put the four IDX files"
    say "into a folder and name it in MINIAI_DATA"; exit 1
fi
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
if ! (cd "$tmp" && apt-get download -q dataset-fashion-mnist) >"$tmp/log" 2>&1; then
    say "apt could not fetch dataset-fashion-mnist (sudo apt-get update may help): $(tail -n 1 "$tmp/log")"; exit 1
fi
dpkg -x "$tmp"/dataset-fashion-mnist_*.deb "$tmp/deb"
mkdir -p "$(dirname "$dest")"
rm -rf "$dest.new"; cp -r "$tmp/deb/usr/share/datasets/fashion-mnist" "$dest.new"
rm -rf "$dest"; mv "$dest.new" "$dest"
say "Fashion-MNIST is in $dest"
