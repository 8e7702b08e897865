"""Backends `tensorrt` and `tensorrt-rtx`: one builder and engine for both."""
