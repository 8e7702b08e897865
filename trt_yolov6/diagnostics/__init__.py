"""Inspection of files and of this machine."""
