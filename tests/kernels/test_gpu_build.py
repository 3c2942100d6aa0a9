"""The GPU kernels compile for the devices they are meant for, on a machine that has none."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import PROGRAMS, ROOT

NVCC = os.environ.get("NVCC") or shutil.which("nvcc")
KERNELS = {
    "attend_kernel",
    "attention_mass_kernel",
    "attention_peaks_kernel",
    "free_pages_kernel",
    "grow_kernel",
    "merge_kernel",
    "move_pages_kernel",
    "pack_slots_kernel",
    "place_kernel",
    "write_kv_kernel",
}
SHARED_MEMORY = {80: 163, 90: 227}
"""KiB that a block of threads can have."""


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_triton_compiles(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    del environment["TRITON_INTERPRET"]  # which conftest set for this process
    run = subprocess.run(
        [sys.executable, str(PROGRAMS / "compile_triton.py"), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    compiled = [line.split() for line in run.stdout.splitlines()]
    assert {name for name, _, _ in compiled} == KERNELS
    for name, cubin, shared in compiled:
        assert int(cubin) > 0
        assert int(shared) <= SHARED_MEMORY[capability] << 10, f"{name} does not fit"


@pytest.mark.skipif(NVCC is None, reason="csrc/cuda not compiled: no nvcc on PATH or in $NVCC")
def test_cuda_compiles(tmp_path: Path) -> None:
    """For sm_80, sm_89 and sm_90, as setup.py builds it."""
    library = tmp_path / "_cuda.so"
    build = ["bash", str(ROOT / "csrc/cuda/build.sh"), str(library)]
    run = subprocess.run(build, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    assert ctypes.CDLL(str(library)).fastgen_decode_attention
    for capability in (b"sm_80", b"sm_89", b"sm_90"):
        assert capability in library.read_bytes()


def test_gpu_check_runs(tmp_path: Path) -> None:
    """The program for machines with a GPU, with its kernels interpreted on tiny shapes."""
    out = tmp_path / "check.json"
    run = subprocess.run(
        [sys.executable, str(PROGRAMS / "gpu_check.py"), "--interpreted", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    report = json.loads(out.read_text())
    assert report["triton"]["passed"] > 10 and report["triton"]["failed"] == []
    assert len(report["benchmarks"]["decode"]) == 6
    left_out = report["benchmarks"]["left_out"]
    assert [entry.split(":")[0] for entry in left_out] == ["dense, vLLM flash attention"]
    assert report["cuda"] == report["sanitizer"] == "no device"
