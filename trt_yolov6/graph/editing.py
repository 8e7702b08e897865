"""Small changes of ONNX graphs: copies at another opset, other nodes, further outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from trt_yolov6.graph.index import constants_of, names_read, tensor_value

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


def at_opset(model: onnx.ModelProto, least: int) -> onnx.ModelProto:
    """Return a copy of a model, converted where its opset is lower than `least`."""
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    if opset < least:
        return onnx.version_converter.convert_version(model, least)
    return copy.deepcopy(model)


def copy_notes(source: onnx.ModelProto, target: onnx.ModelProto) -> None:
    """Copy a model's metadata, such as class names, and its producer to another.

    ONNX's and GraphSurgeon's conversions drop both, by which families are recognized.
    """
    del target.metadata_props[:]
    target.metadata_props.extend(source.metadata_props)
    target.producer_name, target.producer_version = source.producer_name, source.producer_version


def bypass(graph: gs.Graph, source: gs.Tensor, result: gs.Tensor) -> None:
    """Have the readers of `result` read `source`; an output of the graph keeps its name."""
    if result in graph.outputs:
        (producer,) = source.inputs
        result.inputs.clear()
        producer.outputs = [result if item is source else item for item in producer.outputs]
        source, result = result, source
    for node in list(result.outputs):
        node.inputs = [source if item is result else item for item in node.inputs]
    result.inputs.clear()


def set_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Replace a graph's nodes, some of which may be the graph's own."""
    # `del` frees the graph's own nodes, so all are copied first.
    kept = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def set_initializers(graph: onnx.GraphProto, tensors: Iterable[onnx.TensorProto]) -> None:
    """Replace a graph's initializers, some of which may be the graph's own."""
    kept = [copy.deepcopy(tensor) for tensor in tensors]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def drop_unread_initializers(graph: onnx.GraphProto) -> None:
    """Remove the initializers that nothing reads."""
    read = {name for node in graph.node for name in names_read(node)}
    read.update(item.name for item in graph.output)
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]


def add_initializers(graph: onnx.GraphProto, values: Mapping[str, NDArray[Any]]) -> None:
    """Append arrays as initializers, by name."""
    graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        for name, value in values.items()
    )


def replace_tensor(tensor: onnx.TensorProto, value: NDArray[Any]) -> None:
    """Give a stored tensor another value, in place; its name stays."""
    array = np.ascontiguousarray(value).reshape(np.shape(value))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def add_to_bias(
    model: onnx.ModelProto,
    position: int,
    change: NDArray[Any],
    *,
    own: str,
    dtype: np.dtype[Any] | type[np.floating] = np.float32,
) -> None:
    """Add to a convolution's bias in place.

    Args:
        model: it is changed.
        position: the convolution's index among the graph's nodes.
        change: (output channels,)
        own: name of a new bias, where it has none or shares it with other nodes.
        dtype: type of a new bias where it has none.

    Raises:
        ValueError: the bias is computed.
    """
    node, constants = model.graph.node[position], constants_of(model)
    name = node.input[2] if len(node.input) > 2 else ""
    if name and name not in constants:
        raise ValueError(f"the bias {name!r} is computed")
    before = tensor_value(constants[name]) if name else np.zeros(len(change), dtype)
    after = (before.astype(np.float64) + change).astype(before.dtype)
    is_shared = sum(name in item.input for item in model.graph.node) > 1
    if name and not is_shared:
        replace_tensor(constants[name], after)
        return
    add_initializers(model.graph, {own: after})
    del node.input[2:]
    node.input.append(own)


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return a copy of a model that has further tensors as outputs, for ONNX Runtime."""
    result = copy.deepcopy(model)
    present = {item.name for item in (*model.graph.input, *model.graph.output)}
    result.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in present
    )
    return result
