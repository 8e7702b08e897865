"""Look-ups in an ONNX graph: producers, readers, constants, attributes, shapes, subgraphs, tail.

They read the protobuf messages directly: onnx_ir converts a model into its own objects and back,
which rewrites every byte and takes longer than most of these look-ups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trt_yolov6.graph.operators import CONVOLUTIONS, WEIGHTED_OPS


class GraphIndex:
    """A graph's nodes and constants by the tensors they produce and read.

    It is made once and does not follow later changes of the graph. Only the main graph's nodes are
    indexed; `names_read` finds what branches and loop bodies read.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.nodes = list(graph.node)
        """Nodes in the graph's order, which is topological in a valid graph."""
        self.outputs = frozenset(item.name for item in graph.output)
        """Names of the graph's outputs."""
        self.constants = constants_of(model)
        """Initializers and the values of Constant nodes, by name."""
        self._inputs = [item.name for item in graph.input]
        self._producers = {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def _readers(self) -> dict[str, list[onnx.NodeProto]]:
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                readers.setdefault(name, []).append(node)
        return readers

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The names of the graph's inputs and of all that its nodes produce, in its order."""
        return (*self._inputs, *(name for node in self.nodes for name in node.output if name))

    @cached_property
    def layers_after(self) -> dict[str, int]:
        """For each tensor, the length of the longest chain of convolutions after it."""
        found: dict[str, int] = {}
        for node in reversed(self.nodes):
            for name in node.output:
                found[name] = max(
                    (
                        found[reader.output[0]] + (reader.op_type in CONVOLUTIONS)
                        for reader in self.readers(name)
                    ),
                    default=0,
                )
        return found

    def producer(self, name: str) -> onnx.NodeProto | None:
        """Return the node that produces a tensor; None for an input or an initializer."""
        return self._producers.get(name)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """Return the nodes that read a tensor, each once, in the graph's order."""
        return self._readers.get(name, [])

    def value(self, name: str) -> NDArray[Any] | None:
        """Return a constant's value; None for a tensor that is computed or given."""
        tensor = self.constants.get(name)
        return None if tensor is None else tensor_value(tensor)

    def scaled(self, node: onnx.NodeProto) -> tuple[str, float] | None:
        """Return the tensor that a node multiplies by one number, and the number; else None."""
        if node.op_type == "Mul":
            for source, name in (node.input, reversed(node.input)):
                factor = self.value(name)
                if factor is not None and factor.size == 1:
                    return str(source), factor.item()
        return None

    def gated(self, node: onnx.NodeProto) -> tuple[str, onnx.NodeProto] | None:
        """Return the tensor that a node multiplies by a function of it, and the function's node.

        In SiLU that is a Sigmoid. None for other nodes.
        """
        if node.op_type == "Mul":
            for source, name in (node.input, reversed(node.input)):
                gate = self.producer(name)
                if gate is not None and gate.input and gate.input[0] == source:
                    return str(source), gate
        return None

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """Return the names of all computed tensors that some tensors depend on, these included."""
        found: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            node = self.producer(name)
            if node is not None and name not in found:
                found.add(name)
                pending.extend(names_read(node))
        return found


def nodes_after_layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes that no convolution or matrix product follows, in the graph's order."""
    graph = GraphIndex(model)
    ahead = graph.ancestors([n.output[0] for n in graph.nodes if n.op_type in WEIGHTED_OPS])
    return [node for node in graph.nodes if not ahead.intersection(node.output)]


def tensor_value(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Return a stored tensor as an array."""
    return np.asarray(numpy_helper.to_array(tensor))


def constants_of(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Return a graph's constants by name: initializers and the values of Constant nodes."""
    found = {item.name: item for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            found.update(
                (node.output[0], item.t) for item in node.attribute if item.name == "value"
            )
    return found


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name: numbers, text, lists, `TensorProto`, `GraphProto`."""
    found = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value
        for name, value in found.items()
    }


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return one attribute of a node, or `default` where the node does not have it."""
    return attributes(node).get(name, default)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the branches of an `If` and the body of a loop, which may read any tensor by name."""
    for item in node.attribute:
        yield from item.graphs
        if item.HasField("g"):
            yield item.g


def all_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph or function and of its branches and loop bodies."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names of the tensors that a node reads, in its branches and loop bodies as well."""
    yield from (name for name in node.input if name)
    for body in subgraphs(node):
        yield from (item.name for item in body.output)
        for inner in body.node:
            yield from names_read(inner)


def inferred(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return a copy of a model with all shapes and types that ONNX infers; None where it fails."""
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # its error classes share no public base
        return None


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Return the shapes that a model states or stores, by tensor; None for a free axis."""
    found = {
        item.name: tuple(
            axis.dim_value if axis.HasField("dim_value") else None
            for axis in item.type.tensor_type.shape.dim
        )
        for item in _stated(model)
        if item.type.tensor_type.HasField("shape")
    }
    return found | {name: tuple(item.dims) for name, item in constants_of(model).items()}


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Return the ONNX element types that a model states or stores, by tensor."""
    found = {item.name: item.type.tensor_type.elem_type for item in _stated(model)}
    return found | {name: item.data_type for name, item in constants_of(model).items()}


def type_name(elem_type: int) -> str:
    """Return ONNX's name of an element type, in lower case: `float`, `int8`, `float8e4m3fn`."""
    known = onnx.TensorProto.DataType.values()
    name: str = onnx.TensorProto.DataType.Name(elem_type if elem_type in known else 0)
    return name.lower()


def _stated(model: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    yield from (*model.graph.input, *model.graph.value_info, *model.graph.output)
