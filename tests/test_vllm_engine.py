"""What users rely on: stock's answers at recovery 1.0, memory that comes back, a pool that ends
as it began."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from engine import KOREAN, Engine, chat, english

NATURAL = [
    ("booleans", 200),
    ("exceptions", 700),
    ("objects", 500),
    ("execmodel", 900),
    ("naming", 300),
    ("strings", 400),
    ("import", 250),
    ("calls", 600),
    ("function", 350),
    ("try", 1200),
    ("raise", 200),
    ("with", 450),
    ("class", 150),
    ("async", 800),
    ("types", 2000),
    ("compound", 1000),
    ("assignment", 320),
    ("comparisons", 640),
]
SCRIPT = Path(__file__).parent / "run_stock.py"


@pytest.mark.engine
def test_recovery_one_equals_stock(model: str, engine: Engine, tmp_path: Path) -> None:
    prompts = [english(size, topic) for topic, size in NATURAL]
    prompts += [KOREAN, chat(model, "Why is the sky blue?")]
    source, target = tmp_path / "prompts.json", tmp_path / "stock.json"
    source.write_text(json.dumps(prompts))
    subprocess.run([sys.executable, SCRIPT, model, source, target, "64"], check=True, timeout=300)
    stock = json.loads(target.read_text())
    assert stock["backend"] == "CPU_ATTN"
    names = [engine.add(p, 1.0, max_tokens=64, ignore_eos=True) for p in prompts]
    results = engine.run()
    for name, tokens in zip(names, stock["tokens"], strict=True):
        assert results[name].output == tokens
        assert results[name].info["kv_kept_ratio"] == 1.0
        assert results[name].info["vacated_blocks"] == 0


@pytest.mark.engine
def test_chunk_size_does_not_change_policies(engine: Engine) -> None:
    """Alone, a 700-token prompt takes 256-token chunks; beside others it is cut elsewhere."""
    prompt = english(3200, "types")
    name = engine.add(prompt, max_tokens=8, ignore_eos=True)
    alone = engine.run(trace=True)[name]
    assert len(alone.prompt) > 2 * 256
    others = [engine.add(english(400 + 90 * i, "compound", 500 * i)) for i in range(4)]
    name = engine.add(prompt, max_tokens=8, ignore_eos=True)
    together = engine.run(trace=True)
    assert set(others) < set(together)
    assert together[name].policy == alone.policy
    assert together[name].kept == alone.kept
    assert together[name].output == alone.output


@pytest.mark.engine
def test_sampling_options_work(engine: Engine) -> None:
    prompt = english(600, "naming")
    many = engine.add(prompt, n=3, temperature=1.0, seed=7)
    scored = engine.add(prompt, logprobs=2, prompt_logprobs=1, max_tokens=5)
    stopped = engine.add(prompt, stop=["the"], max_tokens=64)
    outputs = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        outputs.update({o.request_id: o for o in engine.step()})
    assert len({tuple(o.token_ids) for o in outputs[many].outputs}) == 3
    assert len(outputs[scored].outputs[0].logprobs) == 5
    assert len(outputs[scored].prompt_logprobs) == len(outputs[scored].prompt_token_ids)
    assert outputs[stopped].outputs[0].finish_reason == "stop"
    again = engine.add(prompt, n=3, temperature=1.0, seed=7)
    while engine.llm.llm_engine.has_unfinished_requests():
        outputs.update({o.request_id: o for o in engine.step()})
    first, second = (
        [list(o.token_ids) for o in sorted(outputs[r].outputs, key=lambda o: o.index)]
        for r in (many, again)
    )
    assert first == second


@pytest.mark.engine
def test_wrong_override_is_that_requests_error(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"fastgen_recovery: got 1\.5"):
        engine.add(english(300), recovery=1.5)
    with pytest.raises(ValueError, match="unknown key"):
        engine.add(english(300), extra_args={"fastgen_recovry": 0.9})
    name = engine.add(english(300))
    assert name in engine.run()


@pytest.mark.engine
def test_soak(engine: Engine) -> None:
    """200 requests, random lengths and aborts, in a pool that forces preemptions."""
    rng = random.Random(3)
    pool = engine.scheduler.kv_cache_manager.block_pool
    hoard = pool.get_new_blocks(pool.get_num_free_blocks() - 150)
    audit, engine.scheduler.debug = engine.scheduler.debug, False
    audited = AuditWithHoard(engine, len(hoard))
    began, preempted = engine.free_blocks(), engine.num_preemptions
    waiting, alive, finished = 200, set(), 0
    try:
        while waiting or engine.llm.llm_engine.has_unfinished_requests():
            while waiting and len(alive) < 14:
                size = rng.randint(30, 1800)
                prompt = english(size, "specialnames", rng.randint(0, 50000))
                recovery = rng.choice([0.7, 0.9, 0.95, 1.0])
                alive.add(engine.add(prompt, recovery, max_tokens=rng.randint(1, 60)))
                waiting -= 1
            for output in engine.step():
                alive.discard(output.request_id)
                finished += 1
            audited.check()
            if alive and rng.random() < 0.05:
                victim = rng.choice(sorted(alive))
                engine.abort(victim)
                alive.discard(victim)
        assert finished > 100
        assert engine.num_preemptions > preempted, "not enough pressure for a preemption"
        assert engine.free_blocks() == began
    finally:
        engine.scheduler.debug = audit
        pool.free_blocks(hoard)


class AuditWithHoard:
    """The scheduler's own audit, knowing that the test holds blocks back."""

    def __init__(self, engine: Engine, num_hoarded: int) -> None:
        self.engine, self.num_hoarded = engine, num_hoarded

    def check(self) -> None:
        manager = self.engine.scheduler.block_manager
        tables = self.engine.runtime.tables
        held = [b for r in manager.req_to_blocks for b in manager.owned_blocks(r)]
        assert len(held) == len(set(held))
        total = len(held) + manager.block_pool.get_num_free_blocks() + self.num_hoarded
        assert total == manager.block_pool.num_gpu_blocks - 1
        for request_id in manager.free_pages:
            if request_id in manager.req_to_blocks:
                owned = sorted(manager.owned_blocks(request_id))
                assert owned == sorted(tables.blocks[request_id])
