"""Rescaled networks: the same function, with channels whose ranges differ wildly."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from onnx import numpy_helper


def rescale_channels(
    model: onnx.ModelProto,
    rng: np.random.Generator,
    low: float,
    high: float,
    *,
    log_uniform: bool = True,
) -> onnx.ModelProto:
    """Multiply the channels between consecutive convolutions by random factors.

    Wherever a convolution's output goes through a ReLU to one convolution alone, its channels are
    multiplied, and the weights that read them divided, by factors from `low` to `high`. It looks
    for that one pattern only and shares nothing with the equalization that it is to try.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    tensors = {item.name: item for item in graph.initializer}
    for first in graph.node:
        if first.op_type != "Conv" or [n.op_type for n in readers[first.output[0]]] != ["Relu"]:
            continue
        after = readers[readers[first.output[0]][0].output[0]]
        if [node.op_type for node in after] != ["Conv"]:
            continue
        weight, bias = (numpy_helper.to_array(tensors[name]) for name in first.input[1:])
        reader = numpy_helper.to_array(tensors[after[0].input[1]])
        drawn = rng.uniform(0, 1, len(bias))
        factor = low * (high / low) ** drawn if log_uniform else low + (high - low) * drawn
        factor = factor.astype(np.float32)
        for name, values in (
            (first.input[1], weight * factor[:, None, None, None]),
            (first.input[2], bias * factor),
            (after[0].input[1], reader / factor[None, :, None, None]),
        ):
            tensors[name].CopyFrom(numpy_helper.from_array(values, name))
    return result
