"""Natural text: what is on every machine, and what ``scripts/setup.sh`` fetches."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from fastgen_vllm.tools.inputs import InputError, read_text


def natural_text() -> str:
    """About 400,000 characters of English prose: the Python language reference."""
    return " ".join(" ".join(topics[name].split()) for name in sorted(topics))


def texts_in(folder: Path, language: str) -> list[str]:
    """The texts of ``folder/language/*.txt``, longest first.

    Raises:
        InputError: there are none, or one is not UTF-8.
    """
    texts = [read_text(path) for path in (folder / language).glob("*.txt")]
    if not texts:
        raise InputError(
            f"There is no text {folder / language}/*.txt. Run scripts/setup.sh, which fetches "
            "texts, or name a folder that has english/*.txt and korean/*.txt."
        )
    return sorted(texts, key=len, reverse=True)
