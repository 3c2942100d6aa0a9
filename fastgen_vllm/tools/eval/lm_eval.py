"""Tasks of lm-evaluation-harness through its vLLM model: stock and FastGen, a process each.

FastGen compresses a prompt once it has been encoded, so it changes what is generated, and tasks of
type ``generate_until`` show that. Log-likelihood tasks score the prompt itself, which is encoded in
full, so their results equal stock's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen_vllm.tools.child import Child, Jobs


@dataclass(frozen=True)
class HarnessJob:
    """What to run.

    Attributes:
        tasks: names of lm-eval's tasks.
        include: a folder with task files of the user's own.
        limit: documents of each task; all of them where it is None.
        settings: FastGen's.
        engine_args: further arguments of ``vllm.LLM``, for both engines.
    """

    model: str
    tasks: Sequence[str]
    include: Path | None
    limit: int | None
    settings: dict[str, Any]
    engine_args: dict[str, Any]

    def for_engine(self, options: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ``lm_eval.simple_evaluate``, with the task folder beside them."""
        return {
            "model": "vllm",
            "model_args": {
                "pretrained": self.model,
                "enable_prefix_caching": False,
                **self.engine_args,
                **options,
            },
            "tasks": list(self.tasks),
            "include": str(self.include) if self.include else None,
            "limit": self.limit,
        }


def run_lm_eval(job: HarnessJob) -> dict[str, Any]:
    """lm-eval's results by engine, then by task.

    Raises:
        ChildError: an engine or a task failed.
    """
    engines: dict[str, dict[str, Any]] = {
        "stock": {},
        "FastGen": {
            "attention_backend": "FASTGEN",
            "additional_config": {"fastgen": job.settings},
        },
    }
    found = {}
    for name, options in engines.items():
        with Child(f"lm-eval with {name}", "fastgen_vllm.tools.eval.lm_eval") as child:
            found[name] = child.ask(job.for_engine(options))
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
    jobs = Jobs()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import lm_eval
    from lm_eval.tasks import TaskManager

    for job in jobs:
        tasks = TaskManager(include_path=job.pop("include"))
        known = tasks.all_tasks
        unknown = [task for task in job["tasks"] if task not in known and not Path(task).is_file()]
        if unknown:
            raise ValueError(f"lm-eval has no task {', '.join(unknown)}: see `lm-eval ls tasks`")
        results = lm_eval.simple_evaluate(**job, task_manager=tasks)
        assert results is not None
        jobs.answer(results["results"])


if __name__ == "__main__":
    main()
