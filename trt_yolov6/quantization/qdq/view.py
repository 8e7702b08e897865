"""The convolutions of a Q/DQ graph whose weights are stored quantized, and how to change them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper


@dataclass(frozen=True)
class IntegerLayer:
    """A Conv or ConvTranspose that reads INT8 or FP8 weights through a DequantizeLinear."""

    position: int
    """Its place among the graph's nodes."""
    input: str
    """The activation tensor that it reads, behind its Q/DQ pair."""
    output: str
    weight: str
    """Name of the quantized initializer."""
    scale: NDArray[np.float32]
    """Of the weights, shaped so that it broadcasts against them."""
    transposed: bool


def integer_layers(model: onnx.ModelProto) -> tuple[IntegerLayer, ...]:
    """Return the graph's quantized convolutions, two-dimensional ones, in its order."""
    constants = {item.name: item for item in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    uses = Counter(name for node in model.graph.node for name in node.input)
    found = []
    for position, node in enumerate(model.graph.node):
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        source = producers.get(node.input[1])
        if source is None or source.op_type != "DequantizeLinear":
            continue
        stored = constants.get(source.input[0])
        scale = constants.get(source.input[1])
        if (
            stored is None
            or scale is None
            or stored.data_type not in (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN)
            or len(stored.dims) != 4
            or uses[stored.name] > 1
            or uses[source.output[0]] > 1
        ):
            continue
        values = numpy_helper.to_array(scale).astype(np.float32)
        if values.size > 1:
            axis = next((item.i for item in source.attribute if item.name == "axis"), 1)
            values = values.reshape([-1 if index == axis % 4 else 1 for index in range(4)])
        found.append(
            IntegerLayer(
                position,
                node.input[0],
                node.output[0],
                stored.name,
                values,
                node.op_type == "ConvTranspose",
            )
        )
    return tuple(found)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """Return an initializer by name; KeyError if there is none."""
    found: dict[str, onnx.TensorProto] = {item.name: item for item in model.graph.initializer}
    return found[name]


def shift_bias(model: onnx.ModelProto, layer: IntegerLayer, change: NDArray[Any]) -> None:
    """Add (output channels,) to a layer's bias in place, giving it one where it has none."""
    node = model.graph.node[layer.position]
    constants = {item.name: item for item in model.graph.initializer}
    name = node.input[2] if len(node.input) > 2 else ""
    if name and name not in constants:
        raise ValueError(f"the bias {name!r} is no initializer")
    # A half-precision graph has half-precision scales, and its convolutions take such biases.
    source = next(item for item in model.graph.node if node.input[1] in item.output)
    dtype = numpy_helper.to_array(constants[source.input[1]]).dtype
    before = numpy_helper.to_array(constants[name]) if name else np.zeros(len(change), dtype)
    after = (before.astype(np.float64) + change).astype(before.dtype)
    shared = sum(list(item.input).count(name) for item in model.graph.node) > 1
    if name and not shared:
        constants[name].CopyFrom(numpy_helper.from_array(after, name))
        return
    own = f"{layer.output}_bias"
    model.graph.initializer.append(numpy_helper.from_array(after, own))
    del node.input[2:]
    node.input.append(own)


def with_layers_of(model: onnx.ModelProto, other: onnx.ModelProto) -> onnx.ModelProto:
    """Return a Q/DQ graph with the weights and biases of another graph's layers of the same names.

    Args:
        model: it is not changed. Layers that are in float in either graph stay as they are.
        other: made from the same float graph, with the same weight scales.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    theirs = {layer.output: layer for layer in integer_layers(other)}
    for layer in integer_layers(result):
        if layer.output not in theirs:
            continue
        known = theirs[layer.output]
        initializer(result, layer.weight).CopyFrom(initializer(other, known.weight))
        change = _bias(other, known) - _bias(result, layer)
        if np.any(change):
            shift_bias(result, layer, change)
    return result


def _bias(model: onnx.ModelProto, layer: IntegerLayer) -> NDArray[np.float64]:
    """Return a layer's bias; 0 where it has none."""
    node = model.graph.node[layer.position]
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros((), np.float64)
    return numpy_helper.to_array(initializer(model, node.input[2])).astype(np.float64)
