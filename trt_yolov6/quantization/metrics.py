"""Metrics by which layers are ranked: what each is, and which end of its values is sensitive."""

from __future__ import annotations

from typing import Literal, get_args

Metric = Literal["mse", "snr", "cosine", "ap"]

METRICS: tuple[Metric, ...] = get_args(Metric)

TENSOR_METRICS: tuple[Metric, ...] = ("mse", "snr", "cosine")

MEANING: dict[Metric, str] = {
    "mse": "mean squared error of the layer's output, in its squared unit",
    "snr": "signal-to-noise ratio of the layer's output, in dB",
    "cosine": "cosine similarity of the layer's output with float's, -1 to 1",
    "ap": "AP with only this layer in INT8, 0 to 1",
}
"""Description of each metric, with its unit."""


def direction(metric: Metric) -> str:
    """Say which end of a metric's values is that of the sensitive layers."""
    return f"{'highest' if metric == 'mse' else 'lowest'} = most sensitive"
