"""examples/batch.py, stopped in the middle of a line. test_serve.py has the client."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import KOREAN, english
from helpers.paths import ROOT


@pytest.mark.engine
def test_batch_goes_on_where_it_stopped(model: str, tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    question = [{"role": "user", "content": f"{KOREAN}\u2028What is this about?"}]
    jobs = [
        {"id": "done", "prompt": "Hello"},
        {"id": "cut", "prompt": english(1500)},
        {"id": "chat", "messages": question, "extra_args": {"fastgen_compress": False}},
        {"id": "long", "prompt": english(9000)},
    ]
    lines = [json.dumps(job, ensure_ascii=False) for job in jobs]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = json.dumps({"id": "done", "answer": "Hi."}) + "\n"
    answers.write_text(done + '{"id": "cut", "ans', encoding="utf-8")
    engine = {"max_model_len": 1024, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
    command = [sys.executable, str(ROOT / "examples" / "batch.py"), model, str(prompts)]
    command += [str(answers), "--max-tokens", "4", "--at-once", "2"]
    command += ["--engine-args", json.dumps(engine), "--fastgen", '{"min_prompt_tokens": 64}']
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    text = answers.read_text(encoding="utf-8")
    found = {line["id"]: line for line in map(json.loads, text.splitlines())}
    assert text.startswith(done) and len(text.splitlines()) == 4 == len(found)
    assert found["cut"]["kv_kept_ratio"] < 0.5 and found["cut"]["answer"]
    assert found["chat"]["kv_kept_ratio"] == 1.0 and found["chat"]["finish_reason"] == "length"
    assert "leave no room for 4 more" in found["long"]["error"]
