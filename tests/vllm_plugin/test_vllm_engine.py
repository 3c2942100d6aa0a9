"""What users rely on: stock's answers at recovery 1.0, memory that comes back, a pool that ends
as it began."""

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine import KOREAN, Engine, Finished, chat, english
from helpers.paths import PROGRAMS
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from fastgen_vllm.config import RequestOverride
from fastgen_vllm.tools.models import load_tokenizer

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
SCRIPT = PROGRAMS / "run_stock.py"


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
    ours, theirs = together[name].rules, alone.rules
    assert ours is not None and theirs is not None
    assert all(map(torch.equal, ours.tensors(), theirs.tensors()))
    assert together[name].kept == alone.kept
    assert together[name].output == alone.output


@pytest.mark.engine
def test_sampling_options_work(engine: Engine) -> None:
    # Long enough for three chunks: vLLM would rewind the generator of a seeded request after each
    # but the last, which generators of the CPU cannot do.
    prompt = english(3200, "types")
    assert len(engine.llm.get_tokenizer().encode(prompt)) > 2 * 256
    outputs = {}

    def run(**sampling: Any) -> Any:
        name = engine.add(prompt, **sampling)
        while engine.llm.llm_engine.has_unfinished_requests():
            outputs.update({o.request_id: o for o in engine.step()})
        return outputs[name]

    many = run(n=3, temperature=1.0, seed=7)
    assert len({tuple(o.token_ids) for o in many.outputs}) == 3
    scored = run(logprobs=2, prompt_logprobs=1, max_tokens=5)
    assert len(scored.outputs[0].logprobs) == 5
    assert len(scored.prompt_logprobs) == len(scored.prompt_token_ids)
    word = run(max_tokens=24).outputs[0].text.split()[4]
    stopped = run(stop=[word], max_tokens=24).outputs[0]
    assert stopped.finish_reason == "stop" and word not in stopped.text
    # Beside others, chunks are cut elsewhere.
    others = [engine.add(english(400 + 90 * i, "compound", 500 * i)) for i in range(3)]
    again = run(n=3, temperature=1.0, seed=7)
    assert set(others) < set(outputs)
    first, second = (
        [list(o.token_ids) for o in sorted(result.outputs, key=lambda o: o.index)]
        for result in (many, again)
    )
    assert first == second


@pytest.mark.engine
def test_request_that_a_stop_string_ends_tells_what_it_kept(engine: Engine) -> None:
    prompt = english(1200, "naming")
    name = engine.add(prompt, max_tokens=24)
    whole = engine.run()[name]
    word = whole.text.split()[4]
    name = engine.add(prompt, max_tokens=24, stop=[word])
    stopped = engine.run()[name]
    assert 0 < len(stopped.output) < len(whole.output) and word not in stopped.text
    assert stopped.info == whole.info and whole.info["vacated_blocks"] > 0


