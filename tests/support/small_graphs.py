"""Small float graphs with every pattern that quantization has a rule for, written node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIZE = 32


class GraphWriter:
    """Collects nodes and random weights; every method returns the name of its output."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[Any]] = {}
        self._rng = np.random.default_rng(seed)

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], f"{output}_node", **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants[name] = value
        return name

    def conv(
        self, name: str, source: str, channels: tuple[int, int], kernel: int = 1, **attributes: Any
    ) -> str:
        """A convolution of the name; its output is called `<name>_out`."""
        inputs, outputs = channels
        op = attributes.pop("op", "Conv")
        group = attributes.get("group", 1)
        shape = (inputs, outputs) if op == "ConvTranspose" else (outputs, inputs // group)
        fan_in = inputs // group * (1 if op == "ConvTranspose" else kernel * kernel)
        weight = self._rng.normal(0, fan_in**-0.5, (*shape, kernel, kernel)).astype(np.float32)
        bias = self._rng.normal(0, 0.1, outputs).astype(np.float32)
        if op == "Conv":
            attributes.setdefault("pads", [kernel // 2] * 4)
        self.nodes.append(
            helper.make_node(
                op,
                [source, self.constant(f"{name}.w", weight), self.constant(f"{name}.b", bias)],
                [f"{name}_out"],
                name,
                kernel_shape=[kernel, kernel],
                **attributes,
            )
        )
        return f"{name}_out"

    def conv_relu(self, name: str, source: str, channels: tuple[int, int], **kwargs: Any) -> str:
        return self.node("Relu", [self.conv(name, source, channels, **kwargs)], f"{name}_relu")

    def pair(self, source: str, scale: float, name: str | None = None) -> str:
        """A Q/DQ pair on a tensor; its output is called `<name>_dq`, the name the tensor's."""
        name = name or source
        grid = [
            self.constant(f"{name}_scale", np.array(scale, np.float32)),
            self.constant("zero", np.array(0, np.int8)),
        ]
        self.node("QuantizeLinear", [source, *grid], f"{name}_q")
        return self.node("DequantizeLinear", [f"{name}_q", *grid], f"{name}_dq")

    def model(self, *outputs: str, opset: int = 17) -> onnx.ModelProto:
        shape: list[str | int | None] = ["batch", 3, SIZE, SIZE]
        graph = helper.make_graph(
            self.nodes,
            "small",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9
        )
        model = onnx.shape_inference.infer_shapes(model)
        del model.graph.value_info[:]
        onnx.checker.check_model(model)
        return model


def detector() -> onnx.ModelProto:
    """A detector in miniature: pooling pyramid, neck with a transposed convolution, SiLU head.

    Its convolutions: stem, deep, low, reduce, merge, up, join, head, cls, reg.
    """
    graph = GraphWriter()
    stem = graph.conv_relu("stem", "images", (3, 8), kernel=3, strides=[2, 2])
    deep = graph.conv_relu("deep", stem, (8, 8), kernel=3)
    low = graph.conv_relu("low", deep, (8, 16), kernel=3, strides=[2, 2])
    reduced = graph.conv_relu("reduce", low, (16, 8))
    pooling = {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2], "strides": [1, 1]}
    once = graph.node("MaxPool", [reduced], "pool_1", **pooling)
    twice = graph.node("MaxPool", [once], "pool_2", **pooling)
    pyramid = graph.node("Concat", [reduced, once, twice], "pyramid", axis=1)
    merged = graph.conv_relu("merge", pyramid, (24, 16))
    up = graph.conv("up", merged, (16, 8), kernel=2, strides=[2, 2], op="ConvTranspose")
    both = graph.node("Concat", [up, deep], "both", axis=1)
    joined = graph.conv_relu("join", both, (16, 8), kernel=3)
    head = graph.conv("head", joined, (8, 8), kernel=3)
    silu = graph.node("Mul", [head, graph.node("Sigmoid", [head], "head_gate")], "head_silu")
    cls = graph.conv("cls", silu, (8, 3))
    reg = graph.conv("reg", silu, (8, 4))
    flat = graph.constant("flat", np.array([0, 0, -1], np.int64))
    scores = graph.node("Sigmoid", [graph.node("Reshape", [cls, flat], "cls_flat")], "scores")
    return graph.model(graph.node("Reshape", [reg, flat], "boxes"), scores)


def random_images(count: int = 3, seed: int = 0) -> list[NDArray[np.float32]]:
    """Return batches of one image that `detector` takes, float32 (1, 3, SIZE, SIZE) in 0..1."""
    rng = np.random.default_rng(seed)
    return [rng.random((1, 3, SIZE, SIZE), dtype=np.float32) for _ in range(count)]
