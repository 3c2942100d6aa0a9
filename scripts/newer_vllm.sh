#!/usr/bin/env bash
# For the suite: the vLLM that set-up installs for GPUs, in .cache. There is no CPU build of it, so its
# Python files lie over the native code of the one in .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

set_versions cuda
folder=.cache/vllm-$VLLM_VERSION
if [ ! -f "$folder/.complete" ]; then
  echo "newer_vllm: fetching vLLM $VLLM_VERSION into $folder"
  .venv/bin/python -m pip download -q --no-deps --only-binary=:all: -d "$folder" "vllm==$VLLM_VERSION"
  find .cache -maxdepth 1 -name 'vllm-*' ! -path "$folder" -exec rm -rf {} +
fi
.venv/bin/python - "$folder" <<'PYTHON'
import importlib.util
import sys
import zipfile
from pathlib import Path

folder = Path(sys.argv[1])
for wheel in folder.glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if not name.endswith(".so")])
    (metadata,) = folder.glob("vllm-*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    lines = [line + "+cpu" if line.startswith("Version: ") else line for line in lines]
    metadata.write_text("\n".join(lines), encoding="utf-8")
    wheel.unlink()
installed = Path(importlib.util.find_spec("vllm").origin).parent
for library in installed.rglob("*.so"):  # those of this .venv, whichever there was before
    link = folder / "vllm" / library.relative_to(installed)
    link.unlink(missing_ok=True)
    link.symlink_to(library.resolve())
PYTHON
touch "$folder/.complete"
