"""The error for files that cannot be used."""
from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit its model. The text says what was found, what was expected and what to do."""
