"""What the host must know of a device. Each time it asks, it waits for all that the device has to
do, so works that need figures ask together: a work is a generator that yields a tensor of the
device, is sent its numbers and goes on."""

from __future__ import annotations

from collections.abc import Generator
from itertools import islice
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

Work = Generator[torch.Tensor, list[float], Result]
"""What it yields is float64 ``[k]``, in which whole numbers up to 2**53 stay what they are."""


def figures(tensor: torch.Tensor) -> Work[list[float]]:
    """The numbers of a tensor."""
    return (yield tensor.flatten().double())


def together(*works: Work[Any]) -> Work[list[Any]]:
    """All of them, a round of figures at a time: their results in order."""
    results: list[Any] = [None] * len(works)
    answers: dict[int, Any] = dict.fromkeys(range(len(works)))
    while True:
        asked = {}
        for i, answer in answers.items():
            try:
                asked[i] = works[i].send(answer)
            except StopIteration as end:
                results[i] = end.value
        if not asked:
            return results
        numbers = iter((yield torch.cat(list(asked.values()))))
        answers = {i: list(islice(numbers, len(tensor))) for i, tensor in asked.items()}


def wait_for(work: Work[Result]) -> Result:
    """Its result, after a wait for each round of figures."""
    numbers: Any = None
    while True:
        try:
            asked = work.send(numbers)
        except StopIteration as end:
            result: Result = end.value
            return result
        numbers = asked.tolist()
