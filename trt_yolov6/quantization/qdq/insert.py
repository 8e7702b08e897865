"""Insert Q/DQ pairs: from a float graph, its placement and its ranges to the Q/DQ graph.

Activations are quantized symmetrically with one scale a tensor and zero point 0, weights with one
scale an output channel. Weights are stored quantized, once, with a DequantizeLinear after them;
biases stay in float, as TensorRT wants them. The zero points' data type is the quantized type.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import at_opset, copy_notes, drop_unread_initializers, set_nodes
from trt_yolov6.graph.index import constants_of, tensor_value
from trt_yolov6.graph.operators import HALF_SCALES_OPSET, layer_names, weight_axis
from trt_yolov6.quantization.qdq.placement import Placement
from trt_yolov6.quantization.types import INT8, QuantizedType


def insert_qdq(
    model: onnx.ModelProto,
    placement: Placement,
    amax: Mapping[str, float],
    *,
    quantized: QuantizedType = INT8,
    fp16: bool = False,
    weight_scales: Mapping[str, NDArray[np.float32]] | None = None,
) -> onnx.ModelProto:
    """Return the graph with Q/DQ pairs on the placement's tensors, quantized weights in its layers.

    The same arguments give the same bytes. A scale is amax / 127 for INT8 and amax / 448 for FP8,
    in a group with the largest amax.

    Args:
        model: the float32 graph that `placement` was made for; it is not changed.
        amax: largest magnitude that each tensor of the placement has to represent, above 0. One
            tensor of a group is enough.
        quantized: type of tensors and weights. FP8 needs opset 19.
        fp16: compute the rest in half precision, except for what comes after the last
            convolutions. The opset becomes 19 at least.
        weight_scales: trained scales, float32 (channels,), by the weights' name; others come from
            the weights' largest magnitudes.

    Raises:
        UserError: a range is missing, zero or not finite, or a weight is not finite.
    """
    result = at_opset(model, max(quantized.opset, HALF_SCALES_OPSET if fp16 else 0))
    graph = result.graph
    scales = activation_scales(placement, amax, quantized)
    scales |= {name: scales[source] for name, source in placement.repeated.items()}
    if fp16:
        scales = {
            name: float(_half(np.float32(scale), quantized)) for name, scale in scales.items()
        }
    writer = _Writer(
        result, scales, _scale_names(placement, scales), quantized, fp16, weight_scales or {}
    )
    outputs = {name for node in graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    for name in placement.tensors:
        if name not in outputs:
            nodes += writer.pair(name)
    layers = {
        output for output, name in layer_names(model).items() if name in set(placement.layers)
    }
    for original in graph.node:
        node = copy.deepcopy(original)
        for index, name in enumerate(node.input):
            if name in scales and (name, node.output[0]) not in placement.unquantized_reads:
                node.input[index] = writer.dequantized(name)
        # Half precision and the engine's layers go by nodes' names; see `layer_names`.
        node.name = node.name or node.output[0]
        if node.output[0] in layers:
            nodes.append(writer.weights(node))
        nodes.append(node)
        for name in node.output:
            if name in scales:
                nodes += writer.pair(name)
    set_nodes(graph, nodes)
    drop_unread_initializers(graph)
    graph.initializer.extend(writer.tensors())
    if fp16:
        from trt_yolov6.graph.float16 import tail_nodes, to_fp16

        result = to_fp16(result, keep_float32=tail_nodes(result))
    copy_notes(model, result)
    onnx.checker.check_model(result)
    return result


def activation_scales(
    placement: Placement, amax: Mapping[str, float], quantized: QuantizedType = INT8
) -> dict[str, float]:
    """Return each quantized tensor's scale, equal within a group, float32 values.

    Raises:
        UserError: a range is missing, zero or not finite.
    """
    scales: dict[str, float] = {}
    for name, members in placement.group_of.items():
        known = [(amax[member], member) for member in members if member in amax]
        if not known:
            raise UserError(
                f"the calibration has no range for tensor {name!r}; calibrate again for this graph."
            )
        for value, member in known:
            if not math.isfinite(value) or value < 0:
                raise UserError(
                    f"the calibration gives tensor {member!r} the range {value}; check the "
                    "weights for NaN and infinity, and calibrate again."
                )
        scale = np.float32(max(known)[0]) / np.float32(quantized.largest)
        if not scale >= np.finfo(np.float32).tiny:
            raise UserError(
                f"the calibration gives tensor {name!r} the range {max(known)[0]}, too small to "
                "scale to; calibrate with images that are not blank."
            )
        scales[name] = float(scale)
    return scales


def quantize_weights(
    weights: NDArray[np.floating[Any]],
    axis: int | None,
    quantized: QuantizedType = INT8,
    *,
    half_scales: bool = False,
    scales: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize weights symmetrically, one scale a channel or one for all.

    Args:
        weights: finite values of any shape.
        axis: the channel axis; None for one scale.
        quantized: what to quantize to.
        half_scales: round scales up to float16.
        scales: given scales, above 0, float32 (channels,) or (); None: from the largest magnitudes.

    Returns:
        The codes (`QuantizedType.encode`) in the same shape, and float32 scales (channels,) or (),
        all above 0.
    """
    values = weights.astype(np.float32)
    others = tuple(other for other in range(values.ndim) if other != axis)
    amax = np.abs(values).max(axis=others, initial=0, keepdims=True)
    if scales is not None:
        scale = scales.reshape(amax.shape)
    else:
        # A channel of zeros needs a scale too; any will do.
        scale = np.where(amax > 0, amax, 1) / np.float32(quantized.largest)
    scale = np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)
    if half_scales:
        scale = _half(scale, quantized)
    return quantized.encode(values / scale), scale.reshape(() if axis is None else -1)


