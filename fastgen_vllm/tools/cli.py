"""The ``fastgen`` command. Each command checks what the user gave and calls its tool."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from typer.core import TyperGroup

import fastgen_vllm
from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.tools import options
from fastgen_vllm.tools.child import ChildError
from fastgen_vllm.tools.eval import lm_eval as harness
from fastgen_vllm.tools.inputs import InputError, json_object, read_text
from fastgen_vllm.tools.models import check_model
from fastgen_vllm.tools.outputs import check_output, png, write, write_json


class Commands(TyperGroup):
    """Commands whose expected errors are one message each, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (InputError, FastGenConfigError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None
        except ChildError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False)
DEMO_MODEL = Path(".cache/smollm2-135m-instruct")
DEMO_TEXTS = Path(".cache/texts")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastgen-vllm {fastgen_vllm.__version__}")
        raise typer.Exit


@app.callback()
def fastgen(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version of fastgen-vllm and exit.",
        ),
    ] = False,
) -> None:
    """FastGen compresses the KV cache of vLLM, with a policy of its own for each attention head."""


@app.command()
def bench(
    model: options.Model = DEMO_MODEL,
    recovery: options.Recoveries = None,
    settings: options.Settings = "{}",
    json_path: options.BenchJson = Path("out/bench.json"),
    rounds: options.Rounds = None,
    dtype: options.DType = "bfloat16",
    load: options.Loads = None,
    quick: options.QuickBench = False,
) -> None:
    """Measure the speed of stock vLLM and of FastGen side by side, with the same KV memory.

    Without --recovery it measures FastGen with everything kept, and with the goal of the settings.
    """
    from fastgen_vllm.tools.bench import measure, report

    extra = json_object("--settings", settings)
    method = FastGenConfig.from_dict(extra).method
    for value in recovery or ():
        FastGenConfig.from_dict({"recovery": value})
    if recovery and method != "fastgen":
        raise InputError(
            f"--recovery does not go with the method {method!r}, which has a kv_budget. Leave "
            "--recovery out."
        )
    recoveries = tuple(recovery or ()) or ((1.0, None) if method == "fastgen" else (None,))
    check_model(model)
    check_output("--json", json_path, [".md", ".png"])
    plan = (measure.QUICK_PLAN if quick else measure.FULL_PLAN).only(load or ())
    if rounds is not None:
        plan = replace(plan, rounds=rounds)
    job = measure.Bench(str(model), plan, recoveries, extra, dtype, quick)
    _write(report, measure.run_bench(job), json_path)


@app.command("eval")
def evaluate(  # noqa: PLR0913 - a parameter for every option
    model: options.Model = DEMO_MODEL,
    method: options.Methods = None,
    budget: options.Budgets = None,
    recovery: options.Recoveries = None,
    settings: options.Settings = "{}",
    texts: options.Texts = DEMO_TEXTS,
    length: options.Lengths = None,
    task: options.EvalTasks = None,
    half: options.Half = "second",
    json_path: options.EvalJson = Path("out/eval.json"),
    quick: options.QuickEval = False,
    kvpress: options.Kvpress = None,
    lm_eval: options.Tasks = None,
    lm_eval_path: options.TaskFolder = None,
    limit: options.Limit = None,
    engine_args: options.EngineArgs = "{}",
) -> None:
    """Measure how good answers are at each share of the KV cache, beside other methods.

    No model or data set is downloaded.
    """
    from fastgen_vllm.tools.eval import compare, report
    from fastgen_vllm.tools.eval import kvpress as presses

    extra, engine = json_object("--settings", settings), json_object("--engine-args", engine_args)
    own = FastGenConfig.from_dict(extra)
    check_model(model)
    check_output("--json", json_path, [".md", ".png"])
    if lm_eval:
        job = harness.HarnessJob(str(model), tuple(lm_eval), lm_eval_path, limit, extra, engine)
        _lm_eval(job, json_path)
        return
    if lm_eval_path or limit or engine:
        raise InputError("--lm-eval-path, --limit and --engine-args go with --lm-eval. Add it.")
    if own.method != "fastgen":
        raise InputError(
            f"--settings names the method {own.method!r}. Name methods to compare with by --method."
        )
    budgets = budget or (compare.QUICK_BUDGETS if quick else compare.BUDGETS)
    compared = compare.variants(
        method or compare.PEER_METHODS,
        budgets,
        recovery or (compare.QUICK_RECOVERIES if quick else compare.RECOVERIES),
        extra,
    )
    load = compare.load_of(quick, length, task, half)
    peers = presses.of(kvpress, budgets) if kvpress else None
    _write(report, compare.run_eval(str(model), texts, load, compared, extra, peers), json_path)


