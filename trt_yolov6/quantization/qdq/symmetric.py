"""Q/DQ graphs in the one form that TensorRT computes in INT8: signed levels, zero points of 0.

ONNX Runtime's quantizer writes unsigned activations by default. TensorRT would read them as INT8
and cut every level above 127 off, so they are rewritten, or the graph is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    import onnx

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
    constants = _constants(model)
    for node in _quantizers(model):
        zero = _zero_point(node, constants)
        name = node.input[0]
        if zero is None or node.input[1] not in constants:
            raise UserError(f"{source} computes the range of {name!r} as it runs; {_ADVICE}.")
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
    import onnx
    from onnx import helper, numpy_helper

    check_symmetric(model, source)
    constants = _constants(model)
    unsigned = [
        node
        for node in _quantizers(model)
        if (zero := _zero_point(node, constants)) is not None and zero.dtype == np.uint8
    ]
    if not unsigned:
        return model, None
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    added: dict[str, NDArray[Any]] = {}
    halved = 0
    nodes = []
    for node in graph.node:
        zero = _zero_point(node, constants) if node.op_type in _QUANTIZERS else None
        if zero is None or zero.dtype != np.uint8:
            nodes.append(node)
            continue
        shift = _shift(zero) or 0
        factor = 1 if shift else 2
        scale_name, zero_name = f"{node.input[1]}/x{factor}", f"{node.output[0]}/zero"
        scale = constants[node.input[1]]
        added[scale_name] = (scale * factor).astype(scale.dtype)
        added[zero_name] = np.zeros(zero.shape, np.int8)
        name = node.input[0]
        if name in constants and node.op_type == "DequantizeLinear":
            levels = (constants[name].astype(np.float64) - shift) / factor
            name = f"{name}/int8/{factor}"
            added[name] = np.clip(np.rint(levels), -128, 127).astype(np.int8)
        elif node.op_type == "QuantizeLinear" and factor == 2:
            halved += 1
            if makers.get(name) not in _NEVER_NEGATIVE:
                nodes.append(helper.make_node("Relu", [name], [f"{node.output[0]}/from_0"]))
                name = f"{node.output[0]}/from_0"
        node.input[:] = [name, scale_name, zero_name]
        for attribute in [item for item in node.attribute if item.name == "output_dtype"]:
            node.attribute.remove(attribute)
        nodes.append(node)
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    initializers = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in added.items())
    # The types that were noted of quantized tensors.
    del graph.value_info[:]
    onnx.checker.check_model(result)
    said = (
        f"unsigned levels rewritten as INT8: {halved} tensors from 0 up have half their resolution"
        if halved
        else "unsigned levels rewritten as INT8, which changes no value"
    )
    return result, said


_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def _quantizers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in _QUANTIZERS]


def _constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    from onnx import numpy_helper

    wanted = {name for node in _quantizers(model) for name in node.input}
    found = {
        item.name: numpy_helper.to_array(item)
        for item in model.graph.initializer
        if item.name in wanted
    }
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in wanted:
            for item in node.attribute:
                if item.name == "value":
                    found[node.output[0]] = numpy_helper.to_array(item.t)
    return found


def _zero_point(
    node: onnx.NodeProto, constants: dict[str, NDArray[Any]]
) -> NDArray[np.integer[Any]] | None:
    """Return a node's zero point; None where it is not a constant."""
    if len(node.input) > 2 and node.input[2]:
        return constants.get(node.input[2])
    if node.op_type == "QuantizeLinear":
        kind = next((item.i for item in node.attribute if item.name == "output_dtype"), 0)
        if kind:
            import onnx

            return np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(kind))
        return np.zeros((), np.uint8)  # what ONNX says of a node without one
    stored = constants.get(node.input[0])
    # Of what a QuantizeLinear made, that node tells.
    return np.zeros((), np.int8 if stored is None else stored.dtype)


def _shift(zero: NDArray[np.integer[Any]]) -> int | None:
    """Return what to take from levels to have them around 0; None where they cannot be."""
    if zero.dtype == np.uint8 and (zero == 128).all():
        return 128
    return None if zero.astype(np.float32).any() else 0
