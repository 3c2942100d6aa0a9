"""A vLLM engine in a process of its own, which generates batches and measures each.

The parent keeps one per engine and lets them take turns, so that what else the machine does in the
meantime falls on all of them alike. Only vLLM's public interface is used.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastgen_vllm.tools.child import Child, Jobs


@dataclass(frozen=True)
class Batch:
    """Requests that are handed over together. Each generates ``max_tokens`` tokens greedily.

    Attributes:
        prompts: token ids.
        recovery: of the requests, where they do not take the engine's own goal.
        compress: of the requests, where it is not the engine's setting.
    """

    prompts: Sequence[list[int]]
    max_tokens: int
    recovery: float | None = None
    compress: str | None = None


class ChildEngine(Child):
    """The parent's side.

    Args:
        options: arguments of ``vllm.LLM``.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__(f"the {name} engine", "fastgen_vllm.tools.engine")
        self.send(options)

    def wait_until_ready(self) -> None:
        self.receive()

    def run(self, batch: Batch) -> dict[str, Any]:
        """Generate: see ``Measured.figures``."""
        return self.ask(asdict(batch))


@contextmanager
def engines(
    stock: dict[str, Any], fastgen: dict[str, Any], settings: dict[str, Any]
) -> Iterator[dict[str, ChildEngine]]:
    """Both engines, started together.

    Args:
        stock: arguments of ``vllm.LLM`` for vLLM as it comes.
        fastgen: arguments of ``vllm.LLM`` beside those that choose FastGen.
        settings: FastGen's own.
    """
    chosen = {"attention_backend": "FASTGEN", "additional_config": {"fastgen": settings}}
    with ExitStack() as stack:
        running = {
            "stock": stack.enter_context(ChildEngine("stock", stock)),
            "fastgen": stack.enter_context(ChildEngine("FastGen", {**fastgen, **chosen})),
        }
        for engine in running.values():
            engine.wait_until_ready()
        yield running


class Measured:
    """One batch, step by step."""

    def __init__(self, llm: Any, batch: Batch) -> None:
        self.llm, self.engine = llm, llm.llm_engine
        self.preemptions = -self._count_preemptions()
        self.num_requests = len(batch.prompts)
        self.produced: dict[str, int] = {}
        self.finished: dict[str, Any] = {}
        self.max_running = 0
        self.prefill_seconds = 0.0
        self.decode_seconds, self.decode_tokens = 0.0, 0
        self.start = self.now = time.perf_counter()
        self._add(batch)

    def _add(self, batch: Batch) -> None:
        from vllm import SamplingParams

        asked = {"fastgen_recovery": batch.recovery, "fastgen_compress": batch.compress}
        extra = {name: value for name, value in asked.items() if value is not None}
        params = SamplingParams(
            temperature=0.0,
            max_tokens=batch.max_tokens,
            ignore_eos=True,
            extra_args=extra,
            detokenize=False,
        )
        self.names = [f"{self.start}-{i}" for i in range(self.num_requests)]
        for name, prompt in zip(self.names, batch.prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def run(self) -> None:
        while self.engine.has_unfinished_requests():
            self._step()
        self.preemptions += self._count_preemptions()

    def _count_preemptions(self) -> int:
        found = [m.value for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions"]
        return int(sum(found))

    def _step(self) -> None:
        all_decode = len(self.produced) == self.num_requests and not self.finished
        outputs = self.engine.step()
        before, self.now = self.now, time.perf_counter()
        if all_decode:
            self.decode_seconds += self.now - before
            self.decode_tokens += len(outputs)
        self.max_running = max(self.max_running, len(outputs))
        for output in outputs:
            self.produced[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                self.finished[output.request_id] = output
        if len(self.produced) == self.num_requests and not self.prefill_seconds:
            self.prefill_seconds = self.now - self.start

    def figures(self) -> dict[str, Any]:
        """What the batch took.

        Returns:
            ``seconds`` and ``tokens`` (generated) in all; ``prefill_seconds`` until every request
            had its first token; ``decode_seconds`` and ``decode_tokens`` of the steps after that in
            which all requests still ran; ``max_running``; ``preemptions``; ``rss_bytes``;
            ``kv_kept``, the mean share; and for each request, in order, ``answers`` (token ids) and
            ``reports`` (FastGen's, or null).
        """
        outputs = [self.finished[name] for name in self.names]
        reports = [(o.kv_transfer_params or {}).get("fastgen") for o in outputs]
        kept = [report["kv_kept_ratio"] for report in reports if report]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "seconds": self.now - self.start,
            "tokens": sum(self.produced.values()),
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "decode_tokens": self.decode_tokens,
            "max_running": self.max_running,
            "preemptions": self.preemptions,
            "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
            "kv_kept": sum(kept) / len(kept) if kept else 1.0,
            "answers": [list(o.outputs[0].token_ids) for o in outputs],
            "reports": reports,
        }


def main() -> None:
    jobs = Jobs()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    llm = None
    for job in jobs:
        if llm is None:
            llm = LLM(**job, disable_log_stats=False)  # preemptions are among vLLM's metrics
            jobs.answer("ready")
            continue
        llm.reset_prefix_cache()  # another turn's prompts are the same
        measured = Measured(llm, Batch(**job))
        measured.run()
        jobs.answer(measured.figures())


if __name__ == "__main__":
    main()
