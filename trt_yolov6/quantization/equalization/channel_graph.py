"""Find the channels of an ONNX graph that may be rescaled, alone or only together.

Multiplying a channel by s > 0 where a convolution writes it, and dividing the weights that read it
by s, leaves the function of the network as it is if everything between is positively homogeneous:
f(s x) = s f(x). `trace_channels` follows every channel from the convolution that writes it to all
that read it, and puts channels that must share one s into one class; `rescaling` applies them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trt_yolov6.graph.index import (
    GraphIndex,
    attribute,
    attributes,
    names_read,
    shapes_of,
    tensor_value,
)

Classes = NDArray[np.intp]

FIXED = 0
"""The class of the channels that must keep their scale."""


@dataclass(frozen=True)
class Convolution:
    """A Conv or ConvTranspose whose weights lie in the graph."""

    position: int
    """Index among the graph's nodes."""
    input: str
    output: str
    weight: str
    bias: str | None
    groups: int
    transposed: bool

    def by_output(self, weight: NDArray[Any]) -> NDArray[Any]:
        """View its weight as (output channels, input channels of their group, taps)."""
        if not self.transposed:
            return weight.reshape(weight.shape[0], weight.shape[1], -1)
        grouped = weight.reshape(self.groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
        merged: NDArray[Any] = np.swapaxes(grouped, 1, 2)
        return merged.reshape(-1, merged.shape[2], merged.shape[3])

    def from_output(self, view: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the array under a view of `by_output`, in the given shape."""
        if not self.transposed:
            return view.reshape(shape)
        grouped = view.reshape(self.groups, -1, *view.shape[1:])
        return np.swapaxes(grouped, 1, 2).reshape(shape)

    def read_by(self, outputs: int, per_input: NDArray[Any]) -> NDArray[Any]:
        """Repeat a value of each input channel for the output channels that read it.

        Args:
            outputs: how many output channels there are.
            per_input: (input channels,).

        Returns:
            (output channels, input channels of their group), or (1, input channels) without groups.
        """
        grouped = per_input.reshape(self.groups, -1)
        return grouped if self.groups == 1 else np.repeat(grouped, outputs // self.groups, axis=0)


@dataclass(frozen=True)
class Border:
    """Positions of a padded convolution's kernel that lie in the image."""

    rows: NDArray[np.bool_]
    """(output rows, kernel rows) whether that row of the kernel reads one of the input."""
    columns: NDArray[np.bool_]
    """(output columns, kernel columns)"""

    def missing(self, taps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the part of the response to a constant input that padding leaves out.

        Args:
            taps: (channels, kernel rows, kernel columns) the response of each tap.

        Returns:
            (channels, rows, columns), 0 where the whole kernel lies in the image.
        """
        inside = np.einsum("oab,ya->oyb", taps, self.rows.astype(np.float64))
        inside = np.einsum("oyb,xb->oyx", inside, self.columns.astype(np.float64))
        whole = np.logical_and.outer(self.rows.all(axis=1), self.columns.all(axis=1))
        missing: NDArray[np.float64] = taps.sum(axis=(1, 2))[:, None, None] - inside
        return np.where(whole, 0.0, missing)


@dataclass(frozen=True)
class ChannelMap:
    """The channels of a graph and the classes that tie them."""

    classes: Mapping[str, Classes]
    """Class of each channel of a tensor (axis 1); tensors that keep their scale may be missing."""
    sources: Mapping[str, Classes]
    """Origin of each channel, by tensor: equal numbers are copies of one channel."""
    count: int
    """Classes are numbered from 0, the fixed one, to count - 1."""
    convolutions: tuple[Convolution, ...]
    activations: tuple[str, ...]
    """Tensors after which a multiplication by a constant per channel has to be inserted, where
    their classes are rescaled."""
    shiftable: frozenset[str] = frozenset()
    """Activations from which a constant per channel can be subtracted as well: only convolutions
    read them, whose biases compensate it."""
    bordered: Mapping[str, Border] = field(default_factory=dict)
    """Borders of the convolutions with padding that read such activations, by their outputs."""


def trace_channels(model: onnx.ModelProto, *, through_activations: bool = False) -> ChannelMap:
    """Follow the channels of two-dimensional convolutions through the graph.

    Args:
        model: a float graph with its nodes in topological order, as ONNX demands.
        through_activations: let channels change their scale right after an activation that is not
            homogeneous (SiLU, HardSwish, …), by a multiplication to be inserted there.
    """
    trace = _Trace(model, through_activations)
    for position, node in enumerate(trace.graph.nodes):
        rule = _RULES.get(node.op_type, _fix) if node.domain in ("", "ai.onnx") else _fix
        trace.position = position
        rule(trace, node)
        _fix_outer_scope(trace, node)
    for item in model.graph.output:
        trace.fix(item.name)
    return trace.result()


class _Trace:
    """State while the nodes are visited in order."""

    def __init__(self, model: onnx.ModelProto, through_activations: bool) -> None:
        self.graph = GraphIndex(model)
        overridable = {item.name for item in model.graph.input}
        self.constants = {
            name: item for name, item in self.graph.constants.items() if name not in overridable
        }
        self.uses = Counter(name for node in self.graph.nodes for name in node.input)
        self.shapes = shapes_of(onnx.shape_inference.infer_shapes(model, data_prop=True))
        self.through_activations = through_activations
        self.position = 0
        self.parents = [FIXED]
        self.sources: dict[str, Classes] = {}
        self.convolutions: list[Convolution] = []
        self.activations: list[str] = []
        self.borders: dict[str, Border] = {}

    def new(self, count: int) -> Classes:
        first = len(self.parents)
        self.parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def find(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = self.parents[self.parents[number]]
            number = self.parents[number]
        return number

    def tie(self, first: Classes, second: Classes) -> None:
        for one, other in zip(first.ravel(), second.ravel(), strict=True):
            low, high = sorted((self.find(int(one)), self.find(int(other))))
            self.parents[high] = low  # the fixed class is the lowest

    def fix(self, name: str) -> None:
        if name in self.sources:
            self.tie(self.sources[name], np.zeros_like(self.sources[name]))

    def constant(self, name: str) -> NDArray[Any] | None:
        found = self.constants.get(name)
        return None if found is None else tensor_value(found)

    def channels(self, name: str) -> int | None:
        shape = self.shapes.get(name)
        return shape[1] if shape is not None and len(shape) == 4 else None

    def result(self) -> ChannelMap:
        roots = np.array([self.find(number) for number in range(len(self.parents))])
        numbers = np.unique(roots, return_inverse=True)[1]
        classes = {
            name: numbers[source] for name, source in self.sources.items() if source.ndim == 1
        }
        shiftable = frozenset(name for name in self.activations if self._can_shift(name))
        return ChannelMap(
            classes=classes,
            sources={name: self.sources[name] for name in classes},
            count=int(numbers.max()) + 1,
            convolutions=tuple(self.convolutions),
            activations=tuple(self.activations),
            shiftable=shiftable,
            bordered=self.borders,
        )

    def _can_shift(self, name: str) -> bool:
        """Return whether all readers of a tensor pass a constant on to convolutions' biases."""
        readers = self.graph.readers(name)
        return (
            bool(readers)
            and name not in self.graph.outputs
            and name in self.sources
            and all(self._passes_shift_on(node, name) for node in readers)
        )

    def _passes_shift_on(self, node: onnx.NodeProto, name: str) -> bool:
        if node.op_type == "Conv":
            return (
                any(item.output == node.output[0] for item in self.convolutions)
                and list(node.input).count(name) == 1
                and self._has_known_border(node)
            )
        if node.op_type == "Concat" and attribute(node, "axis", 1) % 4 != 1:
            return False
        return node.op_type in _SHIFT_PRESERVING and all(map(self._can_shift, node.output))

    def _has_known_border(self, node: onnx.NodeProto) -> bool:
        """Return whether a convolution has no padding, or a border that can be compensated.

        Padding puts zeros around a tensor whose values are shifted. Its effect on the border is a
        constant, to be added after the convolution if the size is known. That is done only after
        depthwise convolutions: it costs a constant as large as their output.
        """
        given = attributes(node)
        pads = given.get("pads", [0, 0, 0, 0])
        if given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return False
        if not any(pads):
            return True
        output = node.output[0]
        before, after = self.shapes.get(node.input[0]), self.shapes.get(output)
        weight = self.constants[node.input[1]].dims
        if not _is_depthwise(given, weight) or output in self.graph.outputs:
            return False
        if before is None or after is None or None in (*before[2:], *after[2:]):
            return False
        strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])

        def inside(axis: int) -> NDArray[np.bool_]:
            size, places = before[2 + axis] or 0, after[2 + axis] or 0
            first = np.arange(places) * strides[axis] - pads[axis]
            read = first[:, None] + np.arange(weight[2 + axis]) * dilations[axis]
            seen: NDArray[np.bool_] = (read >= 0) & (read < size)
            return seen

        self.borders[output] = Border(inside(0), inside(1))
        return True


def _is_depthwise(given: Mapping[str, Any], weight: Sequence[int]) -> bool:
    return given.get("group", 1) > 1 and weight[1] == 1


_SHIFT_PRESERVING = frozenset(
    {"Concat", "Identity", "MaxPool", "Reshape", "Resize", "Slice", "Split", "Transpose"}
)
"""Operators of which a constant comes out that went in, channel by channel: those that `_RULES`
follow, means aside, which other operators than convolutions read."""

_Rule = Callable[[_Trace, onnx.NodeProto], None]


def _fix(trace: _Trace, node: onnx.NodeProto) -> None:
    """An unknown operator keeps the scale of its inputs and outputs."""
    for name in node.input:
        trace.fix(name)


def _fix_outer_scope(trace: _Trace, node: onnx.NodeProto) -> None:
    """The body of an If or a Loop may read any tensor by name."""
    for name in set(names_read(node)).difference(node.input):
        trace.fix(name)


def _convolution(trace: _Trace, node: onnx.NodeProto) -> None:
    """A convolution reads channels and writes new ones: scales end and begin here."""
    weight = trace.constants.get(node.input[1])
    if weight is None or len(weight.dims) != 4 or weight.data_type != onnx.TensorProto.FLOAT:
        return _fix(trace, node)
    transposed = node.op_type == "ConvTranspose"
    groups = attribute(node, "group", 1)
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
    outputs = weight.dims[1] * groups if transposed else weight.dims[0]
    written = trace.new(outputs)
    trace.sources[node.output[0]] = written
    # A weight or a bias that several nodes read cannot be scaled for one of them.
    own_weight = trace.uses[node.input[1]] == 1
    own_bias = bias is None or (bias in trace.constants and trace.uses[bias] == 1)
    if not own_weight:
        trace.fix(node.input[0])
    if not (own_weight and own_bias):
        trace.fix(node.output[0])
    if own_weight:
        trace.convolutions.append(
            Convolution(
                trace.position,
                node.input[0],
                node.output[0],
                node.input[1],
                bias if own_bias else None,
                groups,
                transposed,
            )
        )


def _same_channels(trace: _Trace, node: onnx.NodeProto) -> None:
    """Homogeneous operations that keep each channel to itself.

    Relu, LeakyRelu and PRelu for s > 0; pooling (its padding never wins a maximum and is zero in a
    mean); resizing over height and width, a weighted mean with constant weights.
    """
    if node.input[0] in trace.sources:
        trace.sources[node.output[0]] = trace.sources[node.input[0]]


def _prelu(trace: _Trace, node: onnx.NodeProto) -> None:
    trace.fix(node.input[1])
    _same_channels(trace, node)


def _resize(trace: _Trace, node: onnx.NodeProto) -> None:
    mode = attribute(node, "coordinate_transformation_mode", "half_pixel")
    if mode == "tf_crop_and_resize" or trace.channels(node.output[0]) != len(
        trace.sources.get(node.input[0], ())
    ):
        return _fix(trace, node)  # outside the crop stands a constant that does not scale
    return _same_channels(trace, node)


def _spatial_mean(trace: _Trace, node: onnx.NodeProto) -> None:
    axes = trace.constant(node.input[1]) if len(node.input) > 1 else None
    listed = attribute(node, "axes", None) if axes is None else axes.tolist()
    keeps = attribute(node, "keepdims", 1)
    if listed is None or not keeps or any(axis % 4 not in (2, 3) for axis in listed):
        return _fix(trace, node)
    return _same_channels(trace, node)


def _pad(trace: _Trace, node: onnx.NodeProto) -> None:
    """Padding height and width with zeros or with the image's own values."""
    pads = trace.constant(node.input[1]) if len(node.input) > 1 else None
    value = trace.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else 0
    if (
        pads is None
        or pads.size != 8
        or pads.reshape(2, 4)[:, :2].any()
        or value is None
        or np.any(value)
    ):
        return _fix(trace, node)
    return _same_channels(trace, node)


def _concat(trace: _Trace, node: onnx.NodeProto) -> None:
    """Along the channels each keeps its class; along another axis the operands' are tied."""
    parts = [trace.sources.get(name) for name in node.input]
    axis = attribute(node, "axis", 1)
    if axis % 4 != 1:
        return _elementwise(trace, node)
    written = []
    for name, part in zip(node.input, parts, strict=True):
        if part is None:
            count = trace.channels(name)
            if count is None:
                return _fix(trace, node)
            part = np.zeros(count, np.intp)
        if part.ndim != 1:
            return _fix(trace, node)
        written.append(part)
    trace.sources[node.output[0]] = np.concatenate(written)


def _elementwise(trace: _Trace, node: onnx.NodeProto) -> None:
    """Sums and the like of tensors: (s a) + (s b) = s (a + b) if both have the same s."""
    parts = [trace.sources.get(name) for name in node.input]
    first = parts[0]
    if first is None or any(part is None or part.shape != first.shape for part in parts):
        return _fix(trace, node)
    for part in parts[1:]:
        assert part is not None
        trace.tie(first, part)
    trace.sources[node.output[0]] = first


def _multiply(trace: _Trace, node: onnx.NodeProto) -> None:
    """(s a) · b = s (a · b) for a b that keeps its scale: a constant, or the gate of an attention.

    A tensor times its own sigmoid is an activation: the sigmoid has fixed the tensor's scale.
    """
    if _is_silu(trace, node):
        return _activation(trace, node)
    scaled = [name for name in node.input if name in trace.sources]
    if (
        len(scaled) != 1
        or len(set(node.input)) != 2
        or (node.op_type == "Div" and scaled[0] != node.input[0])
        or trace.channels(node.output[0]) != trace.sources[scaled[0]].size
        or trace.sources[scaled[0]].ndim != 1
    ):
        return _fix(trace, node)
    trace.sources[node.output[0]] = trace.sources[scaled[0]]


def _is_silu(trace: _Trace, node: onnx.NodeProto) -> bool:
    gated = trace.graph.gated(node)
    return gated is not None and gated[1].op_type in ("Sigmoid", "HardSigmoid")


def _activation(trace: _Trace, node: onnx.NodeProto) -> None:
    """SiLU, HardSwish and the like bend at fixed places: their input keeps its scale.

    What they write has it too, unless a multiplication after them changes it.
    """
    known = [trace.sources[name] for name in node.input if name in trace.sources]
    _fix(trace, node)
    if known and known[0].ndim == 1:
        if trace.through_activations:
            trace.sources[node.output[0]] = trace.new(known[0].size)
            trace.activations.append(node.output[0])
        else:
            trace.sources[node.output[0]] = np.zeros_like(known[0])


def _split(trace: _Trace, node: onnx.NodeProto) -> None:
    source = trace.sources.get(node.input[0])
    if source is None or source.ndim != 1:
        return _fix(trace, node)
    if attribute(node, "axis", 0) % 4 != 1:
        for name in node.output:
            trace.sources[name] = source
        return None
    sizes = trace.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    listed = attribute(node, "split", None) if sizes is None else sizes.tolist()
    if listed is None:
        # Equal parts, the last one smaller where the number does not divide.
        part = -(-source.size // len(node.output))
        listed = [part] * (len(node.output) - 1)
        listed.append(source.size - sum(listed))
    if sum(listed) != source.size or min(listed) < 1:
        return _fix(trace, node)
    for name, piece in zip(node.output, np.split(source, np.cumsum(listed)[:-1]), strict=True):
        trace.sources[name] = piece


def _slice(trace: _Trace, node: onnx.NodeProto) -> None:
    source = trace.sources.get(node.input[0])
    given = [trace.constant(name) for name in node.input[1:]]
    if source is None or source.ndim != 1 or len(given) < 3 or any(item is None for item in given):
        return _fix(trace, node)
    starts, ends, axes = (np.atleast_1d(np.asarray(item)).tolist() for item in given[:3])
    steps = np.atleast_1d(np.asarray(given[3])).tolist() if len(given) > 3 else [1] * len(axes)
    if any(step < 1 for step in steps):
        return _fix(trace, node)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis % 4 == 0:
            return _fix(trace, node)
        if axis % 4 == 1:
            source = source[start:end:step]
    trace.sources[node.output[0]] = source


def _reshape(trace: _Trace, node: onnx.NodeProto) -> None:
    """The two reshapes of a channel shuffle: (N, C, H, W) ↔ (N, groups, C / groups, H, W)."""
    source = trace.sources.get(node.input[0])
    before, after = trace.shapes.get(node.input[0]), trace.shapes.get(node.output[0])
    if (
        source is None
        or before is None
        or after is None
        or len(before) != source.ndim + 3
        or len(after) not in (4, 5)
        or before[-1] is None
        or before[-2:] != after[-2:]
        or before[-2] is None
    ):
        return _fix(trace, node)
    groups = after[1:-2]
    if any(size is None for size in groups) or np.prod(np.array(groups, int)) != source.size:
        return _fix(trace, node)
    trace.sources[node.output[0]] = source.reshape([int(size or 0) for size in groups])


def _transpose(trace: _Trace, node: onnx.NodeProto) -> None:
    source = trace.sources.get(node.input[0])
    if source is None or source.ndim != 2 or attribute(node, "perm", []) != [0, 2, 1, 3, 4]:
        return _fix(trace, node)
    trace.sources[node.output[0]] = source.T


_RULES: dict[str, _Rule] = {
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "Relu": _same_channels,
    "LeakyRelu": _same_channels,
    "PRelu": _prelu,
    "Identity": _same_channels,
    "Dropout": _same_channels,
    "MaxPool": _same_channels,
    "AveragePool": _same_channels,
    "GlobalAveragePool": _same_channels,
    "GlobalMaxPool": _same_channels,
    "Resize": _resize,
    "ReduceMean": _spatial_mean,
    "ReduceMax": _spatial_mean,
    "Pad": _pad,
    "Concat": _concat,
    "Add": _elementwise,
    "Sub": _elementwise,
    "Sum": _elementwise,
    "Max": _elementwise,
    "Min": _elementwise,
    "Mul": _multiply,
    "Div": _multiply,
    "Split": _split,
    "Slice": _slice,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "HardSwish": _activation,
    "Swish": _activation,
    "Mish": _activation,
    "Gelu": _activation,
    "Elu": _activation,
    "Clip": _activation,
}
