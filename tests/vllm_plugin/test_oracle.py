"""The engine against the Hugging Face oracle: policies, kept positions and tokens."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.engine import KOREAN, Engine, Finished, chat, english
from helpers.oracle import FULL, Oracle, Rung, Trace
from helpers.oracle_ladders import SETTINGS, LadderOracle
from helpers.oracle_peaks import PeaksOracle, PeaksSettings

from fastgen_vllm.kernels import UNBOUNDED
from fastgen_vllm.policy.tokens import CLASS_BITS

NUM_TOKENS = 65


@dataclass(frozen=True)
class Case:
    """An engine's settings, None for the suite's own, and what its requests ask for: recovery, and
    budget where that is it. ``least_tokens``: the engine's ``min_prompt_tokens``; ``whole``: on all
    layers of the small model."""

    oracle: Callable[[str], Oracle[Any]]
    fastgen: dict[str, Any] | None
    goals: list[tuple[float, float | None]]
    prompts: tuple[str, ...]
    least_tokens: int = 16
    whole: bool = False


ADAPTIVE = partial(LadderOracle, settings=SETTINGS["adaptive"])
SOME = ("korean", "system", "long")
MORE = ("short", "chat", *SOME)
CASES = {
    "recovery": Case(ADAPTIVE, None, [(0.9, None)], MORE),
    "budget": Case(PeaksOracle, None, [(0.0, 0.2), (0.0, 0.5)], (*MORE, "longest", "marked")),
    "a budget's least memory": Case(
        partial(PeaksOracle, settings=PeaksSettings(generated=256)),
        {"kv_budget": 0.2, "min_prompt_tokens": 256},
        [(0.0, 0.2)],
        SOME,
        256,
    ),
    "all layers": Case(
        partial(PeaksOracle, settings=PeaksSettings(generated=256)),
        {"kv_budget": 0.2},
        [(0.0, 0.2)],
        ("korean", "long"),
        whole=True,
    ),
    "adaptive ladder": Case(ADAPTIVE, {"ladder": "adaptive"}, [(0.0, 0.2), (0.0, 0.5)], SOME),
    "paper": Case(
        partial(LadderOracle, settings=SETTINGS["paper"]),
        {"recovery": 0.9, "ladder": "paper"},
        [(0.85, None), (0.95, None)],
        SOME,
    ),
}


def prompts(model: str) -> dict[str, str]:
    return {
        "short": english(230, "booleans"),
        "korean": KOREAN,
        "chat": chat(model, english(600, "exceptions") + " What does this text say?"),
        "system": chat(model, "What is said of strings?", english(1500, "strings")),
        "long": english(3000, "objects"),
        "longest": english(6000, "specialnames"),
        # Its special tokens alone would take more than any of the budgets.
        "marked": "<|im_end|><|im_start|>".join(english(1800, "import").split(" ")),
    }


def traces_of(model: str, case: Case, engine: Engine) -> dict[str, list[Trace]]:
    """What the engine does, by prompt."""
    names, texts = {}, prompts(model)
    for name in case.prompts:
        for recovery, budget in case.goals:
            key = engine.add(
                texts[name],
                max_tokens=NUM_TOKENS,
                ignore_eos=True,
                extra_args=goal(recovery, budget),
            )
            names[key] = (name, recovery, budget)
    traces: dict[str, list[Trace]] = {}
    for key, result in engine.run(trace=True).items():
        name, recovery, budget = names[key]
        assert len(result.kept) == NUM_TOKENS, f"{name}: {len(result.kept)} steps traced"
        # Windows and the least memory leave little of a short prompt.
        assert result.info["kv_kept_ratio"] < 1.0 or len(result.prompt) < 256
        did = (result.prompt, result.output, rungs_of(result), result.kept)
        trace = Trace(*did, recovery, budget, case.least_tokens)
        traces.setdefault(name, []).append(trace)
    lengths = {name: len(each[0].prompt) for name, each in traces.items()}
    assert min(lengths.values()) >= 45, lengths
    assert max(lengths.values()) >= (1200 if "longest" in lengths else 600), lengths
    return traces


def goal(recovery: float, budget: float | None) -> dict[str, float]:
    return {"fastgen_kv_budget": budget} if budget else {"fastgen_recovery": recovery}


def rungs_of(result: Finished) -> list[list[Rung]]:
    """What the engine's numbers of heads say."""
    rules = result.rules
    assert rules is not None
    numbers = (rules.sticky_kinds, rules.frequent, rules.local, rules.least_window)
    columns = zip(*(tensor.tolist() for tensor in numbers), strict=True)
    return [[rung_of(*head) for head in zip(*layer, strict=True)] for layer in columns]


def rung_of(sticky_kinds: int, frequent: int, local: int, least_window: int) -> Rung:
    if least_window == UNBOUNDED:
        return FULL
    components = frozenset(name for name, bit in CLASS_BITS.items() if sticky_kinds & bit)
    return Rung(components, Fraction(frequent, 10_000), Fraction(local, 10_000), least_window)


def traces_of_another_engine(model: str, name: str, target: Path) -> dict[str, list[Trace]]:
    """From a process of its own: two engines in one undo each other."""
    command = [sys.executable, __file__, model, name, str(target)]
    subprocess.run(command, check=True, timeout=400)
    return pickle.loads(target.read_bytes())


@pytest.mark.engine
@pytest.mark.parametrize("name", CASES)
def test_engine_equals_oracle(
    model: str, whole_model: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    case = CASES[name]
    model = whole_model if case.whole else model
    if case.fastgen is None:
        traces = traces_of(model, case, request.getfixturevalue("engine"))
    else:
        traces = traces_of_another_engine(model, name, tmp_path / "traces")
    oracle = case.oracle(model)
    granted = decided = 0
    for prompt, each in traces.items():
        for trace, verdict in zip(each, oracle.replay(each), strict=True):
            asked = trace.budget or trace.threshold
            assert not verdict.mismatches, f"{prompt} at {asked}: {verdict.mismatches[:5]}"
            granted += verdict.granted
            decided += sum(map(len, trace.policy)) * len(trace.kept)
    assert granted < decided / 1000, f"{granted} of {decided} decisions were near-ties"


if __name__ == "__main__":
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    _, model_path, case_name, out = sys.argv
    own = CASES[case_name].fastgen
    assert own is not None
    other = Engine.start(model_path, 1 << 28, own)
    Path(out).write_bytes(pickle.dumps(traces_of(model_path, CASES[case_name], other)))
