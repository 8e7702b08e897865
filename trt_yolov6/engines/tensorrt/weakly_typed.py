"""An ONNX graph in the form that TensorRT 8 takes: float32, without what its optimizer fails on.

Its networks are weakly typed: tensors are float32, and builder flags allow layers other precisions.
So types of our graphs become flags and constraints (`WeakGraph`). The other passes rewrite INT8
graphs, equal up to rounding in float, where TensorRT 8 fails on the usual form (seen in 8.6.0 on an
H100); each names the failure that it avoids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.helper import make_attribute, make_node

from trt_yolov6.graph.editing import (
    drop_unread_initializers,
    replace_tensor,
    set_initializers,
    set_nodes,
)
from trt_yolov6.graph.index import (
    GraphIndex,
    attributes,
    nodes_after_layers,
    tensor_value,
    types_of,
)
from trt_yolov6.graph.operators import CONVOLUTIONS, MOVING_OPS, QDQ_OPS, is_depthwise
from trt_yolov6.graph.quantized import QuantizedLayer, quantized_layers

_ALWAYS_FUSED = (["Relu"], ["LeakyRelu"], ["Clip"])

_ACTIVATIONS = {"Elu", "HardSigmoid", "HardSwish", "Sigmoid", "Softplus", "Tanh"}

_GATES = {"HardSigmoid", "Sigmoid"}
"""Operators of the factor that SiLU and HardSwish multiply a tensor by."""


@dataclass(frozen=True)
class WeakGraph:
    """A graph for a weakly typed network, and the precisions that its types gave before."""

    model: bytes
    """A serialized ONNX model without half precision."""
    half: bool
    """Layers may compute in half precision."""
    quantized: bool
    """Layers may compute in INT8: the graph has Q/DQ pairs, or is to be calibrated."""
    single: frozenset[str]
    """Tensors that stay in single precision while others are in half: boxes."""
    half_outputs: frozenset[str]
    """Outputs that leave the network in half precision."""
    depthwise: int = 0
    """Depthwise convolutions of an INT8 graph, none of which TensorRT 8 computes in INT8."""


def weak_graph(content: bytes) -> WeakGraph:
    """Return a graph in the form that TensorRT 8 takes.

    Args:
        content: a serialized ONNX model in single or half precision, with or without INT8's pairs.
    """
    model = onnx.load_from_string(content)
    types = types_of(onnx.shape_inference.infer_shapes(model))
    half = onnx.TensorProto.FLOAT16 in types.values()
    single = frozenset(
        name
        for node in nodes_after_layers(model)
        for name in node.output
        if half and node.op_type != "Cast" and types.get(name) == onnx.TensorProto.FLOAT
    )
    half_outputs = frozenset(
        item.name for item in model.graph.output if types[item.name] == onnx.TensorProto.FLOAT16
    )
    if half:
        _widen(model, types)
    split_pools(model)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if quantized:
        drop_idle_pairs(model)
        give_transposed_float_weights(model)
        give_depthwise_float_weights(model)
        scale_shortcuts(model)
        read_before_pairs(model)
        divide_channels(model)
        subtract_borders(model)
        join_siblings(model)
        part_siblings(model)
    graph = GraphIndex(model)
    depthwise = sum(
        is_depthwise(node, graph.constants[node.input[1]].dims)
        for node in graph.nodes
        if quantized and node.op_type in CONVOLUTIONS and node.input[1] in graph.constants
    )
    return WeakGraph(model.SerializeToString(), half, quantized, single, half_outputs, depthwise)


def implicit_graph(content: bytes, half: bool) -> WeakGraph:
    """Return a float32 graph for implicit quantization; what follows its last layers stays single.

    Otherwise TensorRT would compute scores and box coordinates in INT8 where it has a scale.
    Transposed convolutions stay single, too: networks with some in INT8 end in `Assertion engine
    failed` (8.6.0; at optimization level 0 one was built).

    Args:
        content: a serialized ONNX model without Q/DQ pairs or half precision.
        half: layers outside INT8 may compute in half precision.
    """
    model = onnx.load_from_string(content)
    transposed = [node for node in model.graph.node if node.op_type == "ConvTranspose"]
    single = frozenset(
        name for node in (*nodes_after_layers(model), *transposed) for name in node.output
    )
    return WeakGraph(content, half, True, single, frozenset())


# --- half precision -----------------------------------------------------------------------------


def _widen(model: onnx.ModelProto, types: Mapping[str, int]) -> None:
    """Convert half precision to single, in place."""
    graph = model.graph
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for item in (*graph.input, *graph.output):
        if item.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16:
            item.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in floats:
                attribute.i = onnx.TensorProto.FLOAT
                if types.get(node.input[0]) in floats:
                    node.op_type = "Identity"
        if node.op_type == "Identity":
            del node.attribute[:]


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == tensor.FLOAT16:
        replace_tensor(tensor, tensor_value(tensor).astype(np.float32))


def split_pools(model: onnx.ModelProto) -> None:
    """Write poolings of stride 1 over a rectangle as one over rows and one over columns.

    They give the same numbers in 0.6 to 0.9 times the time (5 x 5, INT8 and half precision, H100).
    """
    graph = _Graph(model)
    for node in graph.nodes:
        given = attributes(node)
        kernel = given.get("kernel_shape", [])
        plain = (
            node.op_type == "MaxPool"
            and len(node.output) == 1
            and len(kernel) == 2
            and min(kernel) > 1
            and set(given.get("strides", [1])) | set(given.get("dilations", [1])) == {1}
            and given.get("auto_pad", "NOTSET") == "NOTSET"
            and not given.get("ceil_mode", 0)
        )
        if not plain:
            continue
        top, left, bottom, right = given.get("pads", [0, 0, 0, 0])
        name = node.name or node.output[0]
        between = f"{node.output[0]}/columns"
        halves = (
            ("columns", node.input[0], between, [kernel[0], 1], [top, 0, bottom, 0]),
            ("rows", between, node.output[0], [1, kernel[1]], [0, left, 0, right]),
        )
        graph.replace(
            [node],
            [
                make_node(
                    "MaxPool", [read], [made], f"{name}/{half}", kernel_shape=shape, pads=pads
                )
                for half, read, made, shape, pads in halves
            ],
        )
    graph.write()


# --- INT8 ---------------------------------------------------------------------------------------


def drop_idle_pairs(model: onnx.ModelProto) -> None:
    """Drop pairs after concatenations, poolings and the like that no convolution reads.

    They change no value, as the inputs are quantized with the same scale. Those right before a
    convolution are needed; what TensorRT 8 does with others was not tried.
    """
    graph = _Graph(model)
    scales: dict[str, float] = {}
    for node in graph.nodes:
        scale = graph.value(node.input[1]) if node.op_type in QDQ_OPS else None
        if node.op_type == "DequantizeLinear" and scale is not None and scale.size == 1:
            scales[node.output[0]] = float(scale.item())
        elif node.op_type == "Concat" or node.op_type in MOVING_OPS:
            moved = node.input if node.op_type == "Concat" else node.input[:1]
            found = {scales.get(name) for name in moved}
            only = found.pop() if len(found) == 1 else None
            if only is not None:
                scales.update(dict.fromkeys(node.output, only))
        elif (
            node.op_type == "QuantizeLinear"
            and scale is not None
            and scale.size == 1
            and scales.get(node.input[0]) == float(scale.item())
        ):
            for dequantize in graph.readers(node.output[0]):
                for reader in graph.readers(dequantize.output[0]):
                    if reader.op_type not in CONVOLUTIONS:
                        graph.rewire(reader, dequantize.output[0], node.input[0])
    graph.write()


def give_transposed_float_weights(model: onnx.ModelProto) -> None:
    """Give transposed convolutions float weights of the values of their INT8 weights.

    INT8 weights end in `buildRefitEngine: Assertion engine failed`, whether they have one scale or
    many, stored or after a pair. The layers then compute in half precision.
    """
    graph = _Graph(model)
    for layer in graph.int8_layers("ConvTranspose"):
        values = layer.weights.values()
        layer.node.input[1] = graph.constant(f"{layer.output}/float_weight", values)
    graph.write()


def give_depthwise_float_weights(model: onnx.ModelProto) -> None:
    """Store what the INT8 weights of depthwise convolutions stand for, in float.

    With INT8 weights they compute in half precision nevertheless, and dequantize them in each run;
    on a Turing GPU the build fails (NVIDIA/TensorRT issue 4060). Their input stays rounded, as the
    network was calibrated or trained with it: YOLOX-Nano lost 1.4 points of AP where it did not.
    """
    graph = _Graph(model)
    for layer in graph.int8_layers("Conv"):
        values = layer.weights.values()
        if is_depthwise(layer.node, values.shape):
            layer.node.input[1] = graph.constant(f"{layer.output}/float_weight", values)
    graph.write()


def scale_shortcuts(model: onnx.ModelProto) -> None:
    """Fold a factor on a dequantized tensor into the scale of its own DequantizeLinear.

    Such multiplications (the shortcuts of L) end in `chooseHigherPrecision: Assertion`. This needs
    a product that is only added to dequantized tensors, and a factor above 0, as scales are;
    `read_before_pairs` is for the others.
    """
    graph = _Graph(model)
    for node in graph.nodes:
        scaled = graph.scaled(node)
        if scaled is None or not _added_to_dequantized(graph, node):
            continue
        source, factor = scaled
        pair = graph.producer(source)
        if factor <= 0 or pair is None or pair.op_type != "DequantizeLinear":
            continue
        scale = graph.value(pair.input[1])
        if scale is not None and scale.size == 1:
            product = graph.constant(f"{node.output[0]}/scale", scale * factor)
            node.input[:] = [pair.input[0], product, *pair.input[2:]]
            node.op_type = "DequantizeLinear"
    graph.write()


def _added_to_dequantized(graph: _Graph, node: onnx.NodeProto) -> bool:
    """Return whether all that read a node's output are additions to dequantized tensors."""
    readers = graph.readers(node.output[0])
    others = [
        graph.producer(name)
        for reader in readers
        for name in reader.input
        if name != node.output[0]
    ]
    return {reader.op_type for reader in readers} == {"Add"} and all(
        other is not None and other.op_type == "DequantizeLinear" for other in others
    )


