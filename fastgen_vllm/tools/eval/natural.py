"""Tasks on texts and programs: go on with one, answer a question about one, find a number."""

from __future__ import annotations

from fastgen_vllm.tools.eval.material import Item, Material
from fastgen_vllm.tools.inputs import InputError


def _language(i: int, every: int) -> str:
    return "korean" if i % every == every - 1 else "english"


CONTINUED = 64
"""Tokens of a true continuation that are scored."""


def continuation(material: Material, length: int, i: int, where: float) -> Item:
    """Natural text, and what really follows. Every fourth is Korean."""
    language = _language(i, 4)
    tokens = material.stretch(language, length + CONTINUED, where)
    return Item("continuation", language, length, tokens[:length], tokens[length:])


def code(material: Material, length: int, i: int, where: float) -> Item:
    """The beginning of a module, and what really follows."""
    tokens = _module(material, length + CONTINUED, i)
    return Item("code", "python", length, tokens[:length], tokens[length:])


def _module(material: Material, size: int, i: int) -> list[int]:
    """The first ``size`` tokens of the ``i``-th module that has as many.

    Raises:
        InputError: there are not so many.
    """
    for text in material.files:
        tokens = material.encode(text)
        if len(tokens) >= size:
            i -= 1
        if i < 0:
            return tokens[:size]
    raise InputError(
        f"Too few modules of Python's library have {size} tokens. Take a smaller --length."
    )


GENERATED = 2000


def generation(material: Material, length: int, i: int, where: float) -> Item:
    """A text or, every second time, a module that goes on for long after its beginning."""
    kind, size = ("text", "code")[i % 2], length + GENERATED
    tokens = _module(material, size, i // 2) if i % 2 else material.stretch("english", size, where)
    return Item("generation", kind, length, tokens[:length], tokens[length:])


QUESTIONS = {
    "english": ("Summarize the main idea of this text.", "What does the author argue, and why?"),
    "korean": ("이 글의 핵심 내용을 요약해 주세요.", "이 글에서 가장 중요한 점은 무엇인가요?"),
}


def answers(material: Material, length: int, i: int, where: float) -> Item:
    """A question about a natural text. Every second is Korean."""
    language = _language(i, 2)
    text = material.text(language, length - 100, where)
    question = QUESTIONS[language][i // 2 % 2]
    prompt = material.chat(("user", f"{text}\n\n{question}"))
    return Item("answers", language, length, prompt)


WORDS = (
    *("river", "candle", "marble", "garden", "rocket", "violin", "pepper", "anchor", "blanket"),
    *("copper", "lantern", "meadow", "orchid", "pirate", "saddle", "turtle", "velvet", "walnut"),
)


def retrieval(material: Material, length: int, i: int, where: float) -> Item:
    """Numbers in an essay, in the style of RULER (arXiv 2404.06654): one; one of four; one that is
    said elsewhere to be the same."""
    rng, words = material.rng, material.rng.sample(material.own(list(WORDS)), 4)
    numbers = [str(rng.randrange(1_000_000, 10_000_000)) for _ in words]
    kind = ("passkey", "multi-key", "variable tracking")[i % 3]
    needles = [
        f"The special magic number for {w} is {x}" for w, x in zip(words, numbers, strict=True)
    ]
    depths = [where, *(rng.random() for _ in words[1:])]
    asked = words[0]
    if kind == "passkey":
        needles, depths = needles[:1], depths[:1]
    elif kind == "variable tracking":
        asked = words[1]
        copied = f"The special magic number for {asked} is the same as that for {words[0]}"
        needles, depths = [needles[0], copied], [where * 0.7, where * 0.7 + 0.3]
    sentences = material.text("english", length - 150, rng.random()).split(". ")
    for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
        sentences.insert(int(depth * len(sentences)), needle)
    question = f"What is the special magic number for {asked} mentioned in the text above?"
    text = "Read the text and remember the magic numbers.\n\n" + ". ".join(sentences)
    prompt = material.chat(("user", f"{text}\n\n{question}"))
    prompt += material.encode(f"The special magic number for {asked} mentioned in the text is")
    number = numbers[0]
    return Item(
        "retrieval", kind, length, prompt, most_tokens=10, right=lambda said: number in said
    )


TASKS = (continuation, code, answers, retrieval, generation)
