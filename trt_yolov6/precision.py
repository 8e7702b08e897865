"""Half precision, decided in the ONNX graph, so that every backend computes the same."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs


def to_fp16(model: onnx.ModelProto, keep_float32: Collection[str] = ()) -> onnx.ModelProto:
    """Return a graph that computes in float16; its inputs and outputs keep their types.

    Args:
        model: a float32 graph with named nodes.
        keep_float32: names of nodes that go on computing in float32.
    """
    import onnx_graphsurgeon as gs
    from onnxruntime.transformers.float16 import convert_float_to_float16

    # Suppression and its index arithmetic have no half-precision kernels to speak of.
    blocked = ["NonMaxSuppression", "TopK", "Resize"]
    converted = convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=blocked,
        node_block_list=list(keep_float32),
    )
    graph = gs.import_onnx(converted)
    _remove_bounces(graph)
    # The converter puts its casts at the end of the node list.
    sorted_model: onnx.ModelProto = gs.export_onnx(graph.cleanup().toposort())
    return sorted_model


def _remove_bounces(graph: gs.Graph) -> None:
    """Join what the converter casts to float16 and straight back.

    It casts around every float32 node on its own, so between two of them a tensor would be rounded.
    """
    for back in [node for node in graph.nodes if _is_cast(node, np.float32)]:
        down = back.inputs[0].inputs[0] if back.inputs[0].inputs else None
        if down is None or not _is_cast(down, np.float16):
            continue
        exact, result = down.inputs[0], back.outputs[0]
        if result in graph.outputs:
            producer = exact.inputs[0]
            producer.outputs = [result if item is exact else item for item in producer.outputs]
            exact, result = result, exact
        for user in list(result.outputs):
            if user is not back:
                user.inputs = [exact if item is result else item for item in user.inputs]
        back.outputs.clear()


def _is_cast(node: gs.Node, dtype: type[np.generic]) -> bool:
    import onnx

    wanted = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return bool(node.op == "Cast" and node.attrs["to"] in (wanted, dtype))


def tail_nodes(model: onnx.ModelProto) -> set[str]:
    """Return the nodes behind the last convolutions: those that no convolution comes after.

    In a detector these decode boxes. Pixel coordinates above 512 are multiples of 0.5 in float16,
    so a graph of unknown make keeps its tail in float32.
    """
    heavy = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
    producers = {name: node for node in model.graph.node for name in node.output}
    ahead: set[str] = set()
    pending = [node for node in model.graph.node if node.op_type in heavy]
    while pending:
        node = pending.pop()
        if node.output[0] in ahead:
            continue
        ahead.add(node.output[0])
        pending.extend(producers[name] for name in node.input if name in producers)
    return {node.name for node in model.graph.node if node.output[0] not in ahead}
