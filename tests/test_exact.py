"""INT8 convolutions by integer arithmetic: exact, the same bits in ONNX Runtime and PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.networks import moved
from support.quantized import prepared_sample
from support.small_graphs import GraphWriter, detector, random_images

from trt_yolov6.engines import load_engine
from trt_yolov6.graph.editing import set_nodes
from trt_yolov6.graph.reference import reference_session
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.integer_arithmetic import (
    with_integer_convolutions,
    with_single_quantization,
)
from trt_yolov6.quantization.qdq.placement import place
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.types import FP8
from trt_yolov6.training.qat.export import trained_graph
from trt_yolov6.training.qat.preparation import Start


def run(
    model: onnx.ModelProto, images: NDArray[np.float32], threads: int | None = None, *more: str
) -> dict[str, NDArray[Any]]:
    """Return the outputs of a graph, and any other tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name in more:
        copy.graph.output.add(name=name)
    session = reference_session(copy, threads=threads)
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: images}), strict=True))


def quantized_detector() -> onnx.ModelProto:
    model = detector()
    placement = place(model)
    return insert_qdq(model, placement, dict.fromkeys(placement.tensors, 2.0))


SCALE_OF_BOTH = ("up_out", "deep_relu")
"""The inputs of "join", concatenated: their shared scale is named after the first."""


def convolutions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")]


def test_every_convolution_adds_whole_numbers() -> None:
    model = with_integer_convolutions(quantized_detector())
    onnx.checker.check_model(model, full_check=True)
    sums = [node.output[0] for node in convolutions(model)]
    assert len(sums) == 10
    assert all(name.endswith("/sum") for name in sums)
    values = run(model, random_images()[0], None, *sums)
    for name in sums:
        assert np.abs(values[name]).max() > 127
        np.testing.assert_array_equal(values[name], np.rint(values[name]))


def test_a_convolution_is_the_exact_sum_times_the_scales_plus_the_bias() -> None:
    model = quantized_detector()
    whole = with_integer_convolutions(model)
    # "join" reads a concatenation of two tensors of one scale.
    node = next(node for node in convolutions(whole) if node.output[0] == "join_out/sum")
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    found = run(whole, random_images()[0], None, node.input[0], "join_out")
    codes = torch.from_numpy(found[node.input[0]]).double()
    weights = torch.tensor(constants["join.w/int8/0"]).double()
    # float64 holds integers up to 2^53.
    sums = torch.nn.functional.conv2d(codes, weights, padding=1).numpy()
    (scale,) = (
        constants[f"{name}/scale"] for name in SCALE_OF_BOTH if f"{name}/scale" in constants
    )
    factors = (scale * constants["join.w/scale/0"]).reshape(1, -1, 1, 1)
    expected = sums.astype(np.float32) * factors + constants["join.b"].reshape(1, -1, 1, 1)
    np.testing.assert_array_equal(found["join_out"], expected)


def test_it_is_what_dequantized_values_give_but_for_roundings_of_sums() -> None:
    model = quantized_detector()
    images = np.concatenate(random_images())
    one, other = run(model, images), run(with_integer_convolutions(model), images)
    for name, values in one.items():
        difference = np.abs(values - other[name])
        assert np.quantile(difference, 0.99) < 1e-5, name
        assert difference.max() < 0.05, name


def test_grouped_convolutions_keep_their_groups() -> None:
    graph = GraphWriter()
    stem = graph.conv_relu("stem", "images", (3, 8), kernel=3)
    deep = graph.conv_relu("deep", stem, (8, 8), kernel=3, group=8)
    up = graph.conv("up", deep, (8, 8), kernel=2, strides=[2, 2], op="ConvTranspose")
    model = graph.model(graph.conv("out", up, (8, 4)))
    placement = place(model)
    quantized = insert_qdq(model, placement, dict.fromkeys(placement.tensors, 3.0))
    whole = with_integer_convolutions(quantized)
    assert sum(node.output[0].endswith("/sum") for node in convolutions(whole)) == 4
    image = random_images()[0]
    difference = np.abs(run(quantized, image)["out_out"] - run(whole, image)["out_out"])
    assert np.quantile(difference, 0.99) < 1e-5


