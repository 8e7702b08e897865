"""One pass over the calibration images: statistics of any tensors of a graph.

ONNX Runtime computes image after image with the wanted tensors as further outputs; a thread counts
one image's values while the next image is computed. Memory does not grow with the images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.errors import MissingDependencyError, UserError
from trt_yolov6.graph.reference import WRONG_REWRITES
from trt_yolov6.quantization.statistics import Accumulator, TensorStatistics

if TYPE_CHECKING:
    import onnx
    import onnxruntime

__all__ = ["TensorStatistics", "check_weights", "collect"]

OVERLAP_BYTES = 256 << 20
"""Larger outputs of one image are counted before the next image is computed, to save memory."""


def collect(
    model: onnx.ModelProto,
    images: Iterable[NDArray[Any]],
    tensors: Sequence[str],
    *,
    threads: int | None = None,
) -> dict[str, TensorStatistics]:
    """Run the images through a float graph and return the statistics of some of its tensors.

    The same graph, images and machine give the same statistics.

    Args:
        model: not changed.
        images: each what the graph's one input takes, as `images.calibration_batches` yields.
        tensors: names of float tensors: the graph's input or any node's output.
        threads: CPU threads; None for one a core.

    Returns:
        The statistics by name, in the order of `tensors`.

    Raises:
        UserError: there is no image, a weight or a tensor is NaN or infinite, or all images are
            black.
        ValueError: the graph has no such tensor, or it holds no floats.
    """
    check_weights(model)
    wanted = list(dict.fromkeys(tensors))
    session = _session(model, wanted, threads)
    source = session.get_inputs()[0].name
    outputs = [name for name in wanted if name != source]
    accumulators = {name: Accumulator(name) for name in wanted}
    pending: Future[None] | None = None
    number = 0
    with ThreadPoolExecutor(1, thread_name_prefix="statistics") as worker:
        for number, image in enumerate(images, start=1):
            values = dict(zip(outputs, session.run(outputs, {source: image}), strict=True))
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
        raise UserError("there is no calibration image; give --calib a folder that holds some.")
    result = {name: accumulator.result() for name, accumulator in accumulators.items()}
    if source in result and result[source].amax == 0:
        raise UserError(
            "all calibration images are black, which tells nothing about the network's ranges; "
            "give --calib images like those the detector will see."
        )
    return result


def check_weights(model: onnx.ModelProto) -> None:
    """Raise UserError where a weight is NaN or infinite."""
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
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


def _session(
    model: onnx.ModelProto, tensors: Sequence[str], threads: int | None
) -> onnxruntime.InferenceSession:
    """Return a session with `tensors` as further outputs."""
    import onnx

    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"onnxruntime does not import ({error}); install it with `pip install onnxruntime`."
        ) from error
    produced = {name for node in model.graph.node for name in node.output}
    inputs = {item.name for item in model.graph.input}
    unknown = [name for name in tensors if name not in produced | inputs]
    if unknown:
        raise ValueError(f"the graph has no tensor {unknown[0]!r}")
    present = {item.name for item in model.graph.output}
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    extended.graph.output.extend(
        onnx.ValueInfoProto(name=name)
        for name in tensors
        if name not in present and name not in inputs
    )
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads or os.cpu_count() or 1
    # A waiting thread that spins would take the core from the one that counts.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(
            extended.SerializeToString(),
            settings,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(WRONG_REWRITES),
        )
    except Exception as error:  # its exception classes share no public base
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} does not run the graph that is to be "
            f"calibrated ({reason}); check the ONNX file."
        ) from error