def rounded_weights(
    weights: NDArray[Any], axis: int, scales: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return weights as INT8 represents them; arguments as of `quantize_weights`."""
    codes, scale = quantize_weights(weights, axis, scales=scales)
    shape = [1] * weights.ndim
    shape[axis] = -1
    return codes.astype(np.float32) * scale.reshape(shape)


class _Writer:
    """Makes the nodes and constants that are added to a graph."""

    def __init__(
        self,
        model: onnx.ModelProto,
        scales: Mapping[str, float],
        scale_names: Mapping[str, str],
        quantized: QuantizedType,
        half_scales: bool,
        weight_scales: Mapping[str, NDArray[np.float32]],
    ) -> None:
        self._codes: dict[str, NDArray[np.int8]] = {}
        self._constants: dict[str, NDArray[np.float32]] = {}
        self._scales = scales
        self._scale_names = scale_names
        self._quantized = quantized
        self._half_scales = half_scales
        self._weight_scales = weight_scales
        self._stored = constants_of(model)

    def tensors(self) -> list[onnx.TensorProto]:
        """Return all constants that nodes made so far read."""
        return [
            *(numpy_helper.from_array(value, name) for name, value in self._constants.items()),
            *(self._quantized.tensor(codes, name) for name, codes in self._codes.items()),
        ]

    def dequantized(self, tensor: str) -> str:
        """Return the name of the output of a tensor's Q/DQ pair."""
        return f"{tensor}/dequantized"

    def pair(self, tensor: str) -> list[onnx.NodeProto]:
        """Return the Q/DQ pair of a tensor."""
        scale, zero = self._scale_names[tensor], "zero_point"
        self._constants[scale] = np.array(self._scales[tensor], np.float32)
        self._codes[zero] = np.array(0, np.int8)
        quantized = f"{tensor}/quantized"
        return [
            helper.make_node(
                "QuantizeLinear", [tensor, scale, zero], [quantized], f"{tensor}/quantize"
            ),
            helper.make_node(
                "DequantizeLinear",
                [quantized, scale, zero],
                [self.dequantized(tensor)],
                f"{tensor}/dequantize",
            ),
        ]

    def weights(self, layer: onnx.NodeProto) -> onnx.NodeProto:
        """Store a layer's weights quantized, and return the node that dequantizes them for it."""
        name = layer.input[1]
        axis = weight_axis(layer.op_type) if self._quantized.channel_scales else None
        # Weights that two layers share are stored once, unless the axes differ.
        suffix = "" if axis is None else f"/{axis}"
        levels, scale = f"{name}/{self._quantized.name}{suffix}", f"{name}/scale{suffix}"
        zero = self._quantize(name, axis, levels, scale)
        layer.input[1] = f"{layer.output[0]}/weight"
        node = helper.make_node(
            "DequantizeLinear",
            [levels, scale, zero],
            [layer.input[1]],
            f"{layer.output[0]}/weight/dequantize",
        )
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        return node

    def _quantize(self, name: str, axis: int | None, levels: str, scale: str) -> str:
        """Quantize weights unless it is done already; return the name of their zero point."""
        if levels not in self._codes:
            weights = tensor_value(self._stored[name])
            if not np.isfinite(weights).all():
                raise UserError(
                    f"the weights {name!r} hold NaN or infinity; the file is damaged or its "
                    "training diverged."
                )
            self._codes[levels], self._constants[scale] = quantize_weights(
                weights,
                axis,
                self._quantized,
                half_scales=self._half_scales,
                scales=self._weight_scales.get(name),
            )
        zeros = np.zeros(self._constants[scale].shape, np.int8)
        zero = f"zero_points/{len(zeros)}" if zeros.ndim else "zero_point"
        self._codes[zero] = zeros
        return zero


def _scale_names(placement: Placement, scales: Mapping[str, float]) -> dict[str, str]:
    """Return the name of each tensor's scale: a group has one, named after its first tensor."""
    first = {name: group[0] for name, group in placement.group_of.items()}
    first |= {name: first[source] for name, source in placement.repeated.items()}
    return {name: f"{first[name]}/scale" for name in scales}


def _half(scale: NDArray[np.float32], quantized: QuantizedType) -> NDArray[np.float32]:
    """Round positive scales up to float16 values: rounding down would shrink the range."""
    if quantized.is_floating:
        # FP8 loses nothing by a larger scale, and a subnormal float16 has few bits or counts as 0
        # on a GPU.
        scale = np.maximum(scale, np.float32(np.finfo(np.float16).tiny))
    with np.errstate(over="ignore"):
        half = np.asarray(scale).astype(np.float16)
    short = half.astype(np.float32) < scale
    half = np.where(short, np.nextafter(half, np.float16(np.inf)), half)
    result = half.astype(np.float32)
    if not np.isfinite(result).all():
        raise UserError(
            f"a range of {float(np.max(scale)) * quantized.largest:.3g} is too large for half "
            f"precision; leave the rest in fp32."
        )
    return result
