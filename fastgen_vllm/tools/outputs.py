"""The files that commands write when they are done: checked before anything slow starts."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen_vllm.tools.inputs import InputError

ANOTHER = "Name a file in another folder."


def check_output(
    option: str, path: Path, beside: Sequence[str] = (), inputs: Sequence[Path | None] = ()
) -> None:
    """The file can be written, and so can those of its name with the suffixes ``beside`` it. Its
    folder is made where there is none yet.

    Raises:
        InputError: it cannot, or they would take each other's place or that of an input.
    """
    every = [path, *(path.with_suffix(suffix) for suffix in beside)]
    if len(set(every)) < len(every):
        raise InputError(
            f"{option} {path} takes the place of a file that is written beside it. Take another "
            f"suffix than {' and '.join(beside)}."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for each in every:
            _check(option, each, inputs)
    except OSError as error:
        raise InputError(
            f"{option} {path} cannot be written: {error.strerror}: {error.filename}. {ANOTHER}"
        ) from None


def _check(option: str, path: Path, inputs: Sequence[Path | None]) -> None:
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder. Name a file in it.")
    is_new = not path.exists()
    if not is_new and any(given and path.samefile(given) for given in inputs):
        raise InputError(f"{option} {path} takes the place of the input. {ANOTHER}")
    path.open("ab").close()
    if is_new:
        path.unlink()


def write(path: Path, content: str | bytes) -> None:
    """In place of what is there, as a whole.

    Raises:
        InputError: it cannot be written; what is there stays.
    """
    data = content if isinstance(content, bytes) else content.encode()
    try:
        if path.exists() and not path.is_file():  # a pipe or a device
            path.write_bytes(data)
            return
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(data)
                file.flush()
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(file.name, 0o666 & ~umask)
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}. {ANOTHER}") from None


def write_json(path: Path, results: Any) -> None:
    write(path, json.dumps(results, ensure_ascii=False, indent=2) + "\n")


def png(figure: Any) -> bytes:
    """A figure of matplotlib."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
