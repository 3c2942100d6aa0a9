"""The ``fastgen`` command. Each command checks what the user gave and calls its tool."""

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
from typer.core import TyperGroup

import fastgen_vllm
from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.tools.child import ChildError
from fastgen_vllm.tools.eval import lm_eval as harness
from fastgen_vllm.tools.inputs import InputError, check_output, json_object, read_text
from fastgen_vllm.tools.models import check_model


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
DType = Literal["bfloat16", "float16", "float32"]
Model = Annotated[
    Path,
    typer.Argument(
        help="The folder of a Hugging Face model, with its config, weights and tokenizer. The "
        "default is the small model that scripts/setup.sh makes."
    ),
]
Settings = Annotated[
    str,
    typer.Option(
        metavar="JSON",
        help="FastGen's settings as a JSON object, for example '{\"kv_budget\": 0.3}'. A setting "
        "that is not given has its default.",
    ),
]
Recoveries = Annotated[
    list[float] | None,
    typer.Option(
        help="The share of attention, from 0 to 1, that each head has to keep. May be given "
        "several times, and each value is measured."
    ),
]


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
    model: Model = DEMO_MODEL,
    recovery: Recoveries = None,
    settings: Settings = "{}",
    json_path: Annotated[
        Path,
        typer.Option(
            "--json",
            help="The file for the results. A Markdown table and a chart are written beside it.",
        ),
    ] = Path("out/bench.json"),
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many times each load is measured with each engine. The results are the "
            "medians. By default it is 3 times, or 2 times with --quick.",
        ),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="The number format of the model and of its KV cache.")
    ] = "bfloat16",
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure small loads only. It takes under 3 minutes.")
    ] = False,
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
    check_output("--json", json_path)
    plan = measure.QUICK_PLAN if quick else measure.FULL_PLAN
    if rounds is not None:
        plan = replace(plan, rounds=rounds)
    job = measure.Bench(str(model), plan, recoveries, extra, dtype, quick)
    _write(report, measure.run_bench(job), json_path)


@app.command("eval")
def evaluate(  # noqa: PLR0913 - a parameter for every option
    model: Model = DEMO_MODEL,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method of the literature to compare with: streaming, h2o, snapkv, pyramidkv, "
            "adakv or random. May be given several times. By default it is all of them."
        ),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            help="The share of the KV cache, from 0 to 1, that a method may keep. May be given "
            "several times, and each value is measured."
        ),
    ] = None,
    recovery: Recoveries = None,
    settings: Settings = "{}",
    texts: Annotated[
        Path,
        typer.Option(
            help="The folder of the texts that prompts are made of, in english/*.txt and "
            "korean/*.txt. The default are those that scripts/setup.sh fetches."
        ),
    ] = DEMO_TEXTS,
    length: Annotated[
        list[int] | None,
        typer.Option(
            min=256,
            help="The length of the prompts in tokens. May be given several times. By default it "
            "is 1024 and 2048, or 1024 with --quick.",
        ),
    ] = None,
    json_path: Annotated[
        Path,
        typer.Option(
            "--json",
            help="The file for the results. A Markdown table and, without --lm-eval, a chart are "
            "written beside it.",
        ),
    ] = Path("out/eval.json"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Use few prompts. It takes under 10 minutes.")
    ] = False,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="Run this task of lm-evaluation-harness instead, with stock vLLM and with "
            "FastGen. May be given several times. It needs the package lm-eval.",
        ),
    ] = None,
    lm_eval_path: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="A folder with lm-eval task files of your own. It goes with --lm-eval.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many documents of each lm-eval task are used. By default it is all of them. "
            "It goes with --lm-eval.",
        ),
    ] = None,
    engine_args: Annotated[
        str,
        typer.Option(
            metavar="JSON",
            help="Further arguments of vllm.LLM as a JSON object, for example "
            "'{\"max_model_len\": 2048}'. It goes with --lm-eval.",
        ),
    ] = "{}",
) -> None:
    """Measure how good answers are at each share of the KV cache, beside other methods.

    No model or data set is downloaded.
    """
    from fastgen_vllm.tools.eval import compare, report

    extra, engine = json_object("--settings", settings), json_object("--engine-args", engine_args)
    own = FastGenConfig.from_dict(extra)
    check_model(model)
    check_output("--json", json_path)
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
    compared = compare.variants(
        method or compare.PEER_METHODS,
        budget or (compare.QUICK_BUDGETS if quick else compare.BUDGETS),
        recovery or (compare.QUICK_RECOVERIES if quick else compare.RECOVERIES),
        extra,
    )
    load = compare.QUICK_LOAD if quick else compare.FULL_LOAD
    if length:
        load = replace(load, lengths=tuple(length))
    _write(report, compare.run_eval(str(model), texts, load, compared, extra), json_path)


@app.command()
def profile(
    model: Model = DEMO_MODEL,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A UTF-8 text file with the prompt. By default it is a text of about 850 tokens "
            "from the Python language reference.",
        ),
    ] = None,
    settings: Settings = "{}",
    out: Annotated[
        Path,
        typer.Option(help="The file for the HTML page. The picture is written beside it as PNG."),
    ] = Path("out/profile.html"),
) -> None:
    """Show what each attention head keeps of a prompt, as a page, a picture and a table."""
    from fastgen_vllm.tools import profile as tool
    from fastgen_vllm.tools.texts import natural_text

    config = FastGenConfig.from_dict(json_object("--settings", settings))
    prompt = read_text(prompt_file) if prompt_file else natural_text()[:4000]
    check_model(model)
    check_output("--out", out)
    found = tool.profile(str(model), prompt, config)
    figure = tool.picture(found)
    figure.savefig(out.with_suffix(".png"), dpi=110)
    out.write_text(tool.page(found, figure), encoding="utf-8")
    Console().print(tool.table(found))
    typer.echo(f"The page is in {out} and the picture is in {out.with_suffix('.png')}.")


@app.command()
def demo(
    model: Model = DEMO_MODEL,
    settings: Settings = "{}",
    out: Annotated[
        Path, typer.Option(help="The file for the answers and figures, as JSON.")
    ] = Path("out/demo.json"),
) -> None:
    """Run the same prompts through stock vLLM and FastGen in the same small KV memory."""
    from fastgen_vllm.tools import demo as tool

    extra = json_object("--settings", settings)
    FastGenConfig.from_dict(extra)
    check_model(model)
    check_output("--out", out)
    summary = tool.run_demo(str(model), extra, tool.DEMO_LOAD)
    _write_json(summary, out)
    for table in tool.tables(summary):
        Console().print(table)
    typer.echo(f"The results are in {out}.")


def _lm_eval(job: harness.HarnessJob, json_path: Path) -> None:
    if find_spec("lm_eval") is None:
        raise InputError("--lm-eval needs the package lm-eval. Install it: pip install lm-eval")
    results = harness.run_lm_eval(job)
    _write_json(results, json_path)
    table = harness.markdown(results)
    json_path.with_suffix(".md").write_text(table, encoding="utf-8")
    Console().print(Markdown(table))
    typer.echo(f"The results are in {json_path}, and a Markdown table is beside it.")


def _write(report: ModuleType, results: dict[str, Any], json_path: Path) -> None:
    """A tool's results as JSON, and beside it its Markdown table and its chart."""
    _write_json(results, json_path)
    table = report.markdown(results)
    json_path.with_suffix(".md").write_text(table, encoding="utf-8")
    report.chart(results, json_path.with_suffix(".png"))
    Console().print(Markdown(table))
    typer.echo(f"The results are in {json_path}. A Markdown table and a chart are beside it.")


def _write_json(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
