"""A Q/DQ graph whose INT8 convolutions add up whole numbers, as TensorRT does: the same everywhere.

    before   DQ(codes) ─▶ Conv(·, DQ(weights), bias)
    after    codes ─▶ Conv(·, weights' codes) ─▶ · scales ─▶ + bias

A sum of dequantized values depends on their order in its last bit, so that now and then one falls
on the other side of a rounding: another number of threads, processor or framework gives other
detections. The codes themselves, held in float32, add up without any rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.graph.operators import LAYER_OPS, subgraphs
from trt_yolov6.quantization.qdq.insert import weight_axis

if TYPE_CHECKING:
    import onnx

PASSING_ON = ("Concat", "MaxPool")
"""What only moves values about: of codes of one scale they make codes of that scale."""

_REPLACED = ("Cast", "QuantizeLinear", "DequantizeLinear", *PASSING_ON)
"""What may be left over, read by nothing, once convolutions read codes."""


def with_integer_convolutions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its INT8 convolutions computed on codes.

    Exact as long as sums of products of codes stay below 2^24, which float32 holds: with weights of
    a mean magnitude of 25 steps, inputs all at the range's end and 3x3 kernels, up to 587 channels.
    What is in half precision or FP8, has zero points, a scale for each block, or a bias that is
    dequantized as well, is left as it is.

    Args:
        model: with Q/DQ pairs as `insert_qdq` puts them; it is not changed.

    Returns:
        A graph of its own; `model` itself where there is nothing to do.
    """
    import onnx
    from onnx import helper, numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    constants = {item.name: item for item in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    taken = {*constants, *_names(graph)}
    # Of tensors that hold codes times a scale: the codes as float32, and the scale's name.
    known: dict[str, tuple[str, str]] = {}
    codes_of: dict[str, str] = {}
    # The same of what quantizes them again with that scale, which changes nothing.
    again: dict[str, tuple[str, str]] = {}
    nodes: list[onnx.NodeProto] = []
    rewritten = False

    def new(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    def constant(name: str, value: NDArray[Any]) -> str:
        name = new(name)
        constants[name] = numpy_helper.from_array(np.asarray(value, np.float32), name)
        return name

    for node in graph.node:
        out = node.output[0]
        if node.op_type == "QuantizeLinear" and node.input[0] in known:
            if known[node.input[0]][1] == node.input[1]:
                again[out] = known[node.input[0]]
        elif _dequantizes_int8(node, constants) and node.input[0] in again:
            known[out] = again[node.input[0]]
        elif (
            _dequantizes_int8(node, constants)
            and node.input[0] not in constants
            and math.prod(constants[node.input[1]].dims) == 1
        ):
            known[out] = (new(f"{out}/codes"), node.input[1])
            nodes += [
                helper.make_node(
                    "Cast", [node.input[0]], [known[out][0]], to=onnx.TensorProto.FLOAT
                ),
                node,
            ]
            continue
        if node.op_type in PASSING_ON and all(name in known for name in node.input):
            (scale, *others) = {known[name][1] for name in node.input}
            if not others:
                moved = onnx.NodeProto()
                moved.CopyFrom(node)
                known[out] = (new(f"{out}/codes"), scale)
                moved.name = known[out][0]
                moved.input[:] = [known[name][0] for name in node.input]
                moved.output[:] = [known[out][0]]
                nodes.append(moved)
        stored = makers.get(node.input[1]) if node.op_type in LAYER_OPS else None
        if (
            stored is None
            or node.input[0] not in known
            or not _dequantizes_int8(stored, constants)
            or not _has_scale_by_output(node, stored, constants)
        ):
            nodes.append(node)
            continue
        rewritten = True
        codes, scale = known[node.input[0]]
        weights, scales, *_ = (numpy_helper.to_array(constants[name]) for name in stored.input)
        factors = numpy_helper.to_array(constants[scale]).reshape(()) * scales
        if stored.input[0] not in codes_of:
            codes_of[stored.input[0]] = constant(f"{stored.input[0]}/float", weights)
        total = new(f"{out}/sum")
        convolution = onnx.NodeProto()
        convolution.CopyFrom(node)
        convolution.input[:] = [codes, codes_of[stored.input[0]]]
        convolution.output[:] = [total]
        shape = (1, -1, 1, 1)
        bias = node.input[2] if len(node.input) > 2 else ""
        scaled = new(f"{out}/scaled") if bias else out
        name = constant(f"{out}/factors", factors.reshape(shape))
        nodes += [
            convolution,
            helper.make_node("Mul", [total, name], [scaled], f"{node.name}/scale"),
        ]
        if bias:
            value = numpy_helper.to_array(constants[bias]).reshape(shape)
            name = constant(f"{out}/bias", value)
            nodes.append(helper.make_node("Add", [scaled, name], [out], f"{node.name}/bias"))
    if not rewritten:
        return model
    _keep(graph, nodes, constants)
    return result


def with_single_quantization(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its half-precision QuantizeLinear nodes computed in single precision.

    ONNX Runtime's own are off by one level in every fourth value up to 1.23 at least (seen in
    1.23.2, the newest for Python 3.10); in 1.32 they give what single precision gives.

    Args:
        model: with Q/DQ pairs; it is not changed.

    Returns:
        A graph of its own; `model` itself where there is nothing to do.
    """
    import onnx
    from onnx import helper, numpy_helper

    constants = {item.name: item for item in model.graph.initializer}

    def is_meant(node: onnx.NodeProto) -> bool:
        half = onnx.TensorProto.FLOAT16
        return node.op_type == "QuantizeLinear" and _is_int8(node, constants, half)

    if not any(is_meant(node) for node in model.graph.node):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    widened: dict[str, str] = {}
    for node in result.graph.node:
        if is_meant(node):
            value, scale = node.input[0], node.input[1]
            if scale not in widened:
                widened[scale] = f"{scale}/single"
                single = numpy_helper.to_array(constants[scale]).astype(np.float32)
                result.graph.initializer.append(numpy_helper.from_array(single, widened[scale]))
            exact = f"{node.output[0]}/single"
            nodes.append(helper.make_node("Cast", [value], [exact], to=onnx.TensorProto.FLOAT))
            node.input[0], node.input[1] = exact, widened[scale]
        nodes.append(node)
    kept = type(result.graph)()
    kept.node.extend(nodes)
    del result.graph.node[:]
    result.graph.node.extend(kept.node)
    return result


def _dequantizes_int8(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Tell whether a node makes float32 of INT8 codes whose zero point is 0."""
    import onnx
    from onnx import numpy_helper

    return (
        node.op_type == "DequantizeLinear"
        and _is_int8(node, constants, onnx.TensorProto.FLOAT)
        and not numpy_helper.to_array(constants[node.input[2]]).any()
    )


def _is_int8(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], scale_type: int
) -> bool:
    """Tell whether a Q/DQ node has a stored INT8 zero point and a stored scale of a type."""
    import onnx

    if len(node.input) != 3:
        return False
    scale, zero = constants.get(node.input[1]), constants.get(node.input[2])
    return (
        scale is not None
        and zero is not None
        and scale.data_type == scale_type
        and zero.data_type == onnx.TensorProto.INT8
    )


def _has_scale_by_output(
    node: onnx.NodeProto, stored: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
) -> bool:
    """Tell whether weights (4 axes) have one scale, or one for each of a layer's outputs."""
    from onnx import helper

    if any(name not in constants for name in (stored.input[0], *filter(None, node.input[2:]))):
        return False
    weights, scale = constants[stored.input[0]].dims, constants[stored.input[1]].dims
    if len(weights) != 4:
        return False
    if math.prod(scale) == 1:
        return True
    attributes = {
        item.name: helper.get_attribute_value(item) for item in (*node.attribute, *stored.attribute)
    }
    axis = weight_axis(node.op_type)
    if node.op_type == "ConvTranspose" and attributes.get("group", 1) != 1:
        return False
    return bool(
        attributes.get("axis", 1) % 4 == axis
        and not attributes.get("block_size", 0)
        and list(scale) == [weights[axis]]
    )


def _keep(
    graph: onnx.GraphProto,
    nodes: list[onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
) -> None:
    """Make these the graph's nodes, but for pairs and constants that nothing reads any more."""
    read = {item.name for item in graph.output}
    read.update(name for node in nodes for inner in subgraphs(node) for name in _names(inner))
    kept = []
    for node in reversed(nodes):
        if node.op_type not in _REPLACED or read.intersection(node.output):
            read.update(node.input)
            kept.append(node)
    # A constant that is an input as well would become one that must be given.
    read.update(item.name for item in graph.input)
    # `extend` copies; what is in the graph must not be deleted before.
    whole = type(graph)()
    whole.node.extend(reversed(kept))
    whole.initializer.extend(item for name, item in constants.items() if name in read)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(whole.node)
    graph.initializer.extend(whole.initializer)


def _names(graph: onnx.GraphProto) -> Iterable[str]:
    """Return all names of tensors in a graph, those of its branches and bodies included."""
    for item in (*graph.input, *graph.output, *graph.initializer):
        yield item.name
    for node in graph.node:
        yield from (*node.input, *node.output)
        for inner in subgraphs(node):
            yield from _names(inner)
