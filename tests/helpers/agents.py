"""Agents that share a long system prompt and come back turn after turn, as prefix caches serve."""

from __future__ import annotations

from typing import Any

from helpers.engine import Engine, english

TOPICS = ("integers", "sets", "modules", "classes")
BUDGET = {"fastgen_kv_budget": 0.25}


def agent_loop(engine: Engine, users: int, turns: int) -> list[dict[str, Any]]:
    """Greedy answers of 12 tokens, a turn of all users at a time: ``prompt``, ``output``, ``info``
    of each."""
    tokenizer, answers = engine.llm.get_tokenizer(), []
    system = {"role": "system", "content": english(7000, "types")}
    chats: list[list[dict[str, str]]] = [[system] for _ in range(users)]
    for turn in range(turns):
        names = []
        for user, chat in enumerate(chats):
            question = f"I am user {user}. What does the text say about {TOPICS[turn]}?"
            chat.append({"role": "user", "content": question})
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            names.append(engine.add(text, max_tokens=12, ignore_eos=True, extra_args=BUDGET))
        done = engine.run()
        for name, chat in zip(names, chats, strict=True):
            result = done[name]
            chat.append({"role": "assistant", "content": result.text})
            answers.append({k: getattr(result, k) for k in ("prompt", "output", "info")})
    return answers
