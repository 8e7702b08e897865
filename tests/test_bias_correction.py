"""Bias correction takes the mean errors of rounded weights back, and does no harm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trt_yolov6.data.calibration import calibration_batches
from trt_yolov6.graph.inputs import input_spec
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.quantized import quantized_layers
from trt_yolov6.graph.reference import reference_session
from trt_yolov6.quantization.bias_correction import (
    BiasCorrection,
    without_mean_rounding,
)
from trt_yolov6.quantization.calibrators import amax_of
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import place

Floats = NDArray[np.float32]

PLACED = ["images", "z0", "z1", "z2"]


def network(activation: str, bias: bool = True, kernel: int = 3) -> onnx.ModelProto:
    """Four convolutions of 8 channels in a row."""
    rng = np.random.default_rng(0)
    nodes, constants, last = [], [], "images"
    for index in range(4):
        inputs = 3 if index == 0 else 8
        weight = rng.normal(0, (2 / inputs) ** 0.5 / kernel, (8, inputs, kernel, kernel))
        constants.append(numpy_helper.from_array(weight.astype(np.float32), f"w{index}"))
        names = [last, f"w{index}"]
        if bias:
            values = rng.normal(0, 0.2, 8).astype(np.float32)
            constants.append(numpy_helper.from_array(values, f"b{index}"))
            names.append(f"b{index}")
        nodes.append(helper.make_node("Conv", names, [f"y{index}"], pads=[kernel // 2] * 4))
        nodes.append(helper.make_node(activation, [f"y{index}"], [f"z{index}"]))
        last = f"z{index}"
    ends = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 32, 32]),
        helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, 8, 32, 32]),
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def noise(count: int, seed: int) -> list[Floats]:
    rng = np.random.default_rng(seed)
    return [rng.random((1, 3, 32, 32), np.float32) for _ in range(count)]


def quantized(model: onnx.ModelProto, images: Sequence[Floats]) -> onnx.ModelProto:
    placement = place(model)
    found = collect(model, images, placement.tensors)
    return insert_qdq(model, placement, {n: amax_of(s, "minmax") for n, s in found.items()})


def coarse(model: onnx.ModelProto) -> onnx.ModelProto:
    """Keep 15 of the 255 levels: what 4 bits would leave of the weights."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    stored = {layer.weight for layer in quantized_layers(result)}
    for item in result.graph.initializer:
        if item.name in stored:
            levels = np.rint(numpy_helper.to_array(item) / 18) * 18
            item.CopyFrom(numpy_helper.from_array(levels.astype(np.int8), item.name))
    return result


def outputs(model: onnx.ModelProto, images: Sequence[Floats]) -> list[Floats]:
    session = reference_session(model)
    source = session.get_inputs()[0].name
    runs = [session.run(None, {source: image}) for image in images]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def squared_error(
    one: onnx.ModelProto, other: onnx.ModelProto, images: Sequence[Floats]
) -> list[float]:
    pairs = zip(outputs(one, images), outputs(other, images), strict=True)
    return [float(np.mean((first - second) ** 2)) for first, second in pairs]


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_in_a_linear_network_no_mean_error_is_left(bias: bool) -> None:
    model, images = network("Identity", bias, kernel=1), noise(8, 0)
    rough = coarse(quantized(model, images))

    def mean_error(candidate: onnx.ModelProto) -> float:
        difference = outputs(candidate, images)[0] - outputs(model, images)[0]
        return float(np.abs(difference.mean(axis=(0, 2, 3))).max())

    # What is left is how the rounding of activations depends on the mean that was corrected.
    assert mean_error(BiasCorrection(model, images).correct(rough)) < 0.15 * mean_error(rough)


def test_coarse_weights_lose_less_on_images_not_seen_before() -> None:
    model, images = network("Relu"), noise(8, 0)
    rough = coarse(quantized(model, images))
    unseen = noise(8, 1)
    before = squared_error(model, rough, unseen)[0]
    after = squared_error(model, BiasCorrection(model, images).correct(rough), unseen)[0]
    assert after < 0.5 * before


def test_only_biases_change_and_the_argument_does_not() -> None:
    model, images = network("Relu"), noise(4, 0)
    int8 = quantized(model, images)
    content = int8.SerializeToString(deterministic=True)
    result = BiasCorrection(model, images).correct(int8)
    assert int8.SerializeToString(deterministic=True) == content
    before = {item.name: item.SerializeToString() for item in int8.graph.initializer}
    after = {item.name: item.SerializeToString() for item in result.graph.initializer}
    assert {name for name in after if after[name] != before[name]} == {"b0", "b1", "b2", "b3"}
    assert result.graph.node == int8.graph.node


def test_one_correction_serves_several_graphs_and_gives_each_the_same() -> None:
    model, images = network("Relu"), noise(4, 0)
    ranges = {n: amax_of(s, "minmax") for n, s in collect(model, images, PLACED).items()}
    graphs = [
        insert_qdq(model, place(model, layers), ranges) for layers in (["y3"], [], [], ["y0"])
    ]
    correction = BiasCorrection(model, images)
    for graph in graphs:
        alone = BiasCorrection(model, images).correct(graph).SerializeToString()
        assert correction.correct(graph).SerializeToString() == alone


@pytest.mark.slow
def test_the_sample_in_int8_comes_nearer_to_float(sample_320: Graph, root: Path) -> None:
    model = sample_320.model
    images, unseen = (
        list(calibration_batches(folder, input_spec(model), limit=8))
        for folder in (root / "calib", root / "samples" / "images" / "val")
    )
    int8 = quantized(model, images)
    before = squared_error(model, int8, unseen)
    after = squared_error(model, BiasCorrection(model, images).correct(int8), unseen)
    assert all(second < first for first, second in zip(before, after, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_what_rounding_weights_adds_in_the_mean_is_taken_back_without_images(bias: bool) -> None:
    model, images = network("Relu", bias, kernel=1), noise(4, seed=1)
    rounded = coarse(quantized(model, images))
    means = np.stack([image.mean(axis=(0, 2, 3)) for image in images]).astype(float).mean(axis=0)
    corrected = without_mean_rounding(model, rounded, {"images": np.asarray(means)})

    def error(changed: onnx.ModelProto) -> float:
        own, expected = (collect(one, images, ["y0"])["y0"].channels for one in (changed, model))
        assert own is not None
        assert expected is not None
        return float(np.abs(own.mean - expected.mean).max())

    # What is left is the rounding of the images.
    assert error(corrected) < 0.1 * error(rounded)
