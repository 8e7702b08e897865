"""Make foreign Q/DQ graphs symmetric, as TensorRT computes INT8: signed codes, zero points of 0.

ONNX Runtime's quantizer writes unsigned activations by default. TensorRT would read them as INT8
and saturate every code above 127, so they are rewritten, or the graph is refused.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import add_initializers, drop_unread_initializers, set_nodes
from trt_yolov6.graph.index import GraphIndex, tensor_value
from trt_yolov6.graph.operators import QDQ_OPS
from trt_yolov6.graph.quantized import quantizer

_ADVICE = (
    "quantize it symmetrically to INT8 (ONNX Runtime: activation_type and weight_type "
    "QuantType.QInt8, extra_options={'ActivationSymmetric': True, 'WeightSymmetric': True}), or "
    "build the float graph with --int8"
)

_OPERATORS_OF_ORT = ("QLinear", "DynamicQuantize", "ConvInteger", "MatMulInteger")
"""Beginnings of the names of operators that compute on integers themselves."""

_NEVER_NEGATIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus"}


def check_symmetric(model: onnx.ModelProto, source: str | Path) -> None:
    """Refuse a quantized graph of which `with_symmetric_int8` cannot make one for TensorRT.

    Raises:
        UserError: it has zero points other than 0 (or 128 of unsigned levels), 16-bit levels,
            ranges that are not constants, or operators that compute on integers themselves.
    """
    foreign = next(
        (node.op_type for node in model.graph.node if node.op_type.startswith(_OPERATORS_OF_ORT)),
        None,
    )
    if foreign is not None:
        raise UserError(
            f"{source} computes with {foreign}, which TensorRT does not have; export it with Q/DQ "
            f"nodes (quant_format=QDQ), and {_ADVICE}."
        )
    graph = GraphIndex(model)
    for node in graph.nodes:
        if node.op_type not in QDQ_OPS:
            continue
        zero, name = _zero_point(graph, node), node.input[0]
        if zero is None or node.input[1] not in graph.constants:
            raise UserError(f"{source} computes the range of {name!r} at run time; {_ADVICE}.")
        if zero.dtype in (np.int16, np.uint16):
            raise UserError(
                f"{source} quantizes {name!r} to 16 bits, which TensorRT does not compute in; "
                f"{_ADVICE}."
            )
        if _shift(zero) is None:
            raise UserError(
                f"{source} is quantized with zero points other than 0 (that of {name!r} is "
                f"{int(zero.reshape(-1)[np.flatnonzero(zero)[0]])}), which TensorRT does not take; "
                f"{_ADVICE}."
            )


def with_symmetric_int8(
    model: onnx.ModelProto, source: str | Path
) -> tuple[onnx.ModelProto, str | None]:
    """Return a Q/DQ graph with unsigned levels rewritten as signed ones, and what was done.

    Unsigned levels around 128 become signed ones around 0, which changes no value. Those from 0 up,
    as ReLU leaves them, get twice the scale, which halves their resolution; as their quantization
    cut negative values off, a Relu does so now.

    Args:
        model: any graph; returned as it is, with None, where nothing is unsigned.
        source: its file, for messages.

    Raises:
        UserError: see `check_symmetric`.
    """
    check_symmetric(model, source)
    graph = GraphIndex(model)
    unsigned = {
        node.output[0]: zero
        for node in graph.nodes
        if node.op_type in QDQ_OPS
        and (zero := _zero_point(graph, node)) is not None
        and zero.dtype == np.uint8
    }
    if not unsigned:
        return model, None
    result = copy.deepcopy(model)
    added: dict[str, NDArray[Any]] = {}
    halved = 0
    nodes = []
    for node in result.graph.node:
        if node.output[0] not in unsigned:
            nodes.append(node)
            continue
        zero = unsigned[node.output[0]]
        shift = _shift(zero) or 0
        factor = 1 if shift else 2
        scale_name, zero_name = f"{node.input[1]}/x{factor}", f"{node.output[0]}/zero"
        scale = tensor_value(graph.constants[node.input[1]])
        added[scale_name] = (scale * factor).astype(scale.dtype)
        added[zero_name] = np.zeros(zero.shape, np.int8)
        name = node.input[0]
        if name in graph.constants and node.op_type == "DequantizeLinear":
            codes = (tensor_value(graph.constants[name]).astype(np.float64) - shift) / factor
            name = f"{name}/int8/{factor}"
            added[name] = np.clip(np.rint(codes), -128, 127).astype(np.int8)
        elif node.op_type == "QuantizeLinear" and factor == 2:
            halved += 1
            producer = graph.producer(name)
            if producer is None or producer.op_type not in _NEVER_NEGATIVE:
                nodes.append(helper.make_node("Relu", [name], [f"{node.output[0]}/from_0"]))
                name = f"{node.output[0]}/from_0"
        node.input[:] = [name, scale_name, zero_name]
        for given in [item for item in node.attribute if item.name == "output_dtype"]:
            node.attribute.remove(given)
        nodes.append(node)
    set_nodes(result.graph, nodes)
    drop_unread_initializers(result.graph)
    add_initializers(result.graph, added)
    # It holds types of tensors that were unsigned.
    del result.graph.value_info[:]
    onnx.checker.check_model(result)
    note = (
        f"unsigned levels rewritten as INT8: {halved} tensors from 0 up have half their resolution"
        if halved
        else "unsigned levels rewritten as INT8, which changes no value"
    )
    return result, note


def _zero_point(graph: GraphIndex, node: onnx.NodeProto) -> NDArray[np.integer[Any]] | None:
    """Return a Q/DQ node's zero point; None where it is not a constant."""
    if len(node.input) > 2 and node.input[2]:
        return graph.value(node.input[2])
    kind = quantizer(graph, node).type or onnx.TensorProto.INT8
    return np.zeros((), helper.tensor_dtype_to_np_dtype(kind))


def _shift(zero: NDArray[np.integer[Any]]) -> int | None:
    """Return the offset that centres levels on 0; None where there is none."""
    if zero.dtype == np.uint8 and (zero == 128).all():
        return 128
    return None if zero.astype(np.float32).any() else 0