@pytest.mark.engine
def test_one_token_is_not_worth_compressing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is beam search, where each token is a request of its own."""
    prompt, begin_prefill = english(1200, "naming"), engine.runtime.begin_prefill
    profiled: list[bool] = []

    def begin(request_id: str, tokens: list[int], override: RequestOverride, *lengths: int) -> None:
        profiled.append(override.fastgen_compress is True)
        begin_prefill(request_id, tokens, override, *lengths)

    monkeypatch.setattr(engine.runtime, "begin_prefill", begin)

    def run(num_tokens: int) -> tuple[Any, bool]:
        """The answer, and whether the request was in the head tables."""
        name, outputs, compacted = engine.add(prompt, max_tokens=num_tokens), [], False
        while engine.llm.llm_engine.has_unfinished_requests():
            outputs += engine.step()
            compacted |= any(row.startswith(name) for row in engine.runtime.tables.rows)
        (output,) = outputs
        return output, compacted

    one, one_compacted = run(1)
    two, two_compacted = run(2)
    assert (one_compacted, two_compacted) == (False, True) and profiled == [False, True]
    assert list(one.outputs[0].token_ids) == list(two.outputs[0].token_ids)[:1]
    assert one.kv_transfer_params is None and two.kv_transfer_params["fastgen"]

    profiled.clear()
    (beams,) = engine.llm.beam_search([{"prompt": prompt}], BeamSearchParams(2, max_tokens=3))
    lengths = [len(beam.tokens) - len(one.prompt_token_ids) for beam in beams.sequences]
    assert lengths == [3, 3]
    assert len(profiled) == 1 + 2 + 2 and not any(profiled)


@pytest.mark.engine
def test_what_is_kept_whole_stays_whole_after_preemptions(engine: Engine) -> None:
    """A preempted request comes back as a longer prompt, above ``min_prompt_tokens``."""
    tokenizer = engine.llm.get_tokenizer()
    texts = [english(300, "specialnames", 300 * i) for i in range(10)]
    prompts = [tokenizer.decode(tokenizer.encode(text)[:12]) for text in texts]

    def run() -> dict[str, Finished]:
        names = [engine.add(p, 0.5, max_tokens=160, ignore_eos=True) for p in prompts]
        results = engine.run()
        return {p: results[n] for p, n in zip(prompts, names, strict=True)}

    unpressed, preempted = run(), engine.num_preemptions
    assert max(len(result.prompt) for result in unpressed.values()) < 16
    with engine.limited_to(60):
        pressed = run()
    assert engine.num_preemptions > preempted, "not enough pressure for a preemption"
    for prompt in prompts:
        assert pressed[prompt].info["kv_kept_ratio"] == 1.0
        assert pressed[prompt].output == unpressed[prompt].output


@pytest.mark.engine
@pytest.mark.parametrize("protect", ["system", [5, 60, 100, 140]])
def test_protected_tokens_stay(model: str, engine: Engine, protect: Any) -> None:
    """In every head and at every step, and the rest keeps its share; in the next request not."""
    prompt = chat(model, english(1800, "types"), english(700, "strings"))
    asked = {"fastgen_kv_budget": 0.2}
    names = [
        engine.add(prompt, max_tokens=20, ignore_eos=True, extra_args=extra)
        for extra in ({**asked, "fastgen_protect": protect}, asked)
    ]
    done = engine.run(trace=True)
    ours, bare = (done[name] for name in names)
    n = len(ours.prompt)
    ends = load_tokenizer(model).encode("<|im_end|>", add_special_tokens=False)[0]
    first = ours.prompt.index(ends)
    wanted = {*range(first)} if protect == "system" else {*range(5, 60), *range(100, 140)}
    assert 80 < len(wanted) < n / 2
    assert all(wanted <= head for step in ours.kept for layer in step for head in layer)
    assert not all(wanted <= head for layer in bare.kept[0] for head in layer)
    share = len(wanted) / n
    assert ours.info["protected_tokens"] == len(wanted) and bare.info["protected_tokens"] == 0
    assert ours.info["kv_budget"] == pytest.approx(share + 0.2 * (1 - share))
    assert bare.info["kv_budget"] == 0.2
    assert share < ours.info["kv_kept_ratio"] < ours.info["kv_budget"] + 0.05


@pytest.mark.engine
def test_a_request_keeps_what_its_recovery_needs(engine: Engine) -> None:
    prompt, asked = english(2500, "types"), {"fastgen_kv_budget": 0.1}
    names = [
        engine.add(prompt, max_tokens=3, extra_args={**asked, "fastgen_min_recovery": least})
        for least in (0.0, 0.9)
    ]
    done = engine.run()
    bare, needed = (done[name].info for name in names)
    assert bare["kv_budget"] == 0.1 and bare["kv_recovery"] < 0.8
    assert needed["kv_recovery"] >= 0.9 and needed["kv_budget"] > 0.15
    assert needed["kv_kept_ratio"] > bare["kv_kept_ratio"]


@pytest.mark.engine
def test_requests_are_compacted_again_while_they_grow(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short prompts join when they have grown. Reports that are read late and what runs beside
    change nothing, and a request that has its own budget keeps it."""
    settings = {"compact_every": 40, "min_prompt_tokens": 60}
    config = engine.runtime.config.model_copy(update=settings)
    monkeypatch.setattr(engine.runtime, "config", config)
    monkeypatch.setattr(engine.scheduler, "config", config)
    prompts = [english(size, "specialnames", 9 * size) for size in (100, 700, 1400)]

    def run(names: list[str]) -> list[Finished]:
        done = engine.run(trace=True)
        return [done[name] for name in names]

    def add(prompt: str, budget: float = 0.25) -> str:
        extra = {"fastgen_kv_budget": budget}
        return engine.add(prompt, max_tokens=110, ignore_eos=True, extra_args=extra)

    alone = [run([add(prompt)])[0] for prompt in prompts]
    for result in alone:
        n = len(result.prompt)
        # The last token is not encoded.
        assert result.info["compactions"] == (n + 109 - max(n, 60)) // 40
        assert result.info["kv_kept_last"] <= max(0.25, 60 / (n + 70)) + 0.05
        sizes = [sum(len(head) for layer in kept for head in layer) for kept in result.kept]
        assert sum(after < before for before, after in pairwise(sizes)) >= 1
    free = engine.free_blocks()
    for lag in (0, 1, 2):
        with monkeypatch.context() as late:
            engine.read_reports_late(lag, late)
            together = run([add(prompt) for prompt in prompts])
        for ours, theirs in zip(together, alone, strict=True):
            assert ours.output == theirs.output and ours.kept == theirs.kept
            assert ours.info["kv_kept_last"] == theirs.info["kv_kept_last"]
    assert engine.free_blocks() == free
    (whole,) = run([add(prompts[1], 1.0)])
    assert whole.info["compactions"] == 0 and whole.info["kv_kept_last"] is None


