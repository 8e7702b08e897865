"""The outputs of a graph: what leads to them, and which are not a detector's and are dropped."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import onnx

from trt_yolov6.detectors.recognition import GraphFacts, is_detector
from trt_yolov6.graph.editing import drop_unread_initializers, set_nodes
from trt_yolov6.graph.files import value_spec
from trt_yolov6.graph.index import GraphIndex, inferred
from trt_yolov6.graph.inputs import input_size
from trt_yolov6.graph.operators import UNDECODED_OPS, WEIGHTED_OPS
from trt_yolov6.spec import TensorSpec

_MOST_OUTPUTS = 8
"""Graphs with more outputs are not searched for those of a detector."""


def drop_other_outputs(
    model: onnx.ModelProto, path: str | Path, decoder: str | None
) -> tuple[str, ...]:
    """Drop outputs that are not a detector's, and the nodes that only they needed.

    The largest set of outputs with a known layout is kept, the first one of several; sets whose
    shapes fit the input's size take precedence.

    Args:
        model: changed in place; outputs also get the lengths that follow from the input's.
        path: of the model, for messages.
        decoder: the family whose layouts are looked for; None for all.

    Returns:
        The names of those dropped; none where no part of the outputs is a detector's either.
    """
    _fill_in_output_shapes(model)
    names = tuple(item.name for item in model.graph.output)
    size = input_size(model, path)

    def fits(names: tuple[str, ...], only_known_anchors: bool) -> bool:
        chosen = [item for item in model.graph.output if item.name in names]
        if not all(item.type.HasField("tensor_type") for item in chosen):
            return False
        facts = facts_of(model, [value_spec(item, path) for item in chosen], size)
        return is_detector(facts, decoder, only_known_anchors=only_known_anchors)

    if not 1 < len(names) <= _MOST_OUTPUTS or fits(names, False):
        return ()
    counts = range(len(names) - 1, 0, -1)
    subsets = [some for count in counts for some in itertools.combinations(names, count)]
    choices = itertools.product((True, False), subsets)
    kept = next((some for is_known, some in choices if fits(some, is_known)), None)
    if kept is None:
        return ()
    dropped = tuple(name for name in names if name not in kept)
    for item in [item for item in model.graph.output if item.name in dropped]:
        model.graph.output.remove(item)
    needed = GraphIndex(model).ancestors(kept)
    set_nodes(model.graph, [node for node in model.graph.node if needed.intersection(node.output)])
    drop_unread_initializers(model.graph)
    return dropped


def _fill_in_output_shapes(model: onnx.ModelProto) -> None:
    """Give outputs the lengths that follow from the input's, where the file leaves them free."""
    own = _output_tensors(model)
    if all(axis.dim_value > 0 for tensor in own for axis in tensor.shape.dim[1:]):
        return
    bare = copy.deepcopy(model)
    # What the exporter noted of a free size would stand in the way.
    del bare.graph.value_info[:]
    for tensor in _output_tensors(bare):
        tensor.ClearField("shape")
    sized = inferred(bare)
    if sized is None:
        return
    for tensor, known in zip(own, _output_tensors(sized), strict=True):
        if not tensor.shape.dim:
            tensor.shape.CopyFrom(known.shape)
        for axis, found in zip(tensor.shape.dim, known.shape.dim, strict=False):
            if axis.dim_value <= 0 < found.dim_value:  # see `value_spec`
                axis.dim_value = found.dim_value


def _output_tensors(model: onnx.ModelProto) -> list[onnx.TypeProto.Tensor]:
    types = [output.type for output in model.graph.output]
    return [kind.tensor_type for kind in types if kind.HasField("tensor_type")]


def dropped_text(names: Sequence[str]) -> str:
    """Say which outputs are not a detector's."""
    return f"dropped the output{'s' * (len(names) > 1)} {', '.join(names)}: not a detector's"


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
