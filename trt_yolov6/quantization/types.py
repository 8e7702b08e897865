"""The number types of quantized tensors: INT8, and FP8 in the format E4M3.

INT8 is a uniform grid. E4M3 (4 bits of exponent, 3 of mantissa, no infinity) has constant relative
precision over its normal range, 2^-6 to 448: rounding moves a number by a sixteenth of itself at
most. Values beyond the largest magnitude saturate in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from ml_dtypes import float8_e4m3fn
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

QuantizedName = Literal["int8", "fp8"]


@dataclass(frozen=True)
class QuantizedType:
    """One type that tensors are quantized to."""

    name: QuantizedName
    """Name in manifests; with two dashes before it, on the command line."""
    label: str
    """Display name, e.g. `INT8`."""
    largest: int
    """Largest magnitude, which a tensor's range is scaled to. INT8's -128 is not used, so that its
    levels are symmetric."""
    onnx_type: int
    """Number of ONNX's data type."""
    opset: int
    """First ONNX opset whose DequantizeLinear takes it, with a scale for each channel."""
    is_floating: bool
    channel_scales: bool
    """Weights have a scale for each output channel, else one for all.

    INT8 needs them for its accuracy. FP8 needs them because TensorRT-RTX 1.6.1 leaves a single one
    out on an H200: its convolutions then give the products of the codes, or those within 448,
    where with a scale for each channel they give what ONNX Runtime does.
    """

    def squared_error(self, end: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the integral of the squared rounding error from 0 to `end`, saturation included.

        Args:
            end: 0 or above, in units of the scale, of any shape; it is overwritten.
        """
        if not self.is_floating:
            level = np.minimum(np.rint(end), self.largest)
            end -= level
            return level / 12 + end * end * end / 3
        index = np.searchsorted(_MIDDLES, end)
        end -= E4M3_LEVELS[index]
        return _ERROR_BELOW[index] + end * end * end / 3

    def encode(self, values: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
        """Round values to the nearest level, the even one of two as near; the rest saturates.

        Args:
            values: finite, in units of the scale, of any shape.

        Returns:
            int8 of the same shape: INT8's levels, or the bits of E4M3's.
        """
        clipped = np.clip(values, -self.largest, self.largest)
        if not self.is_floating:
            levels: NDArray[np.int8] = np.rint(clipped).astype(np.int8)
            return levels
        return np.asarray(clipped.astype(float8_e4m3fn)).view(np.int8)

    def tensor(self, codes: NDArray[np.int8], name: str) -> onnx.TensorProto:
        """Return codes from `encode` as a stored ONNX tensor."""
        import onnx

        return onnx.TensorProto(
            name=name,
            data_type=self.onnx_type,
            dims=codes.shape,
            raw_data=np.ascontiguousarray(codes).tobytes(),
        )


E4M3_LEVELS = np.arange(127, dtype=np.uint8).view(float8_e4m3fn).astype(np.float64)
"""The numbers of E4M3 from 0 to 448, float64 (127,)."""

_MIDDLES = (E4M3_LEVELS[1:] + E4M3_LEVELS[:-1]) / 2

_HALF_GAPS = np.diff(E4M3_LEVELS) / 2
# Integral of the squared error from 0 to each level: two half gaps a step, each of width**3 / 3.
_ERROR_BELOW = np.concatenate([[0.0], np.cumsum(2 * _HALF_GAPS**3 / 3)])

INT8 = QuantizedType("int8", "INT8", 127, 3, 13, is_floating=False, channel_scales=True)

FP8 = QuantizedType("fp8", "FP8", 448, 17, 19, is_floating=True, channel_scales=True)
