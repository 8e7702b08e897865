"""Checkpoint files: read without running anything in them, and recognized."""

from pathlib import Path

SUFFIXES = (".pt", ".pth")
"""Endings of checkpoint files."""


def is_named_as_checkpoint(path: Path) -> bool:
    """Return whether a file's name ends as a checkpoint's does, in capitals or not."""
    return path.suffix.lower() in SUFFIXES
