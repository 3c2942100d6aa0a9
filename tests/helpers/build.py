"""What the native kernels are built with."""

from __future__ import annotations

from pathlib import Path


def quick_compiler(path: Path) -> str:
    """A C++ compiler at ``path`` that does not optimise, for what is not timed: it takes a seventh
    of the time."""
    path.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    path.chmod(0o755)
    return str(path)
