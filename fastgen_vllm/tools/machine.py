"""The machine that figures were measured on, for the record."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def machine() -> str:
    """CPU, threads and system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return f"{cpu}, {torch.get_num_threads()} threads, {platform.system()}"