@app.command()
def profile(
    model: options.Model = DEMO_MODEL,
    prompt_file: options.PromptFile = None,
    settings: options.Settings = "{}",
    out: options.PageFile = Path("out/profile.html"),
) -> None:
    """Show what each attention head keeps of a prompt, as a page, a picture and a table."""
    from fastgen_vllm.tools import profile as tool
    from fastgen_vllm.tools.texts import natural_text

    config = FastGenConfig.from_dict(json_object("--settings", settings))
    prompt = read_text(prompt_file) if prompt_file else natural_text()[:4000]
    check_model(model)
    check_output("--out", out, [".png"], [prompt_file])
    found = tool.profile(str(model), prompt, config)
    picture = png(tool.picture(found))
    write(out.with_suffix(".png"), picture)
    write(out, tool.page(found, picture))
    Console().print(tool.table(found))
    typer.echo(f"The page is in {out} and the picture is in {out.with_suffix('.png')}.")


@app.command()
def advise(
    model: options.AnyModel,
    prompts: options.PromptLines,
    budget: options.AdviseBudgets = None,
    agreement: options.Agreement = 0.95,
    max_tokens: options.MaxTokens = 64,
    settings: options.Settings = "{}",
    json_path: options.AdviceJson = Path("out/advise.json"),
) -> None:
    """Say which budget prompts of your own need, and how many more requests it lets in.

    The model runs in float32 on the CPU, once for each prompt and all budgets.
    """
    from fastgen_vllm.tools import advise as tool

    extra, budgets = json_object("--settings", settings), budget or tool.BUDGETS
    check_model(model)
    check_output("--json", json_path, [".png"], [prompts])
    advice = tool.advise(str(model), prompts, budgets, agreement, max_tokens, extra)
    write_json(json_path, asdict(advice))
    write(json_path.with_suffix(".png"), png(tool.picture(advice)))
    Console().print(tool.table(advice))
    Console().print(tool.sentence(advice), style="bold", markup=False)
    typer.echo(
        f"The figures are in {json_path}, and a chart is in {json_path.with_suffix('.png')}."
    )


@app.command()
def demo(
    model: options.Model = DEMO_MODEL,
    settings: options.Settings = "{}",
    out: options.DemoFile = Path("out/demo.json"),
) -> None:
    """Run the same prompts through stock vLLM and FastGen in the same small KV memory."""
    from fastgen_vllm.tools import demo as tool

    extra = json_object("--settings", settings)
    FastGenConfig.from_dict(extra)
    check_model(model)
    check_output("--out", out)
    summary = tool.run_demo(str(model), extra, tool.DEMO_LOAD)
    write_json(out, summary)
    for table in tool.tables(summary):
        Console().print(table)
    Console().print(tool.gain(summary), style="bold")
    typer.echo(f"The results are in {out}.")


def _lm_eval(job: harness.HarnessJob, json_path: Path) -> None:
    if find_spec("lm_eval") is None:
        raise InputError("--lm-eval needs the package lm-eval. Install it: pip install lm-eval")
    results = harness.run_lm_eval(job)
    write_json(json_path, results)
    table = harness.markdown(results)
    write(json_path.with_suffix(".md"), table)
    Console().print(Markdown(table))
    typer.echo(f"The results are in {json_path}, and a Markdown table is beside it.")


def _write(report: ModuleType, results: dict[str, Any], json_path: Path) -> None:
    """A tool's results as JSON, and beside it its Markdown table and its chart."""
    write_json(json_path, results)
    table = report.markdown(results)
    write(json_path.with_suffix(".md"), table)
    write(json_path.with_suffix(".png"), png(report.chart(results)))
    Console().print(Markdown(table))
    typer.echo(f"The results are in {json_path}. A Markdown table and a chart are beside it.")
