import pytest

from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.policy.hybrids import ADAPTIVE_LADDER, Hybrid


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recovery": 1.2}, r"fastgen\.recovery: got 1\.2.*less than or equal to 1"),
        ({"recovery": "high"}, r"fastgen\.recovery: got 'high'"),
        ({"recover": 0.9}, r"fastgen\.recover: unknown key; known keys: kv_budget, recovery"),
        ({"kv_budget": 0.0}, r"fastgen\.kv_budget: got 0\.0.*greater than 0"),
        ({"kv_budget": 1.5}, r"fastgen\.kv_budget: got 1\.5.*less than or equal to 1"),
        ({"method": "h3o", "kv_budget": 0.3}, r"fastgen\.method: got 'h3o'.*'snapkv'"),
        ({"method": "h2o"}, "method 'h2o' needs a kv_budget"),
        ({"kv_budget": 0.3, "recovery": 0.9}, "give kv_budget or recovery, not both"),
        ({"method": "h2o", "recovery": 0.9}, "'h2o' takes a kv_budget in place of recovery"),
        ({"least_window": 2**31}, r"fastgen\.least_window: got 2147483648.*less than or equal"),
        ({"num_sinks": 2**70}, r"fastgen\.num_sinks.*less than or equal"),
        ({"observation_window": 10**30}, r"fastgen\.observation_window.*less than or equal"),
        ({1: 2}, "fastgen: 1 is no name of a setting"),
        ({"ladder": [{1: 2}]}, r"fastgen\.ladder\[0\]: 1 is no name of a setting"),
        ({"ladder": "Paper"}, r"fastgen\.ladder: got 'Paper'; give 'adaptive' or 'paper'"),
        ({"score_pooling": 4}, "score_pooling 4 is even"),
        ({"frequent_score": "mean"}, "'mean' goes with a ladder and query_weighting 'uniform'"),
        ({"query_sampling": 0}, r"fastgen\.query_sampling: got 0.*greater than or equal to 1"),
        ({"block_size": 24}, r"fastgen\.block_size: got 24.*8, 16, 32, 64 or 128"),
        ({"ladder": [{"local": "0.1"}]}, r"ladder\[0\]\.local: got '0\.1'"),
        ({"ladder": [{"special": "yes"}]}, r"ladder\[0\]\.special: got 'yes'"),
        ({"min_prompt_tokens": 10**30}, r"min_prompt_tokens: got 10+\. "),
        ({"kv_budget": "x" * 10_000}, r"kv_budget: got 'x{299}\.\.\.\. "),
        ({"group_reduction": "max"}, r"fastgen\.group_reduction: got 'max'.*'mean' or 'min'"),
        ({"ladder": []}, "empty list"),
        ({"ladder": "greedy"}, r"fastgen\.ladder.*'adaptive' or 'paper'"),
        ({"ladder": [{"frequent": 1.5}]}, r"fastgen\.ladder\[0\]\.frequent: got 1\.5"),
        ({"ladder": [{"frequent": 0.00001}]}, "multiple of 0.0001"),
        ({"ladder": [{}]}, "at least one component"),
        ({"ladder": [{"full": True, "special": True}]}, "'full' alone"),
        ({"ladder": [7]}, r"fastgen\.ladder\[0\]: 7 is not an object"),
        ({"extra_special_tokens": "<x>"}, r"fastgen\.extra_special_tokens: got '<x>'"),
        ({"compress": "never"}, r"fastgen\.compress: got 'never'.*'always' or 'pressure'"),
        ({"compress": "pressure", "ladder": "adaptive"}, "'pressure' goes with a kv_budget and no"),
        ({"compress": "pressure", "recovery": 0.9}, "'pressure' goes with a kv_budget and no"),
        ({"compact_every": 64, "ladder": "paper"}, "compact_every goes with the default method"),
        ({"compact_every": -1}, r"fastgen\.compact_every: got -1.*greater than or equal to 0"),
        ("paper", "must be an object"),
    ],
)
def test_wrong_settings_are_named(settings: object, message: str) -> None:
    with pytest.raises(FastGenConfigError, match=message):
        FastGenConfig.from_dict(settings)


def test_ladder_always_ends_full() -> None:
    config = FastGenConfig.from_dict({"ladder": [{"special": True, "local": 0.1}]})
    assert config.hybrids_for(config.goal) == (Hybrid(special=True, local=0.1), Hybrid(full=True))
    assert config.description == "recovery 0.95, ladder special+local(0.1) -> full"


