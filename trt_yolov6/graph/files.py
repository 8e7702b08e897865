"""Read ONNX files whole: with weights kept in other files, and nodes in topological order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import load_external_data_for_model, uses_external_data
from onnx.inliner import inline_local_functions

from trt_yolov6.common.files import read_bytes
from trt_yolov6.errors import UserError, first_line
from trt_yolov6.graph.editing import set_nodes
from trt_yolov6.graph.index import all_nodes, constants_of, names_read, subgraphs, type_name
from trt_yolov6.graph.reference import parsed_model
from trt_yolov6.spec import PrecisionName, TensorSpec

_MAX_BYTES = 2**31
"""A protobuf message of this size or more cannot be written."""


def read_onnx(path: str | Path) -> onnx.ModelProto:
    """Read and check an ONNX file.

    Weights kept in files of their own (`.onnx.data`) are read from the model's folder, so that the
    model returned is whole. Nodes that stand before those whose results they read are sorted, and
    functions of the file's own, which some exporters make of modules, are put in place.

    Raises:
        UserError: the file or one with its weights is missing, cut short or not an ONNX model.
    """
    from google.protobuf.message import DecodeError

    path = Path(path)
    content = read_bytes(path)
    try:
        model = onnx.load_from_string(content)
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        raise _not_whole(path, first_line(error)) from error
    has_changed = any([read_weights(model, path), sort_nodes(model)])
    try:
        # Of a model it would serialize a second time.
        onnx.checker.check_model(model if has_changed else content)
    except (onnx.checker.ValidationError, ValueError, UnicodeDecodeError) as error:
        raise _not_whole(path, first_line(error)) from error
    model = inlined(model, path)
    if not model.graph.node:
        raise UserError(f"{path} is not an ONNX model with any operator; export it again.")
    for tensor in _tensors(model.graph):  # which the checker does not look at
        if type_name(tensor.data_type) == "undefined" or not _has_its_bytes(tensor):
            raise _not_whole(
                path, f"{tensor.name!r} is of an unknown type or does not fit its shape"
            )
    return model


def read_weights(model: onnx.ModelProto, path: Path) -> bool:
    """Read the weights that a model keeps in other files into it; return whether it has such.

    Args:
        model: changed in place.
        path: of the model; its weights lie in the same folder.

    Raises:
        UserError: such a file is missing, elsewhere or too short, or the whole is over 2 GiB.
    """
    places = sorted(set(_external_files(model)))
    if not places:
        return False
    try:
        load_external_data_for_model(model, str(path.absolute().parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        listed = ", ".join(places)
        reason = first_line(error).rpartition(", but ")[2].rstrip(".")
        raise UserError(
            f"{path} keeps weights in {listed}, which cannot be read from its folder ({reason}); "
            "copy the files together, or export with the weights inside."
        ) from error
    for tensor in _tensors(model.graph):
        if not _has_its_bytes(tensor):
            raise UserError(
                f"{path} keeps the weights of {tensor.name!r} in {', '.join(places)}, which is cut "
                "short or another model's; copy it again."
            )
    if model.ByteSize() >= _MAX_BYTES:
        raise UserError(
            f"{path} has over 2 GiB of weights, more than an ONNX file can hold; a smaller "
            "detector is needed."
        )
    return True


def inlined(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Return a model with the nodes of its own functions in place; itself where it has none.

    Functions with operators that are others in the model's opset stay.

    Raises:
        UserError: a function calls itself, or is called with other inputs than it has.
    """
    if not model.functions:
        return model
    _unify_opsets(model)
    try:
        return inline_local_functions(model)
    except (onnx.checker.ValidationError, RuntimeError) as error:
        raise _not_whole(path, first_line(error)) from error


def _unify_opsets(model: onnx.ModelProto) -> None:
    """Give functions the opset of the model where their operators are the same in both.

    ONNX inlines no others, and its own conversion fails on untyped functions (1.23).
    """
    versions = {opset.domain: opset.version for opset in model.opset_import}
    for function in model.functions:
        for opset in function.opset_import:
            both = opset.version, versions.get(opset.domain, opset.version)
            operators = {n.op_type for n in all_nodes(function) if n.domain == opset.domain}
            if all(_since(one, both[0], opset) == _since(one, both[1], opset) for one in operators):
                opset.version = both[1]


