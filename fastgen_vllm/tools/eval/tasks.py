"""The tasks of ``fastgen eval``: prompts, and what each variant of a ``Lab`` makes of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgen_vllm.tools.inputs import InputError
from fastgen_vllm.tools.lab import Lab
from fastgen_vllm.tools.texts import texts_in

WORDS = (
    *("river", "candle", "marble", "garden", "rocket", "violin", "pepper", "anchor", "blanket"),
    *("copper", "lantern", "meadow", "orchid", "pirate", "saddle", "turtle", "velvet", "walnut"),
)
QUESTIONS = {
    "english": ("Summarize the main idea of this text.", "What does the author argue, and why?"),
    "korean": ("이 글의 핵심 내용을 요약해 주세요.", "이 글에서 가장 중요한 점은 무엇인가요?"),
}


@dataclass(frozen=True)
class Item:
    """One prompt of a task.

    Attributes:
        target: the true continuation (``continuation``), the answer (``retrieval``), or nothing.
    """

    task: str
    kind: str
    prompt: list[int]
    target: list[int]


@dataclass(frozen=True)
class Load:
    """How much of each task. ``lengths`` in tokens, one item of each kind for each of them."""

    lengths: tuple[int, ...]
    continuations: int
    retrievals: int
    agreements: int
    num_tokens: int = 64


@dataclass(frozen=True)
class Haystack:
    """Essays to hide sentences in.

    Attributes:
        length: tokens of a prompt, about.
    """

    tokenizer: Any
    texts: list[str]
    length: int
    rng: random.Random

    def essay(self) -> list[str]:
        """Sentences of one of the longest essays.

        Raises:
            InputError: it is too short.
        """
        text = " ".join(self.rng.choice(self.texts[:12]).split())
        tokens, size = _encode(self.tokenizer, text), self.length - 150
        if len(tokens) < size:
            raise InputError(
                f"A prompt of {self.length} tokens needs a text of {size}, and one of the longest "
                f"English texts has {len(tokens)}. Add longer texts or take a smaller --length."
            )
        return self.tokenizer.decode(tokens[:size]).split(". ")


def items(tokenizer: Any, texts: Path, load: Load) -> Iterator[Item]:
    """All prompts, the same on every machine.

    Raises:
        InputError: the texts are too few or too short.
    """
    passages = Passages(tokenizer, texts_in(texts, "english"), texts_in(texts, "korean"))
    rng = random.Random(0)
    for length in load.lengths:
        yield from _continuations(passages, length, load)
        haystack = Haystack(tokenizer, passages.english, length, rng)
        for kind in (passkey, multi_key, variable_tracking):
            for i in range(load.retrievals):
                yield kind(haystack, (i + 0.5) / load.retrievals)
        yield from _agreements(passages, length, load)


@dataclass(frozen=True)
class Passages:
    """Natural texts in two languages, longest first."""

    tokenizer: Any
    english: list[str]
    korean: list[str]

    def of(self, size: int, backwards: bool = False) -> dict[str, Iterator[list[int]]]:
        """By language, stretches of ``size`` tokens, from the shortest text on if ``backwards``."""
        step = -1 if backwards else 1
        return {
            "english": _passages(self.tokenizer, self.english[::step], size),
            "korean": _passages(self.tokenizer, self.korean[::step], size),
        }


def _passages(tokenizer: Any, texts: list[str], size: int) -> Iterator[list[int]]:
    """One of each text in turn, then further on in each."""
    encoded = [_encode(tokenizer, text) for text in texts]
    for start in range(0, max(map(len, encoded)), size):
        fitting = (tokens for tokens in encoded if start + size <= len(tokens))
        yield from (tokens[start : start + size] for tokens in fitting)
    raise InputError(
        f"The texts have no more passages of {size} tokens. Add texts or take a smaller --length."
    )


def _continuations(passages: Passages, length: int, load: Load) -> Iterator[Item]:
    """Every fourth is Korean."""
    stretches = passages.of(length + load.num_tokens)
    for i in range(load.continuations):
        language = "korean" if i % 4 == 3 else "english"
        tokens = next(stretches[language])
        yield Item("continuation", language, tokens[:length], tokens[length:])


def passkey(haystack: Haystack, depth: float) -> Item:
    """RULER's niah_single: one number in an essay (arXiv 2404.06654)."""
    (word,), (number,) = haystack.rng.sample(WORDS, 1), _numbers(haystack.rng, 1)
    return _retrieval(haystack, "passkey", [(depth, _needle(word, number))], word, number)


