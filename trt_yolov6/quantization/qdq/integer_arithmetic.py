"""Integer-exact emulation of INT8 convolutions in float32: bit-identical wherever it runs.

    before   DQ(codes) ─▶ Conv(·, DQ(weights), bias)
    after    codes ─▶ Conv(·, weights' codes) ─▶ · scales ─▶ + bias

A sum of dequantized values depends on its order in the last bit, so that now and then a value falls
on the other side of a rounding: another thread count, processor or framework gives other
detections. The codes themselves, held in float32, are summed without any rounding.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trt_yolov6.graph.editing import set_initializers, set_nodes
from trt_yolov6.graph.index import GraphIndex, all_nodes, names_read, tensor_value
from trt_yolov6.graph.operators import CODE_PRESERVING_OPS, QDQ_OPS
from trt_yolov6.graph.quantized import (
    QuantizedLayer,
    Quantizer,
    quantized_layers,
    quantizer,
)

_REMOVABLE = ("Cast", *QDQ_OPS, *CODE_PRESERVING_OPS)
"""Operators that nothing may read any more once convolutions read codes."""


def with_integer_convolutions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its INT8 convolutions computed on codes.

    Exact as long as sums of products of codes stay below 2^24, which float32 holds: with weights of
    a mean magnitude of 25 steps, inputs all at the range's end and 3x3 kernels, up to 587 channels.
    Layers in half precision or FP8, with zero points, a scale for each block, or a bias that is
    dequantized as well, are left as they are.

    Args:
        model: with Q/DQ pairs as `insert_qdq` places them; it is not changed.

    Returns:
        A new graph; `model` itself where there is nothing to do.
    """
    rewriter = _Rewriter(model)
    for node in rewriter.graph.nodes:
        rewriter.add(node)
    return rewriter.result() if rewriter.has_changed else model


