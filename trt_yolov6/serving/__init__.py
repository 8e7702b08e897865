"""Serving: engines behind Triton Inference Server."""
