"""Choices for a Q/DQ graph's weights and biases: rounded, corrected, reconstructed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray

from trt_yolov6.common.files import sha256_bytes
from trt_yolov6.quantization.bias_correction import BiasCorrection
from trt_yolov6.quantization.gptq import adapt_rounding
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.table import Weights

DESCRIPTIONS: Mapping[Weights, str] = {
    "nearest": "weights rounded to the nearest",
    "biases": "biases corrected",
    "reconstructed": "layers reconstructed",
}

_KEPT = 4
"""Graphs that are kept for the next time that the same one is asked for."""


class WeightTuning:
    """Makes a Q/DQ graph's weights and biases those of a choice of `Weights`.

    What was made of the last graphs is kept: the graph that is built was mostly tried before.
    """

    def __init__(self, float_model: onnx.ModelProto, images: Sequence[NDArray[Any]]) -> None:
        self._float_model = float_model
        self._images = images
        self._correction = BiasCorrection(float_model, images)
        self._kept: dict[tuple[str, Weights], onnx.ModelProto] = {}

    def tuned(self, model: onnx.ModelProto, weights: Weights) -> onnx.ModelProto:
        """Return the graph with its weights and biases chosen so."""
        if weights == "nearest":
            return model
        key = sha256_bytes(model.SerializeToString()), weights
        if key not in self._kept:
            if weights == "biases":
                made = self._correction.correct(model)
            else:
                made = adapt_rounding(self._float_model, model, self._images)
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = made
        return self._kept[key]


def weight_choices(settings: QuantizationSettings) -> tuple[Weights, ...]:
    """Return the alternatives to rounding to the nearest, the one that brings most first."""
    if settings.quantized.is_floating or not settings.reconstruct:
        return ("biases",)
    return ("reconstructed", "biases")
