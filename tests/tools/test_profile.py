"""``fastgen profile``: whole characters, and the page end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.engine import KOREAN
from typer.testing import CliRunner

from fastgen_vllm.tools.cli import app
from fastgen_vllm.tools.models import load_tokenizer
from fastgen_vllm.tools.profile import MOST_TOKENS, whole_characters

EMOJI = "🎉🚀😀👩‍🚀" * 8


@pytest.mark.parametrize("text", [KOREAN, EMOJI, "plain words"], ids=["korean", "emoji", "plain"])
def test_pieces_are_whole_characters(model: str, text: str) -> None:
    tokenizer = load_tokenizer(model)
    tokens = tokenizer.encode(text)
    pieces = list(whole_characters(tokenizer, tokens))
    assert "".join(piece for piece, _, _ in pieces) == text
    assert [first for _, first, _ in pieces] == [0, *(last for _, _, last in pieces[:-1])]
    assert pieces[-1][2] == len(tokens)


class Broken:
    """A tokenizer whose tokens never make a character. It counts what it decodes."""

    decoded = 0

    def decode(self, tokens: list[int]) -> str:
        self.decoded += len(tokens)
        return "\ufffd"


def test_pieces_of_tokens_without_characters_take_linear_time() -> None:
    tokenizer: Any = Broken()
    pieces = list(whole_characters(tokenizer, list(range(4000))))
    assert len(pieces) == 4000 / MOST_TOKENS
    assert tokenizer.decoded <= 4000 * MOST_TOKENS


@pytest.mark.engine
def test_the_page_shows_the_prompt(model: str, tmp_path: Path) -> None:
    prompt, out = KOREAN + EMOJI, tmp_path / "new" / "page.html"
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    arguments = ["profile", model, "--prompt-file", str(tmp_path / "prompt.txt"), "--out", str(out)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "KV kept" in result.output and "special" in result.output
    page = out.read_text(encoding="utf-8")
    spans = page.split('<p class="text">')[1].split("</p>")[0]
    text = "".join(part.split(">", 1)[1] for part in spans.split("</span>")[:-1])
    assert text.strip() == prompt.strip(), "the prompt's characters are whole"
    assert page.count("<tr><td>") == 6 and "data:image/png;base64," in page
    assert out.with_suffix(".png").stat().st_size > 20_000
