#!/usr/bin/env bash
# Checks the GPU kernels on this machine's GPU and measures them; arguments go to gpu_check.py.
# Needs a Python with torch and triton only: $PYTHON, else .venv's, else python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then
  python=.venv/bin/python
fi
library=$(compgen -G 'fastgen_vllm/_cuda*.so' | head -n 1 || true)
library=${library:-fastgen_vllm/_cuda.so}
if [ ! "$library" -nt csrc/cuda/decode_attention.cu ]; then
  if nvcc=$(command -v "${NVCC:-nvcc}" || ls /usr/local/cuda/bin/nvcc 2>/dev/null); then
    NVCC=$nvcc bash csrc/cuda/build.sh "$library"
  else
    echo "gpu_check: no nvcc, so the CUDA C++ kernel is not checked" >&2
  fi
fi
export PYTHONPATH=$PWD:$PWD/tests
exec "$python" tests/programs/gpu_check.py "$@"
