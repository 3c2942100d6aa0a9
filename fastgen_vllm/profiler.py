"""The prefill hook: attention mass gathered chunk by chunk while a prompt is encoded."""

from __future__ import annotations

import torch

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.kernels import Kernels
from fastgen_vllm.policy import Choice, Ladder, choose


class PromptProfile:
    """Attention mass of one prompt, for all layers, and the choice that follows from it.

    Sampling looks at query positions counted back from the prompt's end, so the queries, and
    with them the policies, do not depend on how the prompt was chunked.

    Args:
        num_tokens: ``n``, known when the request arrives.
        num_layers, num_kv_heads, group_size: ``L``, ``H``, ``G``.
        special, punctuation: bool ``[n]``.
        threshold: ``T`` of this request.
    """

    def __init__(
        self,
        config: FastGenConfig,
        ladder: Ladder,
        num_tokens: int,
        num_layers: int,
        num_kv_heads: int,
        group_size: int,
        special: torch.Tensor,
        punctuation: torch.Tensor,
        threshold: float,
    ) -> None:
        self.config, self.ladder, self.threshold = config, ladder, threshold
        self.num_tokens, self.group_size = num_tokens, group_size
        self.special, self.punctuation = special, punctuation
        bounds = sorted(set(ladder.windows(num_tokens)))
        self.bounds = torch.tensor(bounds, device=special.device)
        groups = group_size if config.group_reduction == "min" else 1
        self.mass = torch.zeros(
            (num_layers, num_kv_heads, groups, num_tokens, len(bounds) + 1),
            dtype=torch.float32,
            device=special.device,
        )
        self.num_queries = -(-num_tokens // config.query_sampling)

    def add_chunk(
        self,
        kernels: Kernels,
        layer: int,
        query: torch.Tensor,
        pages: torch.Tensor,
        page_table: torch.Tensor,
        num_keys: int,
        lse: torch.Tensor,
        scale: float,
    ) -> None:
        """Add a chunk's queries.

        Args:
            query: ``[c, H, G, D]``, the chunk's last ``c`` of the ``num_keys`` tokens so far.
            pages, page_table: where the keys are, as ``kernels.prefill_attention`` takes them.
            lse: float32 ``[c, H, G]``, log-sum-exp of each query's scaled scores.
        """
        first = num_keys - query.shape[0]
        step = self.config.query_sampling
        skip = (self.num_tokens - 1 - first) % step
        if skip >= query.shape[0]:
            return
        kernels.attention_mass(
            query[skip::step],
            pages,
            page_table,
            num_keys,
            lse[skip::step],
            first + skip,
            step,
            self.bounds,
            scale,
            self.mass[layer],
        )

    def frequent_scores(self) -> torch.Tensor:
        """Cumulative attention ``[L, H, n]``, summed over the GQA group and all queries."""
        return self.mass.sum(dim=(2, 4)) * (self.num_tokens / self.num_queries)

    def choose(self) -> Choice:
        """The policies, once every chunk and layer has been added."""
        scores = self.frequent_scores()
        if self.config.frequent_score == "mean":
            n = self.num_tokens
            scores = scores / torch.arange(n, 0, -1, device=scores.device)
        mass = self.mass if self.config.group_reduction == "min" else self.mass / self.group_size
        return choose(
            self.ladder,
            self.threshold,
            mass,
            self.num_queries,
            scores,
            self.special,
            self.punctuation,
            self.config.group_reduction,
        )
