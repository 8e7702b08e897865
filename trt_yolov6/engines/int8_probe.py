"""Probe whether a backend computes convolutions in 8 bits for a target, with one of them.

TensorRT-RTX builds a T4 engine of an INT8 graph without a word and computes all of it in float.
Calibration takes minutes, so that is better known before.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trt_yolov6.engines import backend as backend_module
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.engines.build import quantized_layers_of
from trt_yolov6.errors import UserError
from trt_yolov6.quantization.types import QuantizedType
from trt_yolov6.spec import BatchProfile

_CHANNELS, _SIDE = 64, 32


def computes(backend: str, settings: BuildSettings, kind: QuantizedType) -> bool:
    """Return False where a backend computes even a plain convolution in float.

    Only TensorRT-RTX is asked, which builds in a second and leaves INT8 out for some targets.
    TensorRT computes what is quantized explicitly in 8 bits, and takes half a minute to start.

    Args:
        backend: of `engines.BACKENDS`; ONNX Runtime computes Q/DQ graphs exactly, as ever.
        settings: of the build that is planned.
        kind: INT8 or FP8.
    """
    if backend != "tensorrt-rtx":
        return True
    said: list[str] = []
    small = dataclasses.replace(
        settings,
        batch=BatchProfile(1, 1, 1),
        fp8=kind.name == "fp8",
        timing_cache=None,
        progress=False,
        on_layers=said.append,
    )
    model = _one_convolution(kind)
    try:
        backend_module(backend).build(model.SerializeToString(), small)
    except UserError:  # whatever it is, the real build will say it of the real graph
        return True
    found = quantized_layers_of(model, kind.name, said)
    return found is None or found > 0


def _one_convolution(kind: QuantizedType) -> onnx.ModelProto:
    """Return a graph with a convolution between ReLUs, its input and weights quantized."""
    element = onnx.TensorProto.FLOAT8E4M3FN if kind.name == "fp8" else onnx.TensorProto.INT8
    generator = np.random.default_rng(0)
    weights = generator.normal(0, 0.05, (_CHANNELS, _CHANNELS, 3, 3)).astype(np.float32)
    zero = helper.make_tensor("zero", element, [], [0])
    shape = [1, _CHANNELS, _SIDE, _SIDE]
    nodes = [
        helper.make_node("Relu", ["images"], ["positive"], "first"),
        helper.make_node("QuantizeLinear", ["positive", "scale", "zero"], ["levels"], "q"),
        helper.make_node("DequantizeLinear", ["levels", "scale", "zero"], ["rounded"], "dq"),
        helper.make_node("QuantizeLinear", ["weights", "scale", "zero"], ["weight_levels"], "wq"),
        helper.make_node(
            "DequantizeLinear", ["weight_levels", "scale", "zero"], ["rounded_weights"], "wdq"
        ),
        helper.make_node("Conv", ["rounded", "rounded_weights"], ["conv"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["conv"], ["scores"], "last"),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.array(0.01, np.float32), "scale"),
            zero,
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
