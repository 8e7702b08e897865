"""Ranges for TensorRT's implicit quantization, which needs one for nearly every tensor.

With Q/DQ pairs, tensors between a convolution and the quantized tensor have no scale. Without
pairs, TensorRT runs a layer in INT8 only if all its inputs and outputs have one.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from trt_yolov6.data.calibration import calibration_images
from trt_yolov6.graph.index import GraphIndex, nodes_after_layers, shapes_of, types_of
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.operators import layer_names
from trt_yolov6.quantization.calibrators import amax_of
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.judge import batches_of
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.table import CalibrationTable


def implicit_ranges(
    table: CalibrationTable, graph: Graph, folder: str | Path, settings: QuantizationSettings
) -> dict[str, float]:
    """Return the range of each tensor that TensorRT may quantize, the table's own first.

    Args:
        table: result of the calibration.
        graph: the float graph.
        folder: the calibration images.
        settings: settings of the calibration.
    """
    known = dict(table.amax)
    # A layer whose output has no range stays in float.
    left = {out for out, name in layer_names(graph.model).items() if name in table.float_layers}
    names = [name for name in inner_tensors(graph.model) if name not in {*known, *left}]
    paths = calibration_images(folder, settings.image_limit)
    statistics = collect(graph.model, batches_of(graph, paths, settings.border), names)
    return known | {name: amax_of(item, table.method) for name, item in statistics.items()}


def inner_tensors(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the maps that layers read and those in between, in the graph's order.

    Outputs of the last layers and all that follows are left out: predictions stay in float.
    """
    known = onnx.shape_inference.infer_shapes(model)
    shapes, types, graph = shapes_of(known), types_of(known), GraphIndex(model)
    after = {name for node in nodes_after_layers(model) for name in node.output}
    return tuple(
        name
        for node in graph.nodes
        for name in node.output
        if types.get(name) == onnx.TensorProto.FLOAT
        and len(shapes.get(name, ())) == 4
        and name not in after
        and node.op_type not in ("Constant", "DequantizeLinear")
        and not {reader.output[0] for reader in graph.readers(name)} <= after
    )
