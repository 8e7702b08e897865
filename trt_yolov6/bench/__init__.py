"""Latency, throughput and what bounds them."""
