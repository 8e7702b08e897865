"""Multiply and shift channels where they are written, and undo it where they are read."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from trt_yolov6.graph.editing import add_initializers, add_to_bias, replace_tensor, set_nodes
from trt_yolov6.graph.index import constants_of, tensor_value
from trt_yolov6.quantization.equalization.channel_graph import ChannelMap

Shifts = Mapping[str, NDArray[np.float64]]
"""(channels,) what is subtracted of each channel of a tensor, by its name."""


def rescale(
    model: onnx.ModelProto,
    channels: ChannelMap,
    factors: NDArray[np.float32],
    shifts: Shifts | None = None,
) -> onnx.ModelProto:
    """Return the graph with each channel multiplied where written and divided where read.

    Args:
        model: the graph that `channels` was made from; it is not changed.
        factors: (classes,) above 0; that of the fixed class is 1.
        shifts: of some of `channels.shiftable`: what is subtracted after the activation, before it
            is multiplied, and added again by the biases of what reads it.
    """
    result = copy.deepcopy(model)
    constants = constants_of(result)
    by_source = shifts_by_source(channels, shifts or {})
    borders: dict[str, NDArray[np.float64]] = {}
    for item in channels.convolutions:
        weight = tensor_value(constants[item.weight]).copy()
        written = factors[channels.classes[item.output]]
        by_output = item.by_output(weight)
        if item.input in channels.sources:
            taken = by_source[channels.sources[item.input]]
            if taken.any():
                read = item.read_by(len(by_output), taken)
                taps = (by_output.astype(np.float64) * read[:, :, None]).sum(axis=1)
                own = f"{item.output}_shifted_bias"
                add_to_bias(result, item.position, taps.sum(axis=1), own=own)
                if item.output in channels.bordered:
                    taps = taps.reshape(len(taps), *weight.shape[2:])
                    missing = channels.bordered[item.output].missing(taps)
                    borders[item.output] = -missing * written[:, None, None]
        scaled = by_output * written[:, None, None]
        if item.input in channels.classes:
            read = item.read_by(len(scaled), factors[channels.classes[item.input]])
            scaled = scaled / read[:, :, None]
        replace_tensor(constants[item.weight], item.from_output(scaled, weight.shape))
        bias = result.graph.node[item.position].input[2:]
        # One that others read keeps its values: nothing is written to another scale then.
        if bias and np.any(written != 1):
            stored = constants_of(result)[bias[0]]
            replace_tensor(stored, tensor_value(stored) * written)
    _insert_operators(result, channels, factors, shifts or {}, borders)
    return result


def rescaled_name(name: str) -> str:
    """Name of what an activation's tensor becomes where operators are put after it."""
    return f"{name}_equalized"


def shifts_by_source(channels: ChannelMap, shifts: Shifts) -> NDArray[np.float64]:
    """Return the constants that are subtracted, (sources,), as `channels.sources` counts."""
    highest = max((int(one.max(initial=0)) for one in channels.sources.values()), default=0)
    result = np.zeros(highest + 1)
    for name, values in shifts.items():
        result[channels.sources[name]] = values
    return result


def _insert_operators(
    model: onnx.ModelProto,
    channels: ChannelMap,
    factors: NDArray[np.float32],
    shifts: Shifts,
    borders: Mapping[str, NDArray[np.float64]],
) -> None:
    """Insert operators that weights cannot absorb.

    After an activation they change the channels' scale and middle, after a padded convolution the
    border.
    """
    graph = model.graph
    renamed: dict[str, str] = {}
    added: dict[str, list[onnx.NodeProto]] = {}
    for name, missing in borders.items():
        constant, target = f"{name}_border", f"{name}_bordered"
        add_initializers(graph, {constant: missing[None].astype(np.float32)})
        renamed[name] = target
        added[name] = [helper.make_node("Add", [name, constant], [target], target)]
    for name in channels.activations:
        own = factors[channels.classes[name]].reshape(1, -1, 1, 1)
        taken = shifts.get(name, np.zeros(1)).reshape(1, -1, 1, 1).astype(np.float32)
        steps = [("Sub", "shift", taken)] if taken.any() else []
        steps += [("Mul", "equalization", own)] if np.any(own != 1) else []
        source, made = name, []
        for number, (operator, kind, value) in enumerate(steps, start=1):
            constant = f"{name}_{kind}"
            add_initializers(graph, {constant: value})
            target = rescaled_name(name) if number == len(steps) else f"{name}_shifted"
            made.append(helper.make_node(operator, [source, constant], [target], target))
            source = target
        if made:
            renamed[name], added[name] = source, made
    nodes = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        nodes.append(node)
        nodes.extend(one for name in node.output for one in added.get(name, ()))
    if added:
        set_nodes(graph, nodes)
