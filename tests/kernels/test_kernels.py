"""Every operation of every implementation gives what ``kernel_cases`` says."""

from __future__ import annotations

import pytest
import torch
from helpers import kernel_cases as cases

from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.kernels import Kernels, cpu, reference, select, triton


@pytest.fixture(params=["reference", "triton", *cpu.INSTRUCTION_SETS])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Each implementation, and each instruction set that this machine has."""
    if request.param == "reference":
        return reference
    if request.param == "triton":
        return triton
    assert cpu.problem(64, torch.float32) == "", "the extension must be built to test it"
    if not torch.ops.fastgen.set_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}; one that has runs it")
    request.addfinalizer(lambda: next(filter(torch.ops.fastgen.set_isa, cpu.INSTRUCTION_SETS)))
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(max(2, threads))  # even on a core of its own
    return cpu


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("group", cases.GROUPS)
@pytest.mark.parametrize(("c", "m"), cases.PROMPTS)
def test_prefill_and_mass(kernels: Kernels, group: int, c: int, m: int, dtype: torch.dtype) -> None:
    if kernels is triton and group in (3, 4) and m > 50:
        pytest.skip("slow interpreted, groups of 1 and 7 are run; scripts/gpu_check.sh runs all")
    cases.prefill_and_mass(kernels, group, c, m, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("group", cases.GROUPS)
@pytest.mark.parametrize(("c", "m"), cases.PROMPTS)
def test_log_sum_exps(kernels: Kernels, group: int, c: int, m: int, dtype: torch.dtype) -> None:
    cases.log_sum_exps(kernels, group, c, m, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("group", cases.GROUPS)
@pytest.mark.parametrize(("c", "m"), cases.PROMPTS)
def test_peaks(kernels: Kernels, group: int, c: int, m: int, dtype: torch.dtype) -> None:
    if kernels is triton and group in (3, 4) and m > 50:
        pytest.skip("slow interpreted, groups of 1 and 7 are run; scripts/gpu_check.sh runs all")
    cases.peaks(kernels, group, c, m, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("group", [16, 100])
def test_large_groups(kernels: Kernels, group: int, dtype: torch.dtype) -> None:
    cases.log_sum_exps(kernels, group, 5, 140, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("m", [1, 16, 17, 100])
def test_value_norms(kernels: Kernels, m: int, block_size: int, dtype: torch.dtype) -> None:
    cases.value_norms(kernels, m, block_size, dtype)


@pytest.mark.parametrize("head_size", [16, 32, 48, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [8, 32])
def test_head_and_block_sizes(kernels: Kernels, head_size: int, block_size: int) -> None:
    for dtype in cases.DTYPES:
        cases.head_and_block_size(kernels, head_size, block_size, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("group", cases.GROUPS)
def test_decode_skips_evicted_slots(kernels: Kernels, group: int, dtype: torch.dtype) -> None:
    cases.decode(kernels, cases.DECODE_LENGTHS, group, 64, 16, dtype)


@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_plan_decode(kernels: Kernels, block_size: int) -> None:
    cases.plan_decode(kernels, block_size)


@pytest.mark.parametrize("block_size", [8, 16])
def test_free_pages(kernels: Kernels, block_size: int) -> None:
    cases.free_pages(kernels, block_size)


def test_plan_decode_says_who_is_short_of_pages(kernels: Kernels) -> None:
    cases.plan_decode_short_of_pages(kernels)


def test_move_pages(kernels: Kernels) -> None:
    cases.move_pages(kernels)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("num_slots", [1, 16, 17, 100])
def test_pack_slots(kernels: Kernels, num_slots: int, in_place: bool) -> None:
    cases.pack_slots(kernels, num_slots, in_place)


def test_one_head(kernels: Kernels) -> None:
    """PyTorch ignores the strides of dimensions of size 1."""
    key, value = torch.randn(2, 5, 1, 64)
    kv, slots = torch.zeros(4, 8, 128), torch.tensor([[8, 9, 10, 3, 31]]).T.contiguous()
    kernels.write_kv(key, value, kv, slots)
    assert torch.equal(kv.view(-1, 128)[slots[:, 0]], torch.cat([key, value], -1)[:, 0])


def test_a_cache_that_native_kernels_cannot_serve() -> None:
    kernels, reason = select("auto", "cpu", 72, torch.float32)
    assert kernels is reference and "head size 72" in reason
    assert select("auto", "cpu", 64, torch.bfloat16) == (cpu, "")
    assert select("reference", "cpu", 64, torch.bfloat16).kernels is reference
    with pytest.raises(FastGenConfigError, match=r"head size 72.*'auto'"):
        select("native", "cpu", 72, torch.float32)
