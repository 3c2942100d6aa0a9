"""Errors that users meet."""


class FastGenConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range."""
