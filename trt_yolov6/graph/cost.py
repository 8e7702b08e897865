"""Cost of each layer of an ONNX graph: multiply-adds, and elements read and written."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from trt_yolov6.graph.index import (
    GraphIndex,
    attribute,
    attributes,
    inferred,
    shapes_of,
    type_name,
    types_of,
)
from trt_yolov6.graph.operators import CONVOLUTIONS, QDQ_OPS, WEIGHTED_OPS
from trt_yolov6.graph.quantized import quantized_type

Shape = Sequence["int | None"]

_SHORT_DTYPES = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "double": "fp64",
    "int8": "int8",
    "uint8": "int8",
    "undefined": "unknown",
}
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "fp8": 1}

_TRANSPARENT_OPS = (*QDQ_OPS, "Cast", "Identity")


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with its weights."""

    name: str
    operator: str
    weight_shape: tuple[int, ...]
    """Shape of the weights in ONNX's order, such as (out, in / groups, height, width) of a
    convolution; empty where both factors of a product are computed."""
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    groups: int
    precision: str
    """Precision that it computes in: `int8` or `fp8` where both factors are dequantized from it
    (TensorRT then multiplies in it), else that of its input, `fp32` or `fp16`."""
    flops: int | None
    """Floating-point operations for one image, two a multiply-add; None where a size is unknown."""
    paper_flops: int | None
    """FLOPs as the paper's Table 1 counts: a transposed convolution by its output positions."""
    values: int | None
    """Elements of its input and output together, for one image; None where a size is unknown."""

    @property
    def weights(self) -> int:
        """Elements of its weights, which are read once a batch."""
        return math.prod(self.weight_shape) if self.weight_shape else 0

    def bytes_moved(self, batch: int, element: int) -> int | None:
        """Return the bytes that a batch reads and writes: input, weights and output once each."""
        return None if self.values is None else (self.values * batch + self.weights) * element


@dataclass(frozen=True)
class Ceilings:
    """The most that a device can do, measured or by its data sheet."""

    bytes_per_second: float
    """Read and written together."""
    flops: Mapping[str, float]
    """Floating-point operations a second of a large matrix product, by precision."""
    how: str
    """Origin of the figures, one line."""

    def seconds(self, layer: Layer, batch: int, precision: str) -> tuple[float, float] | None:
        """Return the least time that a layer's arithmetic and its memory traffic take, apart.

        Both are in `precision`, whatever the layer's; None where work or ceiling is unknown.
        """
        moved = layer.bytes_moved(batch, ELEMENT_BYTES.get(precision, 4))
        if layer.flops is None or moved is None or precision not in self.flops:
            return None
        return batch * layer.flops / self.flops[precision], moved / self.bytes_per_second


T4 = Ceilings(320e9, {"fp16": 65e12}, "NVIDIA's data sheet of the T4")


class SizedGraph(GraphIndex):
    """A graph whose shapes and types are inferred, for one image where its batch axis is free."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self.batch = 1
        sized = copy.deepcopy(model)
        for item in sized.graph.input:
            axes = item.type.tensor_type.shape.dim
            if item.name not in self.constants and len(axes) > 1:
                if not axes[0].dim_value:
                    axes[0].dim_value = 1
                self.batch = axes[0].dim_value
        for output in sized.graph.output:
            output.type.tensor_type.ClearField("shape")  # they may name the batch axis
        sized = inferred(sized) or model
        self.shapes = shapes_of(sized)
        """Lengths of the axes by tensor, None for an unknown one."""
        self.types = types_of(sized)
        """ONNX element types by tensor."""

    def stored_before(self, name: str) -> onnx.TensorProto | None:
        """Return the constant that a tensor is made from by casts and (de)quantization."""
        while name not in self.constants:
            producer = self.producer(name)
            if producer is None or producer.op_type not in _TRANSPARENT_OPS:
                return None
            name = producer.input[0]
        return self.constants[name]


def layers_of(model: onnx.ModelProto | SizedGraph) -> tuple[Layer, ...]:
    """Return the convolutions and matrix products of a graph, in its order."""
    graph = model if isinstance(model, SizedGraph) else SizedGraph(model)
    return tuple(_layer(graph, node) for node in graph.nodes if node.op_type in WEIGHTED_OPS)


def macs_per_input(node: onnx.NodeProto, weight_shape: Sequence[int]) -> int:
    """Return the multiply-adds of a (transposed) convolution for each value read, rounded down."""
    if node.op_type == "ConvTranspose":
        return math.prod(weight_shape[1:])
    outputs = weight_shape[0] // attribute(node, "group", 1) * math.prod(weight_shape[2:])
    return int(outputs // math.prod(attribute(node, "strides", (1,))))


def _layer(graph: SizedGraph, node: onnx.NodeProto) -> Layer:
    given = attributes(node)
    weight = graph.stored_before(node.input[1])
    weight_shape = tuple(weight.dims) if weight is not None else ()
    inputs, factor = (graph.shapes.get(node.input[index]) for index in (0, 1))
    output = graph.shapes.get(node.output[0])
    kernel: tuple[int, ...] = ()
    values = output
    if node.op_type in CONVOLUTIONS:
        kernel = weight_shape[2:]
        # Each output value sums over its kernel's inputs; transposed, each input value is
        # multiplied with its kernel's outputs.
        values = output if node.op_type == "Conv" else inputs
        per_value = _product((factor or (None,))[1:])
    else:
        per_value = None if not inputs else inputs[-2 if given.get("transA") else -1]
    flops = _flops(_product(values), per_value, graph.batch)
    paper_flops = flops
    if node.op_type == "ConvTranspose" and output:
        paper_flops = _flops(_product(output[2:]), _product(factor), 1)
    read, written = _product(inputs), _product(output)
    return Layer(
        name=node.name or node.output[0],
        operator=node.op_type,
        weight_shape=weight_shape,
        kernel=kernel,
        strides=tuple(given.get("strides", (1,) * len(kernel))),
        groups=given.get("group", 1),
        precision=_precision(graph, node),
        flops=flops,
        paper_flops=paper_flops,
        values=(
            None
            if read is None or written is None
            else read // graph.batch + written // graph.batch
        ),
    )


def _precision(graph: SizedGraph, node: onnx.NodeProto) -> str:
    """Return a layer's arithmetic: the quantized type if both its factors have one."""
    types = [quantized_type(graph, name) for name in node.input[:2]]
    if None in types:
        return _short_dtype(graph.types.get(node.input[0], 0))
    return " x ".join(sorted({_short_dtype(one) for one in types if one is not None}))


def _flops(values: int | None, per_value: int | None, batch: int) -> int | None:
    return None if values is None or per_value is None else 2 * values * per_value // batch


def _product(shape: Shape | None) -> int | None:
    if shape is None:
        return None
    sizes = [size for size in shape if size is not None]
    return math.prod(sizes) if len(sizes) == len(shape) else None


def _short_dtype(elem_type: int) -> str:
    name = type_name(elem_type)
    return "fp8" if name.startswith("float8") else _SHORT_DTYPES.get(name, name)
