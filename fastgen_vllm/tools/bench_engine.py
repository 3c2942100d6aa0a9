"""One engine under measurement, as a child process: a job a line on stdin, its figures on stdout.

The parent keeps one such child per engine and lets them take turns, so that what else the
machine does in the meantime falls on all of them alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


class BenchEngine:
    """The parent's side of a child.

    Args:
        options: arguments of ``vllm.LLM``.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name = name
        self._log = tempfile.NamedTemporaryFile("w+", suffix=f"-{name}.log")  # noqa: SIM115
        command = [sys.executable, "-m", "fastgen_vllm.tools.bench_engine"]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._send(options)

    def wait_until_ready(self) -> None:
        self._receive()

    def run(
        self, prompts: list[list[int]], max_tokens: int, recovery: float | None = None
    ) -> dict[str, Any]:
        """Figures of one batch: see ``measure``. ``recovery`` is for FastGen engines."""
        self._send({"prompts": prompts, "max_tokens": max_tokens, "recovery": recovery})
        return self._receive()

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()
        self._log.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(message) + "\n")
        self._child.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            log = Path(self._log.name).read_text()
            raise SystemExit(f"the {self.name} engine failed:\n{log[-6000:]}")
        return json.loads(line)


def measure(llm: Any, prompts: list[list[int]], max_tokens: int, extra: Any) -> dict[str, Any]:
    """Run one batch to its end.

    Returns:
        ``seconds`` and ``tokens`` (generated) in all; ``prefill_seconds`` until every request had
        its first token; ``decode_seconds`` and ``decode_tokens`` of the steps after that in which
        all requests still ran; ``max_running``; ``rss_bytes``; ``kv_kept`` of FastGen.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra, detokenize=False
    )
    engine = llm.llm_engine
    start = now = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{start}-{i}", {"prompt_token_ids": prompt}, params)
    produced: dict[str, int] = {}
    kept, max_running, finished = [], 0, False
    prefill_seconds, decode_seconds, decode_tokens = 0.0, 0.0, 0
    while engine.has_unfinished_requests():
        all_decode = len(produced) == len(prompts) and not finished
        outputs = engine.step()
        before, now = now, time.perf_counter()
        if all_decode:
            decode_seconds += now - before
            decode_tokens += len(outputs)
        for output in outputs:
            produced[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                finished = True
                info = (output.kv_transfer_params or {}).get("fastgen")
                kept += [info["kv_kept_ratio"]] if info else []
        max_running = max(max_running, len(outputs))
        if len(produced) == len(prompts) and not prefill_seconds:
            prefill_seconds = now - start
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "seconds": now - start,
        "tokens": sum(produced.values()),
        "prefill_seconds": prefill_seconds,
        "decode_seconds": decode_seconds,
        "decode_tokens": decode_tokens,
        "max_running": max_running,
        "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "kv_kept": sum(kept) / len(kept) if kept else 1.0,
    }


def main() -> None:
    # Replies go to the real stdout; whatever vLLM prints goes to the log.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    llm = LLM(**json.loads(sys.stdin.readline()))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        extra = None if job["recovery"] is None else {"fastgen_recovery": job["recovery"]}
        figures = measure(llm, job["prompts"], job["max_tokens"], extra)
        print(json.dumps(figures), file=replies, flush=True)


if __name__ == "__main__":
    main()
