"""The native kernels under the address and undefined-behaviour sanitizers, and without a build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers.build import quick_compiler
from helpers.paths import ROOT

from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.kernels import cpu, reference, select


def test_under_sanitizers(tmp_path: Path) -> None:
    """A copy of the package, built with the sanitizers, passes the kernel tests."""
    copy = tmp_path / "copy"
    for name in ("csrc", "fastgen_vllm", "tests"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    sanitize = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1"
    compiler = quick_compiler(tmp_path / "quick-g++")
    environment = {**os.environ, "CFLAGS": sanitize, "LDFLAGS": sanitize, "CXX": compiler}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=copy, env=environment, check=True, timeout=500)
    library = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": library,
        # Python and torch never free all; an odr-violation check would look into torch's own.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "PYTHONPATH": f"{copy}{os.pathsep}{copy / 'tests'}",
    }
    where = [sys.executable, "-c", "from fastgen_vllm.kernels import cpu; print(cpu.__file__)"]
    used = subprocess.run(where, cwd=copy, env=environment, capture_output=True, text=True)
    assert used.stdout.startswith(str(copy)), used.stdout + used.stderr
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*tests, "tests/kernels/test_kernels.py", "-k", "not reference and not triton"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    assert " passed" in run.stdout


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` runs the reference, ``native`` says what is missing and the way out."""
    monkeypatch.setattr(cpu, "_load", lambda: "the extension was not built")
    kernels, reason = select("auto", "cpu", 64, torch.float32)
    assert kernels is reference and reason == "the extension was not built"
    with pytest.raises(FastGenConfigError, match=r"not built.*'auto'"):
        select("native", "cpu", 64, torch.float32)


def test_an_extension_of_older_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an update without a reinstall: it is found at start-up, not in a request."""
    monkeypatch.setattr(cpu, "OPERATIONS", (*cpu.OPERATIONS, "added_since"))
    assert cpu._load.__wrapped__() == (
        "the extension was built from older sources, without added_since (reinstall)"
    )


def test_freed_memory_is_kept() -> None:
    """In a process of its own: what one layer leaves serves the next without a page fault."""
    program = """
        import ctypes, resource, torch
        from fastgen_vllm.kernels import cpu

        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: each page faults

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            [torch.ones(3 << 20) for _ in range(4)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        given_back = [faults() for _ in range(3)]
        cpu.keep_freed_memory()
        print(given_back[-1], [faults() for _ in range(3)][-1])
    """
    run = [sys.executable, "-c", textwrap.dedent(program)]
    told = ("GLIBC_", "MALLOC_", "LD_PRELOAD")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(told)}
    found = subprocess.run(
        run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    given_back, kept = map(int, found.stdout.split())
    assert given_back > 1000, "this test's load does not show what it is about"
    assert kept < 100


def test_preparing_the_cache_takes_no_memory() -> None:
    """What is not filled yet is not committed: a server's memory grows with its load."""
    kv = torch.empty(1 << 28, dtype=torch.uint8)
    before = resident_bytes()
    cpu.prepare(kv)
    assert resident_bytes() - before < 1 << 26


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not THP.exists() or "[madvise]" not in THP.read_text(),
    reason="this system gives huge pages always or never, not where they are asked for",
)
def test_what_is_filled_is_put_into_huge_pages() -> None:
    kv = torch.zeros(1 << 28, dtype=torch.uint8)
    assert huge_bytes(kv) < kv.nbytes // 2
    cpu.prepare(kv)
    assert huge_bytes(kv) > kv.nbytes // 2


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes in huge pages of the mapping that the middle of a tensor lies in."""
    inside, middle = False, tensor.data_ptr() + tensor.nbytes // 2
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if last:
            inside = int(first, 16) <= middle < int(last, 16)
        if inside and line.startswith("AnonHugePages"):
            return int(line.split()[1]) << 10
    raise AssertionError("the tensor is in no mapping")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
