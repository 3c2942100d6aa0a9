"""FastGen's metrics beside vLLM's own: in the process that serves ``/metrics``.

The scheduler lives in another process. Its account of what it did travels there on an output's
``kv_transfer_params``, and is taken off before a client could see it. Accounts are of what happened
since the last one, so counters are right however many API servers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from fastgen_vllm.config import WHY_WHOLE
from fastgen_vllm.runtime.traffic import COUNTS
from fastgen_vllm.vllm_plugin import page

ACCOUNT = "fastgen_account"
LABELS = ("model_name", "engine")
SHARES = tuple(i / 20 for i in range(1, 21))
TOKENS = tuple(m * 10**e for e in range(2, 6) for m in (1, 2, 5))

HISTOGRAMS = {
    "fastgen:prompt_tokens": ("Tokens of the prompts that were compressed.", TOKENS),
    "fastgen:kv_kept_ratio": ("Share of its KV slots that a compressed prompt kept.", SHARES),
    "fastgen:kv_recovery": (
        "Share of its last queries' attention that a compressed prompt kept, the mean of heads.",
        SHARES,
    ),
}
COUNTERS = {
    "vacated_blocks": "KV blocks that prompts and compactions gave back, net of those taken.",
    "evicted_slots": "KV slots of single heads that prompts and compactions left out.",
    "compactions": "Compactions of requests that decode.",
    "squeezes": "Compactions for lack of memory, before a request would be preempted.",
}
GAUGES = {
    "kv_held_bytes": "KV memory that decoding requests hold.",
    "kv_saved_bytes": "KV memory that compressed requests gave back of what each would hold alone.",
    "free_pages": "Head pages that decoding requests own and do not use yet.",
}


@cache
def _histograms() -> list[Histogram]:
    return [
        Histogram(name, about, LABELS, buckets=buckets)
        for name, (about, buckets) in HISTOGRAMS.items()
    ]


@cache
def _whole() -> Counter:
    about = "Prompts of which everything was kept, by reason."
    return Counter("fastgen:prompts_kept_whole", about, (*LABELS, "reason"))


@cache
def _counters() -> dict[str, Counter]:
    return {name: Counter(f"fastgen:{name}", COUNTERS[name], LABELS) for name in COUNTS}


@cache
def _gauges() -> dict[str, Gauge]:
    return {
        name: Gauge(f"fastgen:{name}", about, LABELS, multiprocess_mode="mostrecent")
        for name, about in GAUGES.items()
    }


def process_outputs(
    original: Callable[..., Any], processor: Any, outputs: Sequence[Any], *args: Any, **kwargs: Any
) -> Any:
    """Wraps ``OutputProcessor.process_outputs``, which every output of every engine passes."""
    for output in outputs:
        told = output.kv_transfer_params
        if told is not None and ACCOUNT in told:
            rest = {name: value for name, value in told.items() if name != ACCOUNT}
            output.kv_transfer_params = rest or None
            if processor.log_stats:
                record(told[ACCOUNT])
            page.add(told[ACCOUNT])
    return original(processor, outputs, *args, **kwargs)


def record(account: dict[str, Any]) -> None:
    """Add an account of ``runtime.traffic`` to the metrics."""
    engine = (account["model"], str(account["engine"]))
    histograms = [histogram.labels(*engine) for histogram in _histograms()]
    for values in account["prompts"]:
        for histogram, value in zip(histograms, values, strict=True):
            if value is not None:
                histogram.observe(value)
    for reason in WHY_WHOLE:  # those that have not come too, so that the first to come is a rise
        _whole().labels(*engine, reason).inc(account["whole"].get(reason, 0))
    for name, counter in _counters().items():
        counter.labels(*engine).inc(account[name])
    for name, gauge in _gauges().items():
        gauge.labels(*engine).set(account[name])
