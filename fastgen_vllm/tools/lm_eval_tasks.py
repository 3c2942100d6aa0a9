"""Tasks of lm-evaluation-harness through its vLLM model: stock and FastGen, a process each.

FastGen compresses a prompt once it has been encoded, so what it changes is what is generated:
``generate_until`` tasks show it. Log-likelihood tasks score the prompt itself, encoded in full, and
come out as stock's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_lm_eval(
    model: str,
    tasks: Sequence[str],
    include: Path | None,
    settings: dict[str, Any],
    engine_args: dict[str, Any],
    limit: int | None,
) -> dict[str, Any]:
    """lm-eval's results by engine, then by task.

    Args:
        include: a folder with task files of the user's own.
        engine_args: further arguments of ``vllm.LLM``, for both engines.

    Raises:
        RuntimeError: with the end of the log, where an engine or a task failed.
    """
    engines: dict[str, dict[str, Any]] = {
        "stock": {},
        "FastGen": {"attention_backend": "FASTGEN", "additional_config": {"fastgen": settings}},
    }
    found = {}
    for name, options in engines.items():
        job = {
            "model_args": {
                "pretrained": model,
                "enable_prefix_caching": False,
                **engine_args,
                **options,
            },
            "tasks": list(tasks),
            "include": str(include) if include else None,
            "limit": limit,
        }
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "results.json"
            command = [sys.executable, "-m", "fastgen_vllm.tools.lm_eval_tasks", str(target)]
            done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"lm-eval failed with {name}:\n{done.stderr[-3000:]}")
            found[name] = json.loads(target.read_text())
    return found


def markdown(results: dict[str, Any]) -> str:
    """A line per task and metric."""
    lines = ["| task | metric | stock | FastGen |", "|---|---|---|---|"]
    for task, metrics in results["stock"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                other = results["FastGen"][task][metric]
                lines.append(f"| {task} | {metric} | {value:.4f} | {other:.4f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    job = json.load(sys.stdin)
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="vllm",
        model_args=job["model_args"],
        tasks=job["tasks"],
        task_manager=TaskManager(include_path=job["include"]),
        limit=job["limit"],
    )
    assert results is not None
    Path(sys.argv[1]).write_text(json.dumps(results["results"], default=str))


if __name__ == "__main__":
    main()
