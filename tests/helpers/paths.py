"""Where things lie."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
PROGRAMS = TESTS / "programs"
MODEL = str(ROOT / ".cache" / "smollm2-135m-instruct")
TEXTS = ROOT / ".cache" / "texts"
