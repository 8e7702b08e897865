"""One pass over the calibration images: statistics of any tensors of a graph.

ONNX Runtime computes image after image with the tensors as further outputs; a thread counts
one image's values while the next image is computed. Memory does not grow with the images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trt_yolov6.errors import UserError
from trt_yolov6.graph.index import GraphIndex, tensor_value
from trt_yolov6.graph.reference import reference_session, runner
from trt_yolov6.quantization.statistics import Accumulator, TensorStatistics

if TYPE_CHECKING:
    import onnxruntime

OVERLAP_BYTES = 256 << 20
"""Larger outputs of one image are counted before the next image is computed, to save memory."""


def collect(
    model: onnx.ModelProto,
    images: Iterable[NDArray[Any]],
    tensors: Sequence[str],
    *,
    copies: int = 1,
) -> dict[str, TensorStatistics]:
    """Run the images through a float graph and return the statistics of some of its tensors.

    The same graph, images and machine give the same statistics.

    Args:
        model: not changed.
        images: each what the graph's one input takes, as `calibration_batches` yields.
        tensors: names of float tensors: the graph's input or any node's output.
        copies: images in succession that are one in several forms, see `TensorStatistics.reaches`.

    Returns:
        The statistics by name, in the order of `tensors`.

    Raises:
        UserError: there is no image, a weight or a tensor is NaN or infinite, or all images are
            black.
        ValueError: the graph has no such tensor, or it holds no floats.
    """
    check_weights(model)
    names = list(dict.fromkeys(tensors))
    session = _session(model, names)
    source = session.get_inputs()[0].name
    run = runner(session, (name for name in names if name != source))
    accumulators = {name: Accumulator(name, copies) for name in names}
    pending: Future[None] | None = None
    number = 0
    with ThreadPoolExecutor(1, thread_name_prefix="statistics") as worker:
        for number, image in enumerate(images, start=1):
            values = run(image)
            if source in accumulators:
                values[source] = image
            size = sum(array.nbytes for array in values.values())
            if pending is not None:
                pending.result()
            pending = worker.submit(_count, accumulators, values, number)
            del values
            if size > OVERLAP_BYTES:
                pending.result()
        if pending is not None:
            pending.result()
    if not number:
        raise UserError("there is no calibration image; name a folder of some as `calibration`.")
    result = {name: accumulator.result() for name, accumulator in accumulators.items()}
    if source in result and result[source].amax == 0:
        raise UserError(
            "all calibration images are black, so they show nothing of the network's ranges; "
            "calibrate on images like those the detector will see."
        )
    return result


def check_weights(model: onnx.ModelProto) -> None:
    """Raise UserError where a weight is NaN or infinite."""
    for tensor in model.graph.initializer:
        values = tensor_value(tensor)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UserError(
                f"the weight {tensor.name!r} holds NaN or infinity, so the model cannot be "
                "quantized; check the checkpoint it came from."
            )


def _count(
    accumulators: dict[str, Accumulator], values: dict[str, NDArray[Any]], number: int
) -> None:
    for name, accumulator in accumulators.items():
        array = values.pop(name)  # freed as soon as it is counted
        if array.dtype.kind != "f":
            raise ValueError(f"tensor {name!r} is {array.dtype}, of which there is no range")
        if not accumulator.add(array):
            raise UserError(
                f"calibration image number {number} (by name) makes tensor {name!r} NaN or "
                "infinite; remove that image, or check the model's weights."
            )


def _session(model: onnx.ModelProto, tensors: Sequence[str]) -> onnxruntime.InferenceSession:
    """Return a session with `tensors` as further outputs."""
    known = GraphIndex(model).order
    unknown = [name for name in tensors if name not in known]
    if unknown:
        raise ValueError(f"the graph has no tensor {unknown[0]!r}")
    return reference_session(
        model,
        outputs=tensors,
        threads=os.cpu_count(),
        # A waiting thread that spins would take the core from the one that counts.
        spinning=False,
        source="the graph to be calibrated",
    )
