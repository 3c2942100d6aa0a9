"""Tasks in which a prompt is more than a text and a question: tools to call, instructions to keep
to, a chat of several turns, examples to follow."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from fastgen_vllm.tools.eval.functions import FUNCTIONS, Function
from fastgen_vllm.tools.eval.material import Item, Material

CALLING = (
    "You are an assistant that calls functions. Answer every question with one JSON object "
    '{"name": <name of the function>, "arguments": {<name>: <value>, ...}} and nothing else. '
    "These are the functions:\n"
)


def tools(material: Material, length: int, i: int, where: float) -> Item:
    """JSON schemas of 4 to 12 functions, about as many as ``length`` has room for, and a question
    that one of them answers."""
    count = min(max(4, length // 250), 12)
    offered: list[Function] = material.rng.sample(material.own(list(FUNCTIONS)), count)
    question = offered[min(int(where * count), count - 1)].questions[i % 2]
    schemas = "\n".join(json.dumps(function.schema) for function in offered)
    prompt = material.chat(("system", CALLING + schemas), ("user", question))
    by_name = {function.name: function for function in offered}
    right = partial(well_formed, by_name)
    return Item("tools", "json", length, prompt, [], 96, right, _call_or_text)


def _call_or_text(said: str) -> Any:
    return parse_call(said) or said


def well_formed(offered: dict[str, Function], said: str) -> bool:
    """Whether an answer calls one of the functions with all arguments that it requires, and no
    others than it has."""
    call = parse_call(said)
    wanted = offered.get(call["name"]) if call else None
    if call is None or wanted is None:
        return False
    given, known = call["arguments"], list(wanted.parameters)
    return set(known[: wanted.required]) <= set(given) <= set(known)


def parse_call(said: str) -> dict[str, Any] | None:
    """The first JSON object of an answer, where it is a call."""
    start = said.find("{")
    if start < 0:
        return None
    try:
        found, _ = json.JSONDecoder().raw_decode(said[start:])
    except ValueError:
        return None
    if not isinstance(found.get("name"), str) or not isinstance(found.get("arguments"), dict):
        return None
    return found


def _is_korean(said: str) -> bool:
    letters = [char for char in said if char.isalpha()]
    hangul = sum("가" <= char <= "힣" for char in letters)
    return hangul > 0.7 * len(letters) > 0


def _is_json(said: str) -> bool:
    """It is one object, or the beginning of one."""
    try:
        found = json.loads(said)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated") or error.pos >= len(said.rstrip())
        return said.lstrip().startswith("{") and cut
    return isinstance(found, dict)


INSTRUCTIONS = {
    "in Korean": (
        "You are a helpful assistant. Always answer in Korean, whatever the language of the user. "
        "한국어로만 대답하세요.",
        _is_korean,
    ),
    "ends with DONE": (
        "You are a helpful assistant. Answer in one short sentence. Write the word DONE at the end "
        "of every answer.",
        lambda said: said.rstrip(" .!\n").endswith("DONE"),
    ),
    "JSON only": (
        'You are an API. Answer with one JSON object of the form {"answer": "..."} and nothing '
        "else: no explanation, no Markdown.",
        _is_json,
    ),
    "begins with a tag": (
        "You are a helpful assistant. Begin every answer with the tag [REPORT] and then answer "
        "briefly.",
        lambda said: said.lstrip().startswith("[REPORT]"),
    ),
}
ASKED = (
    "What is this text about?",
    "Who wrote this text, and for whom?",
    "Name one thing that the text says.",
)


def instructions(material: Material, length: int, i: int, where: float) -> Item:
    """An instruction in the system prompt, a long text, and a question: does it still hold?"""
    kind = list(INSTRUCTIONS)[i % len(INSTRUCTIONS)]
    instruction, holds = INSTRUCTIONS[kind]
    text = material.text("english", length - 120, where)
    question = material.rng.choice(ASKED)
    prompt = material.chat(("system", instruction), ("user", f"{text}\n\n{question}"))
    return Item("instructions", kind, length, prompt, right=holds)


OPENINGS = {
    "english": ("Tell me about this.", "Please go on.", "And then?", "What else is there to say?"),
    "korean": ("이것에 대해 말해 주세요.", "계속해 주세요.", "그다음은요?", "더 할 말이 있나요?"),
}
CLOSINGS = {
    "english": ("Repeat your second point in your own words.", "What did you tell me first?"),
    "korean": ("두 번째로 말한 내용을 다시 설명해 주세요.", "처음에 무슨 말을 했나요?"),
}


def chat(material: Material, length: int, i: int, where: float) -> Item:
    """Five turns, the assistant's made of natural text, and a question that reaches back. Every
    second is Korean."""
    language = "korean" if i % 2 else "english"
    told = material.stretch(language, length - 150, where)
    each, turns = len(told) // 4, []
    for j, opening in enumerate(OPENINGS[language]):
        said = material.tokenizer.decode(told[j * each : (j + 1) * each])
        turns += [("user", opening), ("assistant", said)]
    turns.append(("user", CLOSINGS[language][i // 2 % 2]))
    return Item("chat", language, length, material.chat(*turns))


LABELS = {"english": "essay", "korean": "law", "code": "program"}


def few_shot(material: Material, length: int, i: int, where: float) -> Item:
    """Examples of a text and the name of its kind, and one more text to name."""
    rng, made = material.rng, "Say of each text what it is.\n\n"
    kinds = list(LABELS)
    while True:
        kind = rng.choice(kinds)
        if kind == "code":
            lines = rng.choice(material.files).splitlines()
            start = rng.randrange(max(1, len(lines) - 3))
            text = "\n".join(lines[start : start + 3])
        else:
            text = material.text(kind, 40, rng.random())
        example = f"Text: {' '.join(text.split())}\nKind:"
        if len(material.encode(made + example)) > length - 16:
            break
        made += f"{example} {LABELS[kind]}\n\n"
    label = LABELS[kind]
    prompt = material.encode(made + example)

    def right(said: str) -> bool:
        return said.strip().startswith(label)

    return Item("few_shot", kind, length, prompt, most_tokens=4, right=right)


TASKS = (tools, instructions, chat, few_shot)
