"""Foreign float graphs in the form that quantization works on: the same function, written plainly.

Paddle2ONNX keeps weights in Constant nodes and batch normalization as a node of its own; PyTorch's
exporters give weights as initializers, with the normalization inside the convolution before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


def with_folded_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Move float constants to the initializers, and batch normalization into convolutions.

    A convolution is left alone whose output something else reads as well, or whose weights others
    share.

    Args:
        model: a float graph; changed in place and returned.
    """
    _move_constants(model)
    _fold_batch_normalization(model)
    return model


def _move_constants(model: onnx.ModelProto) -> None:
    import onnx

    graph = model.graph
    outputs = {item.name for item in graph.output}
    kept = []
    for node in graph.node:
        value = next((item.t for item in node.attribute if item.name == "value"), None)
        is_weight = (
            node.op_type == "Constant"
            and value is not None
            and value.data_type == onnx.TensorProto.FLOAT
            and node.output[0] not in outputs
        )
        if not is_weight or value is None:
            kept.append(node)
            continue
        tensor = graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
    if len(kept) < len(graph.node):
        _replace_nodes(model, kept)


def _fold_batch_normalization(model: onnx.ModelProto) -> None:
    from onnx import numpy_helper

    graph = model.graph
    weights = {item.name: item for item in graph.initializer}
    readers: dict[str, int] = {}
    for name in [name for node in graph.node for name in node.input] + [
        item.name for item in graph.output
    ]:
        readers[name] = readers.get(name, 0) + 1
    producers = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    left: list[Any] = []
    for norm in graph.node:
        left.append(norm)
        conv = producers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if conv is None or len(norm.output) > 1 or readers[norm.input[0]] > 1:
            continue
        names = [*norm.input[1:], *conv.input[1:]]
        own = conv.input[1]
        if any(name not in weights for name in names) or readers[own] > 1:
            continue
        scale, shift, mean, variance = (
            numpy_helper.to_array(weights[name]).astype(np.float64) for name in norm.input[1:]
        )
        epsilon = next((item.f for item in norm.attribute if item.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        weight = numpy_helper.to_array(weights[own]).astype(np.float64)
        bias = np.zeros(len(factor))
        if len(conv.input) > 2:
            bias = numpy_helper.to_array(weights[conv.input[2]]).astype(np.float64)
        weights[own].CopyFrom(
            numpy_helper.from_array((weight.T * factor).T.astype(np.float32), own)
        )
        # The normalization's own shift is this convolution's alone; an earlier bias may be shared.
        tensor = graph.initializer.add()
        tensor.CopyFrom(
            numpy_helper.from_array(
                ((bias - mean) * factor + shift).astype(np.float32), f"{norm.output[0]}/bias"
            )
        )
        conv.input[:] = [*conv.input[:2], tensor.name]
        conv.output[0] = norm.output[0]
        left.pop()
    if len(left) < len(graph.node):
        _replace_nodes(model, left)
        used = {name for node in graph.node for name in node.input}
        used.update(item.name for item in graph.output)
        weights_left = [item for item in graph.initializer if item.name in used]
        del graph.initializer[:]
        graph.initializer.extend(weights_left)
        # What was noted of tensors that are gone.
        del graph.value_info[:]


def _replace_nodes(model: onnx.ModelProto, nodes: list[Any]) -> None:
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    # Before version 4 of the format an initializer had to be an input as well.
    model.ir_version = max(model.ir_version, 4)
