"""Clean up Q/DQ graphs from any quantizer: remove nodes that no INT8 layer needs.

Quantizers put pairs of QuantizeLinear and DequantizeLinear nodes on every tensor they know the
range of (ONNX Runtime), on the inputs of every module (pytorch-quantization, ModelOpt) or on stored
weights. `clean` runs one pass for each kind of surplus until none finds anything, and names each
removal. Some passes change no value; the others remove a rounding, or make scales equal, and
`verify_clean` measures on images that outputs moved no more than that explains.
FP8's nodes are left alone: which of them cost a kernel, and which save one, was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from trt_yolov6.errors import UserError, first_line
from trt_yolov6.graph.editing import bypass, copy_notes
from trt_yolov6.graph.operators import FUSED_OPS, MOVING_OPS, QDQ_OPS, WEIGHTED_OPS
from trt_yolov6.quantization.qdq.placement import joined_groups

_Q, _DQ = QDQ_OPS

# TensorRT computes these in INT8 where all that goes in and what comes out is quantized.
_QUANTIZABLE = {"Add", "Sum", "AveragePool", "GlobalAveragePool"}

# They only move or select values, and TensorRT moves dequantization past them.
_MOVING = {*MOVING_OPS, "Concat"}


@dataclass(frozen=True)
class Removal:
    """One thing that a pass took out or changed."""

    kind: str
    """Name of the pass."""
    tensor: str
    """The tensor that is no longer quantized there, or stored otherwise."""
    reason: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.reason}"


def clean(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[Removal, ...]]:
    """Return a Q/DQ graph without surplus nodes, and the removals in their order.

    A graph without Q/DQ nodes, or without surplus ones, comes back unchanged.

    Raises:
        UserError: the result is not valid ONNX, because the given graph was not.
    """
    if not any(node.op_type in (_Q, _DQ) for node in model.graph.node):
        return model, ()
    graph = gs.import_onnx(model)
    removals: list[Removal] = []
    changed = True
    while changed:
        changed = False
        for one_pass in PASSES:
            found = [Removal(one_pass.__name__, *each) for each in one_pass(graph)]
            if found:
                changed = True
                removals += found
                graph.cleanup()
    if not removals:
        return model, ()
    result: onnx.ModelProto = gs.export_onnx(graph.cleanup().toposort())
    copy_notes(model, result)
    result.ir_version = model.ir_version
    try:
        onnx.checker.check_model(result)
    except onnx.checker.ValidationError as error:
        reason = first_line(error)
        raise UserError(f"the Q/DQ graph is not valid ONNX ({reason}); export it again.") from error
    return result, tuple(removals)


def without_activation_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its weights as they are and no activation quantized."""
    graph = gs.import_onnx(model)
    for pair in _pairs(graph):
        if _is_pinned(graph, pair.source, pair.result):
            continue
        if pair.is_relu:
            pair.result.inputs.clear()
            graph.nodes.append(gs.Node("Relu", inputs=[pair.source], outputs=[pair.result]))
        else:
            bypass(graph, pair.source, pair.result)
    result: onnx.ModelProto = gs.export_onnx(graph.cleanup().toposort())
    result.ir_version = model.ir_version
    return result


# --- passes: each yields the tensors of what it removed, with reasons ---------------------------

Removed = Iterator[tuple[str, str]]


def fold_weights(graph: gs.Graph) -> Removed:
    """Store weights as INT8 where a QuantizeLinear makes them from float at every start.

    The values are those that the node would give; a quarter of the bytes is left.
    """
    for quantize in _nodes(graph, _Q):
        weights, grid = _value(quantize.inputs[0]), _grid(quantize)
        if weights is None or grid is None or grid.zero.dtype not in (np.int8, np.uint8):
            continue
        levels = _constant(graph, f"{quantize.inputs[0].name}/stored", grid.quantize(weights))
        bypass(graph, levels, quantize.outputs[0])
        yield quantize.inputs[0].name, "stored as INT8 instead of float"


def fold_biases(graph: gs.Graph) -> Removed:
    """Store biases in float where they are 32-bit integers read by a DequantizeLinear.

    TensorRT wants the bias of an INT8 convolution in float, and has no 32-bit DequantizeLinear.
    """
    for dequantize in _nodes(graph, _DQ):
        levels, grid = _value(dequantize.inputs[0]), _grid(dequantize)
        if levels is None or grid is None or levels.dtype != np.int32:
            continue
        bias = _constant(
            graph, f"{dequantize.inputs[0].name}/float", grid.dequantize(levels).astype(np.float32)
        )
        bypass(graph, bias, dequantize.outputs[0])
        yield dequantize.inputs[0].name, "stored as float"


