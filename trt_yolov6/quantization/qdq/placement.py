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
from trt_yolov6.graph.operators import ACTIVATIONS, CONVOLUTIONS, MOVING_OPS, layer_names
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
    """Results of concatenations, poolings and the like, each with a tensor of the same scale that
    went into it: they get a pair too, which changes no value."""


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
            take them; else only layers read quantized tensors, and other nodes read them
            unquantized.
        requantize: count the results of concatenations, poolings and the like among `tensors`,
            whose ranges have to be known; else they are `repeated`, with the scale of their input.

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
    wanted = _wanted_tensors(graph, integer, plain)
    links = list(_links(graph, wanted, plain)) if propagate else []
    wanted.update(source for sources, _ in links for source in sources)
    if propagate:
        wanted.update(_activated_terms(graph, integer, plain, wanted))
    late = set() if requantize else wanted.intersection(_dequantized_late(graph, links))
    wanted -= late
    tensors = tuple(name for name in graph.order if name in wanted)
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

    All others run in INT8: the first, whose input of 0..1 loses one of its eight bits, and those
    that make predictions, whose outputs stay in float because no INT8 layer reads them.
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

    The two of squeeze-and-excitation do. They cost next to nothing, and their gates scale whole
    channels, so that rounding them costs accuracy and saves no time.
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

    A tensor core multiplies 32 eight-bit channels at a time; missing ones are padded with zeros.
    """
    weight = _weight_shape(graph, node)
    transposed = node.op_type == "ConvTranspose"
    channels = weight[0] // attribute(node, "group", 1) if transposed else weight[1]
    return "reads fewer than 16 channels" if channels < 16 else None


def is_transposed(graph: GraphIndex, node: onnx.NodeProto) -> str | None:
    """TensorRT-RTX has no transposed convolution in FP8: it would dequantize its input again.

    One that does not overlap is bound by the writing of its output anyway.
    """
    return "is a transposed convolution" if node.op_type == "ConvTranspose" else None


def works_less_than(multiply_adds: int) -> Rule:
    """Quantizing pays where each value is used often.

    TensorRT-RTX writes what a convolution computes in half precision and quantizes it in a kernel
    of its own, which reads two bytes and writes one for each value. What FP8 saves is half the time
    of the next convolution's multiply-adds for each value.
    """

    def rule(graph: GraphIndex, node: onnx.NodeProto) -> str | None:
        few = macs_per_input(node, _weight_shape(graph, node)) < multiply_adds
        return f"does fewer than {multiply_adds} multiply-adds a value" if few else None

    return rule


def is_among_the_last(count: int) -> Rule:
    """Predictions have few channels and are what is judged; in the head SiLU stands between layers.

    TensorRT-RTX fuses SiLU with a convolution in half precision, but not with one in FP8, which
    makes a kernel more where no FP8 layer comes next.

    Args:
        count: layers counted from the outputs on; 1 leaves those in float that no other comes
            after.
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
    quantized: QuantizedType, model: onnx.ModelProto, exclude: Collection[str] = ()
) -> Placement:
    """Decide what to quantize to a type, as `place` does, by the rules that serve the type best.

    FP8 stands right before layers that gain by it, and nowhere else. TensorRT-RTX (seen in 1.5 to
    1.7) pools, concatenates and adds in half precision whatever is before it, so that a pair there
    would only add kernels.
    """
    if quantized.is_floating:
        return place(model, exclude, exclude_rules=FP8_RULES, propagate=False)
    return place(model, exclude)


# --- which tensors carry INT8 -------------------------------------------------------------------


def _unquantized_readers(graph: GraphIndex, integer: set[str]) -> set[str]:
    """Return the nodes, by first output, that read tensors as they are before quantization.

    A layer in float is there to lose nothing, so neither its input nor what leads only to it is
    rounded, nor what leads to a graph output without another layer. Any other float operator (such
    as the multiplication of a shortcut by its factor) reads the quantized tensor: reading the
    other would make TensorRT write the tensor twice, once in float.
    """
    plain: set[str] = set()
    for node in reversed(graph.nodes):
        if node.output[0] in integer:
            continue
        wishes = [
            user.output[0] in plain for name in node.output if name for user in graph.readers(name)
        ]
        # A data-movement operator stays unquantized if any of its readers wants that.
        moves = bool(_concatenated(graph, node) or _moved(graph, node))
        if node.op_type in CONVOLUTIONS or all(wishes) or (moves and any(wishes)):
            plain.add(node.output[0])
    return plain


def _wanted_tensors(graph: GraphIndex, integer: set[str], plain: set[str]) -> set[str]:
    """Return the tensors to quantize: what INT8 layers read, and what is added to their outputs."""
    wanted = {node.input[0] for node in graph.nodes if node.output[0] in integer}
    while found := set(_shortcuts(graph, integer, plain, wanted)) - wanted:
        wanted |= found
    return wanted


