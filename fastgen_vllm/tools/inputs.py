"""What users give to the commands: read and checked before anything slow starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastgen_vllm.errors import shorten


class InputError(ValueError):
    """Something that the user can set right. The message says in one line what and how."""


def json_object(option: str, text: str) -> dict[str, Any]:
    """The value of an option that takes a JSON object."""
    example = f"Write a JSON object such as {option} '{{\"key\": 1}}'."
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers too long and objects too deep
        raise InputError(
            f"{option} {shorten(text)!r} is not valid JSON: {error}. {example}"
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"{option} {shorten(text)!r} is not a JSON object. {example}")
    return found


def read_text(path: Path) -> str:
    """A UTF-8 text file that says something, without the mark that some editors begin it with."""
    try:
        text = path.read_text(encoding="utf-8-sig")
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
