"""Bias correction: subtract the mean error that rounding adds to each convolution's output.

Rounded weights have constant errors, so the mean of a layer's outputs shifts wherever the mean of
its inputs is not zero, as after a ReLU (Nagel et al. 2019, "Data-free quantization through weight
equalization and bias correction", section 4.2). The bias can compensate that.

Correcting layer by layer, each after the corrected ones before it, needs a pass over the images
for every layer. Correcting all by what one pass shows counts an early error in each later layer.
So the part that comes from the inputs is subtracted first: with the means of a layer's input in the
float network and in the quantized one,

    own error(o) = mean of quantized output - mean of float output
                   - Σ_i (mean of quantized input i - mean of float input i) · Σ W_oi

and one pass over each of the two networks serves all layers. (At zero-padded borders the last sum
has fewer terms; what that misses is second-order.)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trt_yolov6.graph.editing import add_to_bias, with_outputs
from trt_yolov6.graph.index import attribute, constants_of, tensor_value
from trt_yolov6.graph.quantized import QuantizedLayer, quantized_layers
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.qdq.integer_arithmetic import with_integer_convolutions

_PARTS = 256
"""Steps that the largest mean error of a layer is counted in."""


def without_mean_rounding(
    float_model: onnx.ModelProto,
    quantized_model: onnx.ModelProto,
    means: Mapping[str, NDArray[np.float64]],
) -> onnx.ModelProto:
    """Return the Q/DQ graph whose biases compensate the mean errors of rounded weights.

    It needs no image, and leaves the mean errors of rounded activations. Without it, forms of a
    graph whose tensors have different means could not be compared.

    Args:
        float_model: the float32 graph that was quantized, after equalization.
        quantized_model: made from it by `insert_qdq`, tensors called as there; it is not changed.
        means: (channels,) the mean of each channel of the float tensors. Layers whose input
            is neither among them nor a concatenation of such stay as they are.
    """
    result = copy.deepcopy(quantized_model)
    makers = {name: node for node in float_model.graph.node for name in node.output}

    def mean_of(name: str) -> NDArray[np.float64] | None:
        if name in means:
            return means[name]
        node = makers.get(name)
        if node is None or node.op_type != "Concat" or attribute(node, "axis", 1) % 4 != 1:
            return None
        parts = [found for part in node.input if (found := mean_of(part)) is not None]
        return np.concatenate(parts) if len(parts) == len(node.input) else None

    for layer, node, weight in layers_of_both(result, float_model):
        mean = mean_of(node.input[0])
        if mean is not None:
            lost = weight.astype(np.float64) - layer.weights.values()
            shift_bias(result, layer, _mean_response(node, lost, mean))
    return result


class BiasCorrection:
    """Corrects the biases of Q/DQ graphs made from one float graph, whose means are kept."""

    def __init__(self, float_model: onnx.ModelProto, images: Sequence[NDArray[Any]]) -> None:
        """Take the float32 graph that was quantized, after equalization, and some inputs of it.

        A few dozen images do; the sample needs no more than 8.
        """
        self._float_model = float_model
        self._images = images
        self._float_means: dict[str, NDArray[np.float64]] = {}

    def correct(self, quantized_model: onnx.ModelProto) -> onnx.ModelProto:
        """Return a Q/DQ graph, made by `insert_qdq`, with its convolutions' biases corrected.

        Raises:
            UserError: there are no images, or they make a tensor NaN or infinite.
        """
        result = copy.deepcopy(quantized_model)
        both = layers_of_both(result, self._float_model)
        layers = [layer for layer, _, _ in both]
        inputs = [node.input[0] for _, node, _ in both]
        missing = {*inputs, *(layer.output for layer in layers)} - self._float_means.keys()
        if missing or not layers:
            means = _means(self._float_model, self._images, inputs, layers)
            self._float_means.update(means)
        before = self._float_means
        # On codes: the same on every processor.
        exact = with_integer_convolutions(
            with_outputs(quantized_model, (n for one in layers for n in (one.input, one.output)))
        )
        after = _means(exact, self._images, [item.input for item in layers], layers)
        for layer, node, weight in both:
            moved = after[layer.input] - before[node.input[0]]
            from_input = _mean_response(node, weight.astype(np.float64), moved)
            error = after[layer.output] - before[layer.output] - from_input
            shift_bias(result, layer, -_on_grid(error))
        return result


def layers_of_both(
    quantized_model: onnx.ModelProto, float_model: onnx.ModelProto
) -> list[tuple[QuantizedLayer, onnx.NodeProto, NDArray[np.float32]]]:
    """Return the layers with codes of their own, each with its node and weight in the float graph.

    Layers whose weight is not stored there are left out.
    """
    constants = constants_of(float_model)
    nodes = {node.output[0]: node for node in float_model.graph.node}
    return [
        (layer, node, tensor_value(constants[node.input[1]]))
        for layer in quantized_layers(quantized_model)
        if layer.has_own_codes
        and (node := nodes.get(layer.output)) is not None
        and node.input[1] in constants
    ]


def bias_of(
    layer: QuantizedLayer, constants: Mapping[str, onnx.TensorProto]
) -> NDArray[np.float64]:
    """Return a layer's bias, (channels,); zeros where it has none."""
    if len(layer.node.input) < 3 or not layer.node.input[2]:
        return np.zeros(layer.channels)
    return tensor_value(constants[layer.node.input[2]]).astype(np.float64)


def shift_bias(model: onnx.ModelProto, layer: QuantizedLayer, change: NDArray[Any]) -> None:
    """Add (output channels,) to a layer's bias in place, giving it one where it has none."""
    # A half-precision graph has half-precision scales, and its convolutions take such biases.
    dtype = layer.weights.scale_type
    add_to_bias(model, layer.position, change, own=f"{layer.output}_bias", dtype=dtype)


def _means(
    model: onnx.ModelProto,
    images: Sequence[NDArray[Any]],
    inputs: Sequence[str],
    layers: Sequence[QuantizedLayer],
) -> dict[str, NDArray[np.float64]]:
    """Return the mean of each channel of the layers' inputs and outputs."""
    found = collect(model, images, [*inputs, *(item.output for item in layers)])
    return {name: item.channels.mean for name, item in found.items() if item.channels is not None}


def _on_grid(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round a layer's mean errors to `_PARTS` of their largest, a power of two.

    The float network's means differ in their last bits from processor to processor.
    """
    largest = float(np.abs(errors).max(initial=0))
    if not largest:
        return errors
    step = 2.0 ** np.ceil(np.log2(largest)) / _PARTS
    rounded: NDArray[np.float64] = np.rint(errors / step) * step
    return rounded


def _mean_response(
    node: onnx.NodeProto, weight: NDArray[np.float64], mean: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the mean output, per channel, that a mean input (channels,) makes."""
    groups, sums = attribute(node, "group", 1), weight.sum(axis=(2, 3))
    by_group = sums.reshape(groups, -1, sums.shape[1])
    inputs = mean.reshape(groups, -1)
    if node.op_type == "Conv":
        return np.asarray(np.einsum("goi,gi->go", by_group, inputs)).reshape(-1)
    # Each output pixel sees one in `spread` of the taps.
    spread = float(np.prod(attribute(node, "strides", [1, 1])))
    return np.asarray(np.einsum("gio,gi->go", by_group, inputs) / spread).reshape(-1)
