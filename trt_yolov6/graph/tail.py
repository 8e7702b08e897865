"""The tail of a graph, after its last layers: decoding, and all that predictions go through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trt_yolov6.graph.index import GraphIndex
from trt_yolov6.graph.operators import CONVOLUTIONS, WEIGHTED_OPS

if TYPE_CHECKING:
    import onnx


def nodes_after_layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes that no convolution or matrix product comes after, in the graph's order."""
    graph = GraphIndex(model)
    ahead = graph.ancestors([n.output[0] for n in graph.nodes if n.op_type in WEIGHTED_OPS])
    return [node for node in graph.nodes if not ahead.intersection(node.output)]


def layers_after(graph: GraphIndex) -> dict[str, int]:
    """Return for each tensor the length of the longest chain of convolutions after it."""
    found: dict[str, int] = {}
    for node in reversed(graph.nodes):
        for name in node.output:
            found[name] = max(
                (
                    found[reader.output[0]] + (reader.op_type in CONVOLUTIONS)
                    for reader in graph.readers(name)
                ),
                default=0,
            )
    return found