def _links(graph: GraphIndex, wanted: set[str], plain: set[str]) -> Iterator[tuple[list[str], str]]:
    """Yield what goes into and what comes out of operators that pass INT8 on.

    All these tensors need equal scales, and only what goes in needs a pair: TensorRT quantizes as
    early and dequantizes as late as it can. Seen in what TensorRT-RTX 1.7 builds: with pairs only
    before them pooling and concatenation take INT8 and pass it to the convolution; with a pair
    only after them, one pooling that is read twice is computed twice; with pairs before some of a
    concatenation's inputs only, the others come in float.

    Where another reader wants the unquantized values, the operator stays in float.
    """
    pending, seen = sorted(wanted), set(wanted)
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
    """Yield the results that need no pair of their own: INT8 comes out, and dequantization waits.

    Not after a resizing: TensorRT-RTX 1.7 dequantizes before it, and the convolution after it would
    be left in float (four of the YOLOv6Lite's were).
    """
    for _, result in links:
        node = graph.producer(result)
        if node is not None and node.op_type != "Resize":
            yield result


def _repeated(
    results: Iterable[str], tensors: Collection[str], links: Iterable[tuple[Sequence[str], str]]
) -> dict[str, str]:
    """Return the tensors dequantized late, each with a tensor of the same scale that has a pair.

    Values do not change by a pair of their own. TensorRT 8 takes a convolution as INT8 only where a
    pair stands right before it; else its weights' DequantizeLinear stays a layer, and the build
    fails. TensorRT-RTX 1.7 makes the same layers of all these pairs as of none, but with one after
    a concatenation and none after the pooling before it, that pooling is in float.
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
    """A concatenation works in INT8 if all that goes in has the scale of what comes out.

    The convolution after it has one scale for its whole input anyway. With the same scale before
    it TensorRT only copies bytes, or has the layers before it write into place; with others each
    input would be quantized again.
    """
    if node.op_type != "Concat" or any(name in graph.constants for name in node.input):
        return []
    return list(dict.fromkeys(node.input))


def _moved(graph: GraphIndex, node: onnx.NodeProto) -> list[str]:
    """Max pooling, resizing and moving values keep the scale of their input.

    Rounding is monotonic, so the maximum of rounded values is the rounded maximum; what is only
    moved is not changed at all. Linear interpolation stays between the values it is given; cubic
    interpolation overshoots, and pads with a value may leave the range: they stay in float.
    """
    if node.op_type == "Resize":
        moves = attribute(node, "mode", "nearest") in ("nearest", "linear")
    else:
        moves = node.op_type in MOVING_OPS
    return [node.input[0]] if moves and node.input[0] not in graph.constants else []


def _shortcuts(
    graph: GraphIndex, integer: set[str], plain: set[str], wanted: set[str]
) -> Iterator[str]:
    """Yield the tensors that residual additions add to the output of a convolution.

    TensorRT fuses convolution, addition, ReLU and the quantization after them into one INT8
    kernel if the addend is INT8 too; the convolution's own output must not be quantized, because
    that would part it from the addition. Where both terms are convolutions, the later one is fused.
    Where activations stand between, the addition is a pointwise kernel of its own, for whose sake
    only `_activated_terms` are quantized.
    """
    yield from _activated_terms(graph, integer, plain, wanted)
    for node in graph.nodes:
        if node.op_type not in ("Add", "Sum") or len(node.input) != 2 or node.output[0] in plain:
            continue
        if not is_quantized_after(graph, node, wanted):
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
    graph: GraphIndex, integer: set[str], plain: set[str], wanted: set[str]
) -> Iterator[str]:
    """Yield what activations write for additions whose other term is quantized, as is their result.

    That is how the shortcuts of M and L-ReLU end, with SiLU those of YOLOX, and with a factor on
    the other term those of L. Four such blocks of 128 channels take TensorRT 8 0.6 times half
    precision's time with both terms in INT8 (0.5 times with SiLU), and 0.8 to 1.0 times with one of
    them or none (H100).
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
            and wanted.union(activated).issuperset(read)
            and is_quantized_after(graph, node, wanted)
        ):
            yield from activated


def _before_factor(graph: GraphIndex, name: str) -> str:
    """Return the tensor that a multiplication by one number reads; else the tensor itself."""
    node = graph.producer(name)
    scaled = None if node is None else graph.scaled(node)
    return name if scaled is None else scaled[0]


def _is_rectified(graph: GraphIndex, name: str, integer: set[str]) -> bool:
    """Return whether a tensor is what a ReLU makes of an INT8 layer's output."""
    node = graph.producer(name)
    return node is not None and node.op_type == "Relu" and node.input[0] in integer


def _is_gated(graph: GraphIndex, name: str, integer: set[str]) -> bool:
    """Return whether a tensor is what SiLU makes of an INT8 layer's output.

    Its channels may have been rescaled after it (`equalization.rescaling`).
    """
    node = graph.producer(name)
    if node is not None and node.op_type == "Mul" and graph.scaled(node) is None:
        computed = [item for item in node.input if item not in graph.constants]
        if len(computed) == 1:
            node = graph.producer(computed[0])
    gated = None if node is None else graph.gated(node)
    return gated is not None and gated[0] in integer and gated[1].op_type == "Sigmoid"


def is_quantized_after(graph: GraphIndex, node: onnx.NodeProto, wanted: set[str]) -> bool:
    """Return whether a node's output, or the ReLU's that follows it, is a tensor to quantize."""
    readers = graph.readers(node.output[0])
    return node.output[0] in wanted or (
        len(readers) == 1 and readers[0].op_type == "Relu" and readers[0].output[0] in wanted
    )


def joined_groups(items: Iterable[Item], links: Iterable[Iterable[Item]]) -> list[tuple[Item, ...]]:
    """Return groups of two and more items that links join, directly or through other links.

    Groups and their items are in the order of `items`; links may have others as well.
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