def test_debug_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not FastGenConfig().debug
    monkeypatch.setenv("FASTGEN_DEBUG", "1")
    assert FastGenConfig().debug


def test_override_ignores_other_keys() -> None:
    override = RequestOverride.from_extra_args({"other": 1, "fastgen_recovery": 0.8})
    assert override.fastgen_recovery == 0.8
    with pytest.raises(FastGenConfigError, match=r"fastgen_recovery: got -1"):
        RequestOverride.from_extra_args({"fastgen_recovery": -1.0})
    with pytest.raises(FastGenConfigError, match="not both"):
        RequestOverride.from_extra_args({"fastgen_recovery": 0.9, "fastgen_kv_budget": 0.3})


def test_override_of_a_fixed_method_is_refused() -> None:
    config = FastGenConfig(method="h2o", kv_budget=0.3)
    config.check_override(RequestOverride(fastgen_compress=False))
    with pytest.raises(FastGenConfigError, match=r"fastgen_kv_budget: 0\.2 .*'h2o'"):
        config.check_override(RequestOverride(fastgen_kv_budget=0.2))


def test_who_keeps_everything_until_blocks_run_short() -> None:
    """Where the engine does, a request with a recovery is compressed always."""
    always, pressed = FastGenConfig(), FastGenConfig(compress="pressure")
    budget, recovery = RequestOverride(), RequestOverride(fastgen_recovery=0.9)
    asked = RequestOverride(fastgen_compress="pressure")
    assert [c.waits(budget) for c in (always, pressed)] == [False, True]
    assert [c.waits(recovery) for c in (always, pressed)] == [False, False]
    assert [c.waits(asked) for c in (always, pressed)] == [True, True]
    assert not pressed.waits(RequestOverride(fastgen_compress="always"))
    assert not pressed.waits(RequestOverride(fastgen_compress=False))
    both = RequestOverride(fastgen_compress="pressure", fastgen_recovery=0.9)
    with pytest.raises(FastGenConfigError, match=r"'pressure' goes with a kv_budget.*'always'"):
        always.check_override(both)
    with pytest.raises(FastGenConfigError, match="'pressure' goes with a kv_budget"):
        FastGenConfig(ladder="adaptive").check_override(asked)


@pytest.mark.parametrize(
    ("num_tokens", "sent", "longest", "compressed", "grows"),
    [
        (256, 256, 300, True, True),
        (255, 255, 900, False, True),
        (255, 255, 512, False, False),
        (400, 255, 900, False, True),
        (512, 255, 900, True, True),
        (512, 512, 513, True, True),
    ],
)
def test_short_prompts_join_when_they_have_grown(
    num_tokens: int, sent: int, longest: int, compressed: bool, grows: bool
) -> None:
    """``num_tokens`` of which ``sent`` were sent; the others were generated before a preemption."""
    goals = FastGenConfig().goals_for(num_tokens, RequestOverride(), sent, longest)
    assert [goal is not None for goal in goals] == [compressed, grows]
    once = FastGenConfig(compact_every=0).goals_for(num_tokens, RequestOverride(), sent, longest)
    assert [goal is not None for goal in once] == [sent >= 256, False]


def test_adaptive_ladder_rises() -> None:
    first, *rising, last = ADAPTIVE_LADDER
    assert first.name == "special" and last.full
    assert all(h.special and h.local == h.frequent / 2 for h in rising)
    shares = [h.frequent + h.local for h in rising]
    assert shares == sorted(set(shares)) and shares[-1] < 1


@pytest.mark.parametrize(
    ("settings", "goal"),
    [
        ({}, "kv_budget 0.25"),
        ({"ladder": "adaptive"}, "kv_budget 0.4, ladder adaptive"),
        ({"recovery": 0.88}, "recovery 0.88, ladder adaptive"),
        ({"recovery": 0.0}, "recovery 0, ladder adaptive"),
        ({"ladder": "paper"}, "recovery 0.95, ladder paper"),
        ({"ladder": [{"local": 0.1}]}, "recovery 0.95, ladder local(0.1) -> full"),
        ({"ladder": "paper", "kv_budget": 0.5}, "kv_budget 0.5, ladder paper"),
    ],
)
def test_default_goal_suits_the_ladder(settings: dict, goal: str) -> None:
    assert FastGenConfig.from_dict(settings).description == goal
