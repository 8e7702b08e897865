"""A detector of two convolutions, in every form that a plan is built from."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


def detector(
    *,
    batch: int | str = "batch",
    fp16: bool = False,
    uint8: bool = False,
    width: int = 8,
    size: int | str = 32,
) -> onnx.ModelProto:
    """A small graph of the `split` layout: two convolutions, 4 box rows and 2 score rows."""
    rng = np.random.default_rng(0)
    real = np.float16 if fp16 else np.float32
    weights: dict[str, NDArray[Any]] = {
        "w1": rng.normal(size=(width, 3, 3, 3)).astype(real),
        "w2": (rng.normal(size=(6, width, 8, 8)) / width).astype(real),
        "flat": np.array([0, -1, 6], np.int64),
        "parts": np.array([4, 2], np.int64),
    }
    if uint8:
        weights["scale"] = np.array(1 / 255, np.float32)
    tensor = "images"
    nodes = []
    if uint8:
        nodes = [
            helper.make_node("Cast", ["images"], ["floats"], "to_float", to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["floats"], ["planar"], "planar", perm=[0, 3, 1, 2]),
            helper.make_node("Mul", ["planar", "scale"], ["unit"], "normalize"),
        ]
        tensor = "unit"
    if fp16:
        nodes.append(helper.make_node("Cast", [tensor], ["half"], "down", to=TensorProto.FLOAT16))
        tensor = "half"
    nodes += [
        helper.make_node("Conv", [tensor, "w1"], ["c1"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "second", strides=[8, 8]),
        helper.make_node("Transpose", ["c2"], ["t2"], "last", perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["t2", "flat"], ["f2"], "flatten"),
        helper.make_node("Cast", ["f2"], ["all"], "up", to=TensorProto.FLOAT),
        helper.make_node("Split", ["all", "parts"], ["boxes", "logits"], "split", axis=2),
        helper.make_node("Sigmoid", ["logits"], ["scores"], "sigmoid"),
    ]
    shape = [batch, size, size, 3] if uint8 else [batch, 3, size, size]
    kind = TensorProto.UINT8 if uint8 else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("images", kind, shape)],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [batch, None, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, None, 2]),
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model