class _Rewriter:
    """The nodes and constants of the new graph, made node by node in the old one's order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = GraphIndex(model)
        self.has_changed = False
        self._model = model
        self._layers = {item.output: item for item in quantized_layers(self.graph)}
        self._taken = {*self.graph.constants, *self.graph.order, *self.graph.outputs}
        for node in all_nodes(model.graph):
            self._taken.update((*node.input, *node.output))
        # Of tensors that hold codes times a scale: the codes as float32, and the scale's name.
        self._codes: dict[str, tuple[str, str]] = {}
        # The same of tensors that are quantized again with that scale, which changes nothing.
        self._requantized: dict[str, tuple[str, str]] = {}
        self._weights: dict[str, str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def add(self, node: onnx.NodeProto) -> None:
        """Take in the next node: rewritten where it is a layer on codes, else as it is."""
        if node.op_type == "QuantizeLinear":
            codes = self._codes.get(node.input[0])
            if codes is not None and codes[1] == node.input[1]:
                self._requantized[node.output[0]] = codes
        elif node.op_type == "DequantizeLinear":
            self._follow_codes(node)
        elif node.op_type in CODE_PRESERVING_OPS and all(n in self._codes for n in node.input):
            self._move_codes(node)
        layer = self._layers.get(node.output[0])
        if layer is not None and self._runs_on_codes(layer):
            self.has_changed = True
            self._rewrite(layer)
        else:
            self._nodes.append(node)

    def result(self) -> onnx.ModelProto:
        """Return the new graph, without nodes and constants that nothing reads any more."""
        result = copy.deepcopy(self._model)
        graph = result.graph
        read = {item.name for item in graph.output}
        kept = []
        for node in reversed(self._nodes):
            if node.op_type not in _REMOVABLE or read.intersection(node.output):
                read.update(names_read(node))
                kept.append(node)
        # A constant that is an input as well would become an input that must be given.
        read.update(item.name for item in graph.input)
        set_nodes(graph, reversed(kept))
        tensors = (*graph.initializer, *self._constants)
        set_initializers(graph, [item for item in tensors if item.name in read])
        return result

    def _follow_codes(self, node: onnx.NodeProto) -> None:
        found, source, target = quantizer(self.graph, node), node.input[0], node.output[0]
        if not _dequantizes_int8(found):
            return
        if source in self._requantized:
            self._codes[target] = self._requantized[source]
        elif found.codes is None and found.scale is not None and math.prod(found.scale.dims) == 1:
            codes = self._new(f"{target}/codes")
            self._codes[target] = codes, node.input[1]
            self._nodes.append(
                helper.make_node("Cast", [source], [codes], to=onnx.TensorProto.FLOAT)
            )

    def _move_codes(self, node: onnx.NodeProto) -> None:
        (scale, *others) = {self._codes[name][1] for name in node.input}
        if others:
            return
        moved = copy.deepcopy(node)
        moved.name = self._new(f"{node.output[0]}/codes")
        moved.input[:] = [self._codes[name][0] for name in node.input]
        moved.output[:] = [moved.name]
        self._codes[node.output[0]] = moved.name, scale
        self._nodes.append(moved)

    def _runs_on_codes(self, layer: QuantizedLayer) -> bool:
        return (
            layer.input in self._codes
            and _dequantizes_int8(layer.weights)
            and layer.has_scale_by_output
            and all(name in self.graph.constants for name in layer.node.input[2:] if name)
        )

    def _rewrite(self, layer: QuantizedLayer) -> None:
        node, out, shape = layer.node, layer.output, (1, -1, 1, 1)
        codes, scale = self._codes[layer.input]
        factors = self._value(scale).reshape(()) * self._value(layer.weights.node.input[1])
        if layer.weight not in self._weights:
            self._weights[layer.weight] = self._constant(
                f"{layer.weight}/float", self._value(layer.weight)
            )
        total = self._new(f"{out}/sum")
        convolution = copy.deepcopy(node)
        convolution.input[:] = [codes, self._weights[layer.weight]]
        convolution.output[:] = [total]
        bias = node.input[2] if len(node.input) > 2 else ""
        scaled = self._new(f"{out}/scaled") if bias else out
        name = self._constant(f"{out}/factors", factors.reshape(shape))
        self._nodes += [
            convolution,
            helper.make_node("Mul", [total, name], [scaled], f"{node.name}/scale"),
        ]
        if bias:
            name = self._constant(f"{out}/bias", self._value(bias).reshape(shape))
            self._nodes.append(helper.make_node("Add", [scaled, name], [out], f"{node.name}/bias"))

    def _value(self, name: str) -> NDArray[Any]:
        return tensor_value(self.graph.constants[name])

    def _new(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        name = self._new(name)
        self._constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name


def with_single_quantization(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its half-precision QuantizeLinear nodes computed in single precision.

    ONNX Runtime's own are off by one level in every fourth value up to 1.23 at least (seen in
    1.23.2, the newest for Python 3.10); in 1.32 they give what single precision gives.

    Args:
        model: with Q/DQ pairs; it is not changed.

    Returns:
        A new graph; `model` itself where there is nothing to do.
    """
    graph = GraphIndex(model)
    half = {
        node.output[0]
        for node in graph.nodes
        if node.op_type == "QuantizeLinear"
        and _is_int8(quantizer(graph, node), onnx.TensorProto.FLOAT16)
    }
    if not half:
        return model
    result = copy.deepcopy(model)
    nodes: list[onnx.NodeProto] = []
    widened: dict[str, str] = {}
    for node in result.graph.node:
        if node.output[0] in half:
            value, scale = node.input[0], node.input[1]
            if scale not in widened:
                widened[scale] = f"{scale}/single"
                single = tensor_value(graph.constants[scale]).astype(np.float32)
                result.graph.initializer.append(numpy_helper.from_array(single, widened[scale]))
            exact = f"{node.output[0]}/single"
            nodes.append(helper.make_node("Cast", [value], [exact], to=onnx.TensorProto.FLOAT))
            node.input[0], node.input[1] = exact, widened[scale]
        nodes.append(node)
    set_nodes(result.graph, nodes)
    return result


def _dequantizes_int8(found: Quantizer) -> bool:
    """Return whether a node makes float32 values of INT8 codes whose zero point is 0."""
    return (
        _is_int8(found, onnx.TensorProto.FLOAT)
        and found.zero_point is not None
        and not tensor_value(found.zero_point).any()
    )


def _is_int8(found: Quantizer, scale_type: int) -> bool:
    """Return whether a Q/DQ node has a stored INT8 zero point and a stored scale of a type."""
    return (
        found.zero_point is not None
        and found.zero_point.data_type == onnx.TensorProto.INT8
        and found.scale is not None
        and found.scale.data_type == scale_type
    )
