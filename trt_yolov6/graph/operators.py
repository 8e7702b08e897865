"""Classes of ONNX operators, with the reasons where two of them differ, and names of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

CONVOLUTIONS = ("Conv", "ConvTranspose")
"""Operators whose weights this package quantizes."""

WEIGHTED_OPS = (*CONVOLUTIONS, "Gemm", "MatMul")
"""Operators that do nearly all of a network's work."""

QDQ_OPS = ("QuantizeLinear", "DequantizeLinear")

HALF_SCALES_OPSET = 19
"""First ONNX opset in which Q/DQ nodes take scales in half precision."""

LAYOUT_OPS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators with the same values out as in, one tensor each, in another order or shape."""

MOVING_OPS = LAYOUT_OPS | {"DepthToSpace", "MaxPool", "Slice", "SpaceToDepth", "Split"}
"""Operators whose outputs hold values of their first input: one scale serves both.

Concat, which has several inputs to move, and Resize, whose mode decides, are asked about apart.
"""

FREE_OPS = LAYOUT_OPS | {"Concat"}
"""Operators that float16 graphs run in half precision after the last layers, too.

Split and Slice are not among them: each of their outputs would be cast, instead of the one input.
"""

CODE_PRESERVING_OPS = ("Concat", "MaxPool")
"""The moving operators, Concat included, that stand between an exported network's layers: of
codes on one scale they make codes on that scale."""

UNDECODED_OPS = LAYOUT_OPS | {"Cast", "Concat", "Gather", "Sigmoid", "Slice", "Split", *QDQ_OPS}
"""Operators after the last layers that decode nothing: they move values, or make a probability of
one. MaxPool is not among them: a graph that pools its scores suppresses boxes by it."""

ACTIVATIONS = frozenset(
    {"Clip", "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh"}
)
"""Elementwise activation functions without weights."""

FUSED_OPS = ACTIVATIONS | {"BatchNormalization", "PRelu", "Softplus"}
"""Operators that TensorRT computes in one kernel with the convolution before them."""


def weight_axis(op: str) -> int:
    """Return the axis of output channels in the weights of a convolution."""
    # ConvTranspose keeps them as (in, out / groups, height, width).
    return 1 if op == "ConvTranspose" else 0


def is_depthwise(node: onnx.NodeProto, weight_shape: Sequence[int]) -> bool:
    """Return whether a node is a convolution with a group, and one filter, for each channel."""
    groups = next((item.i for item in node.attribute if item.name == "group"), 1)
    return node.op_type == "Conv" and 1 < groups == weight_shape[0]


def layer_names(model: onnx.ModelProto) -> dict[str, str]:
    """Return the names of a graph's convolutions by their output tensor, in the graph's order.

    A layer is called as its node; where that has no name, or another layer has the same, as its
    output.
    """
    layers = [node for node in model.graph.node if node.op_type in CONVOLUTIONS]
    counts: dict[str, int] = {}
    for node in layers:
        counts[node.name] = counts.get(node.name, 0) + 1
    return {
        node.output[0]: node.name if node.name and counts[node.name] == 1 else node.output[0]
        for node in layers
    }
