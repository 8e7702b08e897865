"""Inspect an ONNX graph: tensors, operators, layers, stored values and FLOPs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx

from trt_yolov6.graph.cost import Layer, SizedGraph, layers_of
from trt_yolov6.graph.index import all_nodes, type_name
from trt_yolov6.graph.operators import WEIGHTED_OPS

# Which of an operator's inputs are learned.
_LEARNED_INPUTS = {
    **dict.fromkeys(WEIGHTED_OPS, (1, 2)),
    "BatchNormalization": (1, 2),
    "PRelu": (1,),
}


@dataclass(frozen=True)
class TensorInfo:
    """An input or output: a free axis has its name, or `?`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Storage:
    """The stored constants of one dtype."""

    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class OnnxDetails:
    """Content of an ONNX graph."""

    opsets: dict[str, int]
    """Version by domain; the standard domain is `ai.onnx`."""
    ir_version: int
    producer: str
    """The exporter, as the graph names it; empty where it does not."""
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    operators: dict[str, int]
    """Nodes by operator, the most frequent first; those of subgraphs included."""
    parameters: int
    """Learned values: weights and biases of layers, scales and shifts of normalizations."""
    storage: dict[str, Storage]
    """The stored constants by dtype."""
    quantize_nodes: int
    dequantize_nodes: int
    precisions: dict[str, int]
    """Number of layers by the precision that they compute in."""
    layers: tuple[Layer, ...] = field(repr=False)
    flops: int | None
    """FLOPs of all layers for one image; None where the graph leaves the image size open."""
    paper_flops: int | None


def inspect_onnx(model: onnx.ModelProto) -> OnnxDetails:
    """Inspect an ONNX graph."""
    graph = SizedGraph(model)
    operators = Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        for node in all_nodes(model.graph)
    )
    layers = layers_of(graph)
    learned = {
        stored.name: math.prod(stored.dims)
        for node in graph.nodes
        for index in _LEARNED_INPUTS.get(node.op_type, ())
        if index < len(node.input)
        and (stored := graph.stored_before(node.input[index])) is not None
    }
    return OnnxDetails(
        opsets={item.domain or "ai.onnx": item.version for item in model.opset_import},
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=tuple(
            _tensor_info(item) for item in model.graph.input if item.name not in graph.constants
        ),
        outputs=tuple(_tensor_info(item) for item in model.graph.output),
        operators=dict(operators.most_common()),
        parameters=sum(learned.values()),
        storage=_storage(graph.constants.values()),
        quantize_nodes=operators["QuantizeLinear"],
        dequantize_nodes=operators["DequantizeLinear"],
        precisions=dict(Counter(layer.precision for layer in layers).most_common()),
        layers=layers,
        flops=_sum_or_none(layer.flops for layer in layers),
        paper_flops=_sum_or_none(layer.paper_flops for layer in layers),
    )


def _sum_or_none(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _storage(constants: Iterable[onnx.TensorProto]) -> dict[str, Storage]:
    found: dict[str, Storage] = {}
    for constant in constants:
        dtype = _dtype_name(constant.data_type)
        elements = math.prod(constant.dims)
        try:
            width = onnx.helper.tensor_dtype_to_np_dtype(constant.data_type).itemsize
        except (KeyError, TypeError, ValueError):
            width = 0
        old = found.get(dtype, Storage(0, 0, 0))
        found[dtype] = Storage(
            old.tensors + 1, old.elements + elements, old.bytes + elements * width
        )
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    return TensorInfo(
        value.name,
        _dtype_name(tensor.elem_type),
        tuple(
            axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?"
            for axis in tensor.shape.dim
        ),
    )


def _dtype_name(elem_type: int) -> str:
    name = type_name(elem_type)
    return {"float": "float32", "double": "float64"}.get(name, name)
