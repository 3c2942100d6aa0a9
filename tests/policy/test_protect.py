"""Tokens that always stay, and requests that keep what their recovery needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.prompts import PAGE, Prompt

from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.policy.choice import Goal
from fastgen_vllm.policy.protect import SystemPrompts, protect
from fastgen_vllm.policy.tokens import PROTECTED
from fastgen_vllm.tools.models import load_tokenizer

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML without a system prompt of its own."""


@pytest.mark.engine
@pytest.mark.parametrize("template", ["", PLAIN])
@pytest.mark.parametrize("said", ["You are a poet.", "당신은 시인입니다.", "{a}\n\n[b]", ""])
@pytest.mark.parametrize("question", ["Hello?", "\n\n안녕하세요?", " {}"])
def test_a_system_prompt_ends_where_the_user_begins(
    model: str, template: str, said: str, question: str
) -> None:
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = template or tokenizer.chat_template
    messages = [{"role": "system", "content": said}, {"role": "user", "content": question}]
    messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "So?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    end = SystemPrompts.of(tokenizer).length(tokens)
    system, rest = tokenizer.decode(tokens[:end]), tokenizer.decode(tokens[end:])
    assert said in system and rest.count("So?") == 1 and "Yes." in rest
    assert (question not in system) and question.strip() in rest


@pytest.mark.engine
def test_a_chat_without_a_system_prompt_has_none(model: str) -> None:
    """Though the user's second turn begins as a first one does."""
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = PLAIN
    messages = [
        {"role": role, "content": "Hello."} for role in ("user", "assistant", "user", "assistant")
    ]
    tokens = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False))
    found = SystemPrompts.of(tokenizer)
    assert found.end and found.length(tokens) == 0


class Template:
    """A tokenizer of characters, whose template is ``wrap`` around a system prompt."""

    def __init__(self, wrap: str, joins: bool = False) -> None:
        self.wrap, self.joins = wrap, joins

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        if not self.wrap:
            raise ValueError("no chat template")
        return self.wrap.format(*(message["content"] for message in messages))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """``joins``: as tokenizers that mark where a text begins."""
        return [0] * self.joins + [ord(char) for char in text]


@pytest.mark.parametrize(
    "tokenizer",
    [Template(""), Template("{1}"), Template("{0}"), Template("<<{0}>>{1}", joins=True)],
    ids=["no template", "no system prompt", "no user", "cannot be found again"],
)
def test_templates_that_tell_nothing(tokenizer: Any) -> None:
    found = SystemPrompts.of(tokenizer)
    assert found == SystemPrompts() and found.length([1, 2, 3]) == 0
    found.check("fastgen.protect", None)
    with pytest.raises(FastGenConfigError, match=r"fastgen\.protect: 'system' needs a chat"):
        found.check("fastgen.protect", "system")


def test_a_template_that_tells() -> None:
    tokenizer = Template("Today is Monday. {0}>>{1}")
    found = SystemPrompts.of(tokenizer)
    assert found.length(tokenizer.encode("Today is Friday. Be kind.>>Hello>>", False)) == 25


@pytest.mark.parametrize(
    ("tokens", "length"),
    [([5, 7, 8, 9, 7, 8], 1), ([5, 9, 7, 7, 8], 3), ([5, 7], 0), ([7, 8], 0), ([5], 0), ([], 0)],
)
def test_the_first_turn_counts(tokens: list[int], length: int) -> None:
    assert SystemPrompts((5,), (7, 8)).length(tokens) == length


@pytest.mark.parametrize(
    ("spans", "limit", "wanted"),
    [
        ([(0, 3)], 0.5, {0, 1, 2}),
        ([(8, 10), (1, 3)], 0.5, {1, 2, 8, 9}),
        ([(1, 4), (2, 6)], 1.0, {1, 2, 3, 4, 5}),
        ([(1, 4), (2, 9)], 0.5, {1, 2, 3, 4, 5}),
        ([(7, 99)], 1.0, {7, 8, 9}),
        ([(0, 9)], 0.01, set()),
        ([], 0.5, set()),
    ],
)
def test_spans_within_a_limit(spans: list[tuple[int, int]], limit: float, wanted: set[int]) -> None:
    classes = torch.arange(10, dtype=torch.uint8) % 3
    marked, count = protect(classes, spans, limit)
    assert set((marked & PROTECTED).nonzero()[:, 0].tolist()) == wanted and count == len(wanted)
    assert torch.equal(marked & ~torch.tensor(PROTECTED, dtype=torch.uint8), classes)


