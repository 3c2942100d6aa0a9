"""``fastgen advise``: a sweep over prompts of the user's own, and what it recommends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.engine import KOREAN, english
from typer.testing import CliRunner

from fastgen_vllm.tools.advise import Line, lowest, read_prompts
from fastgen_vllm.tools.cli import app
from fastgen_vllm.tools.inputs import InputError
from fastgen_vllm.tools.models import load_tokenizer


def line(budget: float, memory: float, agreement: float) -> Line:
    return Line(budget, memory, 1 / memory, (0.1, 0.01), (agreement, 0.01))


@pytest.mark.parametrize(
    ("agreements", "best"),
    [
        ([0.97, 0.98, 0.99, 1.0], 0.2),  # 0.1 holds no less
        ([0.94, 0.94, 0.96, 1.0], 0.4),
        ([0.99, 0.99, 0.9, 1.0], 0.8),  # what is better below is luck
        ([0.9, 0.9, 0.9, 0.9], None),
    ],
)
def test_the_lowest_budget_that_is_good_enough(agreements: list[float], best: float | None) -> None:
    budgets, memories = (0.1, 0.2, 0.4, 0.8), (0.25, 0.25, 0.4, 0.8)
    lines = list(map(line, budgets, memories, agreements))
    found = lowest(lines, 0.95)
    assert (found and found.budget) == best


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "line 2: JSONDecodeError"),
        ('{"text": "Hello"}', "line 2: ValueError: it has no prompt"),
        ('{"messages": "Hello"}', "line 2: "),
        ('{"prompt": ""}', "line 2: ValueError: the prompt is empty"),
    ],
)
def test_lines_that_are_no_prompt(model: str, tmp_path: Path, second: str, message: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt": "Hello"}}\n{second}\n')
    with pytest.raises(InputError, match=message):
        read_prompts(prompts, load_tokenizer(model))


@pytest.mark.engine
def test_advice(model: str, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "advice.json"
    question = {"role": "user", "content": f"{KOREAN} {english(1500)} \u2028What is this about?"}
    jobs = [{"prompt": english(2000, "types")}, {"messages": [question]}, {"prompt": "Hello"}]
    prompts.write_text("\n\n".join(json.dumps(job, ensure_ascii=False) for job in jobs))
    arguments = ["advise", model, str(prompts), "--json", str(out), "--agreement", "0.5"]
    arguments += ["--max-tokens", "12", "--budget", "0.5", "--budget", "0.2"]

    def advised(*more: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*arguments, *more], env={"COLUMNS": "200"})
        return result.exit_code, result.output

    code, said = advised("--settings", '{"min_prompt_tokens": 32}')
    assert code == 0 and 'Take {"min_prompt_tokens": 32, "kv_budget": 0.2}' in said
    assert "1 short prompts are kept whole" in said and "only 2 prompts" in said
    found = json.loads(out.read_text())
    low, high = found["lines"]
    assert (low["budget"], high["budget"]) == (0.2, 0.5)
    assert 0.2 < low["memory"] < 0.3 and 0.5 < high["memory"] < 0.6
    assert low["at_once"] == pytest.approx(1 / low["memory"])
    assert low["kl"][0] > high["kl"][0] > 0 and 0 < low["agreement"][0] <= 1
    assert out.with_suffix(".png").stat().st_size > 10_000

    code, said = advised("--settings", '{"min_prompt_tokens": 2000}')
    assert code == 2 and "have fewer than 2000 tokens" in said
