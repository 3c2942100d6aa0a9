"""A real vLLM engine under test, stepped by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any

import pytest

from fastgen_vllm.kernels import HeadRules
from fastgen_vllm.runtime.report import StepReport

KOREAN = (
    "한국의 가을은 하늘이 높고 바람이 시원해서 여행하기 좋은 계절입니다. 사람들은 산으로 단풍을 "
    "보러 가고, 시장에서는 햇과일을 팝니다. “올해는 사과가 참 달아요!” 하고 상인이 말했습니다. "
    "우리는 작은 마을에 들러 국수를 먹고, 오래된 다리를 건너 강가를 걸었습니다. 저녁이 되자 "
    "마을 사람들이 모여 음악을 들었고, 아이들은 불빛 아래에서 춤을 추었습니다. 그 다음 날 우리는"
)


def english(num_chars: int, topic: str = "types", start: int = 0) -> str:
    """Natural prose: the Python language reference, which ships with Python."""
    text = " ".join(topics[topic].split())
    assert len(text) >= start + num_chars, f"topic {topic} has {len(text)} characters"
    return text[start : start + num_chars]


@dataclass
class Finished:
    """One request's answer, and how its heads go on and what they held step by step, where
    traced."""

    prompt: list[int]
    output: list[int]
    text: str
    info: dict[str, Any]
    rules: HeadRules | None = None
    kept: list[list[list[set[int]]]] = field(default_factory=list)


class Engine:
    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.runtime = self.core.model_executor.driver_worker.worker.runtime
        self.most_running = 0
        self.num_preemptions = 0
        self.reports_are_late = False
        self._count = 0

    @classmethod
    def start(cls, model: str, kv_bytes: int, fastgen: dict[str, Any], **options: Any) -> Engine:
        from vllm import LLM

        fastgen = {"min_prompt_tokens": 16, "debug": True, **fastgen}
        defaults = {
            "dtype": "float32",
            "max_model_len": 4096,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 256,
            "enforce_eager": True,
            "seed": 0,
        }
        return cls(
            LLM(
                model,
                attention_backend="FASTGEN",
                additional_config={"fastgen": fastgen},
                kv_cache_memory_bytes=kv_bytes,
                **{**defaults, **options},
            )
        )

    def add(self, prompt: str, recovery: float | None = None, **sampling: Any) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        extra = {} if recovery is None else {"fastgen_recovery": recovery}
        defaults = {"temperature": 0.0, "max_tokens": 16, "extra_args": extra}
        params = SamplingParams(
            output_kind=RequestOutputKind.FINAL_ONLY, **{**defaults, **sampling}
        )
        self._count += 1
        name = f"test-{self._count}"
        self.llm.llm_engine.add_request(name, prompt, params)
        return name

    def abort(self, request_id: str) -> None:
        self.llm.llm_engine.abort_request([request_id])

    def step(self) -> list[Any]:
        preempted = {r.request_id: r.num_preemptions for r in self.scheduler.requests.values()}
        outputs = self.llm.llm_engine.step()
        for request in self.scheduler.requests.values():
            self.num_preemptions += request.num_preemptions - preempted[request.request_id]
        self.most_running = max(self.most_running, len(self.scheduler.running))
        self.audit()
        return [output for output in outputs if output.finished]

    def run(self, trace: bool = False) -> dict[str, Finished]:
        """Step until nothing is left. The results are keyed by the name ``add`` returned."""
        done: dict[str, Finished] = {}
        traces: dict[str, Finished] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            finished = self.step()
            if trace:
                self._snapshot(traces)
            done |= {output.request_id: self._finished(output, traces) for output in finished}
        return done

    def _finished(self, output: Any, traces: dict[str, Finished]) -> Finished:
        answer, name = output.outputs[0], output.request_id
        info = (output.kv_transfer_params or {}).get("fastgen", {})
        prompt = list(output.prompt_token_ids)
        result = Finished(prompt, list(answer.token_ids), answer.text, info)
        # vLLM appends a suffix to the names that it is given.
        for seen in (t for n, t in traces.items() if name in (n, n.rsplit("-", 1)[0])):
            result.rules, result.kept = seen.rules, seen.kept
        return result

    @contextmanager
    def limited_to(self, num_blocks: int) -> Iterator[None]:
        """Leave only ``num_blocks`` in the pool; a request that never runs owns the others."""
        manager = self.scheduler.block_manager
        pool = manager.block_pool
        hoard = pool.get_new_blocks(pool.get_num_free_blocks() - num_blocks)
        manager.req_to_blocks["hoard"] = hoard
        self.most_running = 0
        try:
            yield
            assert self.free_blocks() == num_blocks
        finally:
            pool.free_blocks(manager.req_to_blocks.pop("hoard"))

    def read_reports_late(self, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Reports are read so many steps after their own, as with asynchronous scheduling."""
        late: list[tuple[StepReport, int]] = []
        apply_report = self.scheduler.apply_report

        def apply_late(report: StepReport, step: int) -> None:
            late.append((report, step))
            if len(late) > lag:
                apply_report(*late.pop(0))

        monkeypatch.setattr(self.runtime, "report_lag", lag)
        monkeypatch.setattr(self.scheduler, "apply_report", apply_late)
        monkeypatch.setattr(self, "reports_are_late", lag > 0)

    def audit(self) -> None:
        """Scheduler and worker agree on every block, and none is lost or has owners that it does
        not count."""
        manager = self.scheduler.block_manager
        held = Counter(b for r in manager.req_to_blocks for b in manager.owned_blocks(r))
        assert held == {b: manager.block_pool.blocks[b].ref_cnt for b in held}
        total = len(held) + self.free_blocks()
        assert total == manager.block_pool.num_gpu_blocks - 1
        # Where reports are late, the scheduler's own audit compares the two at the report's step.
        for request_id in () if self.reports_are_late else manager.free_pages:
            owned = sorted(manager.owned_blocks(request_id))
            assert owned == sorted(self.runtime.tables.blocks[request_id])

    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def _snapshot(self, traces: dict[str, Finished]) -> None:
        tables, pool = self.runtime.tables, self.runtime.pool
        for request_id, row in tables.rows.items():
            seen = traces.get(request_id)
            if seen is None:
                rules = HeadRules(*(t[row].clone() for t in tables.state.rules.tensors()))
                seen = traces[request_id] = Finished([], [], "", {}, rules)
            positions = pool.positions[tables.pages_of(request_id)].flatten(2).tolist()
            kept = [[{p for p in head if p >= 0} for head in layer] for layer in positions]
            if not seen.kept or kept != seen.kept[-1]:
                seen.kept.append(kept)


def chat(model: str, question: str, system: str = "") -> str:
    """``question`` in the model's chat template, after a system prompt if one is given."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
