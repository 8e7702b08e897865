"""ONNX graphs without their weights, small enough to carry, and random weights to fill them again.

A skeleton is an ONNX model whose large weights have lost their values. It keeps each one's name,
shape and dtype and how its values were spread, in the tensor's `doc_string`; everything that a
graph computes boxes with (anchors, strides, shapes) stays. The checker refuses a skeleton;
`with_random_weights` makes a model of it again.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trt_yolov6.graph.reference import reference_session

SMALL = 1024
"""Bytes up to which a weight keeps its values."""

_MARK = "random "
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy without the values of weights above `SMALL` bytes.

    Args:
        model: a float32 graph whose weights are initializers.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    weights = weight_names(copy)
    for tensor in copy.graph.initializer:
        if tensor.name not in weights or tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.nbytes <= SMALL:
            continue
        spread = {
            "mean": float(values.mean()),
            "std": float(values.std()),
            "low": float(values.min()),
            "high": float(values.max()),
        }
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.doc_string = _MARK + json.dumps(spread)
    return copy


def with_random_weights(skeleton: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """Return a copy of a skeleton whose emptied weights are drawn again.

    Each is drawn from the normal distribution that its own values had, cut at their least and
    greatest value, so that variances stay positive. The same seed gives the same weights in graphs
    of several batch sizes, for they depend on the tensor's name only.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(skeleton)
    for tensor in copy.graph.initializer:
        if not tensor.doc_string.startswith(_MARK):
            continue
        spread = json.loads(tensor.doc_string[len(_MARK) :])
        values = _generator(seed, tensor.name).standard_normal(tuple(tensor.dims), np.float32)
        values = np.clip(values * spread["std"] + spread["mean"], spread["low"], spread["high"])
        tensor.raw_data = values.astype("<f4").tobytes()
        tensor.doc_string = ""
    return copy