@pytest.mark.parametrize("ladder", [None, "adaptive", "paper"])
@pytest.mark.parametrize("goal", [Goal(None, 0.3), Goal(0.6, None)])
def test_protected_tokens_stay_in_every_head(ladder: str | None, goal: Goal) -> None:
    """For good; and a budget is of the rest."""
    how: dict[str, Any] = {"ladder": ladder, "least_window": 8, "num_sinks": 0}
    prompt = Prompt.random(400, 3, goal, 100, **how)
    profile = prompt.profile
    spared = profile.finish()
    none = torch.zeros_like(profile.token_classes)
    profile.token_classes, profile.num_protected = protect(none, [(50, 130)], 1.0)
    profile.goal = goal
    choice = profile.finish()
    assert not spared.kept[..., 50:130].all()
    assert choice.kept[..., 50:130].all()
    full = choice.rules.least_window > 1000
    assert (choice.sticky[..., 50:130].all(-1) | full).all()
    if goal.budget is not None:
        assert profile.goal.budget == pytest.approx(0.2 + 0.8 * 0.3)
        pages = int(-(-choice.kept.sum(-1) // PAGE).sum())
        assert pages <= (0.2 + 0.8 * 0.3) * 2 * 100


@pytest.mark.parametrize("ladder", [None, "adaptive"])
@pytest.mark.parametrize("least", [0.0, 0.5, 0.9, 1.0])
def test_a_budget_rises_until_enough_is_recovered(ladder: str | None, least: float) -> None:
    goal = Goal(None, 0.1, least_recovery=least)
    prompt = Prompt.random(300, 3, goal, 100, peaked=0.5, ladder=ladder, least_window=8)
    choice = prompt.profile.finish()
    assert float(choice.recovery.mean()) >= least - 1e-6
    risen = prompt.profile.goal.budget
    assert risen is not None
    assert (risen == 0.1) == (least < 0.1), "random attention is spread evenly"
    if 0 < least < 1:
        below = Goal(None, risen - 0.02)
        less = Prompt.random(300, 3, below, 100, peaked=0.5, ladder=ladder, least_window=8)
        assert float(less.profile.finish().recovery.mean()) < least


@pytest.mark.parametrize("n", [1, 5, 40, 333])
def test_recovery_is_what_the_last_queries_see(n: int) -> None:
    """By an explicit mask over their attention, weighed by the values' norms."""
    prompt = Prompt.random(n, 3, Goal(None, 0.4), 50, ladder=None, least_window=8)
    choice = prompt.profile.finish()
    attention = prompt.far_attention()
    for head in range(2):
        seen = attention[head].sum((0, 1)) * prompt.value[:, head].norm(dim=-1)
        wanted = (seen * choice.kept[0, head]).sum() / seen.sum() if n > 8 else torch.tensor(1.0)
        torch.testing.assert_close(choice.recovery[0, head], wanted)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"fastgen_protect": "user"}, r"fastgen_protect: got 'user'\. give 'system', or a list"),
        ({"fastgen_protect": [1]}, "a list of ranges"),
        ({"fastgen_protect": [5, 3]}, "a list of ranges"),
        ({"fastgen_protect": [-1, 3]}, "a list of ranges"),
        ({"fastgen_protect": [0, 2.5]}, "a list of ranges"),
        ({"fastgen_protect": [0, "b"]}, "a list of ranges"),
        ({"fastgen_protect": [None, {}]}, "a list of ranges"),
        ({"fastgen_protect": []}, "a list of ranges"),
        ({"fastgen_protect": 7}, "a list of ranges"),
        ({"fastgen_min_recovery": 1.5}, r"fastgen_min_recovery: got 1\.5"),
    ],
)
def test_wrong_requests_are_named(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(FastGenConfigError, match=message):
        RequestOverride.from_extra_args(extra)


def test_what_the_engine_cannot_give_is_refused() -> None:
    protects = RequestOverride.from_extra_args({"fastgen_protect": [0, 4, 9, 12]})
    assert protects.spans == [(0, 4), (9, 12)]
    floor = RequestOverride(fastgen_min_recovery=0.8)
    fixed = FastGenConfig(method="h2o", kv_budget=0.3)
    for override in (protects, floor):
        FastGenConfig().check_override(override)
        with pytest.raises(FastGenConfigError, match="cannot change method 'h2o'"):
            fixed.check_override(override)
    with pytest.raises(FastGenConfigError, match=r"fastgen_min_recovery: 0\.8 goes with a budget"):
        FastGenConfig(recovery=0.9).check_override(floor)
    both = RequestOverride(fastgen_min_recovery=0.8, fastgen_kv_budget=0.3)
    FastGenConfig(recovery=0.9).check_override(both)
    assert FastGenConfig().goal_of(floor).least_recovery == 0.8
    always = FastGenConfig(kv_budget=0.3, min_recovery=0.9)
    assert always.goal_of(RequestOverride()).least_recovery == 0.9
    assert always.goal_of(RequestOverride(fastgen_recovery=0.1)).least_recovery == 0.0
    for wrong in ({"protect": "system"}, {"min_recovery": 0.5}):
        with pytest.raises(FastGenConfigError, match="does not go with method"):
            FastGenConfig.from_dict({"method": "h2o", "kv_budget": 0.3, **wrong})
    with pytest.raises(FastGenConfigError, match="min_recovery goes with a kv_budget"):
        FastGenConfig.from_dict({"recovery": 0.9, "min_recovery": 0.5})