def _since(operator: str, version: int, opset: onnx.OperatorSetIdProto) -> int | None:
    """Return the opset in which an operator became what it is in a version; None if unknown."""
    known = operator, version, opset.domain
    return onnx.defs.get_schema(*known).since_version if onnx.defs.has(*known) else None


def sort_nodes(model: onnx.ModelProto) -> bool:
    """Put nodes after those whose results they read; return whether any had to be moved.

    Half-precision exports of some tools append the casts at the end. The order is kept where it
    can be run. A graph with a cycle is left as it is, for the checker to refuse. Only the main
    graph is changed, in place, as no exporter unsorts others.
    """
    nodes = list(model.graph.node)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    needs = {
        index: {makers[name] for name in names_read(node) if name in makers} - {index}
        for index, node in enumerate(nodes)
    }
    if all(maker < index for index, made in needs.items() for maker in made):
        return False
    try:
        order = tuple(TopologicalSorter(needs).static_order())
    except CycleError:
        return False
    set_nodes(model.graph, [nodes[index] for index in order])
    return True


def value_spec(value: onnx.ValueInfoProto, path: str | Path) -> TensorSpec:
    """Return name, shape and dtype of a graph's input or output; an axis left free is None.

    Raises:
        UserError: it is not a tensor, or of a type that ONNX does not know.
    """
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or type_name(tensor.elem_type) == "undefined":
        raise UserError(
            f"{path} has {value.name!r}, which is not a tensor of a known type; a detector is "
            "needed."
        )
    # Some exporters write a free axis as -1 or 0.
    shape = tuple(d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim)
    return TensorSpec(
        value.name, shape, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    )


def graph_precision(model: onnx.ModelProto) -> PrecisionName:
    """Return the precision a graph is in, by its Q/DQ nodes and its weights."""
    operators = {node.op_type for node in model.graph.node}
    if any(op.startswith("DynamicQuantize") for op in operators):
        return "int8-dynamic"
    names = {type_name(item.data_type) for item in constants_of(model).values()}
    if any(op == "QuantizeLinear" or op.startswith("QLinear") for op in operators):
        # Nothing but Q/DQ nodes reads constants of such a type.
        return "fp8" if any(name.startswith("float8") for name in names) else "int8"
    return "fp16" if "float16" in names else "fp32"


def _external_files(model: onnx.ModelProto) -> Iterator[str]:
    for tensor in _tensors(model.graph):
        if uses_external_data(tensor):
            yield next((item.value for item in tensor.external_data if item.key == "location"), "?")


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from (item.t for item in node.attribute if item.HasField("t"))
        for body in subgraphs(node):
            yield from _tensors(body)


def _has_its_bytes(tensor: onnx.TensorProto) -> bool:
    """Return whether a tensor has as many raw bytes as its shape asks for, where it has any."""
    # Not of types that NumPy lacks: values of some share a byte, others are float32 to onnx 1.17.
    others = ("float4", "float6", "float8", "bfloat", "int4", "uint4", "int2", "uint2")
    kind = type_name(tensor.data_type)
    if not tensor.HasField("raw_data") or kind.startswith((*others, "string", "undefined")):
        return True
    width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return len(tensor.raw_data) == int(width * math.prod(tensor.dims))


def _not_whole(path: Path, reason: str) -> UserError:
    if path.suffix != ".onnx":
        return UserError(
            f"{path} is not an ONNX model ({reason}); give an ONNX file (.onnx) or a YOLOv6 "
            "checkpoint (.pt)."
        )
    return UserError(f"{path} is not a whole ONNX model ({reason}); export or copy it again.")


def has_other_files(path: Path) -> bool:
    """Return whether an ONNX file keeps weights in other files; False for any other file."""
    try:
        model = parsed_model(path.read_bytes())
    except OSError:
        return False
    return model is not None and any(True for _ in _external_files(model))
