"""INT8 sensitivity of each layer: the error of the layer's output, or of detections.

MSE, signal-to-noise ratio and cosine similarity of all layers come from one pass over the images:
each layer of the float graph gets a quantized twin, which reads the same float input
through a Q/DQ pair, and the graph itself sums up how far the two are apart. So a layer's own
rounding counts, not the error of the layers before.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from trt_yolov6.common.files import check_writable
from trt_yolov6.common.plots import new_figure, save_figure
from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import add_initializers, at_opset
from trt_yolov6.graph.index import constants_of, tensor_value
from trt_yolov6.graph.operators import layer_names, weight_axis
from trt_yolov6.graph.reference import reference_session, runner
from trt_yolov6.quantization.metrics import MEANING, TENSOR_METRICS, Metric, direction
from trt_yolov6.quantization.qdq.insert import (
    activation_scales,
    insert_qdq,
    rounded_weights,
)
from trt_yolov6.quantization.qdq.placement import Placement, place
from trt_yolov6.quantization.types import INT8

_SUMS = ("error", "reference", "values", "count")


@dataclass(frozen=True)
class Distortion:
    """Error of a layer's output against float, as sums that add up over images.

    The cosine comes from the sum of squared differences, which keeps its digits where the two
    tensors are nearly the same.
    """

    error: float
    """Sum of squared differences."""
    reference: float
    """Sum of the float output's squares."""
    values: float
    """Sum of the quantized output's squares."""
    count: int
    """Number of elements."""

    def __add__(self, other: Distortion) -> Distortion:
        return Distortion(*map(operator.add, astuple(self), astuple(other)))

    @property
    def mse(self) -> float:
        """Mean squared error, 0 or more, in squared units of the tensor."""
        return self.error / max(1, self.count)

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio in dB, 10 log10 of the float output's power by the error's.

        Infinite for equal tensors, minus infinite where zeros became something else.
        """
        if self.error == 0:
            return math.inf
        return 10 * math.log10(self.reference / self.error) if self.reference else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine similarity, in -1..1; 1 for two tensors of zeros, 0 if only one is."""
        lengths = math.sqrt(self.reference), math.sqrt(self.values)
        if not lengths[0] or not lengths[1]:
            return 1.0 if self.error == 0 else 0.0
        apart = self.error - (lengths[0] - lengths[1]) ** 2
        return max(-1.0, 1 - apart / (2 * lengths[0] * lengths[1]))


@dataclass(frozen=True)
class Sensitivity:
    """A graph's INT8 layers by one metric, the most sensitive first.

    mse: the highest first, in squared units of the layer's output; snr: dB, the lowest first;
    cosine: the lowest first; ap: the AP in 0..1 with only that layer in INT8, the lowest first.
    """

    metric: Metric
    layers: tuple[tuple[str, float], ...]
    """Names as in `layer_names`, with values."""

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names, the most sensitive first."""
        return tuple(name for name, _ in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON of `sensitivity --json`; a value that is not finite is null."""
        return {
            "metric": self.metric,
            "unit": MEANING[self.metric],
            "direction": direction(self.metric),
            "layers": [
                {"name": name, "value": value if np.isfinite(value) else None}
                for name, value in self.layers
            ],
        }


def layer_distortions(
    model: onnx.ModelProto,
    placement: Placement,
    amax: Mapping[str, float],
    images: Iterable[NDArray[Any]],
) -> dict[str, Distortion]:
    """Return how far each INT8 layer's output is from float, all layers in one pass.

    Args:
        model: the float graph that the placement was made for.
        placement: what is to run in INT8.
        amax: range of each tensor to quantize, see `CalibrationTable`.
        images: each what the graph's input takes; any number takes the same memory.

    Returns:
        By layer, in the graph's order, summed over all images: the convolution's output with its
        bias, before the activation.

    Raises:
        UserError: a range is missing, or there is no image.
    """
    if not placement.layers:
        return {}
    twins = _with_twins(model, placement, input_scales(model, placement, amax))
    run = runner(reference_session(twins))
    totals = {name: Distortion(0.0, 0.0, 0.0, 0) for name in placement.layers}
    seen = False
    for image in images:
        seen = True
        found = run(image)
        for name in totals:
            error, reference, values, count = (found[_sum_name(name, kind)] for kind in _SUMS)
            totals[name] += Distortion(float(error), float(reference), float(values), int(count))
    if not seen:
        raise UserError("there is no calibration image; name a folder of some as `calibration`.")
    return totals


def ranked(distortions: Mapping[str, Distortion], metric: Metric) -> Sensitivity:
    """Return the layers by a tensor metric, the most sensitive first; ties in the given order."""
    if metric not in TENSOR_METRICS:
        raise ValueError(f"{metric!r} is not a metric of a layer's output")
    values = {name: float(getattr(item, metric)) for name, item in distortions.items()}
    return by_value(metric, values)


def by_value(metric: Metric, values: Mapping[str, float]) -> Sensitivity:
    """Return the layers by their values in a metric, the most sensitive first."""
    sign = -1 if metric == "mse" else 1
    order = sorted(values, key=lambda name: sign * values[name])
    return Sensitivity(metric, tuple((name, values[name]) for name in order))


def scores_alone(
    model: onnx.ModelProto,
    placement: Placement,
    amax: Mapping[str, float],
    score: Callable[[onnx.ModelProto], float],
) -> dict[str, float]:
    """Return for each layer the score of the graph in which only that layer runs in INT8.

    Arguments as in `layer_distortions`; `score` is any function of a graph.
    """
    scales = input_scales(model, placement, amax)
    ranges = {name: scale * INT8.largest for name, scale in scales.items()}
    return {
        name: score(insert_qdq(model, only_layer(model, placement, name), ranges))
        for name in placement.layers
    }


