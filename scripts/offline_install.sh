#!/usr/bin/env bash
# Installs a bundle of scripts/offline_bundle.sh, which lies beside this script, with no network:
#   bash offline_install.sh TARGET
# makes the directory TARGET with the source, its .venv and the model.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
fail() {
  echo "offline_install: $*" >&2
  exit 1
}
[ $# = 1 ] || fail "usage: bash offline_install.sh TARGET"
target=$(realpath -m "$1") python=$(command -v "${PYTHON:-python3}") || fail "no ${PYTHON:-python3}"
python=$(realpath -s "$python")
[ ! -e "$target" ] || fail "$target exists; name a new directory"
[ -f "$here/SHA256SUMS" ] || fail "no SHA256SUMS beside this script: is it in the bundle's directory?"
echo "offline_install: checking the parts"
(cd "$here" && sha256sum --quiet -c SHA256SUMS) ||
  fail "parts are missing or damaged; copy those named above again"

mkdir -p "$target"
work=$(mktemp -d "$target/.bundle.XXXX")
finished=
trap 'rm -rf "$work"; [ -n "$finished" ] || rm -rf "$target"' EXIT
(cd "$here" && cut -c67- SHA256SUMS | xargs cat) | tar -x -C "$work"
bundle=$work/fastgen-bundle
. "$bundle/bundle.env"
[ "$(uname -m)" = "$machine" ] || fail "the bundle is for $machine, this machine is $(uname -m)"
has=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$has" = "$python_wanted" ] || fail "the bundle is for Python $python_wanted, $python is $has; set PYTHON"

echo "offline_install: installing for $device into $target"
cp -r "$bundle/source/." "$target"
cd "$target"
"$python" -m venv .venv
.venv/bin/python -m pip install -q --no-index --find-links "$bundle/wheels" uv
offline=(.venv/bin/uv pip install -q --python .venv/bin/python --offline --no-index --no-deps)
"${offline[@]}" --find-links "$bundle/wheels" -r "$bundle/requirements.txt"
# Builds the native kernels where a compiler is at hand.
"${offline[@]}" --no-build-isolation -e .
if [ -n "$model" ]; then
  mkdir -p .cache
  mv "$bundle/model" ".cache/$model"
fi
.venv/bin/fastgen --help >/dev/null
finished=yes
echo "offline_install: done; for example"
echo "  cd $target && .venv/bin/vllm serve ${model:+.cache/}${model:-MODEL} --attention-backend fastgen"
