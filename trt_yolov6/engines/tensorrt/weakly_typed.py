"""An ONNX graph the way TensorRT 8 takes it: float32 throughout, and written around its optimizer.

TensorRT 8's networks are weakly typed: a tensor is float32, and builder flags say what else layers
may compute in. So what our graphs say by types becomes flags and constraints (`WeakGraph`). The
other changes are forms of INT8 graphs, equal but for rounding in float, that TensorRT 8 takes where
it stops at the usual ones (seen in 8.6.0 on an H100):

- A transposed convolution with INT8 weights ends in `buildRefitEngine: Assertion engine failed`,
  whether they have one scale or many, stored or behind a pair. It gets float weights of the same
  values, and computes in half precision.
- A multiplication by a constant per channel before a QuantizeLinear ends in `mergeScales: Assertion
  equalOrZero`. A division by the reciprocals does not.
- Convolutions that read one tensor, and that no activation is fused with, are merged; in INT8 that
  ends in `chooseHigherPrecision: Assertion`. Here they are one convolution and a Split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.graph.float16 import nodes_after_layers
from trt_yolov6.graph.operators import LAYER_OPS, MOVING_OPS
from trt_yolov6.quantization.qdq.insert import weight_axis

if TYPE_CHECKING:
    import onnx

_QDQ = ("QuantizeLinear", "DequantizeLinear")

_ALWAYS_FUSED = (["Relu"], ["LeakyRelu"], ["Clip"])

_ACTIVATIONS = {"Elu", "HardSigmoid", "HardSwish", "Sigmoid", "Softplus", "Tanh"}

_GATES = {"HardSigmoid", "Sigmoid"}
"""What SiLU and HardSwish multiply a tensor by, computed from it."""


@dataclass(frozen=True)
class WeakGraph:
    """A graph for a weakly typed network, with what its types said before."""

    model: bytes
    """A serialized ONNX model without half precision."""
    half: bool
    """Layers may compute in half precision."""
    quantized: bool
    """Layers may compute in INT8: the graph has Q/DQ pairs, or is to be calibrated."""
    single: frozenset[str]
    """Tensors to be computed in single precision although others are in half: boxes."""
    half_outputs: frozenset[str]
    """Outputs that leave the network in half precision."""


def weak_graph(content: bytes) -> WeakGraph:
    """Return a graph as TensorRT 8 takes it.

    Args:
        content: a serialized ONNX model in single or half precision, with or without INT8's pairs.
    """
    import onnx

    model = onnx.load_from_string(content)
    types = _tensor_types(model)
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
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if quantized:
        drop_idle_pairs(model)
        give_transposed_float_weights(model)
        divide_channels(model)
        join_siblings(model)
    return WeakGraph(model.SerializeToString(), half, quantized, single, half_outputs)


def implicit_graph(content: bytes, half: bool) -> WeakGraph:
    """Return a float32 graph for implicit quantization: what follows its last layers stays single.

    TensorRT would compute scores and box coordinates in INT8 as well, where it has a scale.

    Args:
        content: a serialized ONNX model without Q/DQ pairs or half precision.
        half: layers outside INT8 may compute in half precision.
    """
    import onnx

    tail = nodes_after_layers(onnx.load_from_string(content))
    single = frozenset(name for node in tail for name in node.output)
    return WeakGraph(content, half, True, single, frozenset())


# --- half precision -----------------------------------------------------------------------------


def _tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the ONNX element types of all tensors."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {item.name: item.data_type for item in graph.initializer}
    for item in (*graph.input, *graph.value_info, *graph.output):
        found[item.name] = item.type.tensor_type.elem_type
    return found


def _widen(model: onnx.ModelProto, types: Mapping[str, int]) -> None:
    """Make all that is in half precision single, in place."""
    import onnx

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
    import onnx
    from onnx import numpy_helper

    if tensor.data_type == onnx.TensorProto.FLOAT16:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


# --- INT8 ---------------------------------------------------------------------------------------


def drop_idle_pairs(model: onnx.ModelProto) -> None:
    """Drop pairs after concatenations, poolings and the like that no convolution reads.

    What goes in is quantized with the same scale, so that they change no value. One right before a
    convolution is needed; of others it was not tried what TensorRT 8 makes of them.
    """
    graph = _Graph(model)
    scales: dict[str, float] = {}
    for node in graph.nodes:
        scale = graph.value(node.input[1]) if node.op_type in _QDQ else None
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
                    if reader.op_type not in LAYER_OPS:
                        graph.rewire(reader, dequantize.output[0], node.input[0])
    graph.write()


def give_transposed_float_weights(model: onnx.ModelProto) -> None:
    """Store what the INT8 weights of transposed convolutions stand for, in float."""
    graph = _Graph(model)
    for node in graph.nodes:
        stored = graph.stored_weights(node) if node.op_type == "ConvTranspose" else None
        if stored is not None:
            shape = [1] * stored.codes.ndim
            shape[weight_axis(node.op_type)] = -1
            values = stored.codes.astype(np.float32) * stored.scales.reshape(shape)
            node.input[1] = graph.constant(f"{node.output[0]}/float_weight", values)
    graph.write()


def divide_channels(model: onnx.ModelProto) -> None:
    """Write multiplications by a constant per channel, before a QuantizeLinear, as divisions."""
    graph = _Graph(model)
    for node in graph.nodes:
        if node.op_type != "Mul" or not any(
            reader.op_type == "QuantizeLinear" for reader in graph.readers(node.output[0])
        ):
            continue
        for index, name in enumerate(node.input):
            factors = graph.value(name)
            if factors is not None and factors.size > 1 and np.all(factors != 0):
                inverse = graph.constant(f"{node.output[0]}/divisors", 1 / factors)
                node.input[:] = [node.input[1 - index], inverse]
                node.op_type = "Div"
                break
    graph.write()


def join_siblings(model: onnx.ModelProto) -> None:
    """Make one convolution and a Split of INT8 convolutions that TensorRT would merge itself."""
    from onnx import helper

    graph = _Graph(model)
    families: dict[tuple[Any, ...], list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        stored = graph.stored_weights(node) if node.op_type == "Conv" else None
        biased = node.input[2:] and node.input[2]
        if stored is None or (biased and graph.value(node.input[2]) is None):
            continue
        attributes = sorted(
            (item.name, str(helper.get_attribute_value(item))) for item in node.attribute
        )
        if dict(attributes).get("group", "1") == "1" and _is_bare(graph, node):
            key = (node.input[0], *stored.codes.shape[1:], *attributes)
            families.setdefault(key, []).append(node)
    for members in families.values():
        if len(members) > 1:
            _join(graph, members)
    graph.write()


def _is_bare(graph: _Graph, node: onnx.NodeProto) -> bool:
    """Tell whether TensorRT fuses no activation with a convolution.

    It fuses a ReLU and the like always, others only where nothing but quantization follows them.
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


