"""Half precision, decided in the ONNX graph, so that every backend computes the same."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import onnx

from trt_yolov6.graph.editing import bypass, copy_notes
from trt_yolov6.graph.index import GraphIndex, nodes_after_layers
from trt_yolov6.graph.operators import FREE_OPS

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


def to_fp16(model: onnx.ModelProto, keep_float32: Collection[str] = ()) -> onnx.ModelProto:
    """Return a graph that computes in float16; its inputs and outputs keep their types.

    The exception is `scores` computed in float16: they leave the graph as float16, since float32
    would hold the same numbers in twice the bytes, and they are nearly all that leaves it.

    Args:
        model: a float32 graph with named nodes.
        keep_float32: names of nodes that keep computing in float32.
    """
    import onnx_graphsurgeon as gs
    from onnx_graphsurgeon.logger import G_LOGGER
    from onnxruntime.transformers.float16 import convert_float_to_float16

    # Suppression and its index arithmetic have no half-precision kernels to speak of.
    blocked = ["NonMaxSuppression", "TopK", "Resize"]
    kept = set(keep_float32)
    float32 = {name for node in model.graph.node if node.name in kept for name in node.output}
    outputs = [item.name for item in model.graph.output]
    half = {"scores"} - float32 if outputs == ["boxes", "scores"] else set()
    converted = convert_float_to_float16(
        model,
        keep_io_types=[
            *(item.name for item in model.graph.input),
            *(name for name in outputs if name not in half),
        ],
        op_block_list=blocked,
        node_block_list=list(kept),
    )
    with G_LOGGER.suppress(G_LOGGER.ERROR):  # it prints that NumPy has no FP8
        graph = gs.import_onnx(converted)
    _remove_bounces(graph)
    # The converter puts its casts at the end of the node list.
    sorted_model: onnx.ModelProto = gs.export_onnx(graph.cleanup().toposort())
    copy_notes(model, sorted_model)
    return sorted_model


def _remove_bounces(graph: gs.Graph) -> None:
    """Remove casts to float16 and straight back.

    The converter casts around each float32 node by itself, so a tensor between two of them would be
    rounded.
    """
    for back in [node for node in graph.nodes if _is_cast(node, np.float32)]:
        down = back.inputs[0].inputs[0] if back.inputs[0].inputs else None
        if down is not None and _is_cast(down, np.float16):
            bypass(graph, down.inputs[0], back.outputs[0])


def _is_cast(node: gs.Node, dtype: type[np.generic]) -> bool:
    onnx_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return bool(node.op == "Cast" and node.attrs["to"] in (onnx_type, dtype))


def tail_nodes(model: onnx.ModelProto) -> set[str]:
    """Return the names of the nodes after the last convolutions that compute in float32.

    In a detector these decode boxes. Pixel coordinates above 512 are multiples of 0.5 in float16,
    so a graph keeps its tail in float32. In a graph with `boxes` and `scores` as separate outputs,
    only what leads to the boxes counts.
    """
    tail = nodes_after_layers(model)
    if [item.name for item in model.graph.output] == ["boxes", "scores"]:
        before_boxes = GraphIndex(model).ancestors(["boxes"])
        tail = [node for node in tail if before_boxes.intersection(node.output)]
    # Moving half-precision values needs no other precision; computing with them does.
    float32: set[str] = set()
    names = set()
    for node in tail:
        if node.op_type not in FREE_OPS or float32.intersection(node.input):
            float32.update(node.output)
            names.add(node.name)
    return names
