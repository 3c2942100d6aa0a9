"""Natural text that is on every machine: the Python language reference."""

from __future__ import annotations

from pydoc_data.topics import topics


def natural_text() -> str:
    """About 400,000 characters of English prose."""
    return " ".join(" ".join(topics[name].split()) for name in sorted(topics))