def multi_key(haystack: Haystack, depth: float) -> Item:
    """RULER's niah_multikey: four numbers, one asked for."""
    rng = haystack.rng
    words, numbers = rng.sample(WORDS, 4), _numbers(rng, 4)
    depths = [depth, *(rng.random() for _ in range(3))]
    needles = [(d, _needle(w, x)) for d, w, x in zip(depths, words, numbers, strict=True)]
    return _retrieval(haystack, "multi-key", needles, words[0], numbers[0])


def variable_tracking(haystack: Haystack, depth: float) -> Item:
    """RULER's variable tracking, one hop: the number that the first word's number was copied to."""
    (first, second), (number,) = haystack.rng.sample(WORDS, 2), _numbers(haystack.rng, 1)
    copied = f"The special magic number for {second} is the same as that for {first}."
    needles = [(depth * 0.7, _needle(first, number)), (depth * 0.7 + 0.3, copied)]
    return _retrieval(haystack, "variable tracking", needles, second, number)


def _needle(word: str, number: str) -> str:
    return f"The special magic number for {word} is {number}."


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(rng.randrange(1_000_000, 10_000_000)) for _ in range(count)]


def _retrieval(
    haystack: Haystack, kind: str, needles: list[tuple[float, str]], word: str, number: str
) -> Item:
    tokenizer, sentences = haystack.tokenizer, haystack.essay()
    for depth, needle in sorted(needles, reverse=True):
        sentences.insert(int(depth * len(sentences)), needle.rstrip("."))
    question = f"What is the special magic number for {word} mentioned in the text above?"
    text = "Read the text and remember the magic numbers.\n\n" + ". ".join(sentences)
    prompt = _chat(tokenizer, f"{text}\n\n{question}")
    prompt += f"The special magic number for {word} mentioned in the text is"
    return Item("retrieval", kind, _encode(tokenizer, prompt), _encode(tokenizer, f" {number}"))


def _agreements(passages: Passages, length: int, load: Load) -> Iterator[Item]:
    """Instructions about natural texts; every second is Korean."""
    tokenizer, stretches = passages.tokenizer, passages.of(length - 100, backwards=True)
    for i in range(load.agreements):
        language = "korean" if i % 2 else "english"
        text = tokenizer.decode(next(stretches[language]))
        question = QUESTIONS[language][i // 2 % 2]
        prompt = _encode(tokenizer, _chat(tokenizer, f"{text}\n\n{question}"))
        yield Item("agreement", language, prompt, [])


def _chat(tokenizer: Any, text: str) -> str:
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def run(lab: Lab, item: Item, num_tokens: int) -> dict[str, torch.Tensor]:
    """Figures of every variant on one prompt: ``[variants]`` each.

    The first variant is the full cache, which ``agreement`` compares with.
    """
    lab.prefill(item.prompt)
    figures = {"slots": lab.kept_ratio(), "pages": lab.page_ratio()}
    if item.task == "continuation":
        loss = torch.zeros(len(lab.variants))
        for token in item.target:
            loss -= lab.logits.log_softmax(-1)[:, token]
            lab.decode([token] * len(lab.variants))
        return {**figures, "loss": loss / len(item.target)}
    answers = _greedy(lab, len(item.target) or num_tokens)
    if item.task == "retrieval":
        right = [answer == item.target for answer in answers]
        return {**figures, "accuracy": torch.tensor(right).float()}
    return {
        **figures,
        "rouge_l": torch.tensor([rouge_l(answer, answers[0]) for answer in answers]),
        "same_tokens": torch.tensor([_same_start(a, answers[0]) / len(a) for a in answers]),
    }


def _greedy(lab: Lab, num_tokens: int) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in lab.variants]
    for _ in range(num_tokens):
        best = lab.logits.argmax(-1).tolist()
        for answer, token in zip(answers, best, strict=True):
            answer.append(token)
        lab.decode(best)
    return answers


def _same_start(a: list[int], b: list[int]) -> int:
    same = [x == y for x, y in zip(a, b, strict=True)]
    return same.index(False) if False in same else len(same)


def rouge_l(answer: list[int], reference: list[int]) -> float:
    """F1 of the longest common subsequence of tokens: ROUGE-L for any language, where the usual
    library knows only Latin words."""
    row = [0] * (len(reference) + 1)
    for token in answer:
        diagonal = 0
        for j, other in enumerate(reference):
            above = row[j + 1]
            row[j + 1] = diagonal + 1 if token == other else max(above, row[j])
            diagonal = above
    return 2 * row[-1] / (len(answer) + len(reference))