@pytest.mark.engine
@pytest.mark.parametrize("lag", [0, 1])
def test_requests_are_squeezed_instead_of_preempted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    """Under ``pressure`` everything is kept while memory suffices, and answers are those of the
    full cache; then what holds most is compacted, and hardly anybody is preempted."""
    prompts = [english(260, "specialnames", 1100 * i) for i in range(10)]
    preemptions: list[int] = []

    def run(compress: Any) -> dict[str, Finished]:
        extra = {"fastgen_compress": compress, "fastgen_kv_budget": 0.3}
        names = [engine.add(p, max_tokens=90, ignore_eos=True, extra_args=extra) for p in prompts]
        before, done = engine.num_preemptions, engine.run()
        preemptions.append(engine.num_preemptions - before)
        return {p: done[name] for p, name in zip(prompts, names, strict=True)}

    whole, unpressed = run(False), run("pressure")
    for prompt in prompts:
        assert unpressed[prompt].output == whole[prompt].output
        assert unpressed[prompt].info["compactions"] == 0
    free = engine.free_blocks()
    engine.read_reports_late(lag, monkeypatch)
    with engine.limited_to(45):
        run(False)
        squeezed = run("pressure")
    assert engine.free_blocks() == free
    assert preemptions[:2] == [0, 0]
    assert preemptions[2] >= 4, "not enough pressure for preemptions"
    assert 10 * preemptions[3] <= preemptions[2]
    compacted = [r.info for r in squeezed.values() if r.info["compactions"]]
    assert len(compacted) > 3
    for info in compacted:
        assert info["kv_kept_last"] < 0.7 and info["compacted_at"] > 50


@pytest.mark.engine
def test_wrong_override_is_that_requests_error(engine: Engine) -> None:
    with pytest.raises(VLLMValidationError, match=r"fastgen_recovery: got 1\.5"):
        engine.add(english(300), recovery=1.5)
    with pytest.raises(VLLMValidationError, match=r"\[0, 900\] goes beyond the prompt's \d+ tok"):
        engine.add("Hello", extra_args={"fastgen_protect": [0, 900]})
    with pytest.raises(VLLMValidationError, match="unknown key"):
        engine.add(english(300), extra_args={"fastgen_recovry": 0.9})
    name = engine.add(english(300))
    assert name in engine.run()


