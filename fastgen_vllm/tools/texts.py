"""Natural text: what is on every machine, and what ``scripts/setup.sh`` fetches."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics


def natural_text() -> str:
    """About 400,000 characters of English prose: the Python language reference."""
    return " ".join(" ".join(topics[name].split()) for name in sorted(topics))


def texts_in(folder: Path, language: str) -> list[str]:
    """The texts of ``folder/language/*.txt``, longest first.

    Raises:
        FileNotFoundError: there are none.
    """
    texts = [path.read_text() for path in (folder / language).glob("*.txt")]
    if not texts:
        raise FileNotFoundError(
            f"no {folder / language}/*.txt; run scripts/setup.sh, which fetches them, or name a "
            "folder with english/ and korean/ texts"
        )
    return sorted(texts, key=len, reverse=True)
