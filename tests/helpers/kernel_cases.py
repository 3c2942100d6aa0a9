"""What every implementation of an operation must give, against attention computed the long way in
float64. Tensors are made on torch's default device, so that the same cases run on a GPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from fastgen_vllm.kernels import (
    UNBOUNDED,
    DecodeBatch,
    HeadRules,
    HeadState,
    Kernels,
    Look,
    Looks,
    Pages,
    ProfiledQueries,
    PromptBatch,
    PromptKeys,
    reference,
)

GROUPS = (1, 3, 4, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE = 0.3
LAYERS, HEADS = 2, 2
PAGES_PER_BLOCK = LAYERS * HEADS
NAN = float("nan")
PROMPTS = [(1, 1), (16, 16), (17, 17), (5, 33), (1, 48), (64, 64), (65, 130), (70, 257)]
"""Queries of the chunk, and keys."""
DECODE_LENGTHS = [[1, 16], [17, 40], [32, 33], [1500, 63]]
"""Head lengths from 1 to a page and past it, and one long enough to be split."""


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@dataclass
class Prompt:
    """``m`` keys in scattered blocks of the second of two layers, ``c`` queries at their end."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv: torch.Tensor
    blocks: torch.Tensor

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
    ) -> Prompt:
        return cls.several(kernels, [(c, m)], group, head_size, dtype, block_size)[0]

    @classmethod
    def several(
        cls,
        kernels: Kernels,
        sizes: list[tuple[int, int]],
        group: int,
        head_size: int,
        dtype: torch.dtype,
        block_size: int = 16,
    ) -> list[Prompt]:
        """In one pool."""
        widths = [-(-m // block_size) for _, m in sizes]
        pages = torch.full((PAGES_PER_BLOCK * (sum(widths) + 2), block_size, 2 * head_size), NAN)
        kv, free = pages.to(dtype)[HEADS:], torch.randperm(sum(widths) + 2, device="cpu")
        prompts = []
        for (c, m), width in zip(sizes, widths, strict=True):
            blocks, free = free[:width], free[width:]
            # As in a model: q, k and v are views of one projection.
            qkv = torch.randn(m, HEADS * (group + 2), head_size, dtype=dtype)
            query, key, value = qkv.split([HEADS * group, HEADS, HEADS], dim=1)
            page_table = blocks.to(kv.device) * PAGES_PER_BLOCK + torch.arange(HEADS)[:, None]
            positions = torch.arange(m)
            slots = page_table[:, positions // block_size] * block_size + positions % block_size
            kernels.write_kv(key, value, kv, slots.T.contiguous())
            query = query[m - c :].unflatten(1, (HEADS, group))
            prompts.append(cls(query, key, value, kv, blocks))
        return prompts

    @property
    def keys(self) -> PromptKeys:
        ((_, keys),) = batch_of([self]).chunks(self.kv)
        return keys

    def attend(self, kernels: Kernels, output: torch.Tensor) -> torch.Tensor:
        """The log-sum-exps."""
        return kernels.prefill_attention(self.query, self.kv, batch_of([self]), SCALE, output)

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


def batch_of(prompts: list[Prompt]) -> PromptBatch:
    return PromptBatch.of(
        [prompt.blocks for prompt in prompts],
        [len(prompt.query) for prompt in prompts],
        [len(prompt.key) for prompt in prompts],
        HEADS,
        PAGES_PER_BLOCK,
        prompts[0].kv.device,
    )


def prefill_and_mass(
    kernels: Kernels, group: int, c: int, m: int, dtype: torch.dtype, seed: int = 0
) -> None:
    torch.manual_seed(seed)
    prompt = Prompt.random(kernels, c, m, group, 64, dtype)
    probs = prompt.probs()
    output = torch.full_like(prompt.query, float("nan"))
    lse = prompt.attend(kernels, output)
    close(output, torch.einsum("hgqk,khd->qhgd", probs, prompt.value.double()), dtype)

    bounds = torch.tensor([1, 4, 20, 100])
    edges = [0, *bounds.tolist(), 10**9]
    for step in (1, 3):
        skip = (c - 1) % step
        chosen = slice(skip, None, step)
        distance = torch.arange(m - c, m)[chosen, None] - torch.arange(m)
        for groups in {1, group}:
            mass = torch.ones(2, groups, m + 5, 5)
            queries = ProfiledQueries(prompt.query[chosen], lse[chosen], m - c + skip, step)
            kernels.attention_mass(queries, prompt.keys, bounds, SCALE, mass)
            reduced = probs.sum(1, keepdim=True) if groups == 1 else probs
            for bucket in range(5):
                inside = (distance >= edges[bucket]) & (distance < edges[bucket + 1])
                wanted = reduced[:, :, chosen].masked_fill(~inside, 0.0).sum(-2)
                close(mass[:, :, :m, bucket] - 1, wanted, dtype)
            assert (mass[:, :, m:] == 1).all()


def log_sum_exps(
    kernels: Kernels, group: int, c: int, m: int, dtype: torch.dtype, seed: int = 0
) -> None:
    """Of a chunk and of another prompt beside it."""
    torch.manual_seed(seed)
    prompts = Prompt.several(kernels, [(c, m), (70, 70)], group, 64, dtype)
    prompt, every = prompts[0], torch.cat([each.query for each in prompts])
    query, key = prompt.query.double(), prompt.key.double()
    scores = torch.einsum("qhgd,khd->qhgk", query, key) * SCALE
    causal = torch.ones(c, m).tril(m - c).bool()[:, None, None]
    wanted = scores.masked_fill(~causal, float("-inf")).logsumexp(-1)
    attended = torch.einsum("hgqk,khd->qhgd", prompt.probs(), prompt.value.double())
    output = torch.full_like(every, float("nan"))
    lse = kernels.prefill_attention(every, prompt.kv, batch_of(prompts), SCALE, output)
    close(output[:c], attended, dtype)
    close(lse[:c], wanted, dtype)
    beside = torch.empty_like(prompts[1].query)
    close(lse[c:], prompts[1].attend(kernels, beside).double(), dtype)
    close(output[c:], beside.double(), dtype)


def peaks(kernels: Kernels, group: int, c: int, m: int, dtype: torch.dtype, seed: int = 0) -> None:
    """Several prompts at once, one of them looked at by two profiles, and one by none. Every query
    or every third is looked at, and counts less the earlier it is; some stand further back, before
    the first key even."""
    torch.manual_seed(seed)
    sizes = [(c, m), (2, 40), (17, 17)]
    prompts = Prompt.several(kernels, sizes, group, 64, dtype)
    batch, query = batch_of(prompts), torch.cat([prompt.query for prompt in prompts])
    output = torch.full_like(query, float("nan"))
    lse = kernels.prefill_attention(query, prompts[0].kv, batch, SCALE, output)
    probs, skip, back = [prompt.probs() for prompt in prompts], (c - 1) % 3, 1 + c // 2
    attended = [
        torch.einsum("hgqk,khd->qhgd", p, prompt.value.double())
        for p, prompt in zip(probs, prompts, strict=True)
    ]
    close(output, torch.cat(attended), dtype)
    each = [
        Look(0, 0, c, 1, m - c, m),
        Look(0, skip, (c + 2) // 3, 3, m - c + skip, m),
        Look(0, 0, c, 1, m - c - back, m),
        Look(2, c + 2, 17, 1, 0, 17),
    ]
    counts = [torch.linspace(0.1, 1.0, look.queries, device="cpu") for look in each]
    device = query.device
    looks = Looks.of(each, [count.log() for count in counts], LAYERS, HEADS, device)
    looks.all_found.fill_(float("nan"))
    if kernels.NAME == "Triton":  # flash attention lays them out so
        lse = lse.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    kernels.attention_peaks(query, lse, prompts[0].kv, batch, looks, 1, SCALE)
    for look, count, found in zip(each, counts, looks.found, strict=True):
        own = probs[look.prompt][:, :, look.first - [0, c, c + 2][look.prompt] :: look.step]
        stood = look.position + look.step * torch.arange(look.queries)
        seen = own * (stood[:, None] >= torch.arange(look.num_keys))
        seen = seen * count.to(device)[:, None]
        close(found[0, 1], seen.amax((1, 2)), dtype)
        close(found[1, 1], seen.sum((1, 2)), dtype)
        norms = prompts[look.prompt].value.double().norm(dim=-1).T
        torch.testing.assert_close(found[2, 1].double(), norms, rtol=1e-5, atol=1e-5)
        assert found[:, 0].isnan().all(), "of another layer"


def value_norms(kernels: Kernels, m: int, block_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(m)
    prompt = Prompt.random(kernels, 1, m, 1, 64, dtype, block_size)
    wanted = prompt.value.double().norm(dim=-1).T
    torch.testing.assert_close(kernels.value_norms(prompt.keys), wanted.float())


def head_and_block_size(
    kernels: Kernels, head_size: int, block_size: int, dtype: torch.dtype, seed: int = 0
) -> None:
    torch.manual_seed(seed)
    prompt = Prompt.random(kernels, 40, 140, 2, head_size, dtype, block_size)
    output = torch.empty_like(prompt.query)
    prompt.attend(kernels, output)
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
    """Every fifth slot is evicted and holds NaN; head 0 keeps scores, sums or, in every second row,
    peaks, and head 1 does not."""
    torch.manual_seed(seed)
    width, num_rows, layer = -(-max(map(max, lengths)) // block_size) + 1, len(lengths) + 1, 1
    num_pages = 2 * len(lengths) * width + 1
    kv = torch.full((num_pages, block_size, 2 * head_size), float("nan"), dtype=dtype)
    positions = torch.full((num_pages, block_size), -1, dtype=torch.int32)
    pages = Pages(kv, positions, torch.rand(num_pages, block_size))
    table = torch.zeros(num_rows, 2, 2, width, dtype=torch.int32)
    shape = table.shape[:3]
    heads = HeadState(
        table.view(-1),
        width * torch.arange(4 * num_rows).view(shape),
        torch.zeros(shape, dtype=torch.int32),
        torch.zeros(shape, dtype=torch.int32),
        HeadRules.zeros(shape, table.device),
        torch.zeros(num_rows, 1, dtype=torch.int32),
        torch.zeros(num_rows, dtype=torch.int32),
    )
    heads.rules.keeps_scores[..., 0] = True
    heads.rules.decay[::2] = 0.9
    rows = torch.arange(len(lengths)).flip(0) + 1
    query = torch.randn(len(lengths), 2, group, head_size, dtype=dtype)
    free = iter(torch.randperm(num_pages - 1).add(1).tolist())
    slots = (
        (row, h, slot)
        for row, of_heads in zip(rows.tolist(), lengths, strict=True)
        for h, length in enumerate(of_heads)
        for slot in range(length)
    )
    for row, h, slot in slots:
        heads.lengths[row, layer, h] = slot + 1
        own, offset = table[row, layer, h], slot % block_size
        if offset == 0:
            own[slot // block_size] = next(free)
        if slot % 5 != 3:
            positions[own[slot // block_size], offset] = slot
            kv[own[slot // block_size], offset] = torch.randn(2 * head_size).to(dtype)
    before, output = pages.scores.clone(), torch.full_like(query, float("nan"))
    batch = _batch(rows, width - 1)
    for n, of_heads in enumerate(lengths):
        batch.num_tokens[n] = max(of_heads) + n
    kernels.decode_attention(query, pages, heads, batch, layer, SCALE, output)
    untouched = torch.ones_like(before, dtype=torch.bool)
    for n, row in enumerate(rows.tolist()):
        for h in range(2):
            own = table[row, layer, h][table[row, layer, h] > 0].long()
            live = positions[own].flatten() >= 0
            key, value = kv[own].flatten(0, 1)[live].double().chunk(2, -1)
            expected = (query[n, h].double() @ key.T * SCALE).softmax(-1)
            close(output[n, h], expected @ value, dtype)
            if h:
                continue
            was, found = (scores[own].flatten()[live].double() for scores in (before, pages.scores))
            if row % 2:
                close(found - was, expected.sum(0), dtype)
            else:
                is_far = int(batch.num_tokens[n]) - 1 - positions[own].flatten()[live] >= 32
                close(found, torch.maximum(0.9 * was, is_far * expected.sum(0)), dtype)
            untouched[own] = False
    assert torch.equal(pages.scores[untouched], before[untouched])


def _batch(rows: torch.Tensor, max_pages: int) -> DecodeBatch:
    none = torch.zeros(len(rows), dtype=torch.int64)
    slots = torch.full((len(rows), 2, 2), -7)
    return DecodeBatch(rows, none, none.to(torch.uint8), slots, max_pages)


RULES = [
    # sticky kinds, frequent, local, least window, keeps scores, averages, decay
    (0b0000_0001, 0, 0, 1, False, False, 0.0),
    (0b0000_0011, 500, 0, 12, True, True, 0.0),
    (0b1000_0000, 300, 300, 1, True, False, 0.9),
    (0b0000_0110, 0, 700, 20, False, True, 0.0),
    (0b00, 0, 0, UNBOUNDED, False, False, 0.0),
]
"""Some that evict always, some by score, and one that never does."""


def rules_of(which: torch.Tensor) -> HeadRules:
    """``RULES[which]``, elementwise."""
    columns = zip(*RULES, strict=True)
    found = HeadRules.zeros(tuple(which.shape), which.device)
    for tensor, column in zip(found.tensors(), columns, strict=True):
        tensor.copy_(torch.tensor(column, device=which.device)[which])
    return found


@dataclass
class Tables:
    """Random decode state of ``R`` rows, ``L = H = 2``."""

    pages: Pages
    heads: HeadState

    @classmethod
    def random(cls, num_rows: int, block_size: int, which: torch.Tensor | None = None) -> Tables:
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
        if which is None:
            which = torch.randint(0, len(RULES), shape)
        heads = HeadState(
            page_table.flatten(),
            torch.arange(0, page_table.numel(), width).view(shape),
            lengths,
            torch.ones(shape, dtype=torch.int32),
            rules_of(which),
            torch.nn.functional.pad(free, (0, 4)),
            torch.full((num_rows,), 4, dtype=torch.int32),
        )
        kv = torch.zeros(num_pages, block_size, 8)
        return cls(Pages(kv, positions, scores), heads)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a step may change."""
        heads = {k: v for k, v in vars(self.heads).items() if isinstance(v, torch.Tensor)}
        return {**heads, "positions": self.pages.positions, "scores": self.pages.scores}

    def give_back_a_block(self) -> None:
        """Four free pages again where some were taken, and they are new."""
        heads, pages = self.heads, self.pages
        heads.num_free[heads.num_free < 4] = 4
        fresh = torch.arange(len(pages.kv), len(pages.kv) + 4 * len(heads.num_free))
        heads.free_pages[:, :4] = fresh.view(-1, 4).int()
        more = (0, 0, 0, len(fresh))
        self.pages = Pages(
            torch.nn.functional.pad(pages.kv, (0, 0, *more)),
            torch.nn.functional.pad(pages.positions, more, value=-1),
            torch.nn.functional.pad(pages.scores, more),
        )


def plan_decode(kernels: Kernels, block_size: int, seed: int = 0) -> None:
    """The same slots and tables as the reference, step after step."""
    torch.manual_seed(seed)
    ours, evictions = Tables.random(5, block_size), 0
    wanted = copy.deepcopy(ours)
    rows = torch.tensor([3, 0, 4])
    for step in range(2 * block_size):
        t = torch.tensor([201, 230, 222]) + step
        classes = torch.where(torch.rand(3) < 0.3, torch.randint(0, 256, (3,)), 0).to(torch.uint8)
        before, slots = ours.heads.lengths.clone(), []
        for tables, ops in ((ours, kernels), (wanted, reference)):
            batch = DecodeBatch(rows, t, classes, torch.full((3, 2, 2), -7), 6)
            assert int(ops.plan_decode(tables.pages, tables.heads, batch)) == -1
            slots.append(batch.slots)
        evictions += int((ours.heads.lengths == before)[rows].sum())
        assert torch.equal(*slots)
        for name, tensor in ours.state().items():
            assert torch.equal(tensor, wanted.state()[name]), name
        ours.give_back_a_block()
        wanted.give_back_a_block()
    assert evictions > 20


def plan_decode_short_of_pages(kernels: Kernels, seed: int = 0) -> None:
    """Such requests are left as they were, their tokens go to page 0, and others go on."""
    torch.manual_seed(seed)
    tables = Tables.random(4, 16, torch.full((4, 2, 2), len(RULES) - 1))
    tables.heads.num_free[:] = 3
    tables.heads.lengths[1], tables.heads.lengths[2] = 5, 32
    before, rows = copy.deepcopy(tables), torch.tensor([2, 1, 0])
    batch = DecodeBatch(rows, rows + 300, torch.zeros(3).to(torch.uint8), _batch(rows, 6).slots, 6)
    assert int(kernels.plan_decode(tables.pages, tables.heads, batch)) == 2
    assert (batch.slots[0] == 0).all() and (batch.slots[2] == 0).all()
    assert torch.equal(batch.slots[1] % 16, torch.full((2, 2), 5))
    changed = before.heads.lengths.clone()
    changed[1] += 1
    assert torch.equal(tables.heads.lengths, changed)
    same = ("page_table", "num_sticky", "num_free", "free_pages")
    assert all(torch.equal(tables.state()[name], before.state()[name]) for name in same)
    assert (tables.pages.positions != before.pages.positions).sum() == 4
    assert (tables.pages.positions[0] == -1).all(), "page 0 is nobody's"


def free_pages(kernels: Kernels, block_size: int, seed: int = 0) -> None:
    """As the reference's, and no more than are left in the end, whatever the tokens' classes."""
    torch.manual_seed(seed)
    tables = Tables.random(5, block_size)
    for steps in (1, 2, 3):
        rows, t = torch.tensor([3, 0, 4]), torch.tensor([201, 230, 222])
        found = kernels.free_pages(tables.heads, rows, t, block_size, steps)
        wanted = reference.free_pages(tables.heads, rows, t, block_size, steps)
        assert found.dtype == torch.int32 and torch.equal(found, wanted)
        later = copy.deepcopy(tables)
        for step in range(steps):
            classes = torch.full((3,), 255 * (step % 2), dtype=torch.uint8)
            batch = DecodeBatch(rows, t + step + 1, classes, torch.zeros(3, 2, 2).long(), 6)
            reference.plan_decode(later.pages, later.heads, batch)
        assert (found <= later.heads.num_free[rows]).all()
    assert len(kernels.free_pages(tables.heads, rows[:0], t[:0], block_size, 1)) == 0


def _random_pages(count: int, block_size: int, size: int) -> Pages:
    kv = torch.randn(count, block_size, size).bfloat16()
    positions = torch.randint(1000, (count, block_size), dtype=torch.int32)
    return Pages(kv, positions, torch.rand(count, block_size))


def move_pages(kernels: Kernels, seed: int = 0) -> None:
    torch.manual_seed(seed)
    pages, order = _random_pages(20, 8, 48), torch.randperm(20)
    before = copy.deepcopy(pages)
    for count in (0, 7):
        source, target = order[:count], order[10 : 10 + count]
        kernels.move_pages(pages, source, target)
        untouched = torch.ones(20, dtype=torch.bool)
        untouched[target] = False
        for ours, old in _each(pages, before):
            assert torch.equal(ours[target], old[source])
            assert torch.equal(ours[untouched], old[untouched])


def _each(pages: Pages, others: Pages) -> list[tuple[torch.Tensor, torch.Tensor]]:
    names = ("kv", "positions", "scores")
    return [(getattr(pages, name), getattr(others, name)) for name in names]


def pack_slots(kernels: Kernels, num_slots: int, in_place: bool, seed: int = 0) -> None:
    """Heads that keep all, some, only the last, or nothing; to their own pages, or to others."""
    torch.manual_seed(seed)
    block_size, width = 16, -(-num_slots // 16)
    order = torch.randperm(12 * width)
    source = order[: 6 * width].view(2, 3, width)
    target = source if in_place else order[6 * width :].view(2, 3, width)
    kept = torch.rand(2, 3, num_slots) < 0.4
    kept[..., -1] = True
    kept[0, 0], kept[1, 1], kept[1, 2, :-1] = True, False, False
    pages = _random_pages(12 * width, block_size, 32)
    before = copy.deepcopy(pages)
    kernels.pack_slots(pages, source, kept, target)
    for layer, head in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        keeps, to = kept[layer, head], target[layer, head]
        for ours, old in _each(pages, before):
            wanted = old[source[layer, head]].flatten(0, 1)[:num_slots][keeps]
            assert torch.equal(ours[to].flatten(0, 1)[: len(wanted)], wanted)
        count = int(keeps.sum())
        behind = pages.positions[to].flatten()[count : -(-count // block_size) * block_size]
        assert (behind == -1).all()
    untouched = torch.ones(12 * width, dtype=torch.bool)
    untouched[target.flatten()] = False
    for ours, old in _each(pages, before):
        assert torch.equal(ours[untouched], old[untouched])
