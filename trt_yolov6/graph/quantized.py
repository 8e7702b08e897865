"""Which layers of a Q/DQ graph are quantized, to what, and with which scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trt_yolov6.graph.index import GraphIndex, attribute, tensor_value
from trt_yolov6.graph.operators import CONVOLUTIONS, MOVING_OPS, weight_axis


@dataclass(frozen=True)
class Quantizer:
    """A QuantizeLinear or DequantizeLinear with its constants."""

    node: onnx.NodeProto
    codes: onnx.TensorProto | None
    """Codes that the DequantizeLinear reads, where they are stored."""
    scale: onnx.TensorProto | None
    """One scale, or one for each channel; None where it is computed."""
    zero_point: onnx.TensorProto | None
    """None where it is computed, or absent, which stands for 0."""
    type: int
    """ONNX type of the codes; 0 where the graph does not say."""

    @property
    def scale_type(self) -> np.dtype[Any]:
        """The stored scale's type: what the node makes of its codes.

        Raises:
            ValueError: the scale is computed.
        """
        return self._stored_scale().dtype

    def scale_for(self, rank: int) -> NDArray[np.float32]:
        """Return the stored scale so that it broadcasts against codes of `rank` axes.

        Raises:
            ValueError: the scale is computed.
        """
        values = self._stored_scale().astype(np.float32)
        if values.size > 1:
            axis = attribute(self.node, "axis", 1) % rank
            values = values.reshape([-1 if index == axis else 1 for index in range(rank)])
        return values

    def values(self) -> NDArray[np.float32]:
        """Return the values of stored symmetric codes.

        Raises:
            ValueError: codes or scale are computed.
        """
        if self.codes is None:
            raise ValueError(f"the codes {self.node.input[0]!r} are computed")
        codes = tensor_value(self.codes).astype(np.float32)
        return codes * self.scale_for(codes.ndim)

    def _stored_scale(self) -> NDArray[Any]:
        if self.scale is None:
            raise ValueError(f"the scale {self.node.input[1]!r} is computed")
        return tensor_value(self.scale)


@dataclass(frozen=True)
class QuantizedLayer:
    """A convolution that reads its weights through a DequantizeLinear."""

    position: int
    """Index among the graph's nodes."""
    node: onnx.NodeProto
    weights: Quantizer
    """The DequantizeLinear of its weights."""
    activations: Quantizer | None
    """The DequantizeLinear right before its input; None where there is none."""
    is_shared: bool
    """Another node reads the weights, as codes or dequantized."""

    @property
    def input(self) -> str:
        """The activation tensor that it reads, after that tensor's Q/DQ pair."""
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        """The tensor that it produces."""
        return str(self.node.output[0])

    @property
    def weight(self) -> str:
        """The tensor of its weights' codes."""
        return str(self.weights.node.input[0])

    @property
    def weight_scale(self) -> str:
        """The tensor of its weights' scale."""
        return str(self.weights.node.input[1])

    @property
    def scale(self) -> NDArray[np.float32]:
        """The weights' scale, which broadcasts against their four axes; see `scale_for`."""
        return self.weights.scale_for(4)

    @property
    def transposed(self) -> bool:
        """True for a ConvTranspose."""
        return self.node.op_type == "ConvTranspose"

    @property
    def channels(self) -> int:
        """Number of output channels; the codes must be stored."""
        assert self.weights.codes is not None
        made = int(self.weights.codes.dims[weight_axis(self.node.op_type)])
        return made * attribute(self.node, "group", 1) if self.transposed else made

    @property
    def has_own_codes(self) -> bool:
        """True if the weights are stored as INT8 or E4M3, four axes, with a scale, for it alone."""
        codes = self.weights.codes
        return (
            codes is not None
            and self.weights.scale is not None
            and codes.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN)
            and len(codes.dims) == 4
            and not self.is_shared
        )

    @property
    def has_scale_by_output(self) -> bool:
        """True if the stored weights (4 axes) have one scale, or one for each output channel."""
        codes, scale = self.weights.codes, self.weights.scale
        if codes is None or scale is None or len(codes.dims) != 4:
            return False
        if math.prod(scale.dims) == 1:
            return True
        axis = weight_axis(self.node.op_type)
        return bool(
            not (self.transposed and attribute(self.node, "group", 1) != 1)
            and attribute(self.weights.node, "axis", 1) % 4 == axis
            and not attribute(self.weights.node, "block_size", 0)
            and list(scale.dims) == [codes.dims[axis]]
        )


def quantized_layers(model: onnx.ModelProto | GraphIndex) -> tuple[QuantizedLayer, ...]:
    """Return the convolutions whose weights are dequantized, in the graph's order."""
    graph = model if isinstance(model, GraphIndex) else GraphIndex(model)
    found = []
    for position, node in enumerate(graph.nodes):
        weights = quantizer_before(graph, node.input[1]) if node.op_type in CONVOLUTIONS else None
        if weights is not None:
            codes, dequantized = weights.node.input[0], weights.node.output[0]
            uses = sum(
                list(reader.input).count(name)
                for name in (codes, dequantized)
                for reader in graph.readers(name)
            )
            activations = quantizer_before(graph, node.input[0])
            found.append(QuantizedLayer(position, node, weights, activations, uses > 2))
    return tuple(found)


def quantizer_before(graph: GraphIndex, name: str) -> Quantizer | None:
    """Return the DequantizeLinear that produces a tensor; None where something else does."""
    node = graph.producer(name)
    return None if node is None or node.op_type != "DequantizeLinear" else quantizer(graph, node)


def quantizer(graph: GraphIndex, node: onnx.NodeProto) -> Quantizer:
    """Return a QuantizeLinear or DequantizeLinear with its constants."""
    codes = graph.constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    zero_point = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
    return Quantizer(
        node, codes, graph.constants.get(node.input[1]), zero_point, _code_type(graph, node)
    )


def quantized_type(graph: GraphIndex, name: str) -> int | None:
    """Return the ONNX type that a tensor is dequantized from, 0 if unknown; None for a float one.

    Operators that only move values may stand between: TensorRT lets them work on the codes.
    """
    node = graph.producer(name)
    if node is None:
        return None
    if node.op_type in MOVING_OPS:
        return quantized_type(graph, node.input[0])
    if node.op_type == "Concat":
        joined = {quantized_type(graph, part) for part in node.input}
        return joined.pop() if len(joined) == 1 else None
    return _code_type(graph, node) if node.op_type == "DequantizeLinear" else None


def _code_type(graph: GraphIndex, node: onnx.NodeProto) -> int:
    """Return the type of a Q/DQ node's codes: as its zero point says, or its neighbour's does."""
    if len(node.input) > 2 and node.input[2]:
        zero_point = graph.constants.get(node.input[2])
        return onnx.TensorProto.UNDEFINED if zero_point is None else zero_point.data_type
    if node.op_type == "QuantizeLinear":
        # ONNX's default is uint8.
        return attribute(node, "output_dtype", 0) or onnx.TensorProto.UINT8
    codes = graph.constants.get(node.input[0])
    if codes is not None:
        return codes.data_type
    before = graph.producer(node.input[0])
    is_quantize = before is not None and before.op_type == "QuantizeLinear"
    return _code_type(graph, before) if before is not None and is_quantize else 0