def read_before_pairs(model: onnx.ModelProto) -> None:
    """Have other multiplications by one number read the tensor before its Q/DQ pair."""
    graph = _Graph(model)
    for node in graph.nodes:
        scaled = graph.scaled(node)
        source = None if scaled is None else _quantized_by_pair(graph, scaled[0])
        if scaled is not None and source is not None:
            graph.rewire(node, scaled[0], source)
    graph.write()


def _quantized_by_pair(graph: _Graph, name: str) -> str | None:
    """Return the tensor before the Q/DQ pair that gives a tensor; None without a pair."""
    dequantize = graph.producer(name)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    quantize = graph.producer(dequantize.input[0])
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    return str(quantize.input[0])


def divide_channels(model: onnx.ModelProto) -> None:
    """Write multiplications by a constant per channel, before a QuantizeLinear, as divisions.

    The multiplications end in `mergeScales: Assertion equalOrZero`.
    """
    graph = _Graph(model)
    for node, source, factors in graph.with_constant("Mul"):
        readers = {reader.op_type for reader in graph.readers(node.output[0])}
        if "QuantizeLinear" in readers and factors.size > 1 and np.all(factors != 0):
            node.input[:] = [source, graph.constant(f"{node.output[0]}/divisors", 1 / factors)]
            node.op_type = "Div"
    graph.write()


