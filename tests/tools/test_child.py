"""A child process answers jobs, and says why where it does not."""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path

import pytest

from fastgen_vllm.tools.child import Child, ChildError

PROGRAM = """
    import sys
    from fastgen_vllm.tools.child import Jobs

    jobs = Jobs()
    print("a library greets the user")
    for job in jobs:
        if job == "fail":
            raise ValueError("this job is wrong")
        if job == "vanish":
            sys.exit(3)
        jobs.answer([job, "한국"])
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    (tmp_path / "echo_program.py").write_text(textwrap.dedent(PROGRAM))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    return Child("the echo", "echo_program")


def test_jobs_are_answered_in_order(child: Child) -> None:
    with child:
        child.send({"a": 1})
        child.send("텍스트")
        assert [child.receive(), child.receive()] == [[{"a": 1}, "한국"], ["텍스트", "한국"]]
        assert child.ask(None) == [None, "한국"]
    assert child._process.returncode == 0


@pytest.mark.parametrize(
    ("job", "status", "log"),
    [("fail", 1, "ValueError: this job is wrong"), ("vanish", 3, "greets")],
)
def test_a_failed_child_shows_its_log(child: Child, job: str, status: int, log: str) -> None:
    with pytest.raises(ChildError) as failure, child:
        child.ask(job)
    message = str(failure.value)
    assert message.startswith(f"the echo failed with exit status {status}:\n")
    assert log in message


def test_a_child_that_has_ended_takes_no_job(child: Child) -> None:
    with pytest.raises(ChildError, match="greets"), child:
        child.send("vanish")
        child._process.wait()
        child.send("too late")


def test_a_child_ends_with_its_parents_error(child: Child) -> None:
    with pytest.raises(KeyboardInterrupt), child:
        raise KeyboardInterrupt
    assert child._process.returncode == -signal.SIGKILL
