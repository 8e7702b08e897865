"""Quantization-aware training of the exported graph."""
