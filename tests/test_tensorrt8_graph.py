"""The graph that TensorRT 8 is given: the same function, in the forms that it takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.small_graphs import GraphWriter, detector, random_images

from trt_yolov6.engines.tensorrt.weakly_typed import (
    divide_channels,
    drop_idle_pairs,
    give_depthwise_float_weights,
    give_transposed_float_weights,
    implicit_graph,
    join_siblings,
    part_siblings,
    read_before_pairs,
    scale_shortcuts,
    split_pools,
    subtract_borders,
    weak_graph,
)
from trt_yolov6.graph.float16 import tail_nodes, to_fp16
from trt_yolov6.graph.index import attributes
from trt_yolov6.graph.reference import reference_session
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import place


def quantized(model: onnx.ModelProto, **keywords: Any) -> onnx.ModelProto:
    placement = place(model)
    return insert_qdq(model, placement, dict.fromkeys(placement.tensors, 2.0), **keywords)


def run(model: onnx.ModelProto, image: NDArray[Any]) -> dict[str, NDArray[Any]]:
    session = reference_session(model)
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": image}), strict=True))


def assert_same(before: onnx.ModelProto, after: onnx.ModelProto, rtol: float = 1e-5) -> None:
    onnx.checker.check_model(after, full_check=True)
    for image in random_images(2):
        expected, found = run(before, image), run(after, image)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=rtol, atol=rtol)


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def siblings(after: str) -> onnx.ModelProto:
    """Two convolutions of one tensor, and what follows each."""
    graph = GraphWriter()
    stem = graph.conv_relu("stem", "images", (3, 8), kernel=3)
    results = []
    for name, channels in (("left", 8), ("right", 16)):
        out = graph.conv(name, stem, (8, channels), kernel=3)
        if after == "relu":
            out = graph.node("Relu", [out], f"{name}_relu")
        if after in ("silu", "scaled"):
            out = graph.node(
                "Mul", [out, graph.node("Sigmoid", [out], f"{name}_gate")], f"{name}_s"
            )
        if after == "scaled":
            factors = np.linspace(0.5, 2, channels, dtype=np.float32).reshape(1, -1, 1, 1)
            out = graph.node("Mul", [out, graph.constant(f"{name}_f", factors)], f"{name}_scaled")
        if after != "predicted":
            out = graph.conv(f"{name}_last", out, (channels, 4))
        results.append(out)
    return graph.model(graph.node("Concat", results, "both", axis=1))


class TestHalfPrecision:
    def test_of_a_float32_graph_only_the_poolings_change(self) -> None:
        weak = weak_graph(detector().SerializeToString())
        expected = detector()
        split_pools(expected)
        assert onnx.load_from_string(weak.model) == expected
        assert not weak.half
        assert not weak.quantized

    def test_casts_go_and_what_they_said_is_told(self) -> None:
        model = detector()
        half = to_fp16(model, keep_float32=tail_nodes(model))
        weak = weak_graph(half.SerializeToString())
        result = onnx.load_from_string(weak.model)
        assert weak.half
        assert not weak.quantized
        # Scores leave our graphs in half precision; boxes are computed in single.
        assert weak.half_outputs == {"scores"}
        assert "boxes" not in weak.half_outputs
        types = {item.data_type for item in result.graph.initializer}
        assert TensorProto.FLOAT16 not in types
        assert "Cast" not in kinds(result)
        assert_same(model, result, rtol=2e-3)

    def test_boxes_are_to_be_computed_in_single_precision(self) -> None:
        graph = GraphWriter()
        layer = graph.conv("layer", "images", (3, 4), kernel=3)
        anchors = graph.constant("anchors", np.full((1, 4, 1, 1), 600.0, np.float32))
        graph.node("Add", [layer, anchors], "boxes")
        model = graph.model("boxes", graph.node("Sigmoid", [layer], "scores"))
        half = to_fp16(model, keep_float32=tail_nodes(model))
        assert weak_graph(half.SerializeToString()).single == {"boxes"}

    def test_implicit_quantization_leaves_some_in_float(self) -> None:
        # All after the last layers, and the transposed convolution.
        model = detector()
        weak = implicit_graph(model.SerializeToString(), half=True)
        assert weak.quantized
        assert weak.half
        transposed = {
            node.output[0] for node in model.graph.node if node.op_type == "ConvTranspose"
        }
        assert len(transposed) == 1
        assert weak.single == {"cls_flat", "scores", "boxes", *transposed}
        assert onnx.load_from_string(weak.model) == model


def pooled(**attributes: Any) -> onnx.ModelProto:
    graph = GraphWriter()
    first = graph.conv_relu("first", "images", (3, 4))
    graph.node("MaxPool", [first], "pooled", **attributes)
    return graph.model("pooled")


class TestPools:
    @pytest.mark.parametrize(
        ("kernel", "pads"),
        [([5, 5], [2, 2, 2, 2]), ([3, 4], [1, 0, 0, 3]), ([13, 13], [6] * 4), ([2, 3], [0] * 4)],
    )
    def test_rows_and_columns_give_the_maximum_of_the_rectangle(
        self, kernel: list[int], pads: list[int]
    ) -> None:
        model = pooled(kernel_shape=kernel, pads=pads)
        result = copy(model)
        split_pools(result)
        assert kinds(result)["MaxPool"] == 2
        assert_same(model, result, rtol=0)

    def test_defaults_may_be_spelled_out_as_pytorch_does(self) -> None:
        defaults = {"strides": [1, 1], "dilations": [1, 1], "auto_pad": "NOTSET", "ceil_mode": 0}
        model = pooled(kernel_shape=[5, 5], pads=[2, 2, 2, 2], storage_order=0, **defaults)
        result = copy(model)
        split_pools(result)
        assert kinds(result)["MaxPool"] == 2
        assert_same(model, result, rtol=0)

    @pytest.mark.parametrize(
        "attributes",
        [
            {"kernel_shape": [2, 2], "strides": [2, 2]},
            {"kernel_shape": [3, 3], "dilations": [2, 2]},
            {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"},
            {"kernel_shape": [1, 5], "pads": [0, 2, 0, 2]},
        ],
    )
    def test_other_poolings_stay(self, attributes: dict[str, Any]) -> None:
        model = pooled(**attributes)
        result = copy(model)
        split_pools(result)
        assert kinds(result) == kinds(model)


class TestQuantized:
    def test_the_whole_computes_the_same(self) -> None:
        model = quantized(detector())
        weak = weak_graph(model.SerializeToString())
        assert weak.quantized
        assert not weak.half
        assert_same(model, onnx.load_from_string(weak.model))

    def test_half_scales_become_the_same_numbers_in_single_precision(self) -> None:
        model = quantized(detector(), fp16=True)
        weak = weak_graph(model.SerializeToString())
        result = onnx.load_from_string(weak.model)
        assert weak.half
        single = {item.name: numpy_helper.to_array(item) for item in result.graph.initializer}
        before = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
        for node in result.graph.node:
            if node.op_type == "QuantizeLinear":
                assert single[node.input[1]] == before[node.input[1]].astype(np.float32)

    def test_only_pairs_before_layers_stay_after_poolings_and_concatenations(self) -> None:
        model = quantized(detector())
        result = copy(model)
        drop_idle_pairs(result)
        after = {node.input[0] for node in result.graph.node if node.op_type == "QuantizeLinear"}
        before = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
        assert before - after == {"pool_1", "pool_2"}
        assert_same(model, result)

    def test_transposed_convolutions_get_float_weights(self) -> None:
        model = quantized(detector())
        result = copy(model)
        give_transposed_float_weights(result)
        stored = {item.name: item.data_type for item in result.graph.initializer}
        for node in result.graph.node:
            if node.op_type == "ConvTranspose":
                assert stored[node.input[1]] == TensorProto.FLOAT
        assert kinds(model)["DequantizeLinear"] - kinds(result)["DequantizeLinear"] == 1
        assert_same(model, result)

    def test_depthwise_convolutions_get_float_weights_of_the_same_values(self) -> None:
        graph = GraphWriter()
        first = graph.conv_relu("first", "images", (3, 8), kernel=3)
        depthwise = graph.conv("depthwise", first, (8, 8), kernel=3, group=8)
        graph.conv("pointwise", graph.node("Relu", [depthwise], "relu"), (8, 4))
        model = graph.model("pointwise_out")
        before = quantized(model)
        result = copy(before)
        give_depthwise_float_weights(result)
        # Only the weights' DequantizeLinear is gone.
        assert kinds(before) - kinds(result) == {"DequantizeLinear": 1}
        assert_same(before, result)
        assert weak_graph(before.SerializeToString()).depthwise == 1
        assert weak_graph(model.SerializeToString()).depthwise == 0  # nothing is INT8

    def test_channel_factors_before_a_pair_become_divisors(self) -> None:
        model = quantized(siblings("scaled"))
        result = copy(model)
        divide_channels(result)
        assert kinds(result)["Div"] == 2
        assert kinds(result)["Mul"] == kinds(model)["Mul"] - 2
        assert_same(model, result, rtol=0.05)  # a rounding may fall on the other side


@pytest.mark.parametrize("swapped", [False, True])
def test_a_constant_for_each_pixel_is_subtracted(swapped: bool) -> None:
    graph = GraphWriter()
    layer = graph.conv_relu("layer", "images", (3, 4))
    values = np.random.default_rng(0).normal(size=(1, 4, 32, 32)).astype(np.float32)
    border = graph.constant("border", values)
    added = graph.node("Add", [border, layer] if swapped else [layer, border], "added")
    offset = graph.constant("offset", np.ones((1, 4, 1, 1), np.float32))
    model = graph.model(graph.node("Add", [added, offset], "out"))
    result = copy(model)
    subtract_borders(result)
    assert [node.op_type for node in result.graph.node][-2:] == ["Sub", "Add"]
    assert_same(model, result, rtol=0)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_weighted_shortcut_reads_what_is_quantized(swapped: bool) -> None:
    graph = GraphWriter()
    source = graph.conv_relu("start", "images", (3, 4))
    start = graph.pair(source, scale := 0.05)
    weight = graph.constant("weight", np.array(-0.7, np.float32))
    shortcut = graph.node("Mul", [start, weight] if swapped else [weight, start], "shortcut")
    inner = graph.conv_relu("inner", start, (4, 4))
    model = graph.model(graph.node("Add", [inner, shortcut], "out"))
    result = copy(model)
    read_before_pairs(result)
    (product,) = (node for node in result.graph.node if node.op_type == "Mul")
    assert set(product.input) == {source, "weight"}
    (convolution,) = (node for node in result.graph.node if node.name == "inner")
    assert convolution.input[0] == start
    assert_same(model, result, rtol=0.7 * scale / 2 + 1e-6)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("factor", "both", "scaled"), [(0.7, True, True), (-0.7, True, False), (0.7, False, False)]
)
def test_a_positive_factor_of_a_shortcut_goes_into_a_scale(
    factor: float, both: bool, scaled: bool, swapped: bool
) -> None:
    graph = GraphWriter()
    start = graph.pair(graph.conv_relu("start", "images", (3, 4)), 0.05)
    weight = graph.constant("weight", np.array([factor], np.float32))
    shortcut = graph.node("Mul", [start, weight] if swapped else [weight, start], "shortcut")
    inner = graph.conv_relu("inner", start, (4, 4))
    terms = [graph.pair(inner, 0.03) if both else inner, shortcut]
    model = graph.model(graph.node("Add", terms[::-1] if swapped else terms, "out"))
    result = copy(model)
    scale_shortcuts(result)
    assert kinds(result)["Mul"] == kinds(model)["Mul"] - scaled
    assert kinds(result)["DequantizeLinear"] == kinds(model)["DequantizeLinear"] + scaled
    assert_same(model, result, rtol=1e-6)


class TestSiblings:
    @pytest.mark.parametrize(
        ("after", "joined"),
        [("relu", 0), ("silu", 0), ("quantized", 0), ("scaled", 1), ("predicted", 1)],
    )
    def test_those_that_no_activation_is_fused_with_become_one(
        self, after: str, joined: int
    ) -> None:
        model = quantized(siblings(after))
        result = copy(model)
        join_siblings(result)
        assert kinds(result)["Split"] == joined
        assert kinds(result)["Conv"] == kinds(model)["Conv"] - joined
        names = [node.name for node in result.graph.node if node.op_type == "Conv"]
        assert ("left || right" in names) == bool(joined)
        assert_same(model, result)

    def test_others_than_two_of_one_shape_are_left_alone(self) -> None:
        model = siblings("predicted")
        for node in model.graph.node:
            if node.name == "right":
                node.attribute.append(helper.make_attribute("dilations", [1, 1]))
        result = quantized(model)
        join_siblings(result)
        assert kinds(result)["Split"] == 0

    @pytest.mark.parametrize(
        ("kernel", "activation", "parted"),
        [(1, "Relu", True), (3, "Relu", False), (1, "Sigmoid", False)],
    )
    def test_pointwise_ones_before_relus_are_told_apart(
        self, kernel: int, activation: str, parted: bool
    ) -> None:
        # As the two paths of the stacks of M and L-ReLU.
        graph = GraphWriter()
        stem = graph.conv_relu("stem", "images", (3, 8), kernel=3)
        paths = []
        for name in ("main", "side", "third"):
            out = graph.conv(name, stem, (8, 8), kernel=kernel)
            out = graph.node(activation, [out], f"{name}_act")
            paths.append(graph.conv(f"{name}_last", out, (8, 4)))
        model = quantized(graph.model(graph.node("Concat", paths, "out", axis=1)))
        result = copy(model)
        part_siblings(result)
        dilations = {
            node.name: attributes(node).get("dilations", [1, 1])
            for node in result.graph.node
            if node.op_type == "Conv"
        }
        assert dilations["side"] == ([2, 2] if parted else [1, 1])
        assert dilations["third"] == ([3, 3] if parted else [1, 1])
        assert {tuple(dilations[name]) for name in ("stem", "main", "main_last")} == {(1, 1)}
        assert_same(model, result)
