#!/bin/sh
# Build the website into _site/: README.md, the notebooks as they were saved, and a page of reference a module.
set -eu
say() { printf 'miniai: %s\n' "$*"; }
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
export DOCS_SRC="$tmp/docs"; mkdir -p "$DOCS_SRC/assets"

if ! .venv/bin/python -c 'import material, mkdocs_jupyter, mkdocstrings_handlers.python' 2>/dev/null; then
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
fi
# The site is to be read without a network or a server: MathJax, and what lets search run from the disk, travel in it.
vendor() {  # npm package, file in it, name here
    (cd "$tmp" && tar -xzOf "$(npm pack --silent --fetch-retries=0 "$1")" "package/$2") >"$DOCS_SRC/assets/$3" 2>/dev/null
}
vendor mathjax@3 es5/tex-svg.js mathjax.js && vendor iframe-worker@1 shim/index.js iframe-worker.js ||
    say "npm could not bring MathJax and iframe-worker: the site shows equations as TeX, and searches only from a server"
NO_MKDOCS_2_WARNING=1 PYTHONDONTWRITEBYTECODE=1 .venv/bin/mkdocs build --strict -f .ci/mkdocs.yml
say "the website is in _site/: open _site/index.html"
