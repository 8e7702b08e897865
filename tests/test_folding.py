"""Foreign graphs are written plainly before they are quantized, and compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from trt_yolov6.engines import load_engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.graph.normalize import with_folded_weights
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.quantization.pipeline import quantize
from trt_yolov6.quantization.settings import QuantizationSettings

RNG = np.random.default_rng(0)


def as_paddle_writes(shared: bool = False, old_format: bool = False) -> onnx.ModelProto:
    """Return a detector of 64 x 64 whose weights are Constant nodes and whose norms are nodes.

    `shared`: the first convolution's output is read by something else, too.
    """
    nodes: list[onnx.NodeProto] = []

    def constant(value: NDArray[Any]) -> str:
        name = f"w{len(nodes)}"
        tensor = numpy_helper.from_array(value, name)
        nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def layer(source: str, channels: tuple[int, int], output: str, bias: bool) -> None:
        weight = RNG.normal(0, 0.3, (channels[1], channels[0], 3, 3)).astype(np.float32)
        inputs = [source, constant(weight)]
        if bias:
            inputs.append(constant(RNG.normal(0, 1, channels[1]).astype(np.float32)))
        pads: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}
        nodes.append(helper.make_node("Conv", inputs, [f"{output}_raw"], **pads))
        ranges = ((0.5, 2), (-1, 1), (-1, 1), (0.1, 3))  # scale, shift, mean, variance
        parts = [
            constant(RNG.uniform(low, high, channels[1]).astype(np.float32)) for low, high in ranges
        ]
        nodes.append(
            helper.make_node(
                "BatchNormalization", [f"{output}_raw", *parts], [f"{output}_norm"], epsilon=1e-3
            )
        )
        nodes.append(helper.make_node("Relu", [f"{output}_norm"], [output]))

    layer("images", (3, 8), "one", bias=False)
    layer("one", (8, 16), "two", bias=True)
    layer("two", (16, 7), "three", bias=True)
    if shared:
        pool: dict[str, Any] = {"kernel_shape": [4, 4], "strides": [4, 4]}
        nodes.append(helper.make_node("MaxPool", ["one_raw"], ["pooled"], **pool))
        sums = helper.make_node("ReduceMean", ["pooled"], ["mean"], axes=[1])
        nodes += [sums, helper.make_node("Add", ["three", "mean"], ["both"])]
    source = "both" if shared else "three"
    shape = constant(np.array([0, 7, 64], np.int64))
    nodes.append(helper.make_node("Reshape", [source, shape], ["flat"]))
    nodes.append(helper.make_node("Transpose", ["flat"], ["rows"], perm=[0, 2, 1]))
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "PaddlePaddle Graph 0",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])],
            [helper.make_tensor_value_info("rows", TensorProto.FLOAT, [1, 64, 7])],
        ),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=3 if old_format else 8,
    )
    onnx.checker.check_model(model)
    return model


def outputs(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    result: NDArray[np.float32] = session.run(None, {"images": images})[0]
    return result


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    result = with_folded_weights(copy)
    onnx.checker.check_model(result)
    return result


def test_batch_normalization_goes_into_the_convolution() -> None:
    model = as_paddle_writes()
    result = folded(model)
    assert "BatchNormalization" not in kinds(result)
    # The weights and a bias of each layer; what the norms had is gone.
    assert sorted(item.dims[0] for item in result.graph.initializer) == [7, 7, 8, 8, 16, 16]
    images = RNG.random((1, 3, 64, 64), np.float32)
    np.testing.assert_allclose(
        outputs(result, images), outputs(model, images), rtol=1e-4, atol=1e-4
    )


def test_a_convolution_that_others_read_keeps_its_normalization() -> None:
    model = as_paddle_writes(shared=True)
    result = folded(model)
    assert kinds(result).count("BatchNormalization") == 1
    images = RNG.random((1, 3, 64, 64), np.float32)
    np.testing.assert_allclose(
        outputs(result, images), outputs(model, images), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("read", ["convolved", "weights"])
def test_what_a_branch_reads_as_well_stays_as_it_is(read: str) -> None:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 2, 4, 4))
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 3, 4, 4))
    one = helper.make_tensor_value_info("one", TensorProto.FLOAT, ())
    branches = {
        name: helper.make_graph([helper.make_node(op, [read], ["one"], keepdims=0)], op, [], [one])
        for name, op in (("then_branch", "ReduceSum"), ("else_branch", "ReduceMax"))
    }
    nodes = [
        helper.make_node("Conv", ["x", "weights"], ["convolved"]),
        helper.make_node("BatchNormalization", ["convolved", "a", "b", "c", "d"], ["normal"]),
        helper.make_node("If", ["condition"], ["chosen"], **branches),
        helper.make_node("Mul", ["normal", "chosen"], ["y"]),
    ]
    stored = [numpy_helper.from_array(RNG.uniform(1, 2, 3).astype(np.float32), n) for n in "abcd"]
    stored += [
        numpy_helper.from_array(RNG.uniform(1, 2, (3, 2, 1, 1)).astype(np.float32), "weights"),
        numpy_helper.from_array(np.array(True), "condition"),
    ]
    graph = helper.make_graph(nodes, "branches", [image], [result], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    value = {"x": RNG.normal(size=(1, 2, 4, 4)).astype(np.float32)}
    (expected,) = ReferenceEvaluator(model).run(None, value)
    onnx.checker.check_model(with_folded_weights(model), full_check=True)
    np.testing.assert_allclose(ReferenceEvaluator(model).run(None, value)[0], expected, rtol=1e-5)


def test_a_normalization_by_the_batch_itself_is_not_folded() -> None:
    model = as_paddle_writes()
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    norms[0].attribute.append(helper.make_attribute("training_mode", 1))
    folded = with_folded_weights(model)
    left = [node.output[0] for node in folded.graph.node if node.op_type == "BatchNormalization"]
    assert left == [norms[0].output[0]]


def test_a_convolution_in_one_dimension_is_folded_as_well() -> None:
    arrays = {"w": RNG.normal(0, 1, (5, 3, 4))} | {
        name: RNG.uniform(0.5, 2, 5) for name in ("scale", "shift", "mean", "variance")
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "w"], ["features"]),
            helper.make_node(
                "BatchNormalization", ["features", *list(arrays)[1:]], ["out"], epsilon=1e-3
            ),
        ],
        "one dimension",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 16])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 5, 13])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = folded(model)
    assert kinds(result) == ["Conv"]
    signal = RNG.random((1, 3, 16), np.float32)
    np.testing.assert_allclose(
        outputs(result, signal), outputs(model, signal), rtol=1e-4, atol=1e-4
    )


def test_an_old_files_format_is_raised_for_its_initializers() -> None:
    assert folded(as_paddle_writes(old_format=True)).ir_version == 4


def test_a_graph_without_either_stays_as_it_is() -> None:
    once = folded(as_paddle_writes())
    assert folded(once) == once


def test_such_a_graph_is_quantized_with_every_step(tmp_path: Path) -> None:
    path = tmp_path / "paddle.onnx"
    onnx.save(as_paddle_writes(), path)
    for number in range(3):
        picture = RNG.integers(0, 256, (64, 64, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"{number}.png"), picture)
    graph = graph_from_onnx(path, decoder="ppyoloe")
    result = quantize(graph, tmp_path, QuantizationSettings(calibrator="minmax"))
    assert len(result.placement.layers) == 3
    built = build_engine(result.graph, backend="onnxruntime", output=tmp_path / "int8.onnx")
    with load_engine(built.path) as engine:
        assert engine.precision == "int8"
