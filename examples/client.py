"""Asks a server the same question with different settings, and prints what each answer kept.

vllm serve MODEL --attention-backend fastgen   # on a CPU: --gpu-memory-utilization 0.3
python examples/client.py --url http://localhost:8000/v1 --file long_text.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import openai

SETTINGS: dict[str, dict[str, Any]] = {
    "the server's own": {},
    "a tenth of the KV cache": {"fastgen_kv_budget": 0.1},
    "the first 64 tokens protected": {"fastgen_protect": [0, 64]},
    "nine tenths of the attention": {"fastgen_recovery": 0.9},
    "everything": {"fastgen_compress": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--key", default="none")
    parser.add_argument("--file", type=Path, required=True, help="a UTF-8 text to ask about")
    parser.add_argument("--question", default="What is this text about?")
    parser.add_argument("--max-tokens", type=int, default=64)
    asked = parser.parse_args()

    client = openai.OpenAI(base_url=asked.url, api_key=asked.key)
    model = client.models.list().data[0].id
    content = f"{asked.file.read_text(encoding='utf-8')}\n\n{asked.question}"
    for name, settings in SETTINGS.items():
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            max_tokens=asked.max_tokens,
            temperature=0,
            extra_body={"vllm_xargs": settings},
        )
        told = ((answer.model_extra or {}).get("kv_transfer_params") or {}).get("fastgen") or {}
        kept = told.get("kv_kept_ratio")
        print(f"{name}: {'not told' if kept is None else f'{kept:.0%} kept'}")
        print(f"    {' '.join((answer.choices[0].message.content or '').split())}\n")


if __name__ == "__main__":
    main()
