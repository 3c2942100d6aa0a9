"""A program in a process of its own, which answers jobs: a line of JSON in, a line of JSON out.

The parent starts a ``Child`` and asks it; the program iterates over its ``Jobs`` and answers each.
An engine under measurement lives in such a process, so that it shares no state with another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LOG_END = 6000
"""Characters of a failed program's log that its error shows."""


class ChildError(RuntimeError):
    """A child ended before it answered. The message ends with the end of its log."""


class Child:
    """The parent's side.

    Args:
        name: what errors call the child.
        program: the Python module to run, which answers through ``Jobs``; or the path of a script,
            for a Python that does not have this package.
        python: what runs it, by default this Python.
    """

    def __init__(self, name: str, program: str | Path, python: str | Path = sys.executable) -> None:
        self.name = name
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        # Isolated: what this Python imports, and the script's neighbours, are nothing to another's.
        how = ("-m", program) if isinstance(program, str) else ("-I", program)
        self._process = subprocess.Popen(
            [python, *how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def send(self, job: Any) -> None:
        """Hand over a job and do not wait for its answer.

        Raises:
            ChildError: the child has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error() from None

    def receive(self) -> Any:
        """The answer to the oldest job that has none yet.

        Raises:
            ChildError: the child has ended without it.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._error()
        return json.loads(line)

    def ask(self, job: Any) -> Any:
        """``send`` and ``receive``."""
        self.send(job)
        return self.receive()

    def close(self) -> None:
        """No more jobs: the child ends once it has answered those it has."""
        self._process.communicate()
        self._log.close()

    def kill(self) -> None:
        """End the child at once, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _error(self) -> ChildError:
        status = self._process.wait()
        log = Path(self._log.name).read_text(encoding="utf-8", errors="replace")
        return ChildError(f"{self.name} failed with exit status {status}:\n{log[-LOG_END:]}")


class Jobs:
    """The child's side. Answers go to the real standard output, and what the program or a library
    prints goes to the log instead."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[Any]:
        for line in sys.stdin:
            yield json.loads(line)

    def answer(self, answer: Any) -> None:
        print(json.dumps(answer, default=str), file=self._answers, flush=True)
