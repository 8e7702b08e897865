"""Align shifted channels with INT8's levels: the values that a channel has most often lie on one.

What SiLU and HardSwish write lies in a few places mostly: at the function's lowest value, at zero,
at what flat parts of an image give. All values of such a place are rounded by the same error, which
neither the taps of a depthwise convolution nor its neighbours average, and up to half a step is
where the middle of a range happens to put it. A constant is subtracted from these channels anyway;
moved by a part of a step, it makes the mean squared error of each channel the least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trt_yolov6.graph.reference import reference_session, runner
from trt_yolov6.quantization.equalization.rescaling import rescaled_name
from trt_yolov6.quantization.equalization.solve import Solution

_PARTS = 32
"""Parts of a step that a channel may be moved by."""


def aligned(
    solution: Solution,
    model: onnx.ModelProto,
    scales: Mapping[str, float],
    images: Iterable[NDArray[Any]],
) -> Solution:
    """Return the solution with its shifts moved by up to half a step of INT8 each.

    Ranges stay as they are: what is beyond one then is clipped by half a step at most.

    Args:
        solution: with shifts.
        model: the graph in its form (`Solution.applied`); it is not changed.
        scales: INT8's step by tensor of that graph. Channels of others stay.
        images: a dozen inputs of the graph.
    """
    written = {
        name: rescaled_name(name) for name in solution.shifts if rescaled_name(name) in scales
    }
    if not written:
        return solution
    counts = {name: np.zeros((len(solution.shifts[name]), _PARTS), np.int64) for name in written}
    run = runner(reference_session(model, outputs=written.values()), written.values())
    for image in images:
        values = run(image)
        for name, tensor in written.items():
            counts[name] += _counts(values[tensor], scales[tensor])
    shifts = dict(solution.shifts)
    for name, tensor in written.items():
        factors = solution.factors[solution.channels.classes[name]]
        moved = shifts[name] + best_parts(counts[name]) * scales[tensor] / factors
        # In float32, as the graph will have them.
        shifts[name] = moved.astype(np.float32).astype(np.float64)
    return dataclasses.replace(solution, shifts=shifts)


def best_parts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return by how many steps to move each channel's levels for the least squared error.

    Args:
        counts: (channels, parts) values between two levels, by the part of the step they are in.

    Returns:
        (channels,) in -0.5..0.5; 0 where nothing was counted.
    """
    parts = counts.shape[1]
    # Moved by some parts, a level lies at the lower end of that part, and values in its middle.
    apart = (np.arange(parts)[:, None] + 0.5 - np.arange(parts)) / parts
    apart -= np.rint(apart)
    best: NDArray[np.float64] = np.argmin(counts @ apart**2, axis=1) / parts
    return best - (best > 0.5)


def _counts(values: NDArray[np.float32], scale: float) -> NDArray[np.int64]:
    """Count (batch, channels, height, width) by the parts of a step, (channels, parts)."""
    batch, channels = values.shape[:2]
    steps = values.reshape(batch, channels, -1) * np.float32(1 / scale)
    part = ((steps - np.floor(steps)) * _PARTS).astype(np.intp) % _PARTS
    part += np.arange(channels)[:, None] * _PARTS
    return np.bincount(part.reshape(-1), minlength=channels * _PARTS).reshape(channels, _PARTS)
