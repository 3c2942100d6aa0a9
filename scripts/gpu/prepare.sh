#!/usr/bin/env bash
# On a machine with a network, from the repository's root and after scripts/setup.sh: makes .carry/1
# and .carry/2, each below 62 MiB. PYTHON needs torch and safetensors; MODEL is the small model's folder.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-.venv/bin/python}
model=${MODEL:-.cache/smollm2-135m-instruct}
carry=$PWD/.carry
work=${WORK:-$PWD/.cache/carry}
limit=$((62 << 20))
export OMP_NUM_THREADS=1
rm -rf "$carry" "$work/site" "$work/packed" "$work/big"
mkdir -p "$carry"/{1,2} "$work"/{wheels,site,big}

# For the GPU machine: Python 3.12 and glibc 2.39.
there=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp)
for n in $(seq 39 -1 17); do there+=(--platform "manylinux_2_${n}_x86_64"); done
for n in 2014 2010 1; do there+=(--platform "manylinux${n}_x86_64"); done
pip() { "$python" -m pip "$@" -q; }

ls "$work"/wheels/vllm-0.32.0-*.whl >/dev/null 2>&1 ||
  pip download "${there[@]}" -d "$work/wheels" vllm==0.32.0
pip install "${there[@]}" --no-compile --target "$work/site" -r "$here/requirements.txt"
[ -d "$work/site/pydantic" ]
(
  cd "$work/site"
  unzip -q -o "$work"/wheels/vllm-0.32.0-*.whl -x '*.h' '*.hpp' '*.cuh' '*.cu' '*.cpp' '*.inl' \
    '*.js' '*.css' '*.jpg' 'vllm/vllm-rs' 'vllm/third_party/deep_gemm/*' \
    'vllm/third_party/fmha_sm100/cute/*' 'vllm/_moe_C*' 'vllm/_flash*' 'vllm/_qutlass*' \
    'vllm/_deepselect*' 'vllm/vllm_flash_attn/_vllm_fa2_C*'
  python3 "$here/slim.py" vllm/_C_stable_libtorch.abi3.so slim.so
  mv slim.so vllm/_C_stable_libtorch.abi3.so
  rm -rf mistral_common/data bin
  find . \( -name __pycache__ -o -name tests \) -prune -exec rm -rf {} +
  plugin=fastgen_vllm-$(sed -n 's/^version = "\(.*\)"/\1/p' "$OLDPWD/pyproject.toml").dist-info
  mkdir "$plugin"
  printf 'Metadata-Version: 2.1\nName: fastgen-vllm\nVersion: %s\n' \
    "$(echo "$plugin" | sed 's/.*-\(.*\).dist-info/\1/')" >"$plugin/METADATA"
  printf '[vllm.general_plugins]\nfastgen = fastgen_vllm.vllm_plugin:register\n' \
    >"$plugin/entry_points.txt"
)
tar -C "$work/site" -cf - . | xz -T1 -8 >"$carry/1/part-0.software.tar.xz"

# Llama-3.1-8B's shape for dummy weights, with the small model's tokenizer.
find "$model" -maxdepth 1 \( -name 'tokenizer*' -o -name 'chat_template*' \) \
  -exec cp {} "$work/big/" \;
cat >"$work/big/config.json" <<'JSON'
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
 "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
 "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "hidden_act": "silu",
 "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
 "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2}
JSON
python3 -c 'from pydoc_data.topics import topics as t
print(" ".join(" ".join(t[name].split()) for name in sorted(t)))' >"$work/big/prose.txt"
tar -C "$work" -cf - big | xz -T1 -8 >"$carry/1/part-1.tokenizer.tar.xz"

"$python" "$here/pack_model.py" pack "$model" "$work/packed"
tar -C "$work/packed" -cf - . | xz -T1 -8 >"$work/model.tar.xz"
room=$((limit - $(cat "$carry"/1/* | wc -c) - (1 << 19)))
head -c $room "$work/model.tar.xz" >"$carry/1/part-2.model"
tail -c +$((room + 1)) "$work/model.tar.xz" >"$carry/2/part-3.model"
cp "$here"/{on_device.sh,engine.py,probe.py,summary.py,pack_model.py} "$carry/1/"
cp "$here/on_device.sh" "$carry/2/"
du -sb "$carry"/*
[ "$(du -sb "$carry/2" | cut -f1)" -lt $limit ]