def subtract_borders(model: onnx.ModelProto) -> None:
    """Write additions of a constant per channel and pixel as subtractions of its negative.

    The additions (borders of shifted channels) end in `x == y || x == 1 || y == 1`.
    """
    graph = _Graph(model)
    for node, source, border in graph.with_constant("Add"):
        if border.ndim == 4 and np.prod(border.shape[2:]) > 1:
            node.input[:] = [source, graph.constant(f"{node.output[0]}/negative", -border)]
            node.op_type = "Sub"
    graph.write()


def join_siblings(model: onnx.ModelProto) -> None:
    """Make one convolution and a Split of INT8 convolutions of one tensor without an activation.

    TensorRT would merge them itself, which ends in `chooseHigherPrecision: Assertion`.
    """
    graph = _Graph(model)
    families: dict[tuple[Any, ...], list[QuantizedLayer]] = {}
    for layer in graph.int8_layers("Conv"):
        if any(name not in graph.constants for name in layer.node.input[2:] if name):
            continue
        given = attributes(layer.node)
        if given.get("group", 1) == 1 and _is_bare(graph, layer.node):
            shape = graph.constants[layer.weight].dims[1:]
            key = (
                layer.input,
                *shape,
                *sorted((name, str(value)) for name, value in given.items()),
            )
            families.setdefault(key, []).append(layer)
    for members in families.values():
        if len(members) > 1:
            _join(graph, members)
    graph.write()