@pytest.mark.engine
def test_vacated_blocks_admit_more_requests(engine: Engine) -> None:
    """Memory for about four requests, 12 waiting: as many run as the kept ratio promises."""
    tokenizer = engine.llm.get_tokenizer()
    texts = [english(3000, "specialnames", 3000 * i) for i in range(12)]
    prompts = [tokenizer.decode(tokenizer.encode(text)[:496]) for text in texts]
    # The largest pool in which a cache that keeps everything runs four of them.
    num_blocks = 5 * -(-496 // 16) - 1

    def run(recovery: float) -> dict[str, Finished]:
        keys = [engine.add(p, recovery, max_tokens=20, ignore_eos=True) for p in prompts]
        results = engine.run()
        return {p: results[k] for p, k in zip(prompts, keys, strict=True)}

    alone = {}
    for prompt in prompts[::4]:
        name = engine.add(prompt, 0.9, max_tokens=20, ignore_eos=True)
        alone[prompt] = engine.run()[name].output
    with engine.limited_to(num_blocks):
        run(1.0)
        stock_running, engine.most_running = engine.most_running, 0
        together = run(0.9)
    assert stock_running == 4
    ratio = sum(r.info["kv_kept_ratio"] for r in together.values()) / len(prompts)
    assert ratio < 0.75, "natural text should leave heads something to discard"
    assert engine.most_running >= 0.9 * stock_running / ratio, (
        f"{stock_running} -> {engine.most_running} running at kept ratio {ratio:.3f}"
    )
    assert {p: together[p].output for p in alone} == alone


@pytest.mark.engine
def test_soak(engine: Engine) -> None:
    """80 requests, random lengths and aborts, in a pool that forces preemptions."""
    rng = random.Random(3)
    waiting, finished, preempted = 80, 0, engine.num_preemptions
    alive: set[str] = set()
    with engine.limited_to(130):
        while waiting or engine.llm.llm_engine.has_unfinished_requests():
            while waiting and len(alive) < 14:
                prompt = english(rng.randint(30, 1600), "specialnames", rng.randint(0, 50000))
                recovery = rng.choice([0.7, 0.9, 0.95, 1.0])
                alive.add(engine.add(prompt, recovery, max_tokens=rng.randint(1, 60)))
                waiting -= 1
            for output in engine.step():
                alive.discard(output.request_id)
                finished += 1
            if alive and rng.random() < 0.05:
                victim = rng.choice(sorted(alive))
                engine.abort(victim)
                alive.discard(victim)
            assert alive or not engine.llm.llm_engine.has_unfinished_requests()
    assert finished > 40
    assert engine.num_preemptions > preempted, "not enough pressure for a preemption"


@pytest.mark.engine
@pytest.mark.parametrize("lag", [1, 2])
def test_late_reports(engine: Engine, monkeypatch: pytest.MonkeyPatch, lag: int) -> None:
    """Reports read one and two steps late, as with asynchronous scheduling, under preemptions:
    no head runs out of pages, every block is accounted for, and answers stay as they were."""
    prompts = [english(200 + 61 * i, "specialnames", 900 * i) for i in range(16)]

    def run(recovery: float) -> dict[str, list[int]]:
        names = [engine.add(p, recovery, max_tokens=50, ignore_eos=True) for p in prompts]
        results = engine.run()
        return {p: results[name].output for p, name in zip(prompts, names, strict=True)}

    in_time = run(0.9)
    engine.read_reports_late(lag, monkeypatch)
    assert run(0.9) == in_time
    preempted = engine.num_preemptions
    free = engine.free_blocks()
    with engine.limited_to(70):
        run(0.9)
        run(1.0)
    assert engine.num_preemptions > preempted, "not enough pressure for a preemption"
    assert engine.free_blocks() == free
