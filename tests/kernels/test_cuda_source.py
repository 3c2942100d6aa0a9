"""csrc/cuda without a GPU: its source compiled for the CPU, against ``kernel_cases``."""

from __future__ import annotations

import ctypes
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from helpers import kernel_cases as cases
from helpers.paths import TESTS

from fastgen_vllm.kernels import cuda


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a library of the CPU's."""
    folder = tmp_path_factory.mktemp("cuda")
    source = (TESTS.parent / "csrc/cuda/decode_attention.cu").read_text()
    source = re.sub(r"#include <cuda_\w+\.h>", '#include "host_cuda.h"', source)
    launch = r"(attend<T, D, G>)<<<grid, block, 0, stream>>>\(a\)"
    source, found = re.subn(launch, r"emulate(\1, grid, block, a)", source)
    assert found == 1, "the launch is written otherwise now"
    source = source.replace("attend(const Arguments a)", "attend(Arguments a)")
    (folder / "kernel.cpp").write_text(source)
    library = folder / "kernel.so"
    build = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{TESTS / 'helpers'}"]
    subprocess.run([*build, str(folder / "kernel.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("head_size", cuda.HEAD_SIZES)
@pytest.mark.parametrize("group", cases.GROUPS)
def test_decode(
    on_host: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    group: int,
    head_size: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(cuda, "_library", lambda: on_host)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    cases.decode(cuda, cases.DECODE_LENGTHS, group, head_size, 16, dtype)
