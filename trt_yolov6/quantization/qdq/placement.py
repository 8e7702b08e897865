"""Place quantization in a detector's graph: which layers become 8-bit, and which tensors.

`place` reads a float ONNX graph and decides; `insert.insert_qdq` carries it out. Each rule is a
function whose docstring gives its reason. They follow how TensorRT treats explicit quantization: a
Q/DQ pair on the input of a convolution makes it run in INT8, quantization is fused into what
computes the tensor, and operators that only move or select values work on INT8 if they get it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import onnx

from trt_yolov6.errors import UserError
from trt_yolov6.graph.cost import macs_per_input
from trt_yolov6.graph.index import GraphIndex, attribute
from trt_yolov6.graph.operators import (
    ACTIVATIONS,
    CONVOLUTIONS,
    MOVING_OPS,
    is_depthwise,
    layer_names,
)
from trt_yolov6.quantization.types import QuantizedType

Item = TypeVar("Item")

_POOLING_OPS = {"GlobalAveragePool", "GlobalMaxPool"}

_POINTWISE_OPS = ACTIVATIONS | {"Identity"}


@dataclass(frozen=True)
class Placement:
    """Which tensors of a float graph get a Q/DQ pair, and which layers run in INT8 by it.

    All tuples are in the graph's order. Layers are named as by `layer_names`.
    """

    tensors: tuple[str, ...]
    """Activation tensors to quantize: the range of each has to be known."""
    groups: tuple[tuple[str, ...], ...]
    """Tensors that share one scale; a tensor is in one group at most."""
    layers: tuple[str, ...]
    """Layers that run in INT8."""
    float_layers: dict[str, str]
    """Layers that stay in float, each with the reason."""
    unquantized_reads: frozenset[tuple[str, str]]
    """Pairs of a quantized tensor and the first output of a node that reads it unquantized."""
    repeated: dict[str, str] = field(default_factory=dict)
    """Results of concatenations, poolings and the like, each with an input of the same scale: they
    get a pair too, which changes no value."""

    @property
    def group_of(self) -> dict[str, tuple[str, ...]]:
        """Group of each of `tensors`; one that shares its scale with no other is its own group."""
        return {name: (name,) for name in self.tensors} | {
            name: group for group in self.groups for name in group
        }


Rule = Callable[[GraphIndex, "onnx.NodeProto"], "str | None"]
"""Says why a convolution stays in float, or None: see "rules to choose" below."""


def place(
    model: onnx.ModelProto,
    exclude: Collection[str] = (),
    *,
    exclude_rules: Sequence[Rule] = (),
    propagate: bool = True,
    requantize: bool = False,
) -> Placement:
    """Decide what to quantize.

    Args:
        model: a float graph without Q/DQ, nodes in topological order (as ONNX demands).
        exclude: names of convolutions that stay in float and read their inputs unquantized.
        exclude_rules: rules of this module by which further layers stay in float.
        propagate: let concatenations, poolings and the like pass 8-bit values on, and additions
            take them; otherwise only layers read quantized tensors.
        requantize: count the results of concatenations, poolings and the like among `tensors`,
            with ranges of their own; otherwise they are `repeated`, with the scale of their input.

    Raises:
        UserError: the graph is quantized already, or has no layer of a name in `exclude`.
    """
    graph = GraphIndex(model)
    if any(node.op_type == "QuantizeLinear" for node in graph.nodes):
        raise UserError(
            "the graph has Q/DQ nodes already; give the float graph, or build it as it "
            "is, without quantizing."
        )
    names = layer_names(model)
    unknown = sorted(set(exclude) - set(names.values()))
    if unknown:
        raise UserError(
            f"`float_layers` names {unknown[0]}, which is not a convolution of the graph; "
            "`trt-yolov6 inspect` lists them."
        )
    reasons = _float_layers(graph, names, set(exclude), exclude_rules)
    integer = {output for output, name in names.items() if name not in reasons}
    if propagate:
        plain = _unquantized_readers(graph, integer)
    else:
        plain = {node.output[0] for node in graph.nodes} - integer
    quantized = _quantized_tensors(graph, integer, plain)
    links = list(_links(graph, quantized, plain)) if propagate else []
    quantized.update(source for sources, _ in links for source in sources)
    if propagate:
        quantized.update(_activated_terms(graph, integer, plain, quantized))
    late = set() if requantize else quantized.intersection(_dequantized_late(graph, links))
    quantized -= late
    tensors = tuple(name for name in graph.order if name in quantized)
    return Placement(
        tensors=tensors,
        groups=tuple(joined_groups(tensors, ((*sources, name) for sources, name in links))),
        layers=tuple(name for name in names.values() if name not in reasons),
        float_layers=reasons,
        unquantized_reads=frozenset(
            (tensor, node.output[0])
            for tensor in tensors
            for node in graph.readers(tensor)
            if node.output[0] in plain
        ),
        repeated=_repeated((name for name in graph.order if name in late), tensors, links),
    )


# --- which layers run in INT8 -------------------------------------------------------------------


def _float_layers(
    graph: GraphIndex, names: dict[str, str], keep: set[str], exclude_rules: Sequence[Rule]
) -> dict[str, str]:
    """Return the layers that stay in float, with reasons.

    All others run in INT8, even the first, whose input of 0..1 loses one of its eight bits, and
    predictions, whose outputs stay in float because no INT8 layer reads them.
    """
    rules = (_has_no_stored_weights, _works_on_single_pixels(graph), _decodes_a_distribution)
    reasons: dict[str, str] = {}
    for node in graph.nodes:
        name = names.get(node.output[0])
        if name is None:
            continue
        if name in keep:
            reasons[name] = "kept in float by choice"
            continue
        found = (rule(graph, node) for rule in (*rules, *exclude_rules))
        if reason := next(filter(None, found), None):
            reasons[name] = reason
    return reasons


def _has_no_stored_weights(graph: GraphIndex, node: onnx.NodeProto) -> str | None:
    """Weights that are computed cannot be stored as INT8."""
    return None if node.input[1] in graph.constants else "its weights are computed"


def _works_on_single_pixels(graph: GraphIndex) -> Rule:
    """A convolution after global pooling works on a single position.

    Squeeze-and-excitation has two. They cost next to nothing, and their gates scale whole channels,
    so rounding them costs accuracy and saves no time.
    """
    pixels = _single_pixel_tensors(graph)
    reason = "works on one pixel, after global pooling"
    return lambda _, node: reason if node.input[0] in pixels else None


def _decodes_a_distribution(graph: GraphIndex, node: onnx.NodeProto) -> str | None:
    """A convolution after a softmax takes the expectation over distribution bins (DFL).

    It is part of the decoding: its weights are the bins' numbers, its output is coordinates.
    """
    name = node.input[0]
    while (producer := graph.producer(name)) is not None:
        if producer.op_type == "Softmax":
            return "takes the expectation of a softmax"
        if producer.op_type not in ("Transpose", "Reshape"):
            return None
        name = producer.input[0]
    return None


def _single_pixel_tensors(graph: GraphIndex) -> set[str]:
    """Return the tensors of height and width 1 that global pooling makes, and what follows them."""
    pixels: set[str] = set()
    for node in graph.nodes:
        if (
            node.op_type in _POOLING_OPS
            or (node.op_type == "ReduceMean" and _reduces_space(graph, node))
            or (node.op_type in (*CONVOLUTIONS, *_POINTWISE_OPS) and node.input[0] in pixels)
            or (
                node.op_type in ("Mul", "Add", "Div")
                and any(name in pixels for name in node.input)
                and all(name in pixels or name in graph.constants for name in node.input)
            )
        ):
            pixels.update(node.output)
    return pixels


def _reduces_space(graph: GraphIndex, node: onnx.NodeProto) -> bool:
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1:
        axes = graph.value(node.input[1])
    return axes is not None and {int(axis) % 4 for axis in axes} == {2, 3}


# --- rules to choose, for `exclude_rules` ---------------------------------------------------------


def reads_few_channels(graph: GraphIndex, node: onnx.NodeProto) -> str | None:
    """Convolutions with fewer than 16 input channels (the stem) cannot fill an 8-bit instruction.

    A tensor core multiplies 32 eight-bit channels at a time, missing ones padded with zeros.
    """
    weight = _weight_shape(graph, node)
    transposed = node.op_type == "ConvTranspose"
    channels = weight[0] // attribute(node, "group", 1) if transposed else weight[1]
    return "reads fewer than 16 channels" if channels < 16 else None


def computes_channels_apart(graph: GraphIndex, node: onnx.NodeProto) -> str | None:
    """TensorRT 8 computes depthwise convolutions in half precision, whatever the graph says.

    So rounding what they read would cost accuracy, and save no time.
    """
    return "is depthwise" if is_depthwise(node, _weight_shape(graph, node)) else None


def is_transposed(graph: GraphIndex, node: onnx.NodeProto) -> str | None:
    """TensorRT-RTX has no transposed convolution in FP8: it would dequantize its input again.

    One that does not overlap is bound by the writing of its output anyway.
    """
    return "is a transposed convolution" if node.op_type == "ConvTranspose" else None


def works_less_than(multiply_adds: int) -> Rule:
    """A layer that uses each input value seldom gains nothing from quantizing it.

    TensorRT-RTX writes a convolution's output in half precision and quantizes it in a separate
    kernel, which reads two bytes and writes one for each value. FP8 saves half the time of the next
    convolution's multiply-adds.
    """

    def rule(graph: GraphIndex, node: onnx.NodeProto) -> str | None:
        few = macs_per_input(node, _weight_shape(graph, node)) < multiply_adds
        return f"does fewer than {multiply_adds} multiply-adds a value" if few else None

    return rule


def is_among_the_last(count: int) -> Rule:
    """Predictions have few channels and decide the accuracy; in the head, SiLU separates layers.

    TensorRT-RTX fuses SiLU with a convolution in half precision but not in FP8, which adds a kernel
    where no FP8 layer follows.

    Args:
        count: layers counted from the outputs; 1: those that no other layer follows.
    """

    def rule(graph: GraphIndex, node: onnx.NodeProto) -> str | None:
        last = graph.layers_after[node.output[0]] < count
        return f"is among the last {count} layers" if last else None

    return rule


def _weight_shape(graph: GraphIndex, node: onnx.NodeProto) -> tuple[int, ...]:
    return tuple(graph.constants[node.input[1]].dims)  # `_has_no_stored_weights` comes first


FP8_RULES: tuple[Rule, ...] = (
    reads_few_channels,
    is_transposed,
    is_among_the_last(3),
    works_less_than(1000),
)
"""Rules for layers that stay in float when the others run in FP8: FP8 gains nothing there."""


def place_for(
    quantized: QuantizedType,
    model: onnx.ModelProto,
    exclude: Collection[str] = (),
    *,
    depthwise: bool = True,
) -> Placement:
    """Decide what to quantize to a type, as `place` does, by the rules that serve the type best.

    Without `depthwise`, depthwise convolutions stay in float, as they always do with FP8.

    FP8 pairs stand right before layers that gain by them, and nowhere else: TensorRT-RTX 1.5 to 1.7
    pools, concatenates and adds in half precision all the same, so more pairs only add kernels.
    """
    if quantized.is_floating:
        return place(model, exclude, exclude_rules=FP8_RULES, propagate=False)
    return place(model, exclude, exclude_rules=() if depthwise else (computes_channels_apart,))


# --- which tensors carry INT8 -------------------------------------------------------------------


def _unquantized_readers(graph: GraphIndex, integer: set[str]) -> set[str]:
    """Return the nodes, by first output, that read tensors as they are before quantization.

    A layer stays in float to lose nothing, so its input is not rounded, nor is what leads only to
    it, or to a graph output without another layer. Any other float operator (such as the
    multiplication of a shortcut by its factor) reads the quantized tensor; otherwise TensorRT would
    write the tensor twice, once in float.
    """
    plain: set[str] = set()
    for node in reversed(graph.nodes):
        if node.output[0] in integer:
            continue
        readers_plain = [
            user.output[0] in plain for name in node.output if name for user in graph.readers(name)
        ]
        # A data-movement operator stays unquantized if any of its readers is.
        moves = bool(_concatenated(graph, node) or _moved(graph, node))
        if node.op_type in CONVOLUTIONS or all(readers_plain) or (moves and any(readers_plain)):
            plain.add(node.output[0])
    return plain


def _quantized_tensors(graph: GraphIndex, integer: set[str], plain: set[str]) -> set[str]:
    """Return the tensors to quantize: what INT8 layers read, and what is added to their outputs."""
    quantized = {node.input[0] for node in graph.nodes if node.output[0] in integer}
    while found := set(_shortcuts(graph, integer, plain, quantized)) - quantized:
        quantized |= found
    return quantized


def _links(
    graph: GraphIndex, quantized: set[str], plain: set[str]
) -> Iterator[tuple[list[str], str]]:
    """Yield inputs and output of the operators that pass INT8 on.

    All of them need equal scales, and only the inputs need a pair: TensorRT quantizes as early and
    dequantizes as late as it can. Seen in TensorRT-RTX 1.7: with pairs before them only, pooling
    and concatenation take INT8 and pass it to the convolution; with a pair after them only, a
    pooling that is read twice is computed twice; with pairs on some inputs of a concatenation
    only, the others are read in float.

    Where another reader needs the unquantized values, the operator stays in float.
    """
    pending, seen = sorted(quantized), set(quantized)
    while pending:
        name = pending.pop()
        node = graph.producer(name)
        if node is None or node.output[0] in plain or name in graph.outputs:
            continue
        sources = _concatenated(graph, node) or _moved(graph, node)
        if sources:
            yield sources, name
            pending.extend(source for source in sources if source not in seen)
            seen.update(sources)


def _dequantized_late(
    graph: GraphIndex, links: Iterable[tuple[Sequence[str], str]]
) -> Iterator[str]:
    """Yield the outputs of such operators that stay INT8 without a pair, see `_links`.

    Those of a resizing do not: TensorRT-RTX 1.7 dequantizes before it and leaves the convolution
    after it in float (four in YOLOv6Lite).
    """
    for _, result in links:
        node = graph.producer(result)
        if node is not None and node.op_type != "Resize":
            yield result


def _repeated(
    results: Iterable[str], tensors: Collection[str], links: Iterable[tuple[Sequence[str], str]]
) -> dict[str, str]:
    """Return the tensors dequantized late, each with a tensor of the same scale that has a pair.

    Such a pair changes no value. TensorRT 8 runs a convolution in INT8 only after a pair that feeds
    it directly; otherwise its weights' DequantizeLinear stays a layer, and the build fails.
    TensorRT-RTX 1.7 builds the same layers with all these pairs or none; with one after a
    concatenation and none after the pooling before it, that pooling is in float.
    """
    sources = {result: inputs[0] for inputs, result in links}
    found: dict[str, str] = {}
    for name in results:
        source = name
        while source not in tensors and source in sources:
            source = sources[source]
        if source in tensors:
            found[name] = source
    return found


def _concatenated(graph: GraphIndex, node: onnx.NodeProto) -> list[str]:
    """A concatenation works in INT8 if its inputs have the scale of its output.

    The convolution after it has one scale for its whole input anyway. With equal scales TensorRT
    only copies bytes, or has the layers before write in place; with others it would quantize each
    input again.
    """
    if node.op_type != "Concat" or any(name in graph.constants for name in node.input):
        return []
    return list(dict.fromkeys(node.input))


def _moved(graph: GraphIndex, node: onnx.NodeProto) -> list[str]:
    """Max pooling, resizing and moving values keep the scale of their input.

    Rounding is monotonic, so the maximum of rounded values is the rounded maximum. Moving changes
    no value, and linear interpolation stays within the range; cubic interpolation overshoots, and
    padding with a value may leave the range: these two stay in float.
    """
    if node.op_type == "Resize":
        moves = attribute(node, "mode", "nearest") in ("nearest", "linear")
    else:
        moves = node.op_type in MOVING_OPS
    return [node.input[0]] if moves and node.input[0] not in graph.constants else []


def _shortcuts(
    graph: GraphIndex, integer: set[str], plain: set[str], quantized: set[str]
) -> Iterator[str]:
    """Yield the tensors that residual additions add to the output of a convolution.

    TensorRT fuses convolution, addition, ReLU and the quantization after them into one INT8
    kernel if the addend is INT8 too; the convolution's own output must not be quantized, because
    that would separate it from the addition. If both terms are convolutions, the later one is
    fused. With activations between, the addition is a pointwise kernel of its own, for which only
    `_activated_terms` are quantized.
    """
    yield from _activated_terms(graph, integer, plain, quantized)
    for node in graph.nodes:
        if node.op_type not in ("Add", "Sum") or len(node.input) != 2 or node.output[0] in plain:
            continue
        if not is_quantized_after(graph, node, quantized):
            continue
        fused = [
            name
            for name in sorted(integer.intersection(node.input), key=graph.order.index)[::-1]
            if len(graph.readers(name)) == 1 and name not in graph.outputs
        ]
        others = [name for name in node.input if fused and name != fused[0]]
        if others and others[0] not in graph.constants:
            yield others[0]


def _activated_terms(
    graph: GraphIndex, integer: set[str], plain: set[str], quantized: set[str]
) -> Iterator[str]:
    """Yield activations' outputs that are added to a quantized tensor, to be quantized as well.

    The shortcuts of M and L-ReLU end that way, those of YOLOX with SiLU, and those of L with a
    factor on the other term. Four such blocks of 128 channels take TensorRT 8 0.6 times as long as
    half precision with both terms in INT8 (0.5 times with SiLU), and 0.8 to 1.0 times with one or
    none (H100).
    """
    for node in graph.nodes:
        if node.op_type != "Add" or len(node.input) != 2 or node.output[0] in plain:
            continue
        read = [_before_factor(graph, name) for name in node.input]
        activated = {
            name
            for name in node.input
            if _is_rectified(graph, name, integer) or _is_gated(graph, name, integer)
        }
        if (
            activated
            and quantized.union(activated).issuperset(read)
            and is_quantized_after(graph, node, quantized)
        ):
            yield from activated


def _before_factor(graph: GraphIndex, name: str) -> str:
    """Return the tensor before a multiplication by one number; without one, the tensor itself."""
    node = graph.producer(name)
    scaled = None if node is None else graph.scaled(node)
    return name if scaled is None else scaled[0]


def _is_rectified(graph: GraphIndex, name: str, integer: set[str]) -> bool:
    """Return whether a tensor is a ReLU of an INT8 layer's output."""
    node = graph.producer(name)
    return node is not None and node.op_type == "Relu" and node.input[0] in integer