def merge_equal_pairs(graph: gs.Graph) -> Removed:
    """Leave one pair of those that quantize one tensor in the same way for several readers."""
    for op in (_Q, _DQ):
        kept: dict[tuple[Any, ...], gs.Node] = {}
        for node in _nodes(graph, op):
            grid, source = _grid(node), node.inputs[0]
            if grid is None or _value(source) is not None or node.outputs[0] in graph.outputs:
                continue
            first = kept.setdefault((id(source), *grid.key()), node)
            if first is not node:
                bypass(graph, first.outputs[0], node.outputs[0])
                yield source.name, "quantized twice, alike"


def drop_requantization(graph: gs.Graph) -> Removed:
    """Drop a pair that comes right after another on the same tensor.

    With equal scales the second does nothing. With others the first only adds a rounding, if
    nothing else reads it.
    """
    for quantize in _nodes(graph, _Q):
        before = _producer(quantize.inputs[0])
        if before is None or before.op != _DQ:
            continue
        first, second = _grid(before), _grid(quantize)
        source = _producer(before.inputs[0])
        if first is None or second is None or source is None or source.op != _Q:
            continue
        name = source.inputs[0].name
        if first.key() == second.key():
            for dequantize in [node for node in quantize.outputs[0].outputs if node.op == _DQ]:
                bypass(graph, before.outputs[0], dequantize.outputs[0])
            yield name, "quantized again with its own scale"
        elif (
            len(before.outputs[0].outputs) == 1
            and before.outputs[0] not in graph.outputs
            and not _is_relu(source.inputs[0], first)
        ):
            quantize.inputs[0] = source.inputs[0]
            yield name, "quantized again with another scale"


def drop_pairs_in_fusions(graph: gs.Graph) -> Removed:
    """Drop pairs between a convolution and what TensorRT computes in the same kernel with it.

    That is an activation, or the addition of a shortcut, where only the other term should be
    quantized.
    """
    for pair in _pairs(graph):
        layer = _producer(pair.source)
        if layer is None or layer.op not in WEIGHTED_OPS or len(pair.source.outputs) != 1:
            continue
        readers = pair.result.outputs
        activation = bool(readers) and all(
            node.op in FUSED_OPS or _is_gate(node, readers) for node in readers
        )
        shortcut = (
            len(readers) == 1
            and readers[0].op in ("Add", "Sum")
            and _is_last_layer(graph, pair, readers[0])
        )
        if pair.result in graph.outputs or pair.is_relu or not (activation or shortcut):
            continue
        reason = f"kept {layer.op} {layer.name} from fusing with {readers[0].op}"
        bypass(graph, pair.source, pair.result)
        yield pair.source.name, reason


def drop_useless_pairs(graph: gs.Graph) -> Removed:
    """Drop pairs that no INT8 layer reads: around operators that compute in float anyway.

    Examples are predictions, gates, and other operators that TensorRT has no INT8 kernel for.
    """
    for pair in _pairs(graph):
        if _is_read_in_int8(graph, pair.result, set()):
            continue
        if pair.is_relu or _is_pinned(graph, pair.source, pair.result):
            continue
        readers = sorted({node.op for node in pair.result.outputs}) or ["the outputs"]
        bypass(graph, pair.source, pair.result)
        reason = f"read by {', '.join(readers)} only, which gains nothing from INT8"
        yield pair.source.name, reason


def unify_scales(graph: gs.Graph) -> Removed:
    """Give a concatenation, a pooling and the like, inputs and output, the largest of their scales.

    With different scales each input is quantized again before the concatenation.
    """
    pairs = _pairs(graph)
    by_result = {id(pair.result): pair for pair in pairs}
    on: dict[int, list[_Pair]] = {}
    for pair in pairs:
        on.setdefault(id(pair.source), []).append(pair)

    def carried(tensor: gs.Tensor) -> list[_Pair] | None:
        """Return the pairs whose scales a tensor has, or None where it is in float."""
        if id(tensor) in by_result:
            return [by_result[id(tensor)]]
        producer = _producer(tensor)
        if producer is not None and producer.op in (*_MOVING, "Resize"):
            # Other operators' further inputs are positions, not values.
            moved = producer.inputs if producer.op == "Concat" else producer.inputs[:1]
            parts = [carried(item) for item in moved]
            return None if None in parts else [one for part in parts if part for one in part]
        return on.get(id(tensor))

    of_quantize: dict[int, list[_Pair]] = {}
    for pair in pairs:
        of_quantize.setdefault(id(pair.quantize), []).append(pair)
    links = list(of_quantize.values())
    for node in graph.nodes:
        if node.op not in _MOVING and node.op != "Resize":
            continue
        # Not where one input is in float: the operator then works in float, whatever the scales.
        if joined := carried(node.outputs[0]):
            after = (pair for tensor in node.outputs for pair in on.get(id(tensor), []))
            links.append([*joined, *after])
    for group in joined_groups(pairs, links):
        grids = [pair.grid for pair in group]
        if any(grid.zero.any() or grid.scale.size != 1 for grid in grids):
            continue
        largest = max(grids, key=lambda grid: float(grid.scale.reshape(-1)[0]))
        for pair in group:
            if pair.grid.key() == largest.key() or pair.grid.zero.dtype != largest.zero.dtype:
                continue
            scale = _constant(graph, f"{pair.source.name}/unified_scale", largest.scale[0])
            pair.quantize.inputs[1] = scale
            for node in [reader for reader in pair.quantize.outputs[0].outputs if reader.op == _DQ]:
                node.inputs[1] = scale
            yield (
                pair.source.name,
                f"scale {float(pair.grid.scale.reshape(-1)[0]):.4g} raised to "
                f"{float(largest.scale.reshape(-1)[0]):.4g}, that of what it is joined with",
            )


