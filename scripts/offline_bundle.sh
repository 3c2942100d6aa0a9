#!/usr/bin/env bash
# Gathers all that scripts/offline_install.sh needs on a machine without a network: vLLM and its
# dependencies as wheels, this package and a model, in parts with checksums.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/.."
. scripts/common.sh

usage() {
  cat <<TEXT
usage: scripts/offline_bundle.sh [options] DIRECTORY
  --device cpu|cuda   the vLLM to gather (default: what this machine has)
  --part-size MIB     size of the parts (default 64)
  --model DIR|none    a model directory to take along (default $MODEL_DIR)
  --text-only         leave out what a text-only model such as Llama does not use: image, audio and
                      video packages, and kernels of other architectures
  --without PACKAGE   leave out another package, may be repeated
The bundle is for this machine's kind of CPU and this Python version (PYTHON names another one).
TEXT
}

absolute() { # of where this was called from
  (cd "$from" && realpath -m -- "$1")
}

refuse() {
  echo "offline_bundle: $*" >&2
  exit 2
}

# Not torchvision: vLLM's warm-up on GPUs imports it whatever the model.
TEXT_ONLY=(torchaudio torchcodec opencv-python-headless pynvvideocodec
  humming-kernels tilelang z3-solver tokenspeed-mla tokenspeed-triton instanttensor)
device=$(detect_device) part_size=64 model=$MODEL_DIR without=() out=
while [ $# -gt 0 ]; do
  [[ ! $1 =~ ^--(device|part-size|model|without)$ ]] || [ $# -gt 1 ] || refuse "$1 needs a value"
  case $1 in
    --device) device=$2 && shift ;;
    --part-size) part_size=$2 && shift ;;
    --model)
      model=$2 && shift
      [ "$model" = none ] || model=$(absolute "$model")
      ;;
    --text-only) without+=("${TEXT_ONLY[@]}") ;;
    --without) without+=("$2") && shift ;;
    -h | --help) usage && exit ;;
    -*) usage >&2 && refuse "unknown option $1" ;;
    *) out=$(absolute "$1") ;;
  esac
  shift
done
[ -n "$out" ] || { usage >&2 && exit 2; }
[[ $device =~ ^(cpu|cuda)$ ]] || refuse "--device $device, use cpu or cuda"
[[ $part_size =~ ^[1-9][0-9]{0,5}$ ]] || refuse "--part-size $part_size, use MiB"
[ "$model" = none ] || [ -f "$model/config.json" ] ||
  refuse "no model in $model; run scripts/setup.sh, name one with --model, or pass --model none"
set_versions "$device"
mkdir -p "$out"
[ -z "$(ls -A "$out")" ] || refuse "$out is not empty"

work=$(mktemp -d "$out/.work.XXXX")
trap 'rm -rf "$work"' EXIT
root=$work/fastgen-bundle wheels=$work/fastgen-bundle/wheels
mkdir -p "$wheels"
"${PYTHON:-python3}" -m venv "$work/tools"
python=$work/tools/bin/python
"$python" -m pip install -q uv "setuptools>=77"

echo "offline_bundle: resolving vLLM $VLLM_VERSION for $device"
wants=(uv "setuptools>=77")
if [ "$device" = cpu ]; then
  without+=("${CPU_LEAVES_OUT[@]}")
  with_cpu_torch "$python" -m pip download -q --no-deps -d "$wheels"
  write_vllm_shim "$work/vllm"
  "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$wheels" "$work/vllm"
  wants+=("torch==$TORCH_VERSION+cpu" "vllm==$VLLM_VERSION+cpu" "triton==$TRITON_VERSION")
else
  wants+=("torch==$TORCH_VERSION" "vllm==$VLLM_VERSION")
fi
leave_out "${without[@]}" >"$work/overrides.txt"
printf '%s\n' "${wants[@]}" >"$work/wants.txt"
gather() {
  : >"$work/errors.txt"
  "$work/tools/bin/uv" pip compile -q --no-header --no-annotate --find-links "$wheels" \
    --override "$work/overrides.txt" --constraint "$work/constraints.txt" \
    "$work/wants.txt" pyproject.toml --extra tools -o "$root/requirements.txt" || return
  echo "offline_bundle: downloading $(wc -l <"$root/requirements.txt") packages"
  # With === an index's torch 2.13.0+cpu is not taken for 2.13.0.
  sed 's/^torch==/torch===/' "$root/requirements.txt" >"$work/downloads.txt"
  "$python" -m pip download -q --no-deps --only-binary=:all: --find-links "$wheels" \
    -d "$wheels" -r "$work/downloads.txt" 2>"$work/errors.txt"
}

# The index pages that uv and pip see may be minutes apart, and a release may have no wheel: a
# version that pip does not find is ruled out, and all is resolved again.
: >"$work/constraints.txt"
until gather; do
  # Extras are left out; what was asked for with === is not ours to rule out.
  missing=$(sed -n 's/.*No matching distribution found for \([A-Za-z0-9._-]*\)[^= ]*==\([^= ][^ ]*\).*/\1!=\2/p' "$work/errors.txt")
  [ -n "$missing" ] || { cat "$work/errors.txt" >&2 && exit 1; }
  echo "offline_bundle: resolving again with $missing"
  echo "$missing" >>"$work/constraints.txt"
done

mkdir "$root/source"
excluded=(./.git ./.venv ./.kvpress ./.carry ./.cache './.*_cache' ./.hypothesis ./build ./out '*.so' __pycache__
  "./$(realpath --relative-to=. "$out")")
tar -c "${excluded[@]/#/--exclude=}" . | tar -x -C "$root/source"
[ "$model" = none ] || cp -rL "$model" "$root/model"
{
  echo "device=$device"
  echo "python_wanted=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  echo "machine=$(uname -m)"
  echo "model=$([ "$model" = none ] || basename "$(realpath "$model")")"
} >"$root/bundle.env"

echo "offline_bundle: writing parts of $part_size MiB"
tar -c -C "$work" fastgen-bundle | split -b "${part_size}m" -d -a 4 - "$out/fastgen-bundle.tar."
cp scripts/offline_install.sh "$out/"
(cd "$out" && sha256sum fastgen-bundle.tar.* >SHA256SUMS)
echo "offline_bundle: $(wc -l <"$out/SHA256SUMS") parts, $(du -shx --exclude='.work*' "$out" | cut -f1), in $out;" \
  "take them all to the other machine and run: bash offline_install.sh TARGET"
