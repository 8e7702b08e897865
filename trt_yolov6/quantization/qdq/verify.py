"""Measure on images how far cleaning a Q/DQ graph moved its outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trt_yolov6.errors import UserError
from trt_yolov6.graph.reference import reference_session
from trt_yolov6.quantization.qdq.cleanup import without_activation_pairs

EXPLAINED = 2.0
"""Limit of output changes, in multiples of the change by quantization before.

A cleaned graph that is not farther from the float graph than the other was lies, by the triangle
inequality, within twice that distance of it.
"""


@dataclass(frozen=True)
class OutputShift:
    """Change of one output; root mean squares over all images, in the output's unit."""

    output: str
    moved: float
    """Between the graph before cleaning and after."""
    quantization: float
    """Between the graph before cleaning and the same without any activation quantized."""

    @property
    def explained(self) -> bool:
        """The output moved no more than quantization explains, see `EXPLAINED`."""
        return self.moved <= EXPLAINED * self.quantization


def verify_clean(
    before: onnx.ModelProto, after: onnx.ModelProto, images: Iterable[NDArray[Any]]
) -> tuple[OutputShift, ...]:
    """Measure on images how far cleaning moved the outputs, and how far quantization had.

    Args:
        before: the Q/DQ graph as it came.
        after: what `clean` made of it.
        images: batches of the shape and type that the graph takes; each is read once.

    Returns:
        One value an output of the graph, in its order; `explained` says whether it is in order.

    Raises:
        UserError: there is no image.
    """
    sessions = [
        reference_session(model) for model in (before, after, without_activation_pairs(before))
    ]
    names = [item.name for item in sessions[0].get_outputs()]
    feed = sessions[0].get_inputs()[0].name
    squares, count = np.zeros((2, len(names))), np.zeros(len(names))
    for batch in images:
        given, cleaned, plain = (session.run(names, {feed: batch}) for session in sessions)
        for index, (old, new, real) in enumerate(zip(given, cleaned, plain, strict=True)):
            old, new, real = (value.astype(np.float64) for value in (old, new, real))
            for row, difference in enumerate((new - old, old - real)):
                squares[row, index] += np.square(difference).sum()
            count[index] += old.size
    if not count.all():
        raise UserError("surgery cannot be verified without images; give `calibration` some.")
    return tuple(
        OutputShift(name, *np.sqrt(squares[:, index] / count[index]).tolist())
        for index, name in enumerate(names)
    )
