"""The engine against the Hugging Face oracle: policies, kept positions and tokens."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import KOREAN, Engine, chat, english
from helpers.oracle import SETTINGS, Oracle, Trace

NUM_TOKENS = 65
GOALS: dict[str, list[tuple[float, float | None]]] = {
    "adaptive": [(0.9, None), (0.0, 0.2), (0.0, 0.5)],
    "paper": [(0.85, None), (0.95, None)],
}
"""Recovery, and budget where that is what a request asks for."""


def prompts(model: str) -> dict[str, str]:
    return {
        "short": english(230, "booleans"),
        "korean": KOREAN,
        "chat": chat(model, english(600, "exceptions") + " What does this text say?"),
        "long": english(3000, "objects"),
        "longest": english(6000, "specialnames"),
    }


def traces_of(model: str, ladder: str, engine: Engine) -> dict[str, list[Trace]]:
    """What the engine does, by prompt."""
    names = {}
    for name, text in prompts(model).items():
        for recovery, budget in GOALS[ladder]:
            goal = {"fastgen_kv_budget": budget} if budget else {"fastgen_recovery": recovery}
            key = engine.add(text, max_tokens=NUM_TOKENS, ignore_eos=True, extra_args=goal)
            names[key] = (name, recovery, budget)
    traces: dict[str, list[Trace]] = {}
    for key, result in engine.run(trace=True).items():
        name, recovery, budget = names[key]
        assert len(result.kept) == NUM_TOKENS, f"{name}: {len(result.kept)} steps traced"
        # The adaptive ladder keeps the last 64 tokens: little is left of a short prompt.
        assert result.info["kv_kept_ratio"] < 1.0 or len(result.prompt) < 256
        trace = Trace(result.prompt, result.output, result.policy, result.kept, recovery, budget)
        traces.setdefault(name, []).append(trace)
    lengths = {name: len(each[0].prompt) for name, each in traces.items()}
    assert min(lengths.values()) >= 45 and max(lengths.values()) >= 1200, lengths
    return traces


def traces_of_another_engine(model: str, ladder: str, target: Path) -> dict[str, list[Trace]]:
    """From a process of its own: two engines in one undo each other."""
    command = [sys.executable, __file__, model, ladder, str(target)]
    subprocess.run(command, check=True, timeout=400)
    return pickle.loads(target.read_bytes())


@pytest.mark.engine
@pytest.mark.parametrize("ladder", ["adaptive", "paper"])
def test_engine_equals_oracle(
    model: str, ladder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if ladder == "adaptive":
        traces = traces_of(model, ladder, request.getfixturevalue("engine"))
    else:
        traces = traces_of_another_engine(model, ladder, tmp_path / "traces")
    oracle = Oracle(model, SETTINGS[ladder])
    granted = 0
    for name, each in traces.items():
        for trace, verdict in zip(each, oracle.replay(each), strict=True):
            goal = trace.budget or trace.threshold
            assert not verdict.mismatches, f"{name} at {goal}: {verdict.mismatches[:5]}"
            granted += verdict.granted
    total = 90 * NUM_TOKENS * len(traces) * len(GOALS[ladder])
    assert granted < total / 1000, f"{granted} of {total} decisions were near-ties"


if __name__ == "__main__":
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    _, model_path, ladder_name, out = sys.argv
    paper = Engine.start(kv_bytes=1 << 30, recovery=0.9, ladder=ladder_name)
    Path(out).write_bytes(pickle.dumps(traces_of(model_path, ladder_name, paper)))