def settled(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """Return a copy with random weights through which a signal neither vanishes nor explodes.

    Weights are drawn with He's scale (arXiv 1502.01852, equation 10). Then the graph runs once,
    node by node in ONNX Runtime, on a random image, and each linear layer's weight and bias are
    divided by the standard deviation of its output (layer-sequential unit variance, arXiv
    1511.06422). A batch normalization is left as it comes: by default it passes its input on.

    Args:
        model: a float32 graph with fixed shapes and without subgraphs.
        seed: of weights and image.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    values: dict[str, NDArray[Any]] = {
        name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()
    }
    for value in copy.graph.input:
        if value.name not in tensors:
            shape = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            # Side inputs are scale factors, by which boxes are divided.
            drawn = _generator(seed, value.name).random(shape, np.float32)
            values[value.name] = drawn if len(shape) == 4 else np.ones(shape, np.float32)
    left = Counter(name for node in copy.graph.node for name in node.input)
    left.update(value.name for value in copy.graph.output)
    changed: set[str] = set()
    for node in copy.graph.node:
        _draw(node, tensors, values, changed, seed)
        outputs = _run(node, values, copy.opset_import)
        fresh = [name for name in node.input[1:] if name in changed]
        if node.op_type in _LINEAR and fresh:
            deviation = float(outputs[0].std())
            if math.isfinite(deviation) and deviation > 0:
                for name in fresh:
                    values[name] = values[name] / np.float32(deviation)
                outputs = [outputs[0] / np.float32(deviation)]
        # Where layers share a weight, the first has set it.
        for name in fresh:
            tensors[name].CopyFrom(numpy_helper.from_array(values[name], name))
        changed.difference_update(fresh)
        values.update(zip((name for name in node.output if name), outputs, strict=True))
        for name in node.input:
            left[name] -= 1
            if not left[name] and name not in tensors:
                values.pop(name, None)
    return copy


def at_batch(one: onnx.ModelProto, two: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return a graph for `batch` images, from the same network's exports for one and for two.

    A tracing exporter writes the batch size into shapes all over a graph; the two exports differ
    exactly there, by a factor of two.

    Raises:
        ValueError: they differ in something else.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(one)
    del copy.graph.value_info[:]
    first, second = copy.graph, two.graph
    if [node.op_type for node in first.node] != [node.op_type for node in second.node]:
        raise ValueError("the exports for one and two images have other nodes; export each batch.")
    for value, other in zip(
        [*first.input, *first.output], [*second.input, *second.output], strict=True
    ):
        axes = value.type.tensor_type.shape.dim
        for axis, twice in zip(axes, other.type.tensor_type.shape.dim, strict=True):
            if axis.dim_value != twice.dim_value:
                axis.dim_value *= batch
    # By where they are read: exporters number some constants on from export to export.
    twins = dict(
        pair
        for node, twin in zip(first.node, second.node, strict=True)
        for pair in zip(node.input, twin.input, strict=True)
    )
    others = {tensor.name: tensor for tensor in second.initializer}
    for tensor in first.initializer:
        if tensor.name in twins:
            _scale(tensor, others[twins[tensor.name]], batch)
    for node, twin in zip(first.node, second.node, strict=True):
        for attribute, other in zip(node.attribute, twin.attribute, strict=True):
            if attribute.HasField("t"):
                _scale(attribute.t, other.t, batch)
            elif attribute != other:
                raise ValueError(f"{node.name} differs in {attribute.name}; export each batch.")
    return copy


def constants_as_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose Constant nodes are initializers, as weights must be here."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = []
    for node in copy.graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            tensor = copy.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    return copy


def weight_names(model: onnx.ModelProto) -> set[str]:
    """Return the names of all initializers that are a layer's weights."""
    names = {tensor.name for tensor in model.graph.initializer}
    return {
        name
        for node in model.graph.node
        if node.op_type in _WEIGHTED
        for name in node.input
        if name in names
    }


def parameters(model: onnx.ModelProto) -> int:
    """Return the number of weights in a model or skeleton, decoding constants left out."""
    weights = weight_names(model)
    return sum(math.prod(item.dims) for item in model.graph.initializer if item.name in weights)


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _draw(
    node: onnx.NodeProto,
    tensors: dict[str, TensorProto],
    values: dict[str, NDArray[Any]],
    changed: set[str],
    seed: int,
) -> None:
    """Draw a linear layer's large weights; a small bias is drawn along, to be scaled with them."""
    if node.op_type not in _LINEAR:
        return
    for place, name in enumerate(node.input):
        if name not in tensors or values[name].dtype != np.float32 or not place:
            continue
        if place == 1 and values[name].nbytes <= SMALL:
            return  # a fixed projection, such as the one from distances' bins to a distance
        shape = values[name].shape
        fan_in = shape[-2] if node.op_type in ("MatMul", "Gemm") else math.prod(shape[1:])
        scale = math.sqrt(2 / fan_in) if place == 1 else 0.1
        values[name] = _generator(seed, name).standard_normal(shape, np.float32) * np.float32(scale)
        changed.add(name)


def _run(node: onnx.NodeProto, values: dict[str, NDArray[Any]], opsets: Any) -> list[NDArray[Any]]:
    """Compute one node in ONNX Runtime."""
    names = list(dict.fromkeys(name for name in node.input if name))
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(values[name].dtype), values[name].shape
        )
        for name in names
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = helper.make_graph([node], "node", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = reference_session(model, threads=1, optimized=False)
    return list(session.run(None, {name: values[name] for name in names}))


def _scale(tensor: TensorProto, other: TensorProto, batch: int) -> None:
    """Scale what is twice as large in `other` by the batch size, in place."""
    if tensor == other or (tensor.data_type == TensorProto.FLOAT and tensor.dims == other.dims):
        return
    first, second = numpy_helper.to_array(tensor), numpy_helper.to_array(other)
    if first.shape == second.shape and np.array_equal(
        np.where(first != second, 2 * first, first), second
    ):
        values = np.where(first != second, batch * first, first)
    elif first.ndim and second.shape == (2 * first.shape[0], *first.shape[1:]):
        values = np.repeat(first, batch, axis=0)
    else:
        raise ValueError(f"the constant {tensor.name!r} depends on the batch; export each batch.")
    tensor.CopyFrom(numpy_helper.from_array(values.astype(first.dtype), tensor.name))