def test_other_types_and_zero_points_are_left_alone() -> None:
    model = detector()
    plain = place(model)
    ranges = dict.fromkeys(plain.tensors, 2.0)
    shifted = quantized_detector()
    for item in shifted.graph.initializer:
        if item.name == "zero_point":
            item.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), "zero_point"))
    half = insert_qdq(model, plain, ranges, fp16=True)
    for other in (insert_qdq(model, plain, ranges, quantized=FP8), shifted, half, model):
        assert with_integer_convolutions(other) is other


def test_a_scale_along_another_axis_is_left_alone() -> None:
    graph = GraphWriter()
    read = graph.pair("images", 0.01)
    weights = graph.constant("w_codes", np.ones((4, 3, 1, 1), np.int8))
    scales = graph.constant("w_scale", np.array([0.1, 0.2, 0.3], np.float32))
    zeros = graph.constant("w_zero", np.zeros(3, np.int8))
    weight = graph.node("DequantizeLinear", [weights, scales, zeros], "w", axis=1)
    model = graph.model(graph.node("Conv", [read, weight], "out", kernel_shape=[1, 1]))
    assert with_integer_convolutions(model) is model


def test_weights_of_one_scale_and_no_bias_are_taken_too() -> None:
    graph = GraphWriter()
    read = graph.pair("images", 0.01)
    weights = graph.constant("w_codes", np.arange(-6, 6, dtype=np.int8).reshape(4, 3, 1, 1))
    scale = graph.constant("w_scale", np.array(0.1, np.float32))
    weight = graph.node("DequantizeLinear", [weights, scale, "zero"], "w")
    model = graph.model(graph.node("Conv", [read, weight], "out", kernel_shape=[1, 1]))
    whole = with_integer_convolutions(model)
    assert [node.op_type for node in whole.graph.node] == ["QuantizeLinear", "Cast", "Conv", "Mul"]
    image = random_images()[0]
    np.testing.assert_allclose(run(whole, image)["out"], run(model, image)["out"], atol=1e-6)


def branching(graph: GraphWriter, read: str, weight: str) -> list[str]:
    """A branch reads a dequantized tensor that nothing else reads, and a constant of its own."""
    other = graph.pair("images", 0.02, "other")
    far = graph.constant("far", np.array(0.5, np.float32))
    flat = graph.constant("flat", np.array([0], np.int64))
    branch = helper.make_graph(
        [helper.make_node("Mul", [other, far], ["then"])],
        "branch",
        [],
        [helper.make_tensor_value_info("then", TensorProto.FLOAT, None)],
    )
    yes = graph.constant("yes", np.array(True))
    graph.nodes.append(
        helper.make_node("If", [yes], ["chosen"], then_branch=branch, else_branch=branch)
    )
    graph.node("ReduceSum", ["chosen", flat], "more", keepdims=0)
    return [graph.node("Conv", [read, weight], "out", kernel_shape=[1, 1]), "more"]


def with_our_names(graph: GraphWriter, read: str, weight: str) -> list[str]:
    """Another's constants are called as ours would be."""
    for name in ("w_codes/float", "out/factors", "out/sum", "out/scaled"):
        graph.constant(name, np.full((1, 3, 1, 1), 9, np.float32))
    bias = graph.constant("out/bias", np.array([1, 2, 3], np.float32))
    more = graph.node("Mul", [read, "out/scaled"], "more")
    return [graph.node("Conv", [read, weight, bias], "out", kernel_shape=[1, 1]), more]


