"""Normalize foreign float graphs: constants become initializers, batch normalization is folded.

Paddle2ONNX keeps weights in Constant nodes and batch normalization as a node of its own; PyTorch's
exporters give weights as initializers, with the normalization inside the convolution before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx

from trt_yolov6.graph.editing import (
    add_initializers,
    drop_unread_initializers,
    replace_tensor,
    set_nodes,
)
from trt_yolov6.graph.index import GraphIndex, attribute, names_read, tensor_value


def with_folded_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Move float constants to the initializers, and batch normalization into convolutions.

    A convolution is left alone whose output something else reads as well, or whose weights others
    share. The float graph is changed in place and returned.
    """
    _move_constants(model)
    _fold_batch_normalization(model)
    return model


def _move_constants(model: onnx.ModelProto) -> None:
    graph = GraphIndex(model)
    moved = {
        name
        for name, value in graph.constants.items()
        if graph.producer(name) is not None
        and value.data_type == value.FLOAT
        and name not in graph.outputs
    }
    if not moved:
        return
    for name in moved:
        graph.constants[name].name = name
    model.graph.initializer.extend(graph.constants[name] for name in graph.order if name in moved)
    _set_nodes(model, [node for node in graph.nodes if not moved.intersection(node.output)])


def _fold_batch_normalization(model: onnx.ModelProto) -> None:
    graph = model.graph
    weights = {item.name: item for item in graph.initializer}
    readers = Counter(name for node in graph.node for name in names_read(node))
    readers.update(item.name for item in graph.output)
    producers = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    left: list[onnx.NodeProto] = []
    for norm in graph.node:
        left.append(norm)
        conv = producers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if conv is None or readers[norm.input[0]] > 1:
            continue
        if len(norm.output) > 1 or attribute(norm, "training_mode", 0):
            continue  # by the batch's own mean and variance
        names = [*norm.input[1:], *conv.input[1:]]
        own = conv.input[1]
        if any(name not in weights for name in names) or readers[own] > 1:
            continue
        scale, shift, mean, variance = (
            tensor_value(weights[name]).astype(np.float64) for name in norm.input[1:]
        )
        factor = scale / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
        weight = tensor_value(weights[own]).astype(np.float64)
        bias = np.zeros(len(factor))
        if len(conv.input) > 2:
            bias = tensor_value(weights[conv.input[2]]).astype(np.float64)
        replace_tensor(weights[own], (weight.T * factor).T.astype(np.float32))
        # The normalization's own shift is this convolution's alone; an earlier bias may be shared.
        name = f"{norm.output[0]}/bias"
        add_initializers(graph, {name: ((bias - mean) * factor + shift).astype(np.float32)})
        conv.input[:] = [*conv.input[:2], name]
        conv.output[0] = norm.output[0]
        left.pop()
    if len(left) < len(graph.node):
        _set_nodes(model, left)
        drop_unread_initializers(graph)
        # Shapes noted of tensors that are gone.
        del graph.value_info[:]


def _set_nodes(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    set_nodes(model.graph, nodes)
    # Before version 4 of the format an initializer had to be an input as well.
    model.ir_version = max(model.ir_version, 4)
