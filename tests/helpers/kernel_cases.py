"""What every implementation of an operation must give, against attention computed the long way in
float64. Tensors are made on torch's default device, so that the same cases run on a GPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch

from fastgen_vllm.kernels import Kernels, reference

GROUPS = (1, 3, 4, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE = 0.3
PROMPTS = [(1, 1), (16, 16), (17, 17), (5, 33), (1, 48), (64, 64), (65, 130), (70, 257)]
"""Queries of the chunk, and keys."""
DECODE_LENGTHS = [[1, 16], [17, 40], [32, 33], [1500, 63]]
"""Head lengths from 1 to a page and past it, and one long enough to be split."""


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@dataclass
class Prompt:
    """``m`` keys in scattered pages, ``c`` queries at their end."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pages: torch.Tensor
    page_table: torch.Tensor

    @classmethod
    def random(
        cls,
        kernels: Kernels,
        c: int,
        m: int,
        group: int,
        head_size: int,
        dtype: torch.dtype,
        block_size: int = 16,
        seed: int = 0,
    ) -> Prompt:
        torch.manual_seed(seed)
        heads, width = 2, -(-m // block_size)
        # As in a model: q, k and v are views of one projection.
        qkv = torch.randn(m, heads * (group + 2), head_size, dtype=dtype)
        query, key, value = qkv.split([heads * group, heads, heads], dim=1)
        pages = torch.full((heads * width + 3, block_size, 2 * head_size), float("nan"))
        page_table = torch.randperm(len(pages))[: heads * width].view(heads, width)
        positions = torch.arange(m)
        slots = page_table[:, positions // block_size] * block_size + positions % block_size
        pages = pages.to(dtype)
        kernels.write_kv(key, value, pages, slots.T.contiguous())
        return cls(query[m - c :].unflatten(1, (heads, group)), key, value, pages, page_table)

    def probs(self) -> torch.Tensor:
        """``[H, G, c, m]`` in float64, by explicit loops over heads."""
        c, heads, groups, _ = self.query.shape
        m = self.key.shape[0]
        causal = torch.ones(c, m).tril(m - c).bool()
        probs = torch.zeros(heads, groups, c, m, dtype=torch.float64)
        for h in range(heads):
            for g in range(groups):
                scores = self.query[:, h, g].double() @ self.key[:, h].double().T * SCALE
                probs[h, g] = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        return probs


def prefill_and_mass(
    kernels: Kernels, group: int, c: int, m: int, dtype: torch.dtype, seed: int = 0
) -> None:
    prompt = Prompt.random(kernels, c, m, group, 64, dtype, seed=seed)
    probs = prompt.probs()
    output = torch.full_like(prompt.query, float("nan"))
    args = (prompt.pages, prompt.page_table, m)
    lse = kernels.prefill_attention(prompt.query, *args, SCALE, output)
    close(output, torch.einsum("hgqk,khd->qhgd", probs, prompt.value.double()), dtype)

    bounds = torch.tensor([1, 4, 20, 100])
    edges = [0, *bounds.tolist(), 10**9]
    for step in (1, 3):
        skip = (c - 1) % step
        chosen = slice(skip, None, step)
        distance = torch.arange(m - c, m)[chosen, None] - torch.arange(m)
        for groups in {1, group}:
            mass = torch.ones(2, groups, m + 5, 5)
            kernels.attention_mass(
                prompt.query[chosen], *args, lse[chosen], m - c + skip, step, bounds, SCALE, mass
            )
            reduced = probs.sum(1, keepdim=True) if groups == 1 else probs
            for bucket in range(5):
                inside = (distance >= edges[bucket]) & (distance < edges[bucket + 1])
                wanted = reduced[:, :, chosen].masked_fill(~inside, 0.0).sum(-2)
                close(mass[:, :, :m, bucket] - 1, wanted, dtype)
            assert (mass[:, :, m:] == 1).all()


def head_and_block_size(
    kernels: Kernels, head_size: int, block_size: int, dtype: torch.dtype, seed: int = 0
) -> None:
    prompt = Prompt.random(kernels, 9, 77, 2, head_size, dtype, block_size, seed)
    output = torch.empty_like(prompt.query)
    kernels.prefill_attention(prompt.query, prompt.pages, prompt.page_table, 77, SCALE, output)
    expected = torch.einsum("hgqk,khd->qhgd", prompt.probs(), prompt.value.double())
    close(output, expected, dtype)
    decode(kernels, [[1, 8], [9, 300]], 2, head_size, block_size, dtype, seed)


def decode(
    kernels: Kernels,
    lengths: list[list[int]],
    group: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> None:
    """Every fifth slot is evicted and holds NaN; head 0 keeps scores, head 1 does not."""
    torch.manual_seed(seed)
    width = -(-max(map(max, lengths)) // block_size) + 1
    num_pages = 2 * len(lengths) * width + 1
    pages = torch.full((num_pages, block_size, 2 * head_size), float("nan"), dtype=dtype)
    positions = torch.full((num_pages, block_size), -1, dtype=torch.int32)
    scores = torch.rand(num_pages, block_size)
    table = torch.zeros(len(lengths) + 1, 2, width, dtype=torch.int32)
    start = width * torch.arange(2 * len(lengths) + 2).view(-1, 2)
    used = torch.zeros(len(lengths) + 1, 2, dtype=torch.int32)
    keeps_scores = torch.tensor([[True, False]]).repeat(len(lengths) + 1, 1)
    rows = torch.arange(len(lengths)).flip(0) + 1
    query = torch.randn(len(lengths), 2, group, head_size, dtype=dtype)
    free = iter(torch.randperm(num_pages - 1).add(1).tolist())
    for n, row in enumerate(rows.tolist()):
        for h, length in enumerate(lengths[n]):
            used[row, h] = length
            for slot in range(length):
                if slot % block_size == 0:
                    table[row, h, slot // block_size] = next(free)
                if slot % 5 != 3:
                    page = table[row, h, slot // block_size]
                    positions[page, slot % block_size] = slot
                    pages[page, slot % block_size] = torch.randn(2 * head_size).to(dtype)
    before, output = scores.clone(), torch.full_like(query, float("nan"))
    kernels.decode_attention(
        query,
        pages,
        positions,
        rows,
        table.flatten(),
        start,
        used,
        keeps_scores,
        scores,
        width - 1,
        SCALE,
        output,
    )
    untouched = torch.ones_like(scores, dtype=torch.bool)
    for n, row in enumerate(rows.tolist()):
        for h in range(2):
            own = table[row, h][table[row, h] > 0].long()
            live = positions[own].flatten() >= 0
            key, value = pages[own].flatten(0, 1)[live].double().chunk(2, -1)
            expected = (query[n, h].double() @ key.T * SCALE).softmax(-1)
            close(output[n, h], expected @ value, dtype)
            if h == 0:
                added = (scores - before)[own].flatten()[live]
                close(added, expected.sum(0), dtype)
                untouched[own] = ~(positions[own] >= 0)
    assert torch.equal(scores[untouched], before[untouched])


@dataclass
class Tables:
    """Random decode state of ``R`` rows, ``L = H = 2``."""

    page_table: torch.Tensor
    table_start: torch.Tensor
    lengths: torch.Tensor
    num_sticky: torch.Tensor
    policy: torch.Tensor
    free_pages: torch.Tensor
    num_free: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def random(cls, num_rows: int, block_size: int, num_hybrids: int) -> Tables:
        width, shape = 6, (num_rows, 2, 2)
        lengths = torch.randint(1, 4 * block_size, shape, dtype=torch.int32)
        lengths[0] = block_size  # appends into a new page
        num_pages = num_rows * 4 * width + 1
        order = (torch.randperm(num_pages - 1) + 1).int()
        page_table = order[: num_rows * 4 * (width - 1)].view(*shape, width - 1)
        page_table = torch.nn.functional.pad(page_table, (0, 1))
        positions = torch.full((num_pages, block_size), -1, dtype=torch.int32)
        scores = torch.zeros(num_pages, block_size)
        for index in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
            own = page_table[tuple(index)].long()
            length = int(lengths[tuple(index)])
            at = own[torch.arange(length) // block_size], torch.arange(length) % block_size
            positions[at] = torch.randperm(200)[:length].int()
            # Few distinct scores, so that ties must be broken.
            scores[at] = torch.randint(0, 3, (length,)).float()
            scores[own[0], 0] = float("inf")
            page_table[tuple(index)][-(-length // block_size) :] = 0
        free = order[num_rows * 4 * (width - 1) :].view(num_rows, 4)
        return cls(
            page_table.flatten(),
            torch.arange(0, page_table.numel(), width).view(shape),
            lengths,
            torch.ones(shape, dtype=torch.int32),
            torch.randint(0, num_hybrids, shape),
            torch.nn.functional.pad(free, (0, 4)),
            torch.full((num_rows,), 4, dtype=torch.int32),
            positions,
            scores,
        )


def plan_decode(kernels: Kernels, block_size: int, mean: bool, seed: int = 0) -> None:
    """The same slots and tables as the reference, step after step."""
    torch.manual_seed(seed)
    ladder = [
        torch.tensor([True, True, False, False, False]),
        torch.tensor([False, True, False, True, False]),
        torch.tensor([False, False, False, False, True]),
        torch.tensor([0, 500, 300, 0, 0]),
        torch.tensor([0, 0, 300, 700, 0]),
        torch.tensor([1, 12, 1, 20, 1]),
    ]
    ours, evictions = Tables.random(5, block_size, 5), 0
    wanted = copy.deepcopy(ours)
    rows = torch.tensor([3, 0, 4])
    for step in range(2 * block_size):
        t = torch.tensor([201, 230, 222]) + step
        special, punctuation = torch.rand(2, 3) < 0.3
        slots = torch.full((2, 3, 2, 2), -7)
        before = ours.lengths.clone()
        for which, (tables, ops) in enumerate(((ours, kernels), (wanted, reference))):
            state = [getattr(tables, f.name) for f in fields(Tables)]
            arguments = (rows, t, special, punctuation, ladder, mean, *state, slots[which])
            assert int(ops.plan_decode(*arguments)) == -1
        evictions += int((ours.lengths == before)[rows].sum())
        assert torch.equal(slots[0], slots[1])
        for field in fields(Tables):
            assert torch.equal(getattr(ours, field.name), getattr(wanted, field.name)), field.name
        # A new page takes from the request's stack; the test gives one block of four back.
        for tables in (ours, wanted):
            grown = tables.num_free < 4
            tables.num_free[grown] = 4
            tables.free_pages[grown, :4] = 0
            fresh = torch.arange(len(tables.positions), len(tables.positions) + 4 * len(grown))
            tables.free_pages[:, :4] = fresh.view(-1, 4).int()
            more = 4 * len(grown)
            tables.positions = torch.nn.functional.pad(tables.positions, (0, 0, 0, more), value=-1)
            tables.scores = torch.nn.functional.pad(tables.scores, (0, 0, 0, more))
    assert evictions > 20


def plan_decode_short_of_pages(kernels: Kernels, seed: int = 0) -> None:
    torch.manual_seed(seed)
    tables = Tables.random(2, 16, 1)
    tables.num_free[:] = 3
    ladder = [torch.tensor([x]) for x in (False, False, True)] + [torch.tensor([0])] * 2
    ladder += [torch.tensor([1])]
    state = [getattr(tables, f.name) for f in fields(Tables)]
    none = torch.zeros(2, dtype=torch.bool)
    slots = torch.zeros(2, 2, 2, dtype=torch.int64)
    tables.lengths[1] = 5
    rows = torch.tensor([1, 0])
    short = kernels.plan_decode(rows, rows + 300, none, none, ladder, False, *state, slots)
    assert int(short) == 1


def move_pages(kernels: Kernels, seed: int = 0) -> None:
    torch.manual_seed(seed)
    pages = torch.randn(20, 8, 48).bfloat16()
    before, order = pages.clone(), torch.randperm(20)
    for count in (0, 7):
        source, target = order[:count], order[10 : 10 + count]
        kernels.move_pages(pages, source, target)
        assert torch.equal(pages[target], before[source])
        untouched = torch.ones(20, dtype=torch.bool)
        untouched[target] = False
        assert torch.equal(pages[untouched], before[untouched])


def pack_slots(kernels: Kernels, num_tokens: int, seed: int = 0) -> None:
    torch.manual_seed(seed)
    width = -(-num_tokens // 16)
    page_table = torch.randperm(6 * width).view(2, 3, width)
    kept = torch.rand(2, 3, num_tokens) < 0.4
    kept[0, 0] = True
    kept[..., -1] = True
    pages = torch.randn(6 * width, 16, 32).bfloat16()
    before = pages.clone()
    kernels.pack_slots(pages, page_table, kept)
    for layer in range(2):
        for head in range(3):
            own, keeps = page_table[layer, head], kept[layer, head]
            wanted = before[own].flatten(0, 1)[:num_tokens][keeps]
            assert torch.equal(pages[own].flatten(0, 1)[: len(wanted)], wanted)
