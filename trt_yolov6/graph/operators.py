"""ONNX operators by what they do, and the names of the layers that have weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


LAYER_OPS = ("Conv", "ConvTranspose")
"""Operators with weights that are quantized."""


# Operators whose output holds values of their first input, or, for linear interpolation, values
# between them: the output's range lies within the input's.
MOVING_OPS = {
    "DepthToSpace",
    "Flatten",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the branches of an `If` and the body of a loop, which may read any tensor by name."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def layer_names(model: onnx.ModelProto) -> dict[str, str]:
    """Return the names of a graph's convolutions by their output tensor, in the graph's order.

    A layer is called as its node; where that has no name, or another layer has the same, as its
    output.
    """
    layers = [node for node in model.graph.node if node.op_type in LAYER_OPS]
    counts: dict[str, int] = {}
    for node in layers:
        counts[node.name] = counts.get(node.name, 0) + 1
    return {
        node.output[0]: node.name if node.name and counts[node.name] == 1 else node.output[0]
        for node in layers
    }