def only_layer(model: onnx.ModelProto, placement: Placement, layer: str) -> Placement:
    """Return the placement in which only one layer of another placement runs in INT8.

    Other readers of the layer's input read it unrounded.

    Raises:
        KeyError: the graph has no such layer.
    """
    outputs = {name: output for output, name in layer_names(model).items()}
    tensor = next(node for node in model.graph.node if node.output[0] == outputs[layer]).input[0]
    return Placement(
        tensors=(tensor,),
        groups=(),
        layers=(layer,),
        float_layers={name: "another layer is looked at" for name in outputs if name != layer},
        unquantized_reads=frozenset(
            (tensor, node.output[0])
            for node in model.graph.node
            if tensor in node.input and node.output[0] != outputs[layer]
        ),
    )


def input_scales(
    model: onnx.ModelProto, placement: Placement, amax: Mapping[str, float]
) -> dict[str, float]:
    """Return the scale that each INT8 layer's input has, by tensor.

    Outputs of a concatenation or pooling have the scale of its inputs.
    """
    return activation_scales(place(model, placement.float_layers, requantize=True), amax)


def check_chart(path: str | Path) -> None:
    """Refuse a path that `write_chart` cannot write to, before the measurement.

    Raises:
        UserError: it is not a .png file or cannot be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"`plot` {path} is not a PNG file; give a name that ends in .png.")
    check_writable(path)


def write_chart(result: Sensitivity, path: str | Path) -> None:
    """Draw a bar for each layer, the most sensitive on top, as a PNG file.

    The bars are the values that `Sensitivity` has, in its direction.

    Raises:
        UserError: see `check_chart`, or no layer runs in INT8.
        MissingDependencyError: matplotlib is not installed.
    """
    check_chart(path)
    if not result.layers:
        raise UserError("no layer runs in INT8, so that there is nothing to draw.")
    names, values = zip(*result.layers, strict=True)
    bars = np.array(values, np.float64)
    finite = bars[np.isfinite(bars)]
    bars = np.nan_to_num(bars, posinf=finite.max(initial=0), neginf=finite.min(initial=0))
    figure = new_figure(9, 1.2 + 0.19 * len(names))
    axes = figure.subplots()
    axes.barh(np.arange(len(names)), bars, color="#2f6f9f", height=0.75)
    if result.metric == "mse" and (bars > 0).any():
        axes.set_xscale("log")
    if result.metric in ("cosine", "ap") and bars.min() < bars.max():
        # Near 1, bars from 0 would all look alike.
        margin = 0.05 * float(bars.max() - bars.min())
        axes.set_xlim(float(bars.min()) - margin, float(bars.max()) + margin)
    axes.set_yticks(np.arange(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    scale = " (logarithmic)" if axes.get_xscale() == "log" else ""
    axes.set_xlabel(f"{MEANING[result.metric]}{scale}; {direction(result.metric)}")
    axes.set_title(f"Sensitivity to INT8 of {len(names)} layers", fontsize=10)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)


def _sum_name(layer: str, kind: str) -> str:
    return f"{layer}/twin/{kind}"


def _with_twins(
    model: onnx.ModelProto, placement: Placement, scales: Mapping[str, float]
) -> onnx.ModelProto:
    """Return the graph with quantized twins of its layers, and their sums as its outputs."""
    result = at_opset(model, INT8.opset)
    graph = result.graph
    constants = constants_of(result)
    nodes: list[onnx.NodeProto] = []
    added: dict[str, NDArray[Any]] = {"twin/zero_point": np.array(0, np.int8)}
    dequantized: dict[str, str] = {}
    outputs: list[onnx.ValueInfoProto] = []
    names = {
        output: name for output, name in layer_names(model).items() if name in set(placement.layers)
    }
    for node in graph.node:
        if node.output[0] not in names:
            continue
        layer, tensor, output = names[node.output[0]], node.input[0], node.output[0]
        if tensor not in dequantized:
            scale, quantized = f"{tensor}/twin/scale", f"{tensor}/twin/quantized"
            added[scale] = np.array(scales[tensor], np.float32)
            dequantized[tensor] = f"{tensor}/twin/dequantized"
            for op, source, target in (
                ("QuantizeLinear", tensor, quantized),
                ("DequantizeLinear", quantized, dequantized[tensor]),
            ):
                nodes.append(helper.make_node(op, [source, scale, "twin/zero_point"], [target]))
        twin = copy.deepcopy(node)
        twin.name = f"{layer}/twin"
        twin.output[0] = f"{layer}/twin/output"
        twin.input[0] = dequantized[tensor]
        twin.input[1] = f"{layer}/twin/weight"
        weight = tensor_value(constants[node.input[1]])
        added[twin.input[1]] = rounded_weights(weight, weight_axis(node.op_type))
        nodes.append(twin)
        difference = f"{layer}/twin/difference"
        nodes.append(helper.make_node("Sub", [output, twin.output[0]], [difference]))
        targets = [_sum_name(layer, kind) for kind in _SUMS]
        for source, target in zip((difference, output, twin.output[0]), targets[:3], strict=True):
            nodes.append(helper.make_node("ReduceSumSquare", [source], [target], keepdims=0))
        nodes.append(helper.make_node("Size", [output], [targets[3]]))
        kinds = [onnx.TensorProto.FLOAT] * 3 + [onnx.TensorProto.INT64]
        outputs += [
            helper.make_tensor_value_info(target, kind, [])
            for target, kind in zip(targets, kinds, strict=True)
        ]
    graph.node.extend(nodes)
    add_initializers(graph, added)
    # Without the graph's own outputs, nodes that only they need are not run.
    del graph.output[:]
    graph.output.extend(outputs)
    return result