def _join(graph: _Graph, members: Sequence[onnx.NodeProto]) -> None:
    """Put one convolution and a Split in the place of the first of several that read one tensor."""
    from onnx import helper

    first = members[0]
    weights = [graph.stored_weights(node) for node in members]
    stored = [item for item in weights if item is not None]
    biases = [
        graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        for node in members
    ]
    counts = [len(item.codes) for item in stored]
    name = " || ".join(node.name or node.output[0] for node in members)
    output = f"{first.output[0]}/joined"
    scales = [
        np.broadcast_to(item.scales, count) for item, count in zip(stored, counts, strict=True)
    ]
    codes = graph.constant(f"{output}/codes", np.concatenate([item.codes for item in stored]))
    scale = graph.constant(f"{output}/scale", np.concatenate(scales))
    zero = graph.constant(f"{output}/zero_point", np.zeros(sum(counts), np.int8))
    bias = np.concatenate(
        [
            np.zeros(count) if item is None else item
            for item, count in zip(biases, counts, strict=True)
        ]
    ).astype(np.float32)
    sizes = graph.constant(f"{output}/sizes", np.array(counts))
    convolution = helper.make_node(
        "Conv",
        [first.input[0], f"{output}/weight", graph.constant(f"{output}/bias", bias)],
        [output],
        name,
    )
    convolution.attribute.extend(first.attribute)
    graph.replace(
        members,
        [
            helper.make_node(
                "DequantizeLinear",
                [codes, scale, zero],
                [f"{output}/weight"],
                f"{output}/dequantize",
                axis=0,
            ),
            convolution,
            helper.make_node(
                "Split",
                [output, sizes],
                [node.output[0] for node in members],
                f"{output}/split",
                axis=1,
            ),
        ],
    )


