"""Probe whether a backend computes convolutions in 8 bits for a target, with one of them.

TensorRT-RTX builds a T4 engine of an INT8 graph without a word and computes all of it in float.
Calibration takes minutes, so that is better known before.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from trt_yolov6.engines import backend as backend_module
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.engines.build import quantized_layers_of
from trt_yolov6.errors import UserError
from trt_yolov6.quantization.types import QuantizedType
from trt_yolov6.spec import BatchProfile


def computes(backend: str, settings: BuildSettings, kind: QuantizedType) -> bool:
    """Return False where a backend computes even a plain convolution in float.

    Only TensorRT-RTX is asked, which builds in a second and leaves INT8 out for some targets.
    TensorRT computes what is quantized explicitly in 8 bits, and takes half a minute to start;
    ONNX Runtime computes Q/DQ graphs exactly, as ever.
    """
    if backend != "tensorrt-rtx":
        return True
    texts: list[str] = []
    small = dataclasses.replace(
        settings,
        batch=BatchProfile.of(1),
        fp8=kind.name == "fp8",
        timing_cache=None,
        progress=False,
        on_layers=texts.append,
    )
    model = _one_convolution(kind)
    try:
        backend_module(backend).build(model.SerializeToString(), small)
    except UserError:  # whatever it is, the real build will say it of the real graph
        return True
    found = quantized_layers_of(model, kind.name, texts)
    return found is None or found > 0


_GRAPH = """
<ir_version: 9, opset_import: ["" : 19]>
probe (float[1, 64, 32, 32] images) => (float[1, 64, 32, 32] scores)
<float scale = {0.01}, ELEMENT zero = {0}>
{
    positive = Relu(images)
    levels = QuantizeLinear(positive, scale, zero)
    rounded = DequantizeLinear(levels, scale, zero)
    weight_levels = QuantizeLinear(weights, scale, zero)
    rounded_weights = DequantizeLinear(weight_levels, scale, zero)
    conv = Conv <pads = [1, 1, 1, 1]> (rounded, rounded_weights)
    scores = Relu(conv)
}
"""


def _one_convolution(kind: QuantizedType) -> onnx.ModelProto:
    """Return a graph with a convolution between ReLUs, its input and weights quantized."""
    element = "float8e4m3fn" if kind.name == "fp8" else "int8"
    model = onnx.parser.parse_model(_GRAPH.replace("ELEMENT", element))
    weights = np.random.default_rng(0).normal(0, 0.05, (64, 64, 3, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, "weights"))
    for node in model.graph.node:
        node.name = node.output[0]
    return model
