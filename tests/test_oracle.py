"""The engine against the Hugging Face oracle: policies, kept positions and tokens."""

import pytest
from engine import KOREAN, Engine, chat, english
from oracle import Oracle, Trace

RECOVERIES = (0.85, 0.90, 0.95)
NUM_TOKENS = 65


def prompts(model: str) -> dict[str, str]:
    return {
        "short": english(230, "booleans"),
        "korean": KOREAN,
        "chat": chat(model, english(600, "exceptions") + " What does this text say?"),
        "medium": english(1400, "numeric-types"),
        "long": english(3000, "objects"),
        "longest": english(6000, "specialnames"),
    }


@pytest.mark.engine
def test_engine_equals_oracle(model: str, engine: Engine) -> None:
    names = {}
    for name, text in prompts(model).items():
        for recovery in RECOVERIES:
            request = engine.add(text, recovery, max_tokens=NUM_TOKENS, ignore_eos=True)
            names[request] = (name, recovery)
    results = engine.run(trace=True)
    traces: dict[str, dict[float, Trace]] = {}
    for request, result in results.items():
        name, recovery = names[request]
        assert len(result.kept) == NUM_TOKENS, f"{name}: {len(result.kept)} steps traced"
        assert result.info["kv_kept_ratio"] <= 1.0
        trace = Trace(result.prompt, result.output, result.policy, result.kept)
        traces.setdefault(name, {})[recovery] = trace
    lengths = {name: len(by[0.9].prompt) for name, by in traces.items()}
    assert min(lengths.values()) >= 45 and max(lengths.values()) >= 1200, lengths

    oracle = Oracle(model)
    granted = 0
    for name, by_recovery in traces.items():
        for recovery, verdict in oracle.replay(by_recovery).items():
            assert not verdict.mismatches, f"{name} at {recovery}: {verdict.mismatches[:5]}"
            granted += verdict.granted
    total = 90 * NUM_TOKENS * len(names)
    assert granted < total / 1000, f"{granted} of {total} decisions were near-ties"
