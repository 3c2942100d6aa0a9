"""The ``fastgen`` command. The work is in ``fastgen_vllm/tools/``."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markdown import Markdown

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.errors import FastGenConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False)
DEMO_MODEL = Path(".cache/smollm2-135m-instruct")
DEMO_TEXTS = Path(".cache/texts")
DType = Literal["bfloat16", "float16", "float32"]
Settings = Annotated[str, typer.Option(help="More FastGen settings, as JSON.")]


@app.callback()
def fastgen() -> None:
    """Per-head adaptive KV-cache compression for vLLM."""


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="A model folder.")] = DEMO_MODEL,
    recovery: Annotated[
        list[float] | None, typer.Option(help="May be repeated. By default 1 and the settings'.")
    ] = None,
    settings: Settings = "{}",
    json_path: Annotated[Path, typer.Option("--json")] = Path("out/bench.json"),
    rounds: Annotated[int | None, typer.Option(min=1, help="How often engines take turns.")] = None,
    dtype: Annotated[DType, typer.Option(help="Of the model and its KV cache.")] = "bfloat16",
    quick: Annotated[bool, typer.Option(help="Small loads: under 3 minutes.")] = False,
) -> None:
    """Measure stock vLLM and FastGen side by side: JSON, a Markdown table and a chart."""
    from fastgen_vllm.tools import bench as tool

    extra = _settings(settings)
    method = _config(extra).method
    for value in recovery or ():
        _config({"recovery": value})
    if recovery and method != "fastgen":
        raise typer.BadParameter(f"--recovery: method {method!r} has a kv_budget; leave it out")
    recoveries = tuple(recovery or ()) or ((1.0, None) if method == "fastgen" else (None,))
    _check_model(model)
    plan = tool.QUICK_PLAN if quick else tool.FULL_PLAN
    if rounds is not None:
        plan = replace(plan, rounds=rounds)
    _write(tool, tool.run_bench(str(model), plan, recoveries, extra, dtype, quick), json_path)


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model folder.")] = DEMO_MODEL,
    method: Annotated[list[str] | None, typer.Option(help="Peers to compare with.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Shares of the KV cache.")] = None,
    recovery: Annotated[list[float] | None, typer.Option(help="Thresholds T.")] = None,
    settings: Settings = "{}",
    texts: Annotated[Path, typer.Option(help="Has english/*.txt and korean/*.txt.")] = DEMO_TEXTS,
    length: Annotated[list[int] | None, typer.Option(min=256, help="Prompt tokens.")] = None,
    json_path: Annotated[Path, typer.Option("--json")] = Path("out/eval.json"),
    quick: Annotated[bool, typer.Option(help="Few prompts: under 10 minutes.")] = False,
    lm_eval: Annotated[
        list[str] | None, typer.Option(help="Instead: lm-evaluation-harness tasks, with vLLM.")
    ] = None,
    lm_eval_path: Annotated[Path | None, typer.Option(help="Folder of your own tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each such task.")] = None,
    engine_args: Annotated[str, typer.Option(help="For --lm-eval: of vllm.LLM, as JSON.")] = "{}",
) -> None:
    """Measure answers at each share of the KV cache, beside other methods; no hub is needed."""
    from fastgen_vllm.tools import eval as tool

    extra, load = _settings(settings), tool.QUICK_LOAD if quick else tool.FULL_LOAD
    if lm_eval:
        _check_model(model)
        _config(extra)
        engine = _json_object("--engine-args", engine_args)
        _lm_eval(model, lm_eval, lm_eval_path, extra, engine, limit, json_path)
        return
    budgets = budget or (tool.QUICK_BUDGETS if quick else tool.BUDGETS)
    recoveries = recovery or (tool.QUICK_RECOVERIES if quick else tool.RECOVERIES)
    _check_model(model)
    try:
        compared = tool.variants(method or tool.PEER_METHODS, budgets, recoveries, extra)
        if length:
            load = replace(load, lengths=tuple(length))
        results = tool.run_eval(str(model), texts, load, compared, extra)
    except (FastGenConfigError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    _write(tool, results, json_path)


@app.command()
def profile(
    model: Annotated[Path, typer.Argument(help="A model folder.")] = DEMO_MODEL,
    prompt_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text.")
    ] = None,
    settings: Settings = "{}",
    out: Annotated[Path, typer.Option(help="The page; the picture goes beside it.")] = Path(
        "out/profile.html"
    ),
) -> None:
    """Show what each head keeps of a prompt: a page, a picture and a table."""
    from fastgen_vllm.tools import profile as tool
    from fastgen_vllm.tools.texts import natural_text

    _check_model(model)
    prompt = prompt_file.read_text() if prompt_file else natural_text()[:4000]
    try:
        found = tool.profile(str(model), prompt, _config(_settings(settings)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    figure = tool.picture(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out.with_suffix(".png"), dpi=110)
    out.write_text(tool.page(found, figure))
    Console().print(tool.table(found))
    typer.echo(f"written to {out} and {out.with_suffix('.png')}")


def _lm_eval(
    model: Path,
    tasks: list[str],
    include: Path | None,
    settings: dict[str, Any],
    engine_args: dict[str, Any],
    limit: int | None,
    json_path: Path,
) -> None:
    if find_spec("lm_eval") is None:
        raise typer.BadParameter("--lm-eval needs the package lm-eval: pip install lm-eval")
    from fastgen_vllm.tools import lm_eval_tasks as tool

    try:
        results = tool.run_lm_eval(str(model), tasks, include, settings, engine_args, limit)
    except RuntimeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(results, indent=2) + "\n")
    Console().print(Markdown(tool.markdown(results)))
    typer.echo(f"written to {json_path}")


def _settings(text: str) -> dict[str, Any]:
    return _json_object("--settings", text)


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{option}: {error}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{option}: {text!r} is not a JSON object")
    return found


def _config(settings: dict[str, Any]) -> FastGenConfig:
    try:
        return FastGenConfig.from_dict(settings)
    except FastGenConfigError as error:
        raise typer.BadParameter(str(error)) from None


def _check_model(model: Path) -> None:
    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} is no model folder: it has no config.json")


def _write(tool: ModuleType, results: dict[str, Any], json_path: Path) -> None:
    """A tool's results as JSON, and beside it its Markdown table and its chart."""
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(results, indent=2) + "\n")
    table = tool.markdown(results)
    json_path.with_suffix(".md").write_text(table)
    tool.chart(results, json_path.with_suffix(".png"))
    Console().print(Markdown(table))
    typer.echo(f"written to {json_path}, and beside it .md and .png")
