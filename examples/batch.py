"""Answers a JSON Lines file of prompts offline, and can be stopped and started again.

Every input line has an "id", and either a "prompt" or chat "messages"; "extra_args" is optional and
holds FastGen's settings for this request. Every output line has the answer and what its KV cache
kept. Lines whose id is in the output file already are skipped. A prompt that is too long
gets an error in place of an answer.

    {"id": "1", "messages": [{"role": "user", "content": "..."}],
     "extra_args": {"fastgen_kv_budget": 0.4}}   (on one line)

    python examples/batch.py MODEL prompts.jsonl answers.jsonl

On a CPU add --engine-args '{"gpu_memory_utilization": 0.3}'.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def drop_cut_line(path: Path) -> None:
    """Remove a last line that was not written to its end, or begin the file."""
    text = path.read_bytes() if path.exists() else b""
    path.write_bytes(text[: text.rfind(b"\n") + 1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=256, help="requests between two writes")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="of vllm.LLM, as JSON")
    parser.add_argument("--fastgen", type=json.loads, default={}, help="its settings, as JSON")
    asked = parser.parse_args()

    drop_cut_line(asked.answers)
    done = {line["id"] for line in read_lines(asked.answers)}
    jobs = read_lines(asked.prompts)
    left = [job for job in jobs if job["id"] not in done]
    if not left:
        print(f"All {len(jobs)} answers are in {asked.answers}.")
        return

    from vllm import LLM, SamplingParams

    llm = LLM(
        asked.model,
        attention_backend="FASTGEN",
        additional_config={"fastgen": asked.fastgen},
        **asked.engine_args,
    )
    tokenizer = llm.get_tokenizer()

    most = llm.llm_engine.model_config.max_model_len - asked.max_tokens

    def tokens_of(job: dict[str, Any]) -> list[int]:
        if "prompt" in job:
            return tokenizer.encode(job["prompt"])
        chat = {"add_generation_prompt": True, "return_dict": False}
        return tokenizer.apply_chat_template(job["messages"], **chat)

    def write(out: Any, line: dict[str, Any]) -> None:
        out.write(json.dumps(line, ensure_ascii=False) + "\n")

    with (
        asked.answers.open("a", encoding="utf-8") as out,
        tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="answer") as progress,
    ):
        remaining = iter(left)
        while batch := list(islice(remaining, asked.at_once)):
            prompts = [tokens_of(job) for job in batch]
            fitting = [(job, p) for job, p in zip(batch, prompts, strict=True) if len(p) <= most]
            params = [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=asked.max_tokens,
                    extra_args=job.get("extra_args"),
                )
                for job, _ in fitting
            ]
            ids = [{"prompt_token_ids": prompt} for _, prompt in fitting]
            outputs = llm.generate(ids, params, use_tqdm=False) if ids else []
            for (job, prompt), output in zip(fitting, outputs, strict=True):
                told = (output.kv_transfer_params or {}).get("fastgen")
                line = {
                    "id": job["id"],
                    "answer": output.outputs[0].text,
                    "finish_reason": output.outputs[0].finish_reason,
                    "prompt_tokens": len(prompt),
                    "kv_kept_ratio": told and told["kv_kept_ratio"],
                }
                write(out, line)
            for job, prompt in zip(batch, prompts, strict=True):
                if len(prompt) > most:
                    error = f"{len(prompt)} tokens leave no room for {asked.max_tokens} more"
                    write(out, {"id": job["id"], "error": error})
            out.flush()
            progress.update(len(batch))


if __name__ == "__main__":
    main()
