"""``fastgen eval``: the lab is the engine, the tasks ask what they say, and it runs end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.engine import Engine, english
from helpers.paths import TEXTS
from typer.testing import CliRunner

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.policy.hybrids import hybrids_of
from fastgen_vllm.tools.cli import app
from fastgen_vllm.tools.eval.compare import run_eval, variants
from fastgen_vllm.tools.eval.report import chart, markdown
from fastgen_vllm.tools.eval.tasks import Load, items, rouge_l
from fastgen_vllm.tools.inputs import InputError
from fastgen_vllm.tools.lab import Lab, Variant
from fastgen_vllm.tools.models import load_tokenizer


@pytest.mark.engine
@pytest.mark.parametrize("goal", [{"recovery": 0.9}, {"kv_budget": 0.3}])
def test_the_lab_is_the_engine(model: str, engine: Engine, goal: dict) -> None:
    """The same policies, the same kept positions step by step, the same greedy tokens."""
    extra = {f"fastgen_{name}": value for name, value in goal.items()}
    name = engine.add(english(2500, "types"), max_tokens=32, ignore_eos=True, extra_args=extra)
    wanted = engine.run(trace=True)[name]
    lab = Lab(model, [Variant("one", FastGenConfig(min_prompt_tokens=16, **goal))], 4096)
    lab.prefill(wanted.prompt, chunk=100)
    ladder, heads = engine.runtime.config.hybrids, lab.runtime.pool.num_kv_heads
    rungs = [ladder.index(hybrid) for hybrid in hybrids_of(lab.choices["one"].rules)]
    assert [rungs[i : i + heads] for i in range(0, len(rungs), heads)] == wanted.policy
    for step, token in enumerate(wanted.output):
        assert lab.kept_positions("one") == wanted.kept[step]
        assert int(lab.logits[0].argmax()) == token
        lab.decode([token])
    lab.runtime.tables.audit()


@pytest.mark.engine
def test_tiny_eval(model: str, tmp_path: Path) -> None:
    compared = variants(["h2o", "snapkv"], [0.4], [0.95], {"least_window": 16})
    load = Load((256,), continuations=4, retrievals=1, agreements=2, num_tokens=8)
    results = run_eval(model, TEXTS, load, compared, {"least_window": 16})
    full, *others = results["variants"]
    assert full["kept_slots"] == 1.0 and full["loss_increase"] == 0.0 and full["rouge_l"] == 1.0
    assert [v["method"] for v in others] == [
        "FastGen",
        "paper's ladder",
        "FastGen",
        "h2o",
        "snapkv",
    ]
    for variant in others:
        assert 0.05 < variant["kept_slots"] < 1
        assert set(variant["rouge_l_by_language"]) == {"english", "korean"}
        if "budget" in variant["name"]:
            assert variant["kept_slots"] < 0.42
    assert others[2]["loss"] != full["loss"]
    json.dumps(results)
    table = markdown(results)
    assert table.count("\n| ") == 1 + len(results["variants"])
    chart(results, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 20_000


@pytest.mark.engine
def test_tasks_ask_what_they_say(model: str) -> None:
    tokenizer = load_tokenizer(model)
    found = list(items(tokenizer, TEXTS, Load((512,), 4, 2, 2, 16)))
    assert [i.task for i in found] == ["continuation"] * 4 + ["retrieval"] * 6 + ["agreement"] * 2
    for item in found[:4]:
        assert len(item.prompt) == 512 and len(item.target) == 16
    for item in found[4:10]:
        text, answer = tokenizer.decode(item.prompt), tokenizer.decode(item.target)
        assert text.count(answer) == 1, "the answer stands in the text once"
        assert 350 < len(item.prompt) < 620
    assert any("가" <= char <= "힣" for char in tokenizer.decode(found[3].prompt))


@pytest.mark.parametrize(
    ("length", "load", "message"),
    [
        (60_000, {"continuations": 1}, "no more passages of 60016 tokens"),
        (60_000, {"retrievals": 1}, "needs a text of 59850"),
        (256, {"agreements": 10_000}, "no more passages of 156 tokens"),
    ],
)
def test_texts_that_are_too_short(model: str, length: int, load: dict, message: str) -> None:
    """A retrieval prompt is not quietly made of what there is."""
    none = {"continuations": 0, "retrievals": 0, "agreements": 0}
    wanted = Load((length,), **{**none, **load}, num_tokens=16)
    with pytest.raises(InputError, match=message):
        list(items(load_tokenizer(model), TEXTS, wanted))


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [([1, 2, 3], [1, 2, 3], 1.0), ([1, 2], [3, 4], 0.0), ([1, 9, 2, 3], [1, 2, 4, 3], 0.75)],
)
def test_rouge_l(answer: list[int], reference: list[int], score: float) -> None:
    assert rouge_l(answer, reference) == score


TASK = """
task: local_capitals
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}} Question: what is the capital of {{country}}? Answer:"
doc_to_target: "{{capital}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.engine
def test_lm_eval_task(model: str, tmp_path: Path) -> None:
    """A small task of the user's own, through lm-eval's vLLM model, in both engines."""
    pairs = [("France", "Paris"), ("Korea", "Seoul"), ("Italy", "Rome")]
    rows = [
        {"text": english(900, "types"), "country": country, "capital": f" {capital}"}
        for country, capital in pairs
    ]
    data = tmp_path / "capitals.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local.yaml").write_text(TASK.replace("DATA", str(data)))
    out = tmp_path / "out.json"
    arguments = ["eval", model, "--lm-eval", "local_capitals", "--lm-eval-path", str(tmp_path)]
    engine_args = {"kv_cache_memory_bytes": 256 << 20, "max_model_len": 2048, "enforce_eager": True}
    arguments += ["--engine-args", json.dumps(engine_args), "--json", str(out)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "| local_capitals |" in out.with_suffix(".md").read_text()
    found = json.loads(out.read_text())
    assert set(found) == {"stock", "FastGen"}
    for engine_results in found.values():
        assert 0 <= engine_results["local_capitals"]["exact_match,none"] <= 1
