"""Prompts that find their beginning encoded: same policies, same answers, memory comes back."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.agents import BUDGET
from helpers.engine import Engine, Finished, english
from helpers.paths import PROGRAMS

SHARED = english(1500, "types")
BLOCK, LOOKED_AT = 16, 128


@pytest.fixture
def engine(engine: Engine) -> Engine:
    """With an empty prefix cache."""
    assert engine.scheduler.reset_prefix_cache()
    return engine


def most_cached(num_tokens: int) -> int:
    """Tokens of a prompt that may come from the cache."""
    return (num_tokens - LOOKED_AT) // BLOCK * BLOCK


def same(ours: Finished, theirs: Finished) -> None:
    assert ours.rules is not None and theirs.rules is not None
    assert all(map(torch.equal, ours.rules.tensors(), theirs.rules.tensors()))
    assert ours.kept == theirs.kept and ours.output == theirs.output
    same_info(ours.info, theirs.info)


def same_info(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """But for what was cached, and for rounding."""
    different = {"cached_tokens", "kv_recovery"}
    assert {k: ours[k] for k in ours.keys() - different} == {
        k: theirs[k] for k in theirs.keys() - different
    }
    recoveries = [info["kv_recovery"] or 1.0 for info in (ours, theirs)]
    assert recoveries[0] == pytest.approx(recoveries[1], rel=1e-5)


@pytest.mark.engine
def test_agent_loop(model: str, tmp_path: Path) -> None:
    """Three users, three turns, a system prompt of 1,500 tokens, with and without the cache."""

    def loop(caching: str) -> list[dict[str, Any]]:
        target = tmp_path / f"{caching}.json"
        program = [sys.executable, str(PROGRAMS / "agent_loop.py"), model, str(target)]
        subprocess.run([*program, caching], check=True, timeout=600)
        found: list[dict[str, Any]] = json.loads(target.read_text())
        return found

    ours, theirs = loop("with"), loop("without")
    assert [a["output"] for a in ours] == [a["output"] for a in theirs]
    assert len({a["info"]["kv_recovery"] for a in theirs}) == 9, "they do not differ"
    for with_cache, without in zip(ours, theirs, strict=True):
        assert without["info"]["vacated_blocks"] > 0 == without["info"]["cached_tokens"]
        same_info(with_cache["info"], without["info"])
    total = sum(len(a["prompt"]) for a in ours)
    computed = total - sum(a["info"]["cached_tokens"] for a in ours)
    assert min(len(a["prompt"]) for a in ours) > 1500
    assert computed <= 0.35 * total, f"{computed} of {total} tokens were computed"


@pytest.mark.engine
@pytest.mark.parametrize(
    "asked",
    [
        {"fastgen_kv_budget": 0.1},
        {"fastgen_kv_budget": 0.1, "fastgen_min_recovery": 0.9},
        {"fastgen_kv_budget": 0.5, "fastgen_min_recovery": 1.0},
        {"fastgen_kv_budget": 1.0},
    ],
)
def test_a_hit_gives_what_a_miss_gives(engine: Engine, asked: dict[str, float]) -> None:
    """All of a prompt is encoded before, or a part of it; chunks are cut elsewhere then."""
    prompts = [SHARED + ending for ending in ("", " And then", english(500, "strings"))]

    def run(prompt: str) -> Finished:
        name = engine.add(prompt, max_tokens=12, ignore_eos=True, extra_args=asked)
        return engine.run(trace=True)[name]

    missed = []
    for prompt in prompts:
        assert engine.scheduler.reset_prefix_cache()
        missed.append(run(prompt))
        assert missed[-1].info["cached_tokens"] == 0
    assert engine.scheduler.reset_prefix_cache()
    run(SHARED)
    shared = len(missed[0].prompt) // BLOCK * BLOCK
    for prompt, miss in zip(prompts, missed, strict=True):
        hit, n = run(prompt), len(miss.prompt)
        same(hit, miss)
        whole = asked["fastgen_kv_budget"] == 1.0
        most = (n - 1) // BLOCK * BLOCK if whole else most_cached(n)
        assert abs(hit.info["cached_tokens"] - min(most, shared)) <= BLOCK


@pytest.mark.engine
def test_what_looks_at_all_tokens_takes_nothing_and_leaves_nothing(engine: Engine) -> None:
    def cached(**extra: Any) -> int:
        name = engine.add(SHARED, max_tokens=3, extra_args=extra)
        return int(engine.run()[name].info["cached_tokens"])

    assert cached(fastgen_recovery=0.9) == 0
    assert cached(**BUDGET) == 0, "the one before left something"
    assert cached(fastgen_recovery=0.9) == 0
    assert cached(**BUDGET) > 0
    assert cached(fastgen_compress=False) > 0


@pytest.mark.engine
def test_children_hit_their_prompt(engine: Engine) -> None:
    """``n`` answers to a prompt, of which all but the first find it encoded."""
    engine.add(SHARED, n=3, temperature=1.0, seed=7, max_tokens=10, extra_args=BUDGET)
    outputs = []
    while engine.llm.llm_engine.has_unfinished_requests():
        outputs += engine.step()
    (output,) = outputs
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
    # It tells of the one that finished last.
    assert output.kv_transfer_params["fastgen"]["cached_tokens"] > 0


def crowd(engine: Engine, count: int, tokens: int = 80) -> dict[str, Finished]:
    """Requests with one beginning, some of them kept whole, all at once: results by prompt."""
    names = {}
    for i in range(count):
        prompt = SHARED[: 900 + 60 * (i % 2)] + english(60 + 15 * i, "specialnames", 700 * i)
        extra = {"fastgen_compress": False} if i % 2 else BUDGET
        name = engine.add(prompt, max_tokens=tokens, ignore_eos=True, extra_args=extra)
        names[name] = prompt
    done = engine.run()
    return {prompt: done[name] for name, prompt in names.items()}


@pytest.mark.engine
@pytest.mark.parametrize("lag", [0, 2])
def test_crowds_under_pressure(engine: Engine, monkeypatch: pytest.MonkeyPatch, lag: int) -> None:
    """Requests that share blocks are compacted in a pool for some of them, with reports that are
    read in time and late; answers stay as they were, but of one that was squeezed."""
    free = engine.free_blocks()
    unpressed = crowd(engine, 6)
    assert engine.scheduler.reset_prefix_cache()
    engine.read_reports_late(lag, monkeypatch)
    with engine.limited_to(30):
        pressed = crowd(engine, 6)
        assert engine.most_running < 6
    untouched = [prompt for prompt in pressed if not pressed[prompt].info["compactions"]]
    assert len(untouched) >= 5
    assert all(pressed[prompt].output == unpressed[prompt].output for prompt in untouched)
    assert engine.free_blocks() == free


@pytest.mark.engine
def test_a_preempted_prompt_hits_its_own_blocks(engine: Engine) -> None:
    def run(preempted: bool) -> Finished:
        name, scheduler = engine.add(SHARED, max_tokens=9, extra_args=BUDGET), engine.scheduler
        if preempted:
            engine.step()
            (request,) = scheduler.running
            assert 0 < request.num_computed_tokens < request.num_prompt_tokens
            scheduler.running.clear()
            scheduler._preempt_request(request, time.monotonic())
            scheduler.prev_step_scheduled_req_ids.clear()  # it is not resumed in the same step
        return engine.run(trace=True)[name]

    alone = run(preempted=False)
    assert engine.scheduler.reset_prefix_cache()
    again = run(preempted=True)
    same(again, alone)
    assert again.info["cached_tokens"] > 0 == alone.info["cached_tokens"]


@pytest.mark.engine
@pytest.mark.parametrize("spare", [1, 2, 30])
def test_a_prompt_as_large_as_the_pool(engine: Engine, spare: int) -> None:
    """It is compacted in place where there are no blocks for it beside its own, and nobody waits
    for ever."""
    name = engine.add(SHARED, max_tokens=20, ignore_eos=True, extra_args=BUDGET)
    ample = engine.run(trace=True)[name]
    assert engine.scheduler.reset_prefix_cache()
    blocks = -(-len(ample.prompt) // BLOCK)
    with engine.limited_to(blocks + spare):
        for again in range(2):
            name = engine.add(SHARED, max_tokens=20, ignore_eos=True, extra_args=BUDGET)
            done = engine.run(trace=True)[name]
            same(done, ample)
            hits = spare == 30 and again
            assert (done.info["cached_tokens"] > 0) == hits


@pytest.mark.engine
def test_soak_of_shared_prefixes(engine: Engine) -> None:
    """Random lengths, budgets and aborts over two beginnings, in a pool for some of them."""
    rng = random.Random(5)
    waiting, finished, cached = 36, 0, 0
    alive: set[str] = set()
    with engine.limited_to(58):
        while waiting or engine.llm.llm_engine.has_unfinished_requests():
            while waiting and len(alive) < 10:
                prompt = english(rng.choice([500, 1400, 2200]), rng.choice(["types", "strings"]))
                prompt += english(rng.randint(10, 400), "specialnames", rng.randint(0, 50000))
                extra = rng.choice(
                    [
                        *(BUDGET, {"fastgen_kv_budget": 0.5, "fastgen_min_recovery": 0.9}),
                        *({"fastgen_compress": False}, {"fastgen_recovery": 0.8}),
                        {**BUDGET, "fastgen_protect": [20, 60]},
                    ]
                )
                tokens = rng.randint(1, 60)
                alive.add(engine.add(prompt, max_tokens=tokens, extra_args=extra))
                waiting -= 1
            for output in engine.step():
                alive.discard(output.request_id)
                finished += 1
                info = (output.kv_transfer_params or {}).get("fastgen", {})
                cached += info.get("cached_tokens", 0)
            if alive and rng.random() < 0.02:
                victim = rng.choice(sorted(alive))
                engine.abort(victim)
                alive.discard(victim)
    assert finished > 20 and cached > 1000
