#!/usr/bin/env bash
# Sets everything up and runs stock vLLM and FastGen on the same prompts; writes out/demo.json.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/fastgen demo "$@"
