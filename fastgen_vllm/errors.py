"""Errors that users meet."""

MOST_SHOWN = 300
"""Characters of a wrong value."""


class FastGenConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range."""


def shorten(text: str) -> str:
    """A wrong value, as far as a message repeats it."""
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
