#!/usr/bin/env bash
# Sets everything up and runs the whole suite; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# The suite starts dozens of engines, each of which would compile vLLM's modules anew.
unset PYTHONDONTWRITEBYTECODE
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -n 2 --dist worksteal "$@"