@dataclass(frozen=True)
class _Stored:
    """Weights behind a DequantizeLinear: INT8 codes, and float32 scales, one or one a channel."""

    codes: NDArray[Any]
    scales: NDArray[Any]


class _Graph:
    """Look-ups in a graph, and the few ways in which this module changes it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self.nodes = list(model.graph.node)
        self._initializers = {item.name: item for item in model.graph.initializer}
        self._makers = {name: node for node in self.nodes for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._replaced: dict[str, list[onnx.NodeProto]] = {}

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return self._readers.get(name, [])

    def value(self, name: str) -> NDArray[Any] | None:
        """Return a constant's value, or None for what is computed."""
        from onnx import numpy_helper

        if name in self._initializers:
            return np.asarray(numpy_helper.to_array(self._initializers[name]))
        maker = self._makers.get(name)
        if maker is None or maker.op_type != "Constant" or maker.attribute[0].name != "value":
            return None
        return np.asarray(numpy_helper.to_array(maker.attribute[0].t))

    def stored_weights(self, layer: onnx.NodeProto) -> _Stored | None:
        """Return the INT8 weights of a layer that reads quantized values; None for other layers."""
        maker, source = self._makers.get(layer.input[1]), self._makers.get(layer.input[0])
        if maker is None or maker.op_type != "DequantizeLinear":
            return None
        if source is None or source.op_type != "DequantizeLinear":
            return None
        codes, scales = (self.value(name) for name in maker.input[:2])
        if codes is None or scales is None or codes.dtype != np.int8 or scales.ndim > 1:
            return None
        return _Stored(codes, scales)

    def rewire(self, node: onnx.NodeProto, before: str, after: str) -> None:
        """Have a node read one tensor in the place of another."""
        node.input[:] = [after if name == before else name for name in node.input]

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant; float ones become float32."""
        from onnx import numpy_helper

        value = value.astype(np.float32) if value.dtype.kind == "f" else value
        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def replace(self, nodes: Sequence[onnx.NodeProto], others: list[onnx.NodeProto]) -> None:
        """Have other nodes stand where the first of some stood."""
        for node in nodes:
            self._replaced[node.output[0]] = []
        self._replaced[nodes[0].output[0]] = others

    def write(self) -> None:
        """Store the nodes and the constants that anything reads."""
        nodes = [_copy(node) for node in self._kept()]
        outputs = {item.name for item in self._graph.output}
        # First what dequantizes, then what only that has read.
        for kind in ("DequantizeLinear", "QuantizeLinear"):
            read = outputs.union(name for node in nodes for name in node.input)
            nodes = [
                node for node in nodes if node.op_type != kind or read.intersection(node.output)
            ]
        read = outputs.union(name for node in nodes for name in node.input)
        constants = [_copy(item) for name, item in self._initializers.items() if name in read]
        del self._graph.node[:], self._graph.initializer[:], self._graph.value_info[:]
        self._graph.node.extend(nodes)
        self._graph.initializer.extend(constants)

    def _kept(self) -> Iterator[onnx.NodeProto]:
        for node in self.nodes:
            yield from self._replaced.get(node.output[0], [node])


def _copy(item: Any) -> Any:
    result = type(item)()
    result.CopyFrom(item)
    return result
