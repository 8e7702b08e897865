"""Shared by tests of quantization: a small graph, plain settings, how weights are stored."""

from __future__ import annotations

from pathlib import Path

import onnx

from support.networks import ONE, random_model
from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.graph.export import ExportSettings, export_onnx, graph_from_checkpoint
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.training.qat.preparation import Start, prepare_graph

MINMAX = QuantizationSettings(calibrator="minmax", equalize=False)


def small_detector(folder: Path) -> Graph:
    """Export YOLOv6 with few and narrow layers and random weights, for images of 64 x 64."""
    path = folder / "tiny.onnx"
    onnx.save(export_onnx(random_model(), ExportSettings((64, 64), ONE), verify=False), path)
    return graph_from_onnx(path)


def prepared_sample(root: Path, size: int, settings: QuantizationSettings) -> Start:
    """Export the sample for square images and calibrate it for quantization-aware training."""
    checkpoint = load_checkpoint(root / "samples" / "yolov6n_bccd.pt")
    graph = graph_from_checkpoint(checkpoint, ExportSettings((size, size)))
    return prepare_graph(graph, checkpoint.arch, root / "calib", quantization=settings)


def convolutions(model: onnx.ModelProto) -> list[str]:
    """Return the names of a graph's convolutions, in order."""
    return [node.name for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")]


def weights_dtype(model: onnx.ModelProto, name: str) -> int:
    """Return the dtype in which a convolution's weights are stored."""
    makers = {output: node for node in model.graph.node for output in node.output}
    source = next(node.input[1] for node in model.graph.node if node.name == name)
    if source in makers:
        source = makers[source].input[0]
    return {item.name: int(item.data_type) for item in model.graph.initializer}[source]
