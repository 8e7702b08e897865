"""Graphs of a network from quantization-aware training: with Q/DQ nodes, or rounded weights."""

from __future__ import annotations

import copy
import dataclasses

import onnx

from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import replace_tensor
from trt_yolov6.graph.index import tensor_value
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.operators import CONVOLUTIONS, weight_axis
from trt_yolov6.quantization.fake_quantize import WIDEST
from trt_yolov6.quantization.qdq.insert import insert_qdq, rounded_weights
from trt_yolov6.training.qat.onnx_module import Trained
from trt_yolov6.training.qat.preparation import Start


def trained_graph(start: Start, trained: Trained, *, fp16: bool = False) -> Graph:
    """Return the Q/DQ graph, ready to be built: PTQ's nodes with trained weights and scales.

    With `fp16`, everything that is not quantized is in half precision, and scales are rounded up to
    float16.

    Raises:
        UserError: it has fewer bits, which INT8's Q/DQ pairs cannot express.
    """
    narrow = [bits for bits in start.quantization.weight_bits.values() if bits != WIDEST]
    if narrow:
        raise UserError(
            f"a network of {narrow[0]} bits cannot be exported; train with bits={WIDEST} for INT8."
        )
    model = insert_qdq(
        trained.model,
        start.quantization.placement,
        trained.amax,
        fp16=fp16,
        weight_scales=trained.weight_scales,
    )
    calibration = {**(start.graph.calibration or {}), "rest": "fp16" if fp16 else "fp32"}
    for name in ("agreement", "agreement_interval", "judged_on"):  # those before the training
        calibration.pop(name, None)
    calibration["quantization_aware_training"] = True
    return dataclasses.replace(start.graph, model=model, calibration=calibration)


def rounded_graph(trained: Trained) -> onnx.ModelProto:
    """Return the graph without Q/DQ nodes, its weights rounded, to use with a calibration cache.

    TensorRT up to 10 scales weights by their largest magnitude. That reproduces the rounding,
    unless training made a scale larger than the channel's weights need.
    """
    model = copy.deepcopy(trained.model)
    constants = {item.name: item for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in CONVOLUTIONS or node.input[1] not in trained.weight_scales:
            continue
        item, axis = constants[node.input[1]], weight_axis(node.op_type)
        scale = trained.weight_scales[node.input[1]]
        replace_tensor(item, rounded_weights(tensor_value(item), axis, scales=scale))
    return model