PASSES = (
    fold_weights,
    fold_biases,
    merge_equal_pairs,
    drop_requantization,
    drop_pairs_in_fusions,
    drop_useless_pairs,
    unify_scales,
)


# --- the graph's vocabulary ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear."""

    scale: NDArray[Any]
    zero: NDArray[Any]
    axis: int

    def key(self) -> tuple[Any, ...]:
        axis = self.axis if self.scale.size > 1 else 0
        return self.scale.tobytes(), self.zero.tobytes(), str(self.zero.dtype), axis

    def quantize(self, values: NDArray[Any]) -> NDArray[Any]:
        limits = np.iinfo(self.zero.dtype)
        zero = self._broadcast(self.zero.astype(np.int64), values)
        scale = self._broadcast(self.scale, values).astype(np.float32)
        scaled = np.rint(values.astype(np.float32) / scale) + zero
        return np.asarray(np.clip(scaled, limits.min, limits.max).astype(self.zero.dtype))

    def dequantize(self, levels: NDArray[Any]) -> NDArray[Any]:
        shifted = levels.astype(np.float64) - self._broadcast(self.zero.astype(np.int64), levels)
        return np.asarray(shifted * self._broadcast(self.scale, levels))

    def _broadcast(self, per_channel: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
        if per_channel.size == 1:
            return np.asarray(per_channel.reshape(()))
        shape = [1] * values.ndim
        shape[self.axis] = -1
        return np.asarray(per_channel.reshape(shape))


@dataclass(frozen=True, eq=False)
class _Pair:
    """A QuantizeLinear on a computed tensor, and one DequantizeLinear after it."""

    source: gs.Tensor
    quantize: gs.Node
    result: gs.Tensor
    grid: _Grid

    @property
    def is_relu(self) -> bool:
        """True where it does more than quantize, see `_is_relu`."""
        return _is_relu(self.source, self.grid)


def _is_relu(source: gs.Tensor, grid: _Grid) -> bool:
    """Return whether quantization cuts negative values off, and so may stand for a ReLU.

    ONNX Runtime's quantizer drops the ReLU then.
    """
    lowest = np.iinfo(grid.zero.dtype).min
    producer = _producer(source)
    positive = producer is not None and producer.op in ("Relu", "Sigmoid", "HardSigmoid", "Softmax")
    return bool((grid.zero == lowest).all()) and not positive


def _pairs(graph: gs.Graph) -> list[_Pair]:
    found: list[_Pair] = []
    for dequantize in _nodes(graph, _DQ):
        quantize = _producer(dequantize.inputs[0])
        if quantize is None or quantize.op != _Q or _value(quantize.inputs[0]) is not None:
            continue
        grid, back = _grid(quantize), _grid(dequantize)
        if grid is None or back is None or grid.key() != back.key():
            continue
        found.append(_Pair(quantize.inputs[0], quantize, dequantize.outputs[0], grid))
    return found


def _nodes(graph: gs.Graph, op: str) -> list[gs.Node]:
    return [node for node in graph.nodes if node.op == op]


def _producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def _value(tensor: gs.Tensor) -> NDArray[Any] | None:
    """Return a constant's value; None for a tensor that is computed, or is in FP8."""
    if isinstance(tensor, gs.Constant):
        # NumPy has no such type, and GraphSurgeon would write the values back in another.
        if isinstance(tensor.dtype, int):
            return None
        return np.asarray(tensor.values)
    producer = _producer(tensor)
    if producer is not None and producer.op == "Constant" and "value" in producer.attrs:
        return np.asarray(producer.attrs["value"].values)
    return None


def _grid(node: gs.Node) -> _Grid | None:
    """Return a node's scale and zero point; None where they are computed or not INT8's kind."""
    scale = _value(node.inputs[1])
    zero: NDArray[Any] | None = np.zeros(1, np.uint8)
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        zero = _value(node.inputs[2])
    elif node.op == _DQ:
        stored = _value(node.inputs[0])
        producer = _producer(node.inputs[0])
        if stored is not None:
            zero = np.zeros(1, stored.dtype)
        elif producer is not None and producer.op == _Q and len(producer.inputs) > 2:
            zero = _value(producer.inputs[2])
    if scale is None or zero is None or not np.issubdtype(zero.dtype, np.integer):
        return None
    # A scale for all may be stored with any shape of one element.
    if scale.size == 1:
        scale, zero = scale.reshape(1), zero.reshape(-1)[:1]
    elif zero.size == 1:
        zero = np.full(scale.shape, zero.reshape(-1)[0])
    return _Grid(scale, zero, int(node.attrs.get("axis", 1)))


def _constant(graph: gs.Graph, name: str, value: NDArray[Any]) -> gs.Constant:
    taken = graph.tensors()
    while name in taken:
        name += "_"
    return gs.Constant(name, np.array(value, order="C"))


def _is_pinned(graph: gs.Graph, source: gs.Tensor, result: gs.Tensor) -> bool:
    """Return whether both ends of a pair are the graph's own, so that it cannot be bypassed."""
    return result in graph.outputs and (source in graph.outputs or not source.inputs)


def _is_gate(node: gs.Node, readers: Sequence[gs.Node]) -> bool:
    """Return whether a multiplication is the second node of x · sigmoid(x)."""
    if node.op != "Mul":
        return False
    sigmoids = [one for one in readers if one.op in ("Sigmoid", "HardSigmoid", "Tanh")]
    return any(_reaches(one.outputs[0], node) for one in sigmoids)


def _reaches(tensor: gs.Tensor, node: gs.Node) -> bool:
    """Return whether a node reads a tensor, directly or through Q/DQ nodes."""
    return any(
        reader is node or (reader.op in (_Q, _DQ) and _reaches(reader.outputs[0], node))
        for reader in tensor.outputs
    )


def _is_last_layer(graph: gs.Graph, pair: _Pair, addition: gs.Node) -> bool:
    """Return whether a pair's layer is the one, of those whose outputs are added, that is fused."""
    layers: list[gs.Node] = []
    for tensor in addition.inputs:
        producer = _producer(tensor)
        if producer is not None and producer.op == _DQ:
            quantize = _producer(producer.inputs[0])
            tensor = quantize.inputs[0] if quantize is not None else tensor
            producer = _producer(tensor)
        if producer is not None and producer.op in WEIGHTED_OPS and len(tensor.outputs) == 1:
            layers.append(producer)
            if tensor in addition.inputs:
                return False  # another term is fused already
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    return bool(layers) and max(layers, key=lambda node: order[id(node)]) is _producer(pair.source)


def _is_read_in_int8(graph: gs.Graph, tensor: gs.Tensor, seen: set[int]) -> bool:
    """Return whether a reader of a dequantized tensor, or one after it, computes in INT8."""
    if id(tensor) in seen:
        return False
    seen.add(id(tensor))
    for node in tensor.outputs:
        if node.op in WEIGHTED_OPS and node.inputs[0] is tensor and _has_int8_weights(node):
            return True
        if node.op in _MOVING or node.op in ("Resize", _Q):
            if any(_is_read_in_int8(graph, output, seen) for output in node.outputs):
                return True
        elif node.op == _DQ:
            if _is_read_in_int8(graph, node.outputs[0], seen):
                return True
        elif node.op in _QUANTIZABLE and _is_quantized_around(graph, node, seen):
            return True
    return False


def _has_int8_weights(node: gs.Node) -> bool:
    """Return whether a layer's second factor is dequantized, stored or computed."""
    producer = _producer(node.inputs[1]) if len(node.inputs) > 1 else None
    while producer is not None and producer.op in ("Transpose", "Reshape"):
        producer = _producer(producer.inputs[0])
    return producer is not None and producer.op == _DQ


def _is_quantized_around(graph: gs.Graph, node: gs.Node, seen: set[int]) -> bool:
    for tensor in node.inputs:
        producer = _producer(tensor)
        fused = producer is not None and producer.op in WEIGHTED_OPS and len(tensor.outputs) == 1
        if producer is None or not (producer.op == _DQ or fused):
            return False
    readers = node.outputs[0].outputs
    if len(readers) == 1 and readers[0].op == "Relu":
        readers = readers[0].outputs[0].outputs
    return any(
        reader.op == _Q and _is_read_in_int8(graph, reader.outputs[0], seen) for reader in readers
    )
