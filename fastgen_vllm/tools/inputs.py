"""What users give to the commands: read and checked before anything slow starts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Something that the user can set right. The message says in one line what and how."""


def json_object(option: str, text: str) -> dict[str, Any]:
    """The value of an option that takes a JSON object."""
    example = f"Write a JSON object such as {option} '{{\"key\": 1}}'."
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{option} {text!r} is not valid JSON: {error}. {example}") from None
    if not isinstance(found, dict):
        raise InputError(f"{option} {text!r} is not a JSON object. {example}")
    return found


def read_text(path: Path) -> str:
    """A UTF-8 text file that says something."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at position "
            f"{error.start} is not valid there. Convert the file, for example with "
            f"`iconv -f ENCODING -t UTF-8 {path}`."
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Name a text file.") from None
    if not text.strip():
        raise InputError(f"{path} is empty. Name a file with text in it.")
    return text


def check_output(option: str, path: Path) -> None:
    """The file can be written. Its folder is made where there is none yet."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{option} {path} cannot be written: {error.strerror}: {error.filename}. "
            "Name a file in another folder."
        ) from None
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder. Name a file in it.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(
            f"{option} {path} cannot be written: permission denied. Name a file in another folder."
        )
