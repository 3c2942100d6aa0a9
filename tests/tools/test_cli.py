"""The ``fastgen`` command: help, version, and one clear message for what a user gets wrong."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fastgen_vllm.tools.child import ChildError
from fastgen_vllm.tools.cli import app
from fastgen_vllm.tools.eval.compare import variants
from fastgen_vllm.tools.inputs import InputError, read_text
from fastgen_vllm.tools.outputs import write, write_json


def fastgen(*arguments: str | Path) -> Any:
    environment = {"COLUMNS": "400", "TERM": "dumb"}
    return CliRunner().invoke(app, [*map(str, arguments)], env=environment)


def test_version() -> None:
    result = fastgen("--version")
    assert result.exit_code == 0
    assert result.output == f"fastgen-vllm {version('fastgen-vllm')}\n"


def test_every_option_has_its_help() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == {"advise", "bench", "demo", "eval", "profile"}
    for name, command in commands.items():
        assert command.help.strip().endswith("."), name
        for parameter in command.params:
            text = getattr(parameter, "help", None)
            assert text and text.endswith(".") and len(text.split()) > 5, (name, parameter.name)


IN_A_FILE = "file.txt. Name a file in another folder."
CASES = [
    (["advise", "nowhere", "FILE"], "nowhere is not a model folder"),
    (["advise", "MODEL", "nowhere.jsonl"], "nowhere.jsonl"),
    (["advise", "MODEL", "FILE"], "line 1: JSONDecodeError"),
    (["advise", "MODEL", "NUMBERS"], "line 1: ValueError: it has no prompt that is a string"),
    (["advise", "MODEL", "FILE", "--json", "FILE"], "takes the place of the input"),
    (["advise", "MODEL", "FILE", "--json", "FOLDER/x.png"], "written beside it"),
    (["advise", "MODEL", "FILE", "--json", "FOLDER/texts.json"], "texts.png is a folder"),
    (["advise", "MODEL", "FILE", "--json", f"FOLDER/{'x' * 300}"], "File name too long"),
    (["advise", "MODEL", "FILE", "--settings", '{"method": "criticalkv"}'], "`fastgen eval` alone"),
    (["advise", "MODEL", "FILE", "--budget", "1.5"], "kv_budget: got 1.5"),
    (["advise", "MODEL", "FILE", "--settings", '{"kv_budget": 0.3}'], "Name budgets by --budget"),
    (["advise", "MODEL", "FILE", "--settings", '{"laddr": 1}'], "unknown key"),
    (["advise", "MODEL", "FILE", "--json", "FOLDER"], "is a folder. Name a file in it."),
    (["bench", "nowhere"], "nowhere is not a model folder"),
    (["bench", "--recovery", "1.5"], "fastgen.recovery: got 1.5"),
    (["bench", "--settings", '{"laddr": 1}'], "unknown key"),
    (["bench", "--settings", "{"], "--settings '{' is not valid JSON"),
    (["bench", "--recovery", "1", "--settings", '{"method": "h2o", "kv_budget": 0.3}'], "'h2o'"),
    (["bench", "--rounds", "0"], "--rounds"),
    (["bench", "--dtype", "fp8"], "bfloat16"),
    (["bench", "MODEL", "--json", "FILE/bench.json"], IN_A_FILE),
    (["bench", "MODEL", "--json", "FOLDER"], "is a folder. Name a file in it."),
    (["eval", "nowhere"], "nowhere is not a model folder"),
    (["eval", "--settings", "[]"], "--settings '[]' is not a JSON object"),
    (["eval", "--settings", '{"method": "h2o", "kv_budget": 0.3}'], "by --method"),
    (["eval", "MODEL", "--method", "h3o"], "'h3o'"),
    (["eval", "MODEL", "--budget", "1.5"], "kv_budget"),
    (["eval", "MODEL", "--texts", "nowhere"], "Run scripts/setup.sh"),
    (["eval", "MODEL", "--texts", "BINARY_TEXTS"], "bad.txt is not UTF-8 text"),
    (["eval", "MODEL", "--length", "60"], "--length 60 is too short for a text and a question"),
    (["eval", "MODEL", "--length", "9000"], "at most 8192 (max_position_embeddings)"),
    (["eval", "MODEL", "--task", "poems"], "There is no task 'poems'"),
    (["eval", "MODEL", "--json", "FILE/eval.json"], IN_A_FILE),
    (["eval", "MODEL", "--kvpress", "nowhere"], "pip install kvpress=="),
    (["eval", "MODEL", "--kvpress", "FILE"], "is not a Python with kvpress"),
    (["eval", "MODEL", "--kvpress", "/bin/true"], "is not a Python with kvpress"),
    (["eval", "MODEL", "--limit", "3"], "go with --lm-eval"),
    (["eval", "MODEL", "--engine-args", "3"], "--engine-args '3' is not a JSON object"),
    (["eval", "MODEL", "--lm-eval", "x", "--lm-eval-path", "nowhere"], "does not exist"),
    (["profile", "nowhere"], "nowhere is not a model folder"),
    (["profile", "--prompt-file", "nowhere"], "does not exist"),
    (["profile", "--prompt-file", "FOLDER"], "is a directory"),
    (["profile", "--prompt-file", "EMPTY"], "empty.txt is empty"),
    (["profile", "--prompt-file", "BINARY"], "byte 0xff at position 6 is not valid"),
    (["profile", "MODEL", "--prompt-file", "FILE"], "The prompt has 2 tokens"),
    (["profile", "MODEL", "--prompt-file", "LONG"], "at most 8192 (max_position_embeddings)"),
    (["profile", "--settings", '"x"'], "is not a JSON object"),
    (["profile", "MODEL", "--settings", '{"recovery": 1.0}'], "keeps everything"),
    (["profile", "MODEL", "--out", "FILE/page.html"], IN_A_FILE),
    (["demo", "nowhere"], "nowhere is not a model folder"),
    (["demo", "--settings", '{"kv_budget": 2}'], "kv_budget: got 2"),
    (["demo", "--settings", "[" * 20_000], "is not valid JSON"),
    (["demo", "MODEL", "--out", "FILE/demo.json"], IN_A_FILE),
]


@pytest.mark.parametrize(
    ("arguments", "message"), CASES, ids=[" ".join(case)[:80] for case, _ in CASES]
)
def test_what_a_user_gets_wrong(
    model: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"Hello \xff there")
    (tmp_path / "file.txt").write_text("Hello there")
    (tmp_path / "long.txt").write_text("one two " * 5000)
    (tmp_path / "numbers.jsonl").write_text('\ufeff{"prompt": [1, 2]}\n', encoding="utf-8")
    (tmp_path / "texts.png").mkdir()
    for language in ("english", "korean"):
        (tmp_path / "texts" / language).mkdir(parents=True)
        (tmp_path / "texts" / language / "bad.txt").write_bytes(b"\xfe\xff\x00a")
    places = {
        "MODEL": model,
        "EMPTY": tmp_path / "empty.txt",
        "BINARY": tmp_path / "latin.txt",
        "BINARY_TEXTS": tmp_path / "texts",
        "LONG": tmp_path / "long.txt",
        "NUMBERS": tmp_path / "numbers.jsonl",
        "FOLDER": tmp_path,
    }
    given = [
        str(places.get(argument, argument.replace("FILE", str(tmp_path / "file.txt")))).replace(
            "FOLDER", str(tmp_path)
        )
        for argument in arguments
    ]
    result = fastgen(*given)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), "no traceback"
    assert message in result.output
    errors = [line for line in result.output.splitlines() if line.strip()]
    assert len(errors) == 1 or "Usage:" in errors[0], "typer's own errors show the usage"


def test_line_ends_of_other_systems_are_read(tmp_path: Path) -> None:
    (tmp_path / "windows.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert read_text(tmp_path / "windows.txt") == "one\ntwo\nthree\n"


def test_a_failed_engine_is_no_traceback(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ChildError("the stock engine failed with exit status 1:\nout of memory")

    monkeypatch.setattr("fastgen_vllm.tools.demo.run_demo", fail)
    result = fastgen("demo", model)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.output == "Error: the stock engine failed with exit status 1:\nout of memory\n"


def test_what_is_written_takes_the_place_of_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    for content in ({"a": 1}, {"b": "\ud55c\uad6d\uc5b4"}):
        write_json(path, content)
        assert json.loads(path.read_text(encoding="utf-8")) == content
    with pytest.raises(InputError, match="No space left"):
        write(Path("/dev/full"), "figures")
    before = os.stat("/dev/null").st_mode
    write(Path("/dev/null"), "figures")
    assert os.stat("/dev/null").st_mode == before, "a device stays one"
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]


def test_variants_are_compared_once() -> None:
    found = variants(["h2o", "h2o"], [0.5, 0.5], [0.9], {})
    assert len({variant.name for variant in found}) == len(found) == 6
