"""What tests start as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_program(program: Path, *arguments: str, **variables: str) -> str:
    """What a Python program prints, with further environment variables. It has to succeed."""
    done = subprocess.run(
        [sys.executable, str(program), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