def sharing_weights(graph: GraphWriter, read: str, weight: str) -> list[str]:
    """Two convolutions read the same weights, the second through a pooling layer."""
    one = graph.node("Conv", [read, weight], "out", kernel_shape=[1, 1])
    pooled = graph.node("MaxPool", [read], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    return [one, graph.node("Conv", [pooled, weight], "more", kernel_shape=[1, 1])]


def with_a_scale_a_channel(graph: GraphWriter, read: str, weight: str) -> list[str]:
    """The activations have a scale for each channel, which no sum of codes has."""
    scales = graph.constant("many", np.array([0.01, 0.02, 0.03], np.float32))
    zeros = graph.constant("nothing", np.zeros(3, np.int8))
    codes = graph.node("QuantizeLinear", ["images", scales, zeros], "codes", axis=1)
    values = graph.node("DequantizeLinear", [codes, scales, zeros], "values", axis=1)
    return [graph.node("Conv", [values, weight], "out", kernel_shape=[1, 1])]


def with_blocks(graph: GraphWriter, read: str, weight: str) -> list[str]:
    """Each block of weights has a scale; there are as many as outputs."""
    codes = graph.constant("b_codes", np.arange(-9, 9, dtype=np.int8).reshape(6, 3, 1, 1))
    scales = graph.constant(
        "b_scale", np.linspace(0.1, 0.6, 6, dtype=np.float32).reshape(2, 3, 1, 1)
    )
    zeros = graph.constant("b_zero", np.zeros((2, 3, 1, 1), np.int8))
    made = graph.node("DequantizeLinear", [codes, scales, zeros], "b", axis=0, block_size=3)
    return [graph.node("Conv", [read, made], "out", kernel_shape=[1, 1])]


def with_a_dequantized_bias(graph: GraphWriter, read: str, weight: str) -> list[str]:
    """Add a convolution with an INT32 bias, as ONNX Runtime quantizes."""
    codes = graph.constant("i_codes", np.array([10, -20, 30], np.int32))
    scale = graph.constant("i_scale", np.array(0.05, np.float32))
    bias = graph.node("DequantizeLinear", [codes, scale], "i")
    return [graph.node("Conv", [read, weight, bias], "out", kernel_shape=[1, 1])]


@pytest.mark.parametrize("inputs_too", [False, True], ids=["", "constants are inputs too"])
@pytest.mark.parametrize(
    "rest",
    [
        branching,
        with_our_names,
        sharing_weights,
        with_a_scale_a_channel,
        with_blocks,
        with_a_dequantized_bias,
    ],
)
def test_graphs_of_other_tools_mean_what_they_meant(
    rest: Callable[[GraphWriter, str, str], list[str]], inputs_too: bool
) -> None:
    graph = GraphWriter()
    read = graph.pair("images", 0.01)
    codes = graph.constant("w_codes", np.arange(-4, 5, dtype=np.int8).reshape(3, 3, 1, 1))
    scales = graph.constant("w_scale", np.array([0.1, 0.2, 0.3], np.float32))
    zeros = graph.constant("w_zero", np.zeros(3, np.int8))
    weight = graph.node("DequantizeLinear", [codes, scales, zeros], "w", axis=0)
    model = graph.model(*rest(graph, read, weight), opset=21)
    if inputs_too:
        model.graph.input.extend(
            helper.make_tensor_value_info(item.name, item.data_type, item.dims)
            for item in model.graph.initializer
        )
    image = random_images()[0]
    expected, found = run(model, image), run(with_integer_convolutions(model), image)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def sample(root: Path) -> Start:
    settings = QuantizationSettings(
        calibrator="minmax", equalize=False, bias_correction=False, image_limit=3
    )
    return prepared_sample(root, 256, settings)


def test_the_trained_network_and_its_exported_graph_compute_the_same(sample: Start) -> None:
    """Left to run from image to logits: backbone and neck, to the last bit.

    In the head, SiLU's exponential has another last bit in PyTorch, and tips a rounding here and
    there; nothing carries that on to other places.
    """
    network = moved(sample.student(), seed=1).eval()
    trained = network.trained()
    model = with_integer_convolutions(trained_graph(sample, trained).model)
    pixels = np.random.default_rng(5).integers(0, 256, (2, 3, 256, 256))
    images = (pixels / 255).astype(np.float32)
    logits = tuple(f"cls_{stride}" for stride in (8, 16, 32))
    expected = run(model, images, None, *sample.features, *logits)
    with torch.no_grad():
        levels, features = network(torch.from_numpy(images))
    found = dict(zip(sample.features, features, strict=True))
    of_neck = [name for name in found if name.startswith("relu")]
    assert len(of_neck) == 6
    for name in of_neck:
        np.testing.assert_array_equal(found[name].numpy(), expected[name])
    for name, level in zip(logits, levels, strict=True):
        difference = np.abs(level[0].numpy() - expected[name])
        assert np.mean(difference > 0) < 2e-3
        assert difference.max() < 0.01


def test_an_engine_computes_on_whole_numbers(sample: Start, tmp_path: Path) -> None:
    path = tmp_path / "sample.onnx"
    model = sample.quantized.graph.model
    path.write_bytes(model.SerializeToString())
    images = np.random.default_rng(8).random((1, 3, 256, 256), np.float32)
    with load_engine(path) as engine:
        found = engine.infer(images)
        assert "integer arithmetic" in (engine.note or "")
        times = engine.layer_times(images, runs=1)
    expected = run(with_integer_convolutions(model), images)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    # Layers are found again by their names.
    assert {"relu", "conv2d"} & {name.removesuffix("_nchwc") for name in times}


def test_nodes_out_of_order_are_computed_on_whole_numbers_too(tmp_path: Path) -> None:
    model = quantized_detector()
    set_nodes(model.graph, list(reversed(model.graph.node)))
    path = tmp_path / "reversed.onnx"
    path.write_bytes(model.SerializeToString())
    images = random_images(1)[0]
    with load_engine(path) as engine:
        assert "integer arithmetic" in (engine.note or "")
        found = engine.infer(images)
    for name, values in run(with_integer_convolutions(quantized_detector()), images).items():
        np.testing.assert_array_equal(found[name], values)


def test_the_graph_given_stays_as_it_is() -> None:
    model = quantized_detector()
    before = model.SerializeToString()
    with_integer_convolutions(model)
    assert model.SerializeToString() == before


class TestSingleQuantization:
    @staticmethod
    def half_quantizer(scale: float) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("QuantizeLinear", ["half", "scale", "zero"], ["codes"]),
            helper.make_node("Cast", ["codes"], ["y"], to=TensorProto.FLOAT),
        ]
        graph = helper.make_graph(
            nodes,
            "half",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4096])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4096])],
            [
                numpy_helper.from_array(np.float16(scale), "scale"),
                numpy_helper.from_array(np.int8(0), "zero"),
            ],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)

    @pytest.mark.parametrize("scale", [0.0123, 0.5, 1e-3])
    def test_half_precision_is_quantized_to_the_nearest_level(self, scale: float) -> None:
        values = np.random.default_rng(0).normal(0, 60 * scale, (1, 4096)).astype(np.float32)
        given = values.astype(np.float16).astype(np.float32)
        expected = np.clip(np.rint(given / np.float32(np.float16(scale))), -128, 127)
        model = with_single_quantization(self.half_quantizer(scale))
        np.testing.assert_array_equal(run(model, values)["y"], expected)
        types = {item.name: item.data_type for item in model.graph.initializer}
        read = [node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"]
        assert [types[name] for name in read] == [TensorProto.FLOAT]

    def test_a_graph_in_single_precision_is_left_alone(self) -> None:
        model = quantized_detector()
        assert with_single_quantization(model) is model

    def test_an_engine_of_half_precision_is_computed_so(self, tmp_path: Path) -> None:
        model, image = detector(), random_images(1)[0]
        placement = place(model)
        half = insert_qdq(model, placement, dict.fromkeys(placement.tensors, 2.0), fp16=True)
        onnx.save(half, tmp_path / "half.onnx")
        with load_engine(tmp_path / "half.onnx") as engine:
            found = engine.infer(image)
            assert "in float" in engine.note
        expected = run(with_single_quantization(half), image)
        for name, values in found.items():
            np.testing.assert_array_equal(values, expected[name])
