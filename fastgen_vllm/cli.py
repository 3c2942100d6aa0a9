"""The ``fastgen`` command. The work is in ``fastgen_vllm/tools/``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from fastgen_vllm.config import FastGenConfig, FastGenConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False)
DEMO_MODEL = Path(".cache/smollm2-135m-instruct")


@app.callback()
def fastgen() -> None:
    """Per-head adaptive KV-cache compression for vLLM."""


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="A model folder.")] = DEMO_MODEL,
    recovery: Annotated[list[float] | None, typer.Option(help="May be repeated.")] = None,
    settings: Annotated[str, typer.Option(help="More FastGen settings, as JSON.")] = "{}",
    json_path: Annotated[Path, typer.Option("--json")] = Path("out/bench.json"),
    rounds: Annotated[int | None, typer.Option(min=1, help="How often engines take turns.")] = None,
    quick: Annotated[bool, typer.Option(help="Small loads: under 3 minutes.")] = False,
) -> None:
    """Measure stock vLLM and FastGen side by side: JSON, a Markdown table and a chart."""
    from fastgen_vllm.tools import bench as tool

    recoveries = tuple(recovery or (1.0, 0.95))
    try:
        extra = json.loads(settings)
        for value in recoveries:
            FastGenConfig.from_dict({"recovery": value, **extra})
    except (json.JSONDecodeError, TypeError, FastGenConfigError) as error:
        raise typer.BadParameter(str(error)) from None
    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} is no model folder: it has no config.json")
    plan = tool.QUICK_PLAN if quick else tool.FULL_PLAN
    if rounds is not None:
        plan = replace(plan, rounds=rounds)
    results = tool.run_bench(str(model), plan, recoveries, extra, quick)
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(results, indent=2) + "\n")
    table = tool.markdown(results)
    json_path.with_suffix(".md").write_text(table)
    tool.chart(results, json_path.with_suffix(".png"))
    Console().print(Markdown(table))
    typer.echo(f"written to {json_path}, and beside it .md and .png")
