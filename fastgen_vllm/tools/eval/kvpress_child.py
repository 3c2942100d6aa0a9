"""kvpress's own code, which ``tools/eval/kvpress.py`` starts under a Python of its own.

Run by its path. It imports nothing of FastGen, which that Python does not have: a line of JSON in,
a line of JSON out, and the logits through a file that both processes map.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from importlib.metadata import version
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES: dict[str, Any] = {
    "SnapKV": kvpress.SnapKVPress,
    "TOVA": kvpress.TOVAPress,
    "PyramidKV": kvpress.PyramidKVPress,
    "AdaKV": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    "CriticalAdaKV": lambda ratio: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(ratio)),
    # As its authors measure it.
    "ExpectedAttention": lambda ratio: kvpress.AdaKVPress(
        kvpress.ExpectedAttentionPress(ratio, epsilon=1e-2)
    ),
    "KeyDiff": kvpress.KeyDiffPress,
}
"""A press for a compression ratio, the share that it drops."""


class Copy:
    """One press's cache of the prompt. ``name`` None is the full cache.

    kvpress does not drop a key that only some heads of a layer drop. It overwrites it while
    decoding, so that queries miss it: those of a layer are ``masked[layer]``, a batch, a head and
    a slot each.
    """

    def __init__(self, model: Any, name: str | None, budget: float) -> None:
        self.model, self.name, self.budget = model, name, budget
        self.cache = self.pristine = DynamicCache()
        self.masked: list[Any] = []
        self.num_tokens = 0

    @property
    def attention_layers(self) -> list[Any]:
        return [layer.self_attn for layer in self.model.model.layers]

    def prefill(self, tokens: list[int]) -> torch.Tensor:
        """Logits of the next token, ``[vocabulary]``."""
        self.num_tokens = len(tokens)
        self.cache = DynamicCache()
        for layer in self.attention_layers:
            layer.masked_key_indices = None
        ids = torch.tensor([tokens])
        if self.name is None:
            out = self.model(ids, past_key_values=self.cache, logits_to_keep=1)
        else:
            with PRESSES[self.name](1 - self.budget)(self.model):
                out = self.model(ids, past_key_values=self.cache, logits_to_keep=1)
        self.masked = [layer.masked_key_indices for layer in self.attention_layers]
        self.pristine = copy.deepcopy(self.cache)
        return out.logits[0, -1]

    def fork(self) -> None:
        self.cache = copy.deepcopy(self.pristine)

    def decode(self, token: int, position: int) -> torch.Tensor:
        for layer, masked in zip(self.attention_layers, self.masked, strict=True):
            layer.masked_key_indices = masked
        out = self.model(
            torch.tensor([[token]]),
            past_key_values=self.cache,
            position_ids=torch.tensor([[position]]),
        )
        return out.logits[0, -1]

    def memory(self) -> float:
        """The share of the prompt's keys that lie in memory."""
        held = [layer.keys.shape[2] for layer in self.pristine.layers]
        return sum(held) / len(held) / self.num_tokens

    def slots(self) -> float:
        """The share of the prompt's keys that queries see."""
        heads = self.pristine.layers[0].keys.shape[1]
        missed = sum(len(masked[0]) for masked in self.masked if masked is not None)
        return self.memory() - missed / len(self.masked) / heads / self.num_tokens

    def kept(self, full: Copy) -> list[list[list[int]]]:
        """Positions that queries see, by layer and head: whose keys they are in ``full``."""
        found = []
        for layer, masked in enumerate(self.masked):
            keys, all_keys = (c.pristine.layers[layer].keys[0] for c in (self, full))
            exact = "donot_use_mm_for_euclid_dist"
            positions = torch.cdist(keys, all_keys, compute_mode=exact).argmin(-1)
            seen = torch.ones_like(positions, dtype=torch.bool)
            if masked is not None:
                seen[masked[1], masked[2]] = False
            found.append([p[s].tolist() for p, s in zip(positions, seen, strict=True)])
        return found


class Copies:
    """All variants' caches of one prompt; the first is the full cache.

    Args:
        job: ``model``, ``variants`` (a press or None, and a budget, each) and ``logits``, the file.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        config = model.config
        if not hasattr(config, "head_dim"):  # Qwen2's; CriticalKVPress reads it
            config.head_dim = config.hidden_size // config.num_attention_heads
        self.copies = [Copy(model, name, budget) for name, budget in job["variants"]]
        shape = (len(self.copies), config.vocab_size)
        size = shape[0] * shape[1]
        self.logits = torch.from_file(job["logits"], shared=True, size=size).view(shape)
        self.position = 0

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        self.position = len(tokens)
        for row, each in zip(self.logits, self.copies, strict=True):
            row.copy_(each.prefill(tokens))
        return {
            "slots": [each.slots() for each in self.copies],
            "memory": [each.memory() for each in self.copies],
        }

    def fork(self, _: None) -> None:
        self.position = self.copies[0].num_tokens
        for each in self.copies:
            each.fork()

    def decode(self, tokens: list[int]) -> None:
        """A token for each variant."""
        for row, each, token in zip(self.logits, self.copies, tokens, strict=True):
            row.copy_(each.decode(token, self.position))
        self.position += 1

    def kept(self, index: int) -> list[list[list[int]]]:
        return self.copies[index].kept(self.copies[0])


def main() -> None:
    # What libraries print goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    copies = Copies(json.loads(sys.stdin.readline()))
    answer(version("kvpress"))
    with torch.inference_mode():
        for line in sys.stdin:
            do, argument = json.loads(line)
            answer(getattr(copies, do)(argument))


if __name__ == "__main__":
    main()