def _is_gated(graph: GraphIndex, name: str, integer: set[str]) -> bool:
    """Return whether a tensor is the SiLU of an INT8 layer's output.

    Its channels may be rescaled afterwards (`equalization.rescaling`).
    """
    node = graph.producer(name)
    if node is not None and node.op_type == "Mul" and graph.scaled(node) is None:
        computed = [item for item in node.input if item not in graph.constants]
        if len(computed) == 1:
            node = graph.producer(computed[0])
    gated = None if node is None else graph.gated(node)
    return gated is not None and gated[0] in integer and gated[1].op_type == "Sigmoid"


def is_quantized_after(graph: GraphIndex, node: onnx.NodeProto, quantized: set[str]) -> bool:
    """Return whether a node's output, or the ReLU's that follows it, is a tensor to quantize."""
    readers = graph.readers(node.output[0])
    return node.output[0] in quantized or (
        len(readers) == 1 and readers[0].op_type == "Relu" and readers[0].output[0] in quantized
    )


def joined_groups(items: Iterable[Item], links: Iterable[Iterable[Item]]) -> list[tuple[Item, ...]]:
    """Return groups of two and more items that links join, directly or through other links.

    Groups and their items are in the order of `items`; links may contain further items.
    """
    group_of: dict[Item, set[Item]] = {}
    for link in links:
        joined = set[Item]()
        for item in link:
            joined |= group_of.get(item, {item})
        group_of.update(dict.fromkeys(joined, joined))
    groups: dict[int, list[Item]] = {}
    for item in items:
        if item in group_of:
            groups.setdefault(id(group_of[item]), []).append(item)
    return [tuple(group) for group in groups.values() if len(group) > 1]
