"""``fastgen eval``: the lab is the engine, the tasks ask what they say, and it runs end to end."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.engine import Engine, english
from helpers.paths import TEXTS
from typer.testing import CliRunner

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.policy.methods import EVAL_ONLY
from fastgen_vllm.tools.cli import app
from fastgen_vllm.tools.eval import lm_eval, natural
from fastgen_vllm.tools.eval.chats import INSTRUCTIONS, well_formed
from fastgen_vllm.tools.eval.compare import COUNTS, run_eval, variants
from fastgen_vllm.tools.eval.functions import FUNCTIONS
from fastgen_vllm.tools.eval.material import Item, Load
from fastgen_vllm.tools.eval.report import FIGURES, Summary, chart, markdown
from fastgen_vllm.tools.eval.tasks import TASKS, items
from fastgen_vllm.tools.inputs import InputError
from fastgen_vllm.tools.lab import Lab, Variant
from fastgen_vllm.tools.models import load_tokenizer


@pytest.mark.engine
@pytest.mark.parametrize("goal", [{"recovery": 0.9}, {"kv_budget": 0.3}])
def test_the_lab_is_the_engine(model: str, engine: Engine, goal: dict) -> None:
    """The same policies, the same kept positions step by step, the same greedy tokens; and from a
    second copy of the prompt the same again."""
    extra = {f"fastgen_{name}": value for name, value in goal.items()}
    name = engine.add(english(2500, "objects"), max_tokens=32, ignore_eos=True, extra_args=extra)
    wanted = engine.run(trace=True)[name]
    lab = Lab(
        model, [Variant("one", FastGenConfig(min_prompt_tokens=16, decode_window=32, **goal))], 4096
    )
    lab.prefill(wanted.prompt, chunk=100)
    assert wanted.rules is not None
    for ours, theirs in zip(
        lab.choices["one"].rules.tensors(), wanted.rules.tensors(), strict=True
    ):
        assert torch.equal(ours, theirs)
    for _ in range(2):
        for step, token in enumerate(wanted.output):
            assert lab.kept_positions("one") == wanted.kept[step]
            assert int(lab.logits[0].argmax()) == token
            lab.decode([token])
        lab.fork()
    lab.runtime.tables.audit()


@pytest.mark.engine
def test_methods_see_the_model(model: str) -> None:
    """What the lab shows them is the model's own: its attention, and what it adds to the output."""
    from transformers import AutoModelForCausalLM

    budget, methods = 0.3, [*sorted(EVAL_ONLY), "snapkv"]
    settings = {"kv_budget": budget, "min_prompt_tokens": 1}
    compared = [Variant(m, FastGenConfig.from_dict({"method": m, **settings})) for m in methods]
    lab = Lab(model, compared, 4096)
    tokens = load_tokenizer(model).encode(english(900, "types"))
    lab.prefill(tokens, chunk=100)
    observed = lab.observed
    assert observed is not None
    hf = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    made: dict[str, torch.Tensor] = {}
    module = hf.model.layers[5].self_attn
    for name in ("q_proj", "v_proj"):
        getattr(module, name).register_forward_hook(
            lambda _module, _input, output, name=name: made.setdefault(name, output[0])
        )
    with torch.inference_mode():
        wanted = hf(torch.tensor([tokens]), output_attentions=True).attentions[5][0]
    found = observed.attention(5, 20)
    torch.testing.assert_close(found.flatten(0, 1), wanted[:, -20:], atol=1e-5, rtol=1e-4)
    before = observed.queries_before_rotation(5).flatten(0, 1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(before, made["q_proj"], atol=1e-3, rtol=1e-3)
    head, size = 4, module.head_dim
    alone = torch.zeros(len(tokens), module.o_proj.in_features)
    its_values = made["v_proj"].unflatten(1, (-1, size))[:, head // found.shape[1]]
    alone[:, head * size : (head + 1) * size] = its_values
    with torch.inference_mode():
        norms = module.o_proj(alone).abs().sum(-1)
    found_norms = observed.output_norms[5].flatten(0, 1)[head]
    torch.testing.assert_close(found_norms, norms, atol=1e-4, rtol=1e-4)
    for name, ratio in zip([v.name for v in compared], lab.kept_ratio().tolist(), strict=True):
        assert ratio == pytest.approx(budget, abs=0.01), name
    chosen = [lab.choices[v.name].kept for v in compared]
    assert not any(torch.equal(a, b) for i, a in enumerate(chosen) for b in chosen[:i])
    lab.decode(lab.logits.argmax(-1).tolist())
    lab.runtime.tables.audit()


@pytest.mark.engine
def test_tiny_eval(model: str, tmp_path: Path) -> None:
    compared = variants(["h2o", "snapkv"], [0.4], [0.95], {"least_window": 16})
    load = Load((256,), dict.fromkeys(COUNTS, 1) | {"answers": 2})
    results = run_eval(model, TEXTS, load, compared, {"least_window": 16})
    summary = Summary(results)
    methods = [v["method"] for v in results["variants"]]
    assert methods == [
        *("full", "FastGen", "adaptive ladder", "h2o", "snapkv"),
        *("adaptive ladder", "paper's ladder"),
    ]
    found = {figure.title: values for figure, values in summary.figures()}
    assert len(found) == sum(figure.task in COUNTS for figure in FIGURES)
    for title, values in found.items():
        assert values.shape[1] == len(methods)
        if title.endswith((": KL", ": loss")):
            assert (values[:, 0] == 0).all() and not (values[:, 1:] == 0).all()
    assert (found["calls as the full cache's"][:, 0] == 1).all()
    for variant, slots in zip(results["variants"][1:], summary.slots[1:], strict=True):
        assert 0.05 < slots < (0.43 if "budget" in variant["name"] else 1)
    table = markdown(json.loads(json.dumps(results)))
    assert table.count("\n| ") == 1 + len(methods)
    chart(results).savefig(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 20_000


@pytest.mark.engine
def test_a_long_generation(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short prompt is kept whole until it has grown; then it has the budget of its length."""
    monkeypatch.setattr(natural, "GENERATED", 200)
    own = {"min_prompt_tokens": 60, "compact_every": 40, "decode_window": 40}
    compared = variants(["h2o"], [0.3], [], own)
    results = run_eval(model, TEXTS, Load((50,), {"generation": 2}), compared, own)
    summary = Summary(results)
    found = {figure.name: values for figure, values in summary.figures()}
    assert set(found) == {"held", "kl", "loss_1", "loss_2", "loss_3", "loss_4"}
    full, ours, *_, peer = found["held"].mean(0).tolist()
    assert full == 1.0 and 0.4 < ours < 0.8 and 0.3 < peer < 0.4
    assert summary.slots[1] == 1.0, "the prompt is short"
    assert found["loss_1"][:, 1].abs().max() < 1e-5 < found["loss_4"][:, 1].abs().max()
    assert "| generation: share held |" in markdown(results)
    chart(results).savefig(tmp_path / "chart.png")


@pytest.mark.engine
def test_tasks_ask_what_they_say(model: str) -> None:
    tokenizer = load_tokenizer(model)
    halves: list[list[Item]] = [
        list(items(tokenizer, TEXTS, Load((512,), dict.fromkeys(TASKS, 4), half)))
        for half in ("first", "second")
    ]
    for item, other in zip(*halves, strict=True):
        text = tokenizer.decode(item.prompt)
        assert item.task == other.task and item.prompt != other.prompt
        assert 280 < len(item.prompt) < 900, (item.task, len(item.prompt))
        if item.task in ("continuation", "code", "generation"):
            long = item.task == "generation"
            assert len(item.prompt) == 512 and len(item.target) == (2000 if long else 64)
            continue
        assert not item.target
        hangul = any("가" <= char <= "힣" for char in text)
        assert hangul or item.kind != "korean"
        if item.task in ("answers", "chat"):
            assert hangul == (item.kind == "korean")
        elif item.task == "tools":
            assert text.count('"type": "function"') == 4
        elif item.task == "retrieval":
            numbers = re.findall(r"magic number for \w+ is (\d{7})", text)
            assert sum(item.right is not None and item.right(x) for x in numbers) == 1
    languages = [i.kind for i in halves[0] if i.task == "answers"]
    assert languages == ["english", "korean"] * 2


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ('{"name": "block_card", "arguments": {"last_digits": "1", "reason": "lost"}}', True),
        ('Sure: {"name": "block_card", "arguments": {"last_digits": 1, "reason": 2}} Bye', True),
        ('{"name": "block_card", "arguments": {"last_digits": "1"}}', False),
        ('{"name": "block_card", "arguments": {"last_digits": 1, "reason": 2, "a": 3}}', False),
        ('{"name": "block_cards", "arguments": {}}', False),
        ('{"name": "block_card"}', False),
        ('{"name": "block_card", "arg', False),
        ("[1]", False),
        ("no", False),
    ],
)
def test_well_formed_calls(said: str, right: bool) -> None:
    (card,) = (function for function in FUNCTIONS if function.name == "block_card")
    assert well_formed({card.name: card}, said) == right


@pytest.mark.parametrize(
    ("kind", "said", "holds"),
    [
        ("in Korean", "이 글은 경제에 대한 글입니다. (GDP)", True),
        ("in Korean", "This text is about 경제.", False),
        ("in Korean", "", False),
        ("ends with DONE", "It is a text. DONE.", True),
        ("ends with DONE", "DONE. It is a text.", False),
        ("JSON only", '{"answer": "yes"}', True),
        ("JSON only", '{"answer": "the beginning of a long', True),
        ("JSON only", '{"answer": "yes"} because', False),
        ("JSON only", 'Here: {"answer": "yes"}', False),
        ("JSON only", '["yes"]', False),
        ("begins with a tag", " [REPORT] It is.", True),
        ("begins with a tag", "REPORT: It is.", False),
    ],
)
def test_instructions_that_hold(kind: str, said: str, holds: bool) -> None:
    assert INSTRUCTIONS[kind][1](said) == holds


@pytest.mark.parametrize("task", ["continuation", "code", "answers", "retrieval"])
def test_texts_that_are_too_short(model: str, task: str) -> None:
    """A prompt is not quietly made of what there is."""
    with pytest.raises(InputError, match=r"Take a smaller --length|take a smaller --length"):
        list(items(load_tokenizer(model), TEXTS, Load((600_000,), {task: 1})))


def test_unknown_lm_eval_tasks_are_named_before_an_engine_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = SimpleNamespace(TaskManager=lambda include_path: SimpleNamespace(all_tasks=["known"]))
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", known)
    (tmp_path / "own.yaml").touch()
    job = {"tasks": ["known", str(tmp_path / "own.yaml"), "nowhere"], "include": None}
    monkeypatch.setattr(lm_eval, "Jobs", lambda: [job])
    with pytest.raises(ValueError, match=r"no task nowhere: see"):
        lm_eval.main()


def test_where_a_peer_is_better_is_said() -> None:
    """By more than one standard error of the difference, paired by prompt."""
    variants = [{"name": n, "method": n.split(",")[0]} for n in ("full", "FastGen, budget 0.2")]
    variants += [{"name": f"{m}, budget 0.2", "method": m} for m in ("near", "better", "worse")]
    rows = [[0.0, 0.5, 0.501, 0.4, 0.6], [0.0, 0.9, 0.899, 0.8, 1.5]]
    shares = {"slots": [1, *[0.2] * 4], "pages": [1, *[0.2] * 4]}
    prompts = [{"task": "chat", "kind": "english", "kl": row, **shares} for row in rows]
    about = {"model": "m", "machine": "x", "date": "today", "load": {"lengths": [9], "half": "b"}}
    table = markdown({**about, "variants": variants, "prompts": prompts})
    assert "- budget 0.2: chat: KL: better." in table


LOCAL_TASK = """
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
    (tmp_path / "local.yaml").write_text(LOCAL_TASK.replace("DATA", str(data)))
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
