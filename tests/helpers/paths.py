"""Where things lie, and what builds them."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
PROGRAMS = TESTS / "programs"
MODEL = str(ROOT / ".cache" / "smollm2-135m-instruct")
TEXTS = ROOT / ".cache" / "texts"


def quick_compiler(path: Path) -> str:
    """A C++ compiler at ``path`` that does not optimise, for what is not timed: it takes a seventh
    of the time."""
    path.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    path.chmod(0o755)
    return str(path)
