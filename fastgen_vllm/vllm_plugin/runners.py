"""What vLLM's two model runners know of a batch when its metadata is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Batch = tuple[list[str], torch.Tensor]
"""The requests in order, and the ids of the batch's tokens, which may be padded."""


def current_batch(runner: Any, is_v2: bool) -> Callable[[], Batch | None]:
    """A function that gives the batch whose metadata is being built; None where it is made up, to
    warm up."""
    if is_v2:
        return _V2Batch(runner)
    return lambda: (runner.input_batch.req_ids, runner.input_ids.gpu)


def replay_switch(runner: Any, is_v2: bool) -> Callable[[bool], None]:
    """A function that says whether the next batch may replay a captured decode step, where the
    runner would: it takes a prompt's last token for a decode step."""
    if not is_v2:
        return lambda may: setattr(runner, "uniform_decode_query_len", int(may))
    gather, may_replay = runner.gather_batch_req_state, [True]

    def gathered(scheduler_output: Any, dummy_run: bool) -> Any:
        state, count = gather(scheduler_output, dummy_run)
        if state is None or may_replay[0]:
            return state, count
        return state._replace(decode_graph_eligible=False), None

    runner.gather_batch_req_state = gathered
    return lambda may: may_replay.__setitem__(0, may)


class _V2Batch:
    """The V2 runner shows a batch to those that prepare it only."""

    def __init__(self, runner: Any) -> None:
        self.current: Any = None
        self.prepare, self.prepare_dummy = runner.prepare_attn, runner.prepare_dummy_attn
        runner.prepare_attn, runner.prepare_dummy_attn = self._prepare, self._prepare_dummy

    def _prepare(self, input_batch: Any) -> Any:
        self.current = input_batch
        return self.prepare(input_batch)

    def _prepare_dummy(self, *args: Any, **kwargs: Any) -> Any:
        self.current = None
        return self.prepare_dummy(*args, **kwargs)

    def __call__(self) -> Batch | None:
        return None if self.current is None else (self.current.req_ids, self.current.input_ids)
