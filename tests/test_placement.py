"""Placement: which tensors get Q/DQ pairs, and that any set of layers can stay in float."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import authors_format
from support.networks import FOUR_LEVELS
from support.small_graphs import GraphWriter, detector, random_images

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.errors import UserError
from trt_yolov6.graph.export import ExportSettings, export_onnx
from trt_yolov6.graph.operators import layer_names
from trt_yolov6.graph.reference import reference_session, runner
from trt_yolov6.models import YOLOv6
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import (
    Placement,
    Rule,
    computes_channels_apart,
    is_among_the_last,
    is_transposed,
    place,
    reads_few_channels,
    works_less_than,
)
from trt_yolov6.spec import BatchProfile

LAYERS = ("stem", "deep", "low", "reduce", "merge", "up", "join", "head", "cls", "reg")
LITE = Path(__file__).parents[1].parent / "shared" / "models" / "yolov6lite_l_320.onnx"


def quantized(model: onnx.ModelProto, placement: Placement) -> onnx.ModelProto:
    return insert_qdq(model, placement, dict.fromkeys(placement.tensors, 2.0))


def int8_layers(model: onnx.ModelProto) -> set[str]:
    """Names of the convolutions that read INT8: directly, or through what only moves values."""
    makers = {name: node for node in model.graph.node for name in node.output}
    moving = {"MaxPool", "Concat", "Reshape", "Transpose", "Split", "Slice"}

    def is_int8(name: str) -> bool:
        node = makers.get(name)
        if node is None or node.op_type not in moving:
            return node is not None and node.op_type == "DequantizeLinear"
        data = node.input if node.op_type == "Concat" else node.input[:1]
        return all(is_int8(item) for item in data)

    return {
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose") and all(map(is_int8, node.input[:2]))
    }


class TestDetector:
    def test_every_convolution_runs_in_int8(self) -> None:
        placement = place(detector())
        assert placement.layers == LAYERS
        assert placement.float_layers == {}
        assert int8_layers(quantized(detector(), placement)) == set(LAYERS)

    def test_pairs_stand_where_values_are_made_and_nowhere_else(self) -> None:
        # After each ReLU, so that it fuses; not between a convolution and its SiLU; not after
        # pooling and concatenation, which pass INT8 through; not on predictions.
        assert place(detector()).tensors == (
            "images",
            "stem_relu",
            "deep_relu",
            "low_relu",
            "reduce_relu",
            "merge_relu",
            "up_out",
            "join_relu",
            "head_silu",
        )

    def test_what_is_concatenated_shares_a_scale(self) -> None:
        placement = place(detector())
        assert placement.groups == (("deep_relu", "up_out"),)
        model = insert_qdq(
            detector(), placement, {name: float(i + 1) for i, name in enumerate(placement.tensors)}
        )
        scales = {
            node.input[0]: node.input[1] for node in model.graph.node if node.op_type[0] == "Q"
        }
        assert scales["deep_relu"] == scales["up_out"]
        value = next(item for item in model.graph.initializer if item.name == scales["up_out"])
        assert onnx.numpy_helper.to_array(value) == np.float32(7) / np.float32(127)

    def test_a_pair_stands_right_before_every_layer(self) -> None:
        # TensorRT 8 fails at a convolution without.
        model = quantized(detector(), place(detector()))
        makers = {name: node.op_type for node in model.graph.node for name in node.output}
        layers = [node for node in model.graph.node if node.op_type.startswith("Conv")]
        assert {makers[node.input[0]] for node in layers} == {"DequantizeLinear"}

    def test_what_is_dequantized_late_gets_the_scale_of_what_goes_in(self) -> None:
        placement = place(detector())
        reduced = dict.fromkeys(("pool_1", "pool_2", "pyramid"), "reduce_relu")
        assert placement.repeated == {**reduced, "both": "up_out"}
        scales = {
            node.input[0]: node.input[1]
            for node in quantized(detector(), placement).graph.node
            if node.op_type == "QuantizeLinear"
        }
        for result, source in placement.repeated.items():
            assert scales[result] == scales[source]

    def test_requantization_counts_them_among_the_tensors(self) -> None:
        placement = place(detector(), requantize=True)
        assert {"pool_1", "pool_2", "pyramid", "both"} <= set(placement.tensors)
        assert placement.repeated == {}

    @settings(max_examples=40, deadline=None)
    @given(st.sets(st.sampled_from(LAYERS)))
    def test_any_layers_can_stay_in_float(self, kept: set[str]) -> None:
        model = detector()
        placement = place(model, exclude=kept)
        result = quantized(model, placement)
        assert set(placement.layers) == set(LAYERS) - kept == int8_layers(result)
        stored = {item.name: item.data_type for item in result.graph.initializer}
        makers = {name: node.op_type for node in result.graph.node for name in node.output}
        for node in result.graph.node:
            if node.name in kept:
                assert stored[node.input[1]] == onnx.TensorProto.FLOAT
                assert makers.get(node.input[0]) != "DequantizeLinear"

    def test_a_layer_in_float_reads_what_is_concatenated_unrounded(self) -> None:
        model = detector()
        placement = place(model, exclude={"join"})
        # `deep_relu` is quantized for `low`, but reaches `join` through the concatenation as it is.
        assert ("deep_relu", "both") in placement.unquantized_reads
        assert "up_out" not in placement.tensors

    def test_with_all_layers_in_float_the_graph_is_the_same(self) -> None:
        model = detector()
        placement = place(model, exclude=LAYERS)
        assert placement.tensors == ()
        assert insert_qdq(model, placement, {}).graph.node == model.graph.node

    def test_a_name_that_is_no_layer_is_refused(self) -> None:
        with pytest.raises(UserError, match="`float_layers` names nonsense"):
            place(detector(), exclude={"stem", "nonsense"})

    def test_a_quantized_graph_is_refused(self) -> None:
        model = detector()
        with pytest.raises(UserError, match="has Q/DQ nodes already"):
            place(quantized(model, place(model)))


class TestRules:
    def test_a_shortcut_is_quantized_and_the_convolution_it_is_added_to_is_not(self) -> None:
        graph = GraphWriter()
        trunk = graph.conv("trunk", "images", (3, 8))
        branch = graph.conv("branch", trunk, (8, 8))
        total = graph.node("Add", [graph.node("Relu", [trunk], "shortcut"), branch], "total")
        graph.conv("after", graph.node("Relu", [total], "total_relu"), (8, 4))
        assert place(graph.model("after_out")).tensors == (
            "images",
            "trunk_out",
            "shortcut",
            "total_relu",
        )

    def test_of_two_added_convolutions_the_later_one_is_fused(self) -> None:
        graph = GraphWriter()
        first, second = (graph.conv(name, "images", (3, 8)) for name in ("first", "second"))
        graph.conv("after", graph.node("Add", [second, first], "total"), (8, 4))
        assert place(graph.model("after_out")).tensors == ("images", "first_out", "total")

    @pytest.mark.parametrize(
        ("op", "terms", "fuses"),
        [
            ("Add", ["side", "branch_out"], True),
            ("Sum", ["side", "branch_out"], True),
            ("Mul", ["side", "branch_out"], False),
            ("Sum", ["side", "branch_out", "trunk_out"], False),
        ],
    )
    def test_only_the_addition_of_two_tensors_is_fused(
        self, op: str, terms: list[str], fuses: bool
    ) -> None:
        graph = GraphWriter()
        trunk = graph.conv("trunk", "images", (3, 8))
        graph.node("Sigmoid", [trunk], "side")
        graph.conv("branch", trunk, (8, 8))
        graph.conv("after", graph.node(op, terms, "total"), (8, 4))
        assert ("side" in place(graph.model("after_out")).tensors) is fuses

    def test_a_convolution_that_others_read_too_is_not_fused_with_an_addition(self) -> None:
        graph = GraphWriter()
        trunk = graph.conv("trunk", "images", (3, 8))
        branch = graph.conv("branch", trunk, (8, 8))
        total = graph.node("Add", [graph.node("Sigmoid", [trunk], "side"), branch], "total")
        graph.conv("after", total, (8, 4))
        graph.node("Relu", [branch], "again")
        assert "side" not in place(graph.model("after_out", "again")).tensors

    def test_a_mean_of_everything_is_no_squeeze_of_space(self) -> None:
        graph = GraphWriter()
        trunk = graph.conv("trunk", "images", (3, 8))
        gate = graph.conv("gate", graph.node("ReduceMean", [trunk], "mean"), (8, 8))
        assert "trunk" in place(graph.model(gate)).layers

    def test_nothing_is_quantized_for_an_addition_behind_activations(self) -> None:
        graph = GraphWriter()
        terms = [
            graph.node("HardSwish", [graph.conv(name, "images", (3, 8))], f"{name}_act")
            for name in ("first", "second")
        ]
        graph.conv("after", graph.node("Add", terms, "total"), (8, 4))
        assert place(graph.model("after_out")).tensors == ("images", "total")

    @pytest.mark.parametrize("after", ["convolution", "concatenation"])
    @pytest.mark.parametrize(("activation", "is_quantized"), [("Relu", True), ("HardSwish", False)])
    def test_both_terms_of_a_shortcut_around_relus_are_quantized(
        self, activation: str, is_quantized: bool, after: str
    ) -> None:
        # As in the blocks of M, whose weights export folds away; the last is concatenated.
        graph = GraphWriter()

        def block(name: str, source: str, channels: int) -> str:
            return graph.node(activation, [graph.conv(name, source, (channels, 8))], f"{name}_act")

        trunk = block("trunk", "images", 3)
        branch = block("branch", block("inner", trunk, 8), 8)
        total = graph.node("Add", [branch, trunk], "total")
        if after == "concatenation":
            total = graph.node("Concat", [total, block("side", "images", 3)], "joined", axis=1)
        graph.conv("after", total, (16 if after == "concatenation" else 8, 4))
        placement = place(graph.model("after_out"))
        assert {"trunk_act", "inner_act", "total"} <= set(placement.tensors)
        assert ("branch_act" in placement.tensors) == is_quantized
        assert placement.unquantized_reads == frozenset()

    def test_nothing_is_quantized_for_an_addition_before_another_activation_than_relu(self) -> None:
        for kind, quantized in (
            ("Relu", ("images", "shortcut", "act")),
            ("Elu", ("images", "act")),
        ):
            graph = GraphWriter()
            shortcut = graph.node("Relu", [graph.conv("trunk", "images", (3, 8))], "shortcut")
            branch = graph.conv("branch", "images", (3, 8))
            total = graph.node("Add", [shortcut, branch], "total")
            graph.conv("after", graph.node(kind, [total], "act"), (8, 4))
            assert place(graph.model("after_out")).tensors == quantized

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize(
        ("activation", "is_quantized"), [("Relu", True), ("silu", True), ("HardSwish", False)]
    )
    def test_a_shortcut_with_a_factor_reads_the_quantized_tensor(
        self, activation: str, is_quantized: bool, order: int
    ) -> None:
        # As in the authors' BottleRep blocks: the tensor is quantized for the block's convolution.
        graph = GraphWriter()
        trunk = graph.conv_relu("trunk", "images", (3, 8))
        branch = graph.conv("branch", trunk, (8, 8))
        if activation == "silu":
            gate = graph.node("Sigmoid", [branch], "gate")
            branch = graph.node("Mul", [gate, branch][::order], "act")
        else:
            branch = graph.node(activation, [branch], "act")
        factor = graph.constant("alpha", np.array([0.5], np.float32))
        scaled = graph.node("Mul", [trunk, factor][::order], "scaled")
        total = graph.node("Add", [branch, scaled][::order], "total")
        graph.conv("after", total, (8, 4))
        placement = place(graph.model("after_out"))
        expected = ("images", "trunk_relu", "act", "total")
        assert placement.tensors == tuple(
            name for name in expected if is_quantized or name != "act"
        )
        assert placement.unquantized_reads == frozenset()

    @pytest.mark.parametrize("is_rescaled", [False, True])
    @pytest.mark.parametrize("has_factor", [False, True])
    def test_both_terms_of_a_shortcut_around_silu_are_quantized(
        self, is_rescaled: bool, has_factor: bool
    ) -> None:
        # As in the blocks of YOLOX and YOLOv5, with a factor of YOLOv6-L; rescaled by equalization.
        graph = GraphWriter()

        def silu(name: str, source: str, channels: int) -> str:
            made = graph.conv(name, source, (channels, 8))
            gate = graph.node("Sigmoid", [made], f"{name}_gate")
            if not is_rescaled:
                return graph.node("Mul", [made, gate], f"{name}_act")
            factors = graph.constant(f"{name}_factors", np.full((1, 8, 1, 1), 2, np.float32))
            return graph.node(
                "Mul", [graph.node("Mul", [made, gate], f"{name}_silu"), factors], f"{name}_act"
            )

        trunk = silu("trunk", "images", 3)
        branch, other = silu("branch", trunk, 8), trunk
        if has_factor:
            alpha = graph.constant("alpha", np.array([0.5], np.float32))
            other = graph.node("Mul", [alpha, trunk], "scaled")
        graph.conv("after", graph.node("Add", [branch, other], "total"), (8, 4))
        model = graph.model("after_out")
        placement = place(model)
        assert placement.tensors == ("images", "trunk_act", "branch_act", "total")
        images = random_images(1)
        measured = collect(model, images, placement.tensors)
        amax = {name: item.amax for name, item in measured.items()}
        expected, found = (
            runner(reference_session(one))(images[0])["after_out"]
            for one in (model, insert_qdq(model, placement, amax))
        )
        np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())

    def test_squeeze_and_excitation_stays_in_float(self) -> None:
        graph = GraphWriter()
        trunk = graph.conv("trunk", "images", (3, 8))
        pooled = graph.node("GlobalAveragePool", [trunk], "pooled")
        gate = graph.conv("grow", graph.conv_relu("shrink", pooled, (8, 2)), (2, 8))
        gate = graph.node("HardSigmoid", [gate], "gate")
        graph.conv("after", graph.node("Mul", [trunk, gate], "gated"), (8, 4))
        placement = place(graph.model("after_out"))
        assert placement.layers == ("trunk", "after")
        assert set(placement.float_layers) == {"shrink", "grow"}
        assert "global pooling" in placement.float_layers["grow"]
        assert placement.tensors == ("images", "gated")

    def test_the_expectation_of_a_distribution_stays_in_float(self) -> None:
        graph = GraphWriter()
        bins = graph.node("Softmax", [graph.conv("reg", "images", (3, 8))], "bins", axis=1)
        graph.conv("dfl", bins, (8, 1))
        placement = place(graph.model("dfl_out"))
        assert placement.layers == ("reg",)
        assert "softmax" in placement.float_layers["dfl"]

    def test_a_depthwise_convolution_runs_in_int8(self) -> None:
        graph = GraphWriter()
        wide = graph.conv_relu("wide", "images", (3, 8))
        graph.conv("depthwise", wide, (8, 8), kernel=3, group=8)
        assert place(graph.model("depthwise_out")).layers == ("wide", "depthwise")

    @pytest.mark.parametrize(("mode", "shared"), [("nearest", True), ("cubic", False)])
    def test_resizing_passes_int8_through_unless_it_overshoots(
        self, mode: str, shared: bool
    ) -> None:
        graph = GraphWriter()
        small = graph.conv_relu("small", "images", (3, 8))
        scales = graph.constant("scales", np.array([1, 1, 2, 2], np.float32))
        graph.conv("after", graph.node("Resize", [small, "", scales], "large", mode=mode), (8, 4))
        placement = place(graph.model("after_out"))
        assert placement.groups == ((("small_relu", "large"),) if shared else ())
        assert ("small_relu" in placement.tensors) == shared

    def test_layers_without_names_are_called_after_their_outputs(self) -> None:
        model = detector()
        for node in model.graph.node:
            node.name = "same" if node.name in ("stem", "deep") else ""
        assert tuple(layer_names(model).values()) == tuple(f"{name}_out" for name in LAYERS)
        assert int8_layers(quantized(model, place(model, exclude={"low_out"}))) >= {"up_out"}


def in_float(rule: Rule, *layers: tuple[int, int], **attributes: Any) -> tuple[str, ...]:
    """Which convolutions in a row, named `0`, `1` ..., a rule leaves in float."""
    graph, tensor = GraphWriter(), "images"
    for number, channels in enumerate(layers):
        tensor = graph.conv(str(number), tensor, channels, **attributes)
    return tuple(place(graph.model(tensor), exclude_rules=(rule,)).float_layers)


def test_a_layer_whose_weights_are_computed_stays_in_float() -> None:
    graph = GraphWriter()
    trunk = graph.conv("trunk", "images", (3, 8))
    shape = graph.constant("shape", np.array([8, 8, 1, 1]))
    ones = graph.node("Expand", [graph.constant("one", np.ones(1, np.float32)), shape], "ones")
    graph.node("Conv", [trunk, ones], "mixed")
    placement = place(graph.model("mixed"))
    assert placement.float_layers == {"mixed_node": "its weights are computed"}
    assert placement.layers == ("trunk",)


class TestRulesToChoose:
    def test_fewer_than_sixteen_input_channels(self) -> None:
        layers = [(3, 16), (16, 15), (15, 4)]
        assert in_float(reads_few_channels, *layers) == ("0", "2")

    @pytest.mark.parametrize(("group", "few"), [(8, True), (4, False)])
    def test_the_channels_of_a_transposed_convolution_s_group(self, group: int, few: bool) -> None:
        graph = GraphWriter()
        wide = graph.conv("wide", "images", (3, 64))
        up = graph.conv("up", wide, (64, 2), kernel=2, op="ConvTranspose", group=group)
        found = place(graph.model(up), exclude_rules=(reads_few_channels,)).float_layers
        assert ("up" in found) is few

    def test_the_channels_of_a_group_are_what_counts(self) -> None:
        assert in_float(reads_few_channels, (3, 32), (32, 32)) == ("0",)
        graph = GraphWriter()
        wide = graph.conv("wide", "images", (3, 32))
        graph.conv("halves", wide, (32, 32), group=2)
        graph.conv("quarters", "halves_out", (32, 32), group=4)
        placement = place(graph.model("quarters_out"), exclude_rules=(reads_few_channels,))
        assert set(placement.float_layers) == {"wide", "quarters"}

    def test_depthwise_convolutions(self) -> None:
        graph = GraphWriter()
        graph.conv("whole", "images", (3, 8))
        graph.conv("depthwise", "whole_out", (8, 8), group=8)
        graph.conv("halves", "depthwise_out", (8, 8), group=2)
        placement = place(graph.model("halves_out"), exclude_rules=(computes_channels_apart,))
        assert set(placement.float_layers) == {"depthwise"}
        # What a layer in float reads is not rounded either.
        assert placement.tensors == ("images", "depthwise_out")

    def test_transposed_convolutions(self) -> None:
        up = {"kernel": 2, "strides": [2, 2], "op": "ConvTranspose"}
        assert in_float(is_transposed, (3, 8), (8, 4), **up) == ("0", "1")
        assert in_float(is_transposed, (3, 8), (8, 4)) == ()
        # Their weights have input channels first.
        assert in_float(reads_few_channels, (3, 16), (16, 8), **up) == ("0",)

    def test_little_work_for_a_value_read(self) -> None:
        # A value is read by 9 products for each of 16 outputs; of every second row and column
        # by a quarter of them.
        assert in_float(works_less_than(144), (3, 16), kernel=3) == ()
        assert in_float(works_less_than(145), (3, 16), kernel=3) == ("0",)
        assert in_float(works_less_than(36), (3, 16), kernel=3, strides=[2, 2]) == ()
        assert in_float(works_less_than(37), (3, 16), kernel=3, strides=[2, 2]) == ("0",)

    @pytest.mark.parametrize("count", range(4))
    def test_layers_counted_from_the_outputs(self, count: int) -> None:
        layers = [(3, 8), (8, 8), (8, 4)]
        assert in_float(is_among_the_last(count), *layers) == ("0", "1", "2")[3 - count :]

    def test_one_rule_serves_graph_after_graph(self) -> None:
        rule = is_among_the_last(1)
        for count in (3, 2, 4, 3) * 5:
            assert in_float(rule, (3, 8), *[(8, 8)] * (count - 1)) == (str(count - 1),)


class TestGates:
    """Tensors of one pixel, after global pooling, and those computed from them."""

    @staticmethod
    def float_layers(axes: list[int] | None, then: str = "", opset: int = 17) -> set[str]:
        graph = GraphWriter()
        trunk = graph.conv("trunk", "images", (3, 8))
        if axes is None:
            pooled = graph.node("GlobalMaxPool", [trunk], "pooled")
        elif opset >= 18:
            stored = graph.constant("axes", np.array(axes))
            pooled = graph.node("ReduceMean", [trunk, stored], "pooled", keepdims=1)
        else:
            pooled = graph.node("ReduceMean", [trunk], "pooled", axes=axes, keepdims=1)
        if then == "constant":
            factor = graph.constant("factor", np.ones((1, 8, 1, 1), np.float32))
            pooled = graph.node("Mul", [pooled, factor], "scaled")
        elif then == "trunk":
            pooled = graph.node("Mul", [pooled, trunk], "scaled")
        elif then:
            pooled = graph.node(then, [pooled], "moved")
        graph.conv("reads", pooled, (8, 4))
        return set(place(graph.model("reads_out", opset=opset)).float_layers)

    @pytest.mark.parametrize("axes", [None, [2, 3], [-2, -1], [3, 2]])
    def test_pooling_of_all_rows_and_columns_makes_one_pixel(self, axes: list[int] | None) -> None:
        assert self.float_layers(axes) == {"reads"}
        assert self.float_layers(axes, opset=18) == {"reads"}

    @pytest.mark.parametrize("axes", [[2], [3], [-1]])
    def test_pooling_of_either_alone_does_not(self, axes: list[int]) -> None:
        assert self.float_layers(axes) == set()
        assert self.float_layers(axes, opset=18) == set()

    @pytest.mark.parametrize("then", ["Relu", "Sigmoid", "Identity", "constant"])
    def test_what_alters_the_pixel_alone_leaves_it_one(self, then: str) -> None:
        assert self.float_layers([2, 3], then) == {"reads"}

    def test_what_scales_a_whole_tensor_does_not(self) -> None:
        assert self.float_layers([2, 3], "trunk") == set()


@pytest.mark.parametrize("between", [(), ("Transpose",), ("Transpose", "Reshape")])
def test_the_expectation_may_be_taken_of_a_moved_distribution(between: tuple[str, ...]) -> None:
    for moves in (True, False):
        graph = GraphWriter()
        tensor = graph.node("Softmax", [graph.conv("reg", "images", (3, 8))], "bins", axis=1)
        for op in between if moves else ("Relu",):
            if op == "Reshape":
                shape = graph.constant("shape", np.array([0, 8, 32, 32], np.int64))
                tensor = graph.node(op, [tensor, shape], op)
            else:
                tensor = graph.node(op, [tensor], op, **({"perm": [0, 1, 3, 2]} if moves else {}))
        graph.conv("dfl", tensor, (8, 1))
        assert (place(graph.model("dfl_out")).layers == ("reg",)) is moves


@pytest.mark.skipif(not LITE.exists(), reason="the YOLOv6Lite graph is not here")
def test_yolov6lite_keeps_only_its_gates_in_float() -> None:
    model = onnx.load(LITE)
    placement = place(model)
    pooled = {node.output[0] for node in model.graph.node if node.op_type == "GlobalAveragePool"}
    gates = {
        node.name for node in model.graph.node if node.op_type == "Conv" and node.input[0] in pooled
    }
    assert len(gates) == 14
    assert gates < set(placement.float_layers)
    assert len(placement.float_layers) == 28  # two a gate
    assert len(placement.layers) == 126


@pytest.mark.skipif(not LITE.exists(), reason="the YOLOv6Lite graph is not here")
def test_yolov6lite_of_a_checkpoint_is_placed_as_that_of_a_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    channels = authors_format.LITE_CHANNELS["yolov6lite_l"]
    model = authors_format.randomized(authors_format.LiteModel(channels))
    path = authors_format.write_checkpoint(tmp_path / "lite.pt", model)
    graph = export_onnx(load_checkpoint(path).model, verify=False)
    graphs = graph, onnx.load(LITE)
    layers = [Counter(node.op_type for node in graph.graph.node) for graph in graphs]
    for kind in ("Conv", "HardSwish", "GlobalAveragePool", "HardSigmoid", "Relu", "Resize"):
        assert layers[0][kind] == layers[1][kind]
    placed, expected = (place(graph) for graph in graphs)
    for part in ("layers", "float_layers", "tensors", "groups"):
        assert len(getattr(placed, part)) == len(getattr(expected, part)), part


def test_bifusion_and_cspsppf_run_in_int8_as_a_whole() -> None:
    model = export_onnx(
        YOLOv6(FOUR_LEVELS), ExportSettings((64, 64), BatchProfile(1, 1, 1)), verify=False
    )
    placement = place(model)
    assert not placement.float_layers
    names = {node.output[0]: node.name for node in model.graph.node}
    sources = {
        node.name: {names[name] for name in node.input}
        for node in model.graph.node
        if node.op_type == "Concat"
    }
    groups = [{names[tensor] for tensor in group} for group in placement.groups]
    tensors = {names[tensor] for tensor in placement.tensors if tensor in names}
    # What is concatenated has one scale, and hands INT8 on.
    for fused in ("neck.fuse5/concat", "neck.fuse4/concat", "backbone.sppf/concat_1"):
        assert any(sources[fused] <= group for group in groups), fused
    # What is pooled has that of its source, which alone is quantized.
    (pooled,) = (part for part in sources["backbone.sppf/concat"] if "maxpool" not in part)
    assert pooled in tensors
    assert not tensors & (sources["backbone.sppf/concat"] - {pooled})
