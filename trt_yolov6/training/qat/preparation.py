"""Preparation of quantization-aware training: the calibrated graph as a network.

checkpoint ─ fuse, export, calibrate, place ─▶ Start ─▶ GraphNetwork
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from trt_yolov6.data.calibration import calibration_images
from trt_yolov6.errors import UserError
from trt_yolov6.graph.index import GraphIndex
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.operators import CONVOLUTIONS, layer_names
from trt_yolov6.models.variants import Architecture
from trt_yolov6.quantization.calibrators import group_amax
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.fake_quantize import NARROWEST, WIDEST, Levels, activation_levels
from trt_yolov6.quantization.judge import LabelledScore, batches_of
from trt_yolov6.quantization.pipeline import QuantizedGraph, quantize
from trt_yolov6.quantization.qdq.insert import activation_scales
from trt_yolov6.quantization.qdq.placement import Placement
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.types import INT8
from trt_yolov6.training.distributed import placed
from trt_yolov6.training.qat.onnx_module import GraphNetwork, Quantization, feature_tensors


@dataclass(frozen=True)
class Start:
    """A calibrated network, ready to be trained quantized."""

    arch: Architecture
    quantized: QuantizedGraph
    """Output of PTQ: the float graph, placement, ranges."""
    quantization: Quantization
    features: tuple[str, ...]

    @property
    def graph(self) -> Graph:
        """The graph's description."""
        return self.quantized.graph

    def student(
        self, device: torch.device | str = "cpu", *, learn_scales: bool = True
    ) -> GraphNetwork:
        """Return the fake-quantized network, as calibrated: PTQ without corrected biases."""
        network = GraphNetwork(
            self.quantized.float_model,
            self.arch,
            self.quantization,
            self.features,
            learn_scales=learn_scales,
        )
        return placed(network, device)

    def teacher(self, device: torch.device | str = "cpu") -> GraphNetwork:
        """Return the float network, not to be trained."""
        network = GraphNetwork(self.quantized.float_model, self.arch, None, self.features)
        return placed(network.eval().requires_grad_(False), device)


def prepare_graph(
    graph: Graph,
    arch: Architecture,
    calib: str | Path,
    *,
    quantization: QuantizationSettings | None = None,
    bits: int = WIDEST,
    score: LabelledScore | None = None,
) -> Start:
    """Calibrate a graph, to be trained quantized.

    Args:
        graph: graph that `export_onnx` made of a network of `arch`.
        arch: the network's architecture.
        calib: folder of calibration images.
        quantization: calibrator, equalization and float layers, as for `quantize`. Biases are not
            corrected: training does that.
        bits: bits of weights and activations, 2 to 8. With fewer than 8, which cannot be exported,
            the first and last layers keep 8 (LSQ, Section 3).
        score: see `quantize`.

    Raises:
        UserError: see `quantize`, or training does not support a setting.
    """
    if not NARROWEST <= bits <= WIDEST:
        raise UserError(f"`bits` {bits} is out of range; give {NARROWEST} to {WIDEST}.")
    settings = quantization or QuantizationSettings()
    tuned = settings.adaptive_rounding or settings.reconstruct_minutes
    if settings.quantized is not INT8 or tuned or settings.fp16:
        raise UserError(
            "quantization-aware training starts from plain INT8; leave FP8, adaptive rounding, "
            "`reconstruct_minutes` and fp16 out of the quantization's settings (`trained_graph` "
            "takes fp16)."
        )
    settings = dataclasses.replace(settings, bias_correction=False, reconstruct=False)
    # Refuses operators that training does not support, before a minute of calibration.
    GraphNetwork(graph.model, arch)
    result = quantize(graph, calib, settings, score=score)
    layers = result.placement.layers
    placement, model = result.placement, result.float_model
    if bits == WIDEST:
        scales = activation_scales(placement, result.table.amax)
        levels = dict.fromkeys(placement.tensors, activation_levels(bits))
        weight_bits = dict.fromkeys(layers, bits)
    else:
        wide_layers, wide_tensors = _ends(model, placement)
        weight_bits = {name: WIDEST if name in wide_layers else bits for name in layers}
        scales, levels = _narrow(graph, result, calib, settings, bits, wide_tensors)
    made = GraphIndex(model)
    features = tuple(name for name in feature_tensors(graph.model) if made.producer(name))
    given = Quantization(placement, scales, levels, weight_bits)
    return Start(arch, result, given, features)


# --- fewer bits ---------------------------------------------------------------------------------


def _ends(model: onnx.ModelProto, placement: Placement) -> tuple[set[str], set[str]]:
    """Return the layers that read the image or make predictions, and the tensors only they read."""
    names, graph = layer_names(model), GraphIndex(model)
    layers, tensors, others = set(), set[str](), set[str]()
    for node in graph.nodes:
        if node.op_type not in CONVOLUTIONS:
            continue
        before = graph.ancestors([node.input[0]])
        is_first = not before.intersection(names)
        if is_first or not graph.layers_after[node.output[0]]:
            layers.add(names[node.output[0]])
            tensors.add(node.input[0])
        else:
            others.add(node.input[0])
    tensors -= others
    alone = {name for name, group in placement.group_of.items() if len(group) == 1}
    return layers, tensors & alone


def _narrow(
    graph: Graph,
    result: QuantizedGraph,
    calib: str | Path,
    settings: QuantizationSettings,
    bits: int,
    wide: set[str],
) -> tuple[dict[str, float], dict[str, Levels]]:
    """Return scales of the least squared error for fewer bits, and the levels."""
    placement = result.placement
    paths = calibration_images(calib, settings.image_limit)
    images = batches_of(graph, paths, settings.border)
    statistics = collect(result.float_model, images, placement.tensors)
    scales: dict[str, float] = {}
    levels: dict[str, Levels] = {}
    for name, members in placement.group_of.items():
        negative = any(statistics[member].amin < 0 for member in members)
        levels[name] = activation_levels(WIDEST if name in wide else bits, negative=negative)
        kind = dataclasses.replace(INT8, largest=levels[name].high)
        amax = group_amax({m: statistics[m] for m in members}, [members], "mse", kind)
        scales[name] = amax[name] / levels[name].high
    return scales, levels
