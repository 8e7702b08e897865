"""Checkpoint files: read without running anything in them, and recognized."""

SUFFIXES = (".pt", ".pth")
"""Endings of checkpoint files."""
