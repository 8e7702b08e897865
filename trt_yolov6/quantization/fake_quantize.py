"""Fake quantization: values rounded to the levels that INT8 will have, gradients passed on.

The rounding is that of ONNX's QuantizeLinear and DequantizeLinear, division included, so that what
is trained is what the exported graph computes. Gradients are those of LSQ (Esser et al., "Learned
step size quantization", ICLR 2020, equations 1 to 3): rounding is passed straight through, what is
clipped gets none, and the scale gets what the rounding leaves over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trt_yolov6.quantization.types import INT8

WIDEST, NARROWEST = 8, 2
"""Bits that a tensor can be quantized to; only the widest can be exported."""


@dataclass(frozen=True)
class Levels:
    """The integers that a tensor is rounded to: all from `low` to `high`."""

    low: int
    high: int


def weight_levels(bits: int) -> Levels:
    """Return the levels of weights, symmetric: -127..127 for 8 bits (`quantization.types`)."""
    most = INT8.largest if bits == WIDEST else 2 ** (bits - 1) - 1
    return Levels(-most, most)


def activation_levels(bits: int, *, negative: bool = True) -> Levels:
    """Return the levels of activations.

    INT8 has -128..127 always, as QuantizeLinear saturates; TensorRT has no unsigned one. Of fewer
    bits, which nothing exports, values that cannot be negative use all levels (LSQ, Section 2).

    Args:
        bits: 2..8.
        negative: whether the tensor has values below zero.
    """
    if bits < WIDEST and not negative:
        return Levels(0, 2**bits - 1)
    return Levels(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def fake_quantize(values: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """Return `clamp(round(values / scale), low, high) * scale`, halves rounded to even.

    Computed in float32 (float64 stays), under autocast too; the result has the values' dtype.

    Args:
        values: floating, any shape.
        scale: above 0, float32 or float64, broadcast to the values' shape: () for one, (n, 1, 1, 1)
            for one an output channel.
        levels: what is rounded to.
    """
    result: Tensor = _FakeQuantize.apply(values, scale, levels)  # type: ignore[no-untyped-call]
    return result


class _FakeQuantize(torch.autograd.Function):
    """Keeps the values alone, which the layer before keeps as well, and rounds again backwards."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, levels: Levels) -> Tensor:
        ctx.save_for_backward(values, scale)
        ctx.levels = levels
        ratio = _wide(values) / scale
        return ratio.round_().clamp_(levels.low, levels.high).mul_(scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, scale = ctx.saved_tensors
        low, high = ctx.levels.low, ctx.levels.high
        (gradient,) = gradients
        ratio = _wide(values) / scale
        inside = (ratio >= low) & (ratio <= high)
        for_scale = None
        if ctx.needs_input_grad[1]:
            left_over = ratio.round().clamp_(low, high)
            left_over -= ratio.mul_(inside)
            for_scale = (left_over * gradient).sum_to_size(scale.shape)
        return (gradient * inside if ctx.needs_input_grad[0] else None), for_scale, None


class FakeQuantizer(nn.Module):
    """Rounds a tensor with scales that are learned, or fixed."""

    initial: Tensor

    def __init__(self, scale: Tensor, levels: Levels, *, learn: bool) -> None:
        """Start from calibrated scales.

        Args:
            scale: float32, above 0, in a shape that `fake_quantize` takes.
            levels: what is rounded to.
            learn: train the logarithm of the scale's change: steps relative to a scale suit ranges
                of 1e-3 and of 1e3 alike (Jain et al., "Trained quantization thresholds", 2020).
                It counts in quantization steps at the range's end.
        """
        super().__init__()
        self.register_buffer("initial", scale.detach().clone())
        self.levels = levels
        self.change = nn.Parameter(torch.zeros_like(scale)) if learn else None

    @property
    def scale(self) -> Tensor:
        """The scales as they are now."""
        if self.change is None:
            return self.initial
        return self.initial * (self.change / self.levels.high).exp()

    @torch.no_grad()
    def settle(self, scale: Tensor) -> None:
        """Set the scales; further learning starts from these."""
        self.initial.copy_(scale)
        if self.change is not None:
            self.change.zero_()

    def forward(self, values: Tensor) -> Tensor:
        """Round; the shape stays."""
        return fake_quantize(values, self.scale, self.levels)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
