"""Compare each of our peers with kvpress's press of the same definition: which keys they keep, and
how far each is from the full cache. Prints Markdown.

    python scripts/against_kvpress.py .kvpress/bin/python [MODEL] [--budget 0.3] [--prompts 4]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.policy.choice import Goal, PromptStats
from fastgen_vllm.policy.hybrids import Ladder
from fastgen_vllm.policy.methods import METHODS
from fastgen_vllm.policy.methods.snapkv import OBSERVATION
from fastgen_vllm.policy.observed import Observed
from fastgen_vllm.tools.eval.kvpress import PRESSES, KvpressLab, of
from fastgen_vllm.tools.eval.measure import divergence
from fastgen_vllm.tools.lab import Lab, Variant
from fastgen_vllm.tools.machine import machine
from fastgen_vllm.tools.texts import texts_in

LIKE_KVPRESS: dict[str, dict[str, Any]] = {
    "SnapKV": {"observation_window": 64, "score_pooling": 5},
    "AdaKV": {"observation_window": 64, "score_pooling": 5},
    "CriticalAdaKV": {"observation_window": 64, "score_pooling": 5},
    "PyramidKV": {"method": "snapkv", "observation_window": 64, "score_pooling": 5},
}
"""Our settings that come nearest to a press's defaults, where ours are others: it does as SnapKV
where a deep layer's share would be smaller than the window."""


GIVEN_THEIR_SCORES = ("SnapKV", "AdaKV", "CriticalAdaKV")


def ours(budget: float) -> list[Variant]:
    found = [Variant("full", FastGenConfig(kv_budget=1.0))]
    for press, method in PRESSES.items():
        settings = {"method": method, "kv_budget": budget}
        found.append(Variant(press, FastGenConfig.from_dict(settings)))
        if press in LIKE_KVPRESS:
            like = FastGenConfig.from_dict({**settings, **LIKE_KVPRESS[press]})
            found.append(Variant(f"{press}, kvpress's settings", like))
    return found


def follow(lab: Lab | KvpressLab, target: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean KL divergence from the first variant while all are given ``target``, ``[variants]``; and
    that variant's logits at the end."""
    total = torch.zeros(len(lab.variants))
    for token in target:
        lab.decode([token] * len(lab.variants))
        total += divergence(lab.logits.log_softmax(-1))
    return total / len(target), lab.logits[0]


def overlap(a: list[list[set[int]]], b: list[list[set[int]]]) -> float:
    """The share of the keys of ``a`` that ``b`` keeps too, over all layers and heads."""
    heads = [(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True)]
    return sum(len(x & y) for x, y in heads) / sum(len(x) for x, _ in heads)


def given_their_scores(observed: Observed, press: str, budget: float) -> list[list[set[int]]]:
    """What our method keeps when keys rank as in kvpress's SnapKV: by the mean of 5 keys around
    each of the earlier keys, as the last 64 queries look at them."""
    layers, heads, n, _ = observed.keys.shape
    scores = torch.zeros(layers, heads, n)
    for layer in range(layers):
        received = observed.attention(layer, 64)[..., :-64].sum(dim=(1, 2))
        scores[layer, :, :-64] = torch.nn.functional.avg_pool1d(received, 5, 1, 2)
    profiling = replace(OBSERVATION, window=64)
    none = torch.zeros(n, dtype=torch.uint8)
    norms, mass = torch.ones_like(scores), scores[:, :, None, :, None]
    stats = PromptStats(mass, norms, scores, scores, none, 16, profiling, observed)
    goal = Goal(None, int(n * (1 - (1 - budget))) / n)  # as kvpress rounds
    method = METHODS[PRESSES[press]]
    ladder = Ladder.from_hybrids(method.hybrids(budget), profiling.least_window, False)
    kept = method.choose(ladder, stats, goal).kept
    return [[set(head.nonzero()[:, 0].tolist()) for head in layer] for layer in kept]


@dataclass
class Comparison:
    """Figures of each of our variants, a prompt each: the share of its keys that its press keeps
    too, and the KL divergence of both from the full cache."""

    lab: Lab
    peers: KvpressLab
    found: dict[str, list[tuple[float, float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    scored: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    furthest: float = 0.0

    def add(self, prompt: list[int], target: list[int]) -> None:
        self.lab.prefill(prompt)
        self.peers.prefill(prompt)
        presses = [v.press for v in self.peers.variants]
        shared = {}
        for variant in self.lab.variants[1:]:
            theirs = presses.index(variant.name.partition(",")[0])
            kept = self.peers.kept_positions(self.peers.variants[theirs].name)
            shared[theirs, variant.name] = overlap(self.lab.kept_positions(variant.name), kept)
        (our_kl, our_end), (their_kl, their_end) = (
            follow(lab, target) for lab in (self.lab, self.peers)
        )
        assert self.lab.observed is not None, "one of the methods needs the model"
        for press in GIVEN_THEIR_SCORES:
            ours = given_their_scores(self.lab.observed, press, self.peers.variants[1].budget)
            [theirs] = [v.name for v in self.peers.variants if v.press == press]
            self.scored[press].append(overlap(ours, self.peers.kept_positions(theirs)))
        self.furthest = max(self.furthest, float((our_end - their_end).abs().max()))
        for i, ((theirs, name), share) in enumerate(shared.items(), 1):
            self.found[name].append((share, float(our_kl[i]), float(their_kl[theirs])))

    def rows(self) -> Iterator[str]:
        yield "| method | our keys that kvpress keeps too | KL, ours | KL, kvpress |"
        yield "|---|---|---|---|"
        for name, figures in self.found.items():
            shared, *divergences = zip(*figures, strict=True)
            cells = [f"{_mean(kl):.3f} ({' '.join(f'{x:.3f}' for x in kl)})" for kl in divergences]
            yield f"| {name} | {_mean(shared):.3f} | {' | '.join(cells)} |"
        for press, shares in self.scored.items():
            yield f"| {press}, kvpress's scores | {_mean(shares):.3f} | | |"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(
    python: Path,
    model: Annotated[Path, typer.Argument()] = Path(".cache/smollm2-135m-instruct"),
    texts: Path = Path(".cache/texts"),
    budget: float = 0.3,
    prompts: int = 4,
    length: int = 1024,
    steps: int = 32,
) -> None:
    compared, kvpress = ours(budget), of(python, [budget])
    room = int((length + steps) * (budget * len(compared) + 4))
    lab = Lab(model, compared, room)
    with KvpressLab(str(model), kvpress, lab) as peers:
        comparison = Comparison(lab, peers)
        for text in texts_in(texts, "english")[:prompts]:
            tokens = lab.tokenizer.encode(text, add_special_tokens=False)
            comparison.add(tokens[:length], tokens[length : length + steps])
    print(f"{model.name}, float32, kvpress {peers.version}, {machine()}, {date.today()}:")
    print(f"{prompts} prompts of {length} tokens at a budget of {budget:g}, {steps} further tokens")
    print(
        "given. KL from the full cache in nats a token, the mean and each prompt's; the last logits"
    )
    print(f"of the two full caches differ by {comparison.furthest:.1e} at most.\n")
    print("\n".join(comparison.rows()))


if __name__ == "__main__":
    typer.run(main)
