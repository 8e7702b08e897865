"""Evidence in an ONNX graph of its detector family, for `detectors.recognition`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trt_yolov6.detectors.recognition import GraphFacts
from trt_yolov6.graph.index import GraphIndex
from trt_yolov6.graph.operators import UNDECODED_OPS, WEIGHTED_OPS
from trt_yolov6.spec import TensorSpec

if TYPE_CHECKING:
    import onnx


def facts_of(
    model: onnx.ModelProto, outputs: Sequence[TensorSpec], image_size: tuple[int, int] | None
) -> GraphFacts:
    """Return the evidence for recognition in an ONNX graph."""
    tail = _tail_operators(model)
    return GraphFacts(
        outputs=tuple(outputs),
        image_size=image_size,
        metadata={item.key: item.value for item in model.metadata_props},
        producer=f"{model.producer_name} {model.graph.name}",
        names=frozenset(
            [node.name for node in model.graph.node]
            + [item.name for item in model.graph.initializer]
        ),
        tail=tail,
        decoding=tail - UNDECODED_OPS,
    )


def _tail_operators(model: onnx.ModelProto) -> frozenset[str]:
    """Return the operators that values go through between the last layers and the outputs.

    What computes shapes, indices or bounds on the way does not count.
    """
    graph = GraphIndex(model)
    pending = list(graph.outputs)
    seen: set[str] = set()
    found: set[str] = set()
    while pending:
        name = pending.pop()
        node = graph.producer(name)
        if name in seen or node is None or node.op_type in (*WEIGHTED_OPS, "Constant"):
            continue
        seen.add(name)
        found.add(node.op_type)
        # The further inputs of a moving operator say where to, such as the shape of a Reshape.
        moves = node.op_type in UNDECODED_OPS and node.op_type != "Concat"
        pending.extend(node.input[:1] if moves else node.input)
    return frozenset(found)