def part_siblings(model: onnx.ModelProto) -> None:
    """Give 1x1 INT8 convolutions that read one tensor, each with a ReLU, different dilations.

    That changes no number, but TensorRT then does not merge them (the two paths of the stacks of M
    and L-ReLU), which ends as in `join_siblings`.
    """
    graph = _Graph(model)
    members: Counter[str] = Counter()
    for layer in graph.int8_layers("Conv"):
        given = attributes(layer.node)
        kernel = graph.constants[layer.weight].dims[2:]
        if set(kernel) != {1} or set(given.get("dilations", [1])) != {1}:
            continue
        if [one.op_type for one in graph.readers(layer.node.output[0])] not in _ALWAYS_FUSED:
            continue
        members[layer.input] += 1
        if members[layer.input] > 1:
            given["dilations"] = [members[layer.input]] * len(kernel)
            del layer.node.attribute[:]
            layer.node.attribute.extend(make_attribute(name, one) for name, one in given.items())
    graph.write()


def _is_bare(graph: _Graph, node: onnx.NodeProto) -> bool:
    """Return whether TensorRT fuses no activation with a convolution.

    It always fuses a ReLU and the like, others only if nothing but quantization follows them.
    """
    name = node.output[0]
    while True:
        readers = graph.readers(name)
        kinds = [reader.op_type for reader in readers]
        if kinds in _ALWAYS_FUSED:
            return False
        gated = [reader for reader in readers if reader.op_type == "Mul"]
        if len(kinds) == 1 and kinds[0] in _ACTIVATIONS:
            name = readers[0].output[0]
        elif len(kinds) == 2 and len(gated) == 1 and _GATES.intersection(kinds):
            (gate,) = (reader for reader in readers if reader is not gated[0])
            if set(gated[0].input) != {name, gate.output[0]}:
                return True
            name = gated[0].output[0]
        else:
            return any(kind != "QuantizeLinear" for kind in kinds)


