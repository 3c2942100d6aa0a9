"""The engine against the Hugging Face oracle: policies, kept positions and tokens."""

import pytest
from engine import KOREAN, Engine, chat, english
from oracle import SETTINGS, Oracle, Trace

NUM_TOKENS = 65


def prompts(model: str) -> dict[str, str]:
    return {
        "short": english(230, "booleans"),
        "korean": KOREAN,
        "chat": chat(model, english(600, "exceptions") + " What does this text say?"),
        "long": english(3000, "objects"),
        "longest": english(6000, "specialnames"),
    }


@pytest.fixture(scope="module")
def paper_engine(model: str) -> Engine:
    return Engine.start(kv_bytes=1 << 30, recovery=0.9, ladder="paper")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("ladder", "goals"),
    [
        ("adaptive", [(0.9, None), (0.97, None), (0.0, 0.2), (0.0, 0.5)]),
        ("paper", [(0.85, None), (0.95, None)]),
    ],
)
def test_engine_equals_oracle(
    model: str, ladder: str, goals: list, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue("engine" if ladder == "adaptive" else "paper_engine")
    names = {}
    for name, text in prompts(model).items():
        for recovery, budget in goals:
            goal = {"fastgen_kv_budget": budget} if budget else {"fastgen_recovery": recovery}
            key = engine.add(text, max_tokens=NUM_TOKENS, ignore_eos=True, extra_args=goal)
            names[key] = (name, recovery, budget)
    results = engine.run(trace=True)
    traces: dict[str, list[Trace]] = {}
    for key, result in results.items():
        name, recovery, budget = names[key]
        assert len(result.kept) == NUM_TOKENS, f"{name}: {len(result.kept)} steps traced"
        assert result.info["kv_kept_ratio"] < 1.0
        trace = Trace(result.prompt, result.output, result.policy, result.kept, recovery, budget)
        traces.setdefault(name, []).append(trace)
    lengths = {name: len(each[0].prompt) for name, each in traces.items()}
    assert min(lengths.values()) >= 45 and max(lengths.values()) >= 1200, lengths

    oracle = Oracle(model, SETTINGS[ladder])
    granted = 0
    for name, each in traces.items():
        for trace, verdict in zip(each, oracle.replay(each), strict=True):
            goal = trace.budget or trace.threshold
            assert not verdict.mismatches, f"{name} at {goal}: {verdict.mismatches[:5]}"
            granted += verdict.granted
    total = 90 * NUM_TOKENS * len(names)
    assert granted < total / 1000, f"{granted} of {total} decisions were near-ties"
