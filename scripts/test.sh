#!/usr/bin/env bash
# Sets everything up and runs the whole suite; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# The suite starts dozens of engines, each of which would compile vLLM's modules anew.
unset PYTHONDONTWRITEBYTECODE
bash scripts/setup.sh
. scripts/common.sh
device=$(detect_device)
if [ "$device" = cpu ]; then
  bash scripts/newer_vllm.sh
else
  # The suite's engines run on the CPU, which the CUDA build of vLLM does not serve.
  set -- tests/kernels tests/policy tests/profiler tests/cache tests/runtime "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -n 2 --dist worksteal "$@"
[ "$device" = cpu ] || bash scripts/gpu_check.sh