def _join(graph: _Graph, layers: Sequence[QuantizedLayer]) -> None:
    """Replace the first of several layers that read one tensor by one convolution and a Split."""
    members = [layer.node for layer in layers]
    first = members[0]
    weights = [tensor_value(graph.constants[layer.weight]) for layer in layers]
    biases = [
        graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        for node in members
    ]
    counts = [len(item) for item in weights]
    name = " || ".join(node.name or node.output[0] for node in members)
    output = f"{first.output[0]}/joined"
    scales = [
        np.broadcast_to(tensor_value(graph.constants[layer.weights.node.input[1]]), count)
        for layer, count in zip(layers, counts, strict=True)
    ]
    codes = graph.constant(f"{output}/codes", np.concatenate(weights))
    scale = graph.constant(f"{output}/scale", np.concatenate(scales))
    zero = graph.constant(f"{output}/zero_point", np.zeros(sum(counts), np.int8))
    bias = np.concatenate(
        [
            np.zeros(count) if item is None else item
            for item, count in zip(biases, counts, strict=True)
        ]
    ).astype(np.float32)
    sizes = graph.constant(f"{output}/sizes", np.array(counts))
    weight = f"{output}/weight"
    bias_name = graph.constant(f"{output}/bias", bias)
    outputs = [node.output[0] for node in members]
    read = [first.input[0], weight, bias_name]
    convolution = make_node("Conv", read, [output], name)
    convolution.attribute.extend(first.attribute)
    stored = [codes, scale, zero]
    graph.replace(
        members,
        [
            make_node("DequantizeLinear", stored, [weight], f"{output}/dequantize", axis=0),
            convolution,
            make_node("Split", [output, sizes], outputs, f"{output}/split", axis=1),
        ],
    )


class _Graph(GraphIndex):
    """A graph with this module's few ways to change it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self._graph = model.graph
        self._initializers = {item.name: item for item in model.graph.initializer}
        self._replaced: dict[str, list[onnx.NodeProto]] = {}

    def int8_layers(self, op: str) -> Iterator[QuantizedLayer]:
        """Yield the layers of an operator whose input and INT8 weights are dequantized."""
        for layer in quantized_layers(self):
            codes, scale = layer.weights.codes, layer.weights.scale
            if (
                layer.node.op_type == op
                and layer.activations is not None
                and codes is not None
                and scale is not None
                and codes.data_type == codes.INT8
                and len(scale.dims) <= 1
            ):
                yield layer

    def with_constant(self, op: str) -> Iterator[tuple[onnx.NodeProto, str, NDArray[Any]]]:
        """Yield each node of a binary operator on a tensor and a constant, with these two."""
        for node in self.nodes:
            if node.op_type == op:
                values = [self.value(name) for name in node.input]
                if values[0] is not None:
                    yield node, str(node.input[1]), values[0]
                elif values[1] is not None:
                    yield node, str(node.input[0]), values[1]

    def rewire(self, node: onnx.NodeProto, before: str, after: str) -> None:
        """Have a node read another tensor instead of one."""
        node.input[:] = [after if name == before else name for name in node.input]

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant; float ones become float32."""
        value = value.astype(np.float32) if value.dtype.kind == "f" else value
        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def replace(self, nodes: Sequence[onnx.NodeProto], others: list[onnx.NodeProto]) -> None:
        """Replace nodes by others, at the place of the first."""
        for node in nodes:
            self._replaced[node.output[0]] = []
        self._replaced[nodes[0].output[0]] = others

    def write(self) -> None:
        """Store the nodes and the constants that anything reads."""
        nodes = list(self._kept())
        outputs = {item.name for item in self._graph.output}
        # DequantizeLinear first, then the QuantizeLinear that only these have read.
        for kind in reversed(QDQ_OPS):
            read = outputs.union(name for node in nodes for name in node.input)
            nodes = [
                node for node in nodes if node.op_type != kind or read.intersection(node.output)
            ]
        set_nodes(self._graph, nodes)
        set_initializers(self._graph, self._initializers.values())
        drop_unread_initializers(self._graph)
        del self._graph.value_info[:]

    def _kept(self) -> Iterator[onnx.NodeProto]:
        for node in self.nodes:
            yield from self._replaced.get(node.output[0], [node])
