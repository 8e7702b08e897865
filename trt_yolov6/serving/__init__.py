"""Engines in service: Triton model repositories, what runs inside Triton, batch work on Ray."""
