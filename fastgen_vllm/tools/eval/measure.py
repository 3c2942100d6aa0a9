"""What each variant of a lab makes of a prompt."""

from __future__ import annotations

import torch

from fastgen_vllm.tools.eval.kvpress import KvpressLab
from fastgen_vllm.tools.eval.material import Item
from fastgen_vllm.tools.lab import Lab

QUARTERS = 4


def run(lab: Lab | KvpressLab, item: Item) -> dict[str, torch.Tensor]:
    """Figures of every variant on one prompt, float32 ``[variants]`` each. The first variant is the
    full cache.

    ``slots`` and ``pages``: the share kept. The same tokens are given to all variants, the true
    continuation or the full cache's own answer: ``kl``, the mean KL divergence from the full
    cache's distribution of the next token; ``same_top``, how often the most likely token is its;
    ``loss``, of a true continuation; of a long one also ``loss_1`` to ``loss_4``, of its quarters,
    and ``held``, the share kept on average while it grew. Then, of an answer, ``own``: it is the
    full cache's own; ``right``: where that can be said, each having answered freely.
    """
    lab.prefill(item.prompt)
    figures = {"slots": lab.kept_ratio(), "pages": lab.page_ratio()}
    given, forced = _follow(lab, item)
    figures |= forced
    if item.target:
        return figures
    own = figures["same_top"] == 1.0
    if item.right is None:
        return figures | {"own": own.float()}
    answer = [token for token in given if token not in lab.end_tokens]
    said = [lab.tokenizer.decode(answer)] * len(lab.variants)
    if not own.all():
        lab.fork()
        said = [lab.tokenizer.decode(tokens) for tokens in _answers(lab, item.most_tokens)]
    gist = item.gist or str
    return figures | {
        "own": torch.tensor([gist(text) == gist(said[0]) for text in said]).float(),
        "right": torch.tensor([item.right(text) for text in said]).float(),
    }


def _follow(lab: Lab | KvpressLab, item: Item) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Give all variants the same tokens, which are returned, and compare what they expect next."""
    given: list[int] = []
    kl, same, held = (torch.zeros(len(lab.variants)) for _ in range(3))
    loss = torch.zeros(QUARTERS, len(lab.variants))
    steps = len(item.target) or item.most_tokens
    while len(given) < steps:
        expected = lab.logits.log_softmax(-1)
        top = expected.argmax(-1)
        token = item.target[len(given)] if item.target else int(top[0])
        kl += divergence(expected)
        same += top == top[0]
        loss[len(given) * QUARTERS // steps] -= expected[:, token]
        held += lab.kept_ratio()
        given.append(token)
        if (not item.target and token in lab.end_tokens) or len(given) == steps:
            break
        lab.decode([token] * len(lab.variants))
    steps = len(given)
    figures = {"kl": kl / steps, "same_top": same / steps}
    if item.target:
        figures["loss"] = loss.sum(0) / steps
    if item.task == "generation":
        figures["held"] = held / steps
        figures |= {f"loss_{i + 1}": part * QUARTERS / steps for i, part in enumerate(loss)}
    return given, figures


def divergence(log_probs: torch.Tensor) -> torch.Tensor:
    """KL divergence from the first of ``[variants, vocabulary]``: ``[variants]``."""
    first = log_probs[0]
    # Rounding leaves a little below zero where there is no difference.
    return (first.exp() * (first - log_probs)).sum(-1).clamp(min=0)


def _answers(lab: Lab | KvpressLab, most_tokens: int) -> list[list[int]]:
    """What each variant answers by itself, greedily, without the token that ends it."""
    answers: list[list[int]] = [[] for _ in lab.variants]
    going = [True] * len(answers)
    for step in range(most_tokens):
        best = lab.logits.argmax(-1).tolist()
        going = [g and t not in lab.end_tokens for g, t in zip(going, best, strict=True)]
        for answer, token, goes_on in zip(answers, best, going, strict=True):
            answer += [token] * goes_on
        if not any(going) or step + 1 == most_tokens:
            break
        lab.decode(best)
    return answers
