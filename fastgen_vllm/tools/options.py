"""The arguments and options of the ``fastgen`` command, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

DType = Annotated[
    Literal["bfloat16", "float16", "float32"],
    typer.Option(help="The number format of the model and of its KV cache."),
]
Model = Annotated[
    Path,
    typer.Argument(
        help="The folder of a Hugging Face model, with its config, weights and tokenizer. The "
        "default is the small model that scripts/setup.sh makes."
    ),
]
AnyModel = Annotated[
    Path,
    typer.Argument(
        help="The folder of a Hugging Face model, with its config, weights and tokenizer."
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
Rounds = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many times each load is measured with each engine. The results are the "
        "medians. By default it is 3 times, or 2 times with --quick.",
    ),
]
BenchJson = Annotated[
    Path,
    typer.Option(
        "--json",
        help="The file for the results. A Markdown table and a chart are written beside it.",
    ),
]
Loads = Annotated[
    list[str] | None,
    typer.Option(
        "--load",
        help="A kind of load: ample, scarce or shared, and without --quick long or pressure. May "
        "be given several times. By default it is all of them.",
    ),
]
QuickBench = Annotated[
    bool, typer.Option("--quick", help="Measure small loads only. It takes some minutes.")
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        help="A method of the literature to compare with: streaming, h2o, snapkv, pyramidkv, "
        "adakv, tova, criticalkv, defensivekv, expected_attention, keydiff or random. May be "
        "given several times. By default it is all of them."
    ),
]
Budgets = Annotated[
    list[float] | None,
    typer.Option(
        help="The share of the KV cache, from 0 to 1, that a method may keep. May be given "
        "several times, and each value is measured."
    ),
]
Kvpress = Annotated[
    Path | None,
    typer.Option(
        metavar="PYTHON",
        help="Compare with the presses of kvpress too, that is with the peers' own code. It wants "
        "an older transformers, so name the Python of a virtual environment that has it.",
    ),
]
Texts = Annotated[
    Path,
    typer.Option(
        help="The folder of the texts that prompts are made of, in english/*.txt and "
        "korean/*.txt. The default are those that scripts/setup.sh fetches."
    ),
]
Lengths = Annotated[
    list[int] | None,
    typer.Option(
        min=16,
        help="The length of the prompts in tokens, at least 256 but for generation. May be given "
        "several times. By default it is 1024 and 2048, or 1024 with --quick.",
    ),
]
EvalTasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="A task: continuation, code, answers, retrieval, tools, instructions, chat or "
        "few_shot; or generation, which takes long. May be given several times. By default it is "
        "all but that.",
    ),
]
Half = Annotated[
    Literal["first", "second"],
    typer.Option(
        help="Which half of the texts, modules and functions prompts are made of. The default "
        "settings were chosen on the first, and the documents' figures are of the second."
    ),
]
EvalJson = Annotated[
    Path,
    typer.Option(
        "--json",
        help="The file for the results. A Markdown table and, without --lm-eval, a chart are "
        "written beside it.",
    ),
]
QuickEval = Annotated[
    bool, typer.Option("--quick", help="Use few prompts. It takes under 10 minutes.")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK",
        help="Run this task of lm-evaluation-harness instead, with stock vLLM and with "
        "FastGen. May be given several times. It needs the package lm-eval.",
    ),
]
TaskFolder = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        help="A folder with lm-eval task files of your own. It goes with --lm-eval.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many documents of each lm-eval task are used. By default it is all of them. "
        "It goes with --lm-eval.",
    ),
]
EngineArgs = Annotated[
    str,
    typer.Option(
        metavar="JSON",
        help="Further arguments of vllm.LLM as a JSON object, for example "
        "'{\"max_model_len\": 2048}'. It goes with --lm-eval.",
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="A UTF-8 text file with the prompt. By default it is a text of about 850 tokens "
        "from the Python language reference.",
    ),
]
PromptLines = Annotated[
    Path,
    typer.Argument(
        exists=True,
        dir_okay=False,
        help='A JSON Lines file of prompts. Every line has a "prompt", or chat "messages".',
    ),
]
AdviseBudgets = Annotated[
    list[float] | None,
    typer.Option(
        "--budget",
        help="A share of the KV cache, from 0 to 1, to try. May be given several times. By default "
        "it is 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5 and 0.7.",
    ),
]
Agreement = Annotated[
    float,
    typer.Option(
        min=0.5,
        max=1.0,
        help="How often the next token must be the full cache's for a budget to be recommended.",
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")]
AdviceJson = Annotated[
    Path, typer.Option("--json", help="The file for the figures. A chart is written beside it.")
]
PageFile = Annotated[
    Path,
    typer.Option(help="The file for the HTML page. The picture is written beside it as PNG."),
]
DemoFile = Annotated[Path, typer.Option(help="The file for the answers and figures, as JSON.")]
