"""The GPU kernels on the device: every case of the suite on fresh random inputs, then how fast they
are. ``scripts/gpu_check.sh`` runs it; it needs torch and triton alone."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers import kernel_cases as cases
from helpers.paths import ROOT

from fastgen_vllm.kernels import Kernels, cuda, triton
from fastgen_vllm.tools import gpu_bench

Case = Callable[..., None]
"""Takes a ``seed``."""

STAGES = ("triton", "cuda", "sanitizer", "benchmarks")

CUDA_CASES = [(d, b, g) for d in cuda.HEAD_SIZES for b in (8, 16, 32) for g in range(1, 9)]


def triton_cases(small: bool) -> Iterator[tuple[str, Case]]:
    dtypes, groups = cases.DTYPES, cases.GROUPS
    prompts = cases.PROMPTS[:2] if small else [*cases.PROMPTS, (300, 1100)]
    lengths = cases.DECODE_LENGTHS[:2] if small else cases.DECODE_LENGTHS
    for dtype in dtypes[:1] if small else dtypes:
        for group in groups[:2] if small else groups:
            for c, m in prompts:
                case = partial(cases.prefill_and_mass, triton, group, c, m, dtype)
                yield f"prefill and mass, {c} of {m}, group {group}, {dtype}", case
                case = partial(cases.peaks, triton, group, c, m, dtype)
                yield f"peaks, {c} of {m}, group {group}, {dtype}", case
            case = partial(cases.decode, triton, lengths, group, 64, 16, dtype)
            yield f"decode, group {group}, {dtype}", case
        for head_size in (80,) if small else (32, 80, 96, 128, 256):
            for block in (8, 32):
                case = partial(cases.head_and_block_size, triton, head_size, block, dtype)
                yield f"head size {head_size}, block size {block}, {dtype}", case
    for block in (8,) if small else (8, 16, 32):
        yield f"bookkeeping, block size {block}", partial(cases.plan_decode, triton, block)
        yield f"free pages, block size {block}", partial(cases.free_pages, triton, block)
    yield "bookkeeping, short of pages", partial(cases.plan_decode_short_of_pages, triton)
    yield "page moves", partial(cases.move_pages, triton)
    for n in (1, 16, 17, 100):
        for in_place in (True, False):
            case = partial(cases.pack_slots, triton, n, in_place)
            yield f"compaction, {n} slots, {'in place' if in_place else 'elsewhere'}", case


def cuda_cases() -> Iterator[tuple[str, Case]]:
    for dtype in cuda.DTYPES:
        for head_size, block, group in CUDA_CASES:
            lengths = cases.DECODE_LENGTHS
            case = partial(cases.decode, cuda, lengths, group, head_size, block, dtype)
            yield f"CUDA C++ decode, group {group}, head {head_size}, block {block}, {dtype}", case


def check(device: str, every: Iterable[tuple[str, Case]], seed: int) -> tuple[int, list[str]]:
    """Cases that passed, and what was wrong with the others."""
    passed, failed = 0, []
    for name, case in every:
        try:
            with torch.device(device):
                case(seed=seed)
            passed += 1
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
            print(f"FAILED {failed[-1]}", flush=True)
    return passed, failed


def sanitize(seed: int) -> str:
    """What compute-sanitizer says of the CUDA kernel."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        return "not run: compute-sanitizer is not installed"
    command = [tool, "--error-exitcode", "9", sys.executable, __file__]
    try:
        done = subprocess.run(
            [*command, "--only-cuda", "--seed", str(seed)],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        return "not finished in 120 s"
    if done.returncode == 0:
        return "no errors"
    return f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"


def benchmarks(
    device: str,
    options: argparse.Namespace,
    deadline: float,
    report: dict[str, Any],
    write: Callable[[], None],
) -> None:
    """Those of the kernels that were not found wrong."""
    kernels: dict[str, Kernels] = {"Triton": triton}
    found = report.get("cuda")
    there = device == "cuda" and not cuda.problem(128, torch.bfloat16)
    if there and (found is None or not found["failed"]):
        kernels["CUDA C++"] = cuda
    with torch.device(device):
        bench = gpu_bench.GpuBench(device, kernels, deadline, options.interpreted, write)
        report["benchmarks"] = bench.report
        bench.run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "out/gpu_check.json")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--minutes", type=float, default=7.0, help="benchmarks start before then")
    parser.add_argument(
        "--stage",
        action="append",
        choices=STAGES,
        help="what to run, in this order; may be given several times. By default it is everything",
    )
    parser.add_argument("--only-cuda", action="store_true", help="the CUDA C++ cases, and no more")
    parser.add_argument(
        "--interpreted",
        action="store_true",
        help="tiny shapes on the CPU under TRITON_INTERPRET=1, to try this program",
    )
    options = parser.parse_args()
    started, seed = time.monotonic(), options.seed
    device = "cpu" if options.interpreted else "cuda"
    if options.interpreted:
        assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
        name = "none, interpreted"
    elif not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} sees no GPU here", file=sys.stderr)
        return 2
    else:
        name = torch.cuda.get_device_name()
    if options.only_cuda:
        chosen = random.Random(seed).sample(list(cuda_cases()), 12)
        return bool(check(device, chosen, seed)[1])
    print(f"Device: {name}, torch {torch.__version__}, seed {seed}")
    problem = cuda.problem(128, torch.bfloat16) if device == "cuda" else "no device"
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "seed": seed,
    }

    def write() -> None:
        """After every stage, so that a run that is cut short still tells."""
        report["seconds"] = time.monotonic() - started
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1))

    for stage in options.stage or STAGES:
        if stage == "benchmarks":
            benchmarks(device, options, started + 60 * options.minutes, report, write)
        elif problem and stage != "triton":
            report[stage] = problem
        elif stage == "sanitizer":
            report[stage] = sanitize(seed)
        else:
            every = triton_cases(options.interpreted) if stage == "triton" else cuda_cases()
            passed, failed = check(device, every, seed)
            report[stage] = {"passed": passed, "failed": failed}
        if stage != "benchmarks":
            print(f"{stage}: {report[stage]}")
        write()
    print(f"\n{report['seconds']:.0f} s, written to {options.json}")
    checked = [report[stage] for stage in ("triton", "cuda") if stage in report]
    return any(isinstance(each, dict) and each["failed"] for each in checked)


if __name__ == "__main__":
    sys.exit(main())
