"""Surgery on Q/DQ graphs: from ONNX Runtime's quantizer, in other tools' styles, and by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from support.logs import logged
from support.pictures import noise_folder
from support.small_graphs import SIZE, GraphWriter, detector, random_images

from trt_yolov6.engines import backend
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.errors import UserError
from trt_yolov6.graph.operators import layer_names
from trt_yolov6.pipeline import build
from trt_yolov6.quantization.qdq.cleanup import clean, without_activation_pairs
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import place
from trt_yolov6.quantization.qdq.verify import OutputShift, verify_clean
from trt_yolov6.spec import BatchProfile

SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True}
INT8 = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._feeds = iter([{"images": image} for image in random_images(4)])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._feeds, None)


def from_onnxruntime(folder: Path, **settings: Any) -> onnx.ModelProto:
    """The small detector as ONNX Runtime's static quantizer makes it."""
    onnx.save(detector(), folder / "float.onnx")
    quantize_static(
        folder / "float.onnx",
        folder / "qdq.onnx",
        _Reader(),
        quant_format=QuantFormat.QDQ,
        **settings,
    )
    return onnx.load(folder / "qdq.onnx")


def ours(**keywords: Any) -> onnx.ModelProto:
    model = detector()
    placement = place(model, **keywords)
    amax = {name: 1.0 + index for index, name in enumerate(placement.tensors)}
    return insert_qdq(model, placement, amax)


def quantized_tensors(model: onnx.ModelProto) -> set[str]:
    return {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(removal.kind for removal in clean(model)[1])


def run(model: onnx.ModelProto, image: NDArray[Any]) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results: list[NDArray[Any]] = session.run(None, {"images": image})
    return results


def assert_same_outputs(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    for image in random_images(2):
        for one, other in zip(run(before, image), run(after, image), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def removed_by_hand(graph: GraphWriter, *outputs: str) -> tuple[onnx.ModelProto, Counter[str]]:
    """Clean a hand-made graph; return the result and the kinds of what was removed."""
    model = graph.model(*outputs)
    result, removals = clean(model)
    assert clean(result) == (result, ())
    return result, Counter(removal.kind for removal in removals)


def int8_conv(graph: GraphWriter, name: str, source: str, channels: tuple[int, int]) -> str:
    """A convolution whose weights are stored as INT8."""
    out = graph.conv(name, source, channels)
    weight = graph.constants.pop(f"{name}.w")
    scale = graph.constant(f"{name}.ws", np.array(np.abs(weight).max() / 127, np.float32))
    zero = graph.constant("zero", np.array(0, np.int8))
    levels = np.rint(weight / graph.constants[scale]).astype(np.int8)
    node = graph.nodes.pop()
    node.input[1] = graph.node(
        "DequantizeLinear", [graph.constant(f"{name}.w8", levels), scale, zero], f"{name}.wd"
    )
    graph.nodes.append(node)
    return out


class TestOnnxRuntimeQuantizer:
    @pytest.mark.parametrize(
        "settings",
        [
            {**INT8, "per_channel": True, "extra_options": SYMMETRIC},
            {
                **INT8,
                "per_channel": True,
                "extra_options": {
                    **SYMMETRIC,
                    "AddQDQPairToWeight": True,
                    "DedicatedQDQPair": True,
                },
            },
            {**INT8, "per_channel": True, "extra_options": {**SYMMETRIC, "QuantizeBias": False}},
        ],
        ids=["default", "float weights, a pair a reader", "float biases"],
    )
    def test_symmetric_graphs_end_with_the_pairs_that_placement_gives(
        self, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        before = from_onnxruntime(tmp_path, **settings)
        after, removals = clean(before)
        placement = place(detector())
        # ONNX Runtime puts a pair on every tensor that it knows the range of.
        assert quantized_tensors(after) == {*placement.tensors, *placement.repeated}
        stored = {item.name: numpy_helper.to_array(item) for item in after.graph.initializer}
        weights = [value for value in stored.values() if value.ndim == 4]
        assert len(weights) == len(layer_names(detector()))
        assert all(value.dtype == np.int8 for value in weights)
        assert not any(value.dtype == np.int32 for value in stored.values())
        assert all(str(removal) for removal in removals)

    @pytest.mark.parametrize(
        "settings",
        [
            {**INT8, "per_channel": True, "extra_options": SYMMETRIC},
            {"per_channel": False},
            {**INT8, "per_channel": False},
            {**INT8, "op_types_to_quantize": ["Conv"], "extra_options": SYMMETRIC},
        ],
        ids=["symmetric", "uint8 with zero points", "int8 with zero points", "convolutions only"],
    )
    def test_outputs_move_no_more_than_quantization_explains_and_come_closer_to_float(
        self, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        before = from_onnxruntime(tmp_path, **settings)
        after, removals = clean(before)
        assert removals
        shifts = verify_clean(before, after, random_images(4, seed=1))
        assert [shift.output for shift in shifts] == ["boxes", "scores"]
        cleaned = verify_clean(after, after, random_images(4, seed=1))
        for shift, remaining in zip(shifts, cleaned, strict=True):
            assert shift.explained
            assert shift.moved > 0
            assert remaining.quantization < shift.quantization
        assert clean(after) == (after, ())


class TestOurOwnGraphs:
    def test_nothing_is_left_to_remove(self) -> None:
        model = ours()
        assert clean(model) == (model, ())

    def test_a_pair_stands_before_every_layer_and_stays(self) -> None:
        model = ours()
        assert {"pool_1", "pool_2", "pyramid", "both"} <= quantized_tensors(clean(model)[0])

    def test_a_float_graph_is_left_alone(self) -> None:
        model = detector()
        assert clean(model) == (model, ())

    def test_metadata_and_outputs_are_kept(self) -> None:
        model = ours()
        model.metadata_props.add(key="names", value='["a"]')
        result, _ = clean(model)
        assert result.metadata_props == model.metadata_props
        assert result.graph.output == model.graph.output

    def test_the_same_graph_gives_the_same_bytes(self) -> None:
        first, second = (clean(ours())[0].SerializeToString() for _ in range(2))
        assert first == second

    def test_without_any_one_pair_tensorrt_rtx_computes_fewer_layers_in_int8(self) -> None:
        api = pytest.importorskip("tensorrt_rtx")
        from trt_yolov6.engines.tensorrt.flavour import logger_of
        from trt_yolov6.engines.tensorrt.layer_log import engine_layers

        def in_int8(model: onnx.ModelProto) -> set[str]:
            settings = BuildSettings(BatchProfile(1, 1, 2), target="l4", progress=False)
            backend("tensorrt-rtx").build(model.SerializeToString(), settings)
            return {
                next(node for node in layer.nodes if node.endswith("_node"))
                if layer.kind == "maxpool"
                else layer.name.split("_myl")[0]
                for layer in engine_layers(logger_of(api).layers)
                if layer.kind in ("correlation", "maxpool") and set(layer.inputs) == {"Int8"}
            }

        placement = place(detector())
        model = ours()
        everything = in_int8(model)
        # Where concatenations and poolings hand INT8 on, TensorRT-RTX needs no pair.
        for tensor in placement.repeated:
            model = _without_pair(model, tensor)
        assert in_int8(model) == everything
        assert everything == {
            *(set(layer_names(detector()).values()) - {"up"}),  # which it has no kernel for
            "pool_1_node",
            "pool_2_node",
        }
        # What the transposed convolution reads is quantized though it is computed in float.
        for tensor in sorted({*placement.tensors} - {"merge_relu"}):
            assert in_int8(_without_pair(model, tensor)) < everything, tensor

    def test_after_a_build_that_failed_the_next_has_its_layers_in_int8(self) -> None:
        api = pytest.importorskip("tensorrt_rtx")
        from trt_yolov6.engines.tensorrt.flavour import logger_of
        from trt_yolov6.engines.tensorrt.layer_log import engine_layers

        def layers_of(model: onnx.ModelProto, target: str) -> list[tuple[str, ...]]:
            settings = BuildSettings(BatchProfile(1, 1, 2), target=target, progress=False)
            backend("tensorrt-rtx").build(model.SerializeToString(), settings)
            return [layer.inputs for layer in engine_layers(logger_of(api).layers)]

        expected = layers_of(ours(), "l4")
        graph = GraphWriter()
        weight = graph.constant("weight", np.ones((SIZE, SIZE), np.float32))
        product = graph.node("MatMul", ["images", weight], "product")
        with pytest.raises(UserError):  # it has no float32 matrix product for a T4
            layers_of(graph.model(product), "t4")
        assert layers_of(ours(), "l4") == expected


def _without_pair(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    names = (f"{tensor}/quantize", f"{tensor}/dequantize")
    pair = [node for node in result.graph.node if node.name in names]
    assert len(pair) == 2
    for node in pair:
        result.graph.node.remove(node)
    for node in result.graph.node:
        for index, name in enumerate(node.input):
            if name == pair[1].output[0]:
                node.input[index] = tensor
    return result


class TestPasses:
    def test_weights_quantized_at_run_time_are_stored_as_int8(self) -> None:
        # As PyTorch exports fake quantization, and as pytorch-quantization and ModelOpt do.
        graph = GraphWriter()
        source = graph.pair("images", 0.01)
        graph.conv("layer", source, (3, 8))
        node = graph.nodes.pop()
        grid = [
            graph.constant("ws", np.linspace(0.005, 0.02, 8, dtype=np.float32)),
            graph.constant("wz", np.zeros(8, np.int8)),
        ]
        graph.node("QuantizeLinear", ["layer.w", *grid], "wq", axis=0)
        node.input[1] = graph.node("DequantizeLinear", ["wq", *grid], "wd", axis=0)
        graph.nodes.append(node)
        result, found = removed_by_hand(graph, "layer_out")
        assert found == {"fold_weights": 1}
        stored = [item for item in result.graph.initializer if len(item.dims) == 4]
        assert [item.data_type for item in stored] == [onnx.TensorProto.INT8]
        assert_same_outputs(graph.model("layer_out"), result)

    def test_one_pair_is_left_of_those_that_several_readers_have(self) -> None:
        # As pytorch-quantization: each module quantizes its own input.
        graph = GraphWriter()
        trunk = graph.conv_relu("trunk", "images", (3, 8))
        outs = [
            int8_conv(graph, name, graph.pair(trunk, 0.02, name=f"{name}_input"), (8, 4))
            for name in ("left", "right")
        ]
        result, found = removed_by_hand(graph, *outs)
        assert found["merge_equal_pairs"] == 2  # a QuantizeLinear, then a DequantizeLinear
        assert quantized_tensors(result) == {"trunk_relu"}
        assert_same_outputs(graph.model(*outs), result)

    def test_a_second_pair_with_the_same_scale_goes(self) -> None:
        graph = GraphWriter()
        out = int8_conv(graph, "layer", graph.pair(graph.pair("images", 0.01), 0.01), (3, 8))
        result, found = removed_by_hand(graph, out)
        assert found == {"drop_requantization": 1}
        assert len(quantized_tensors(result)) == 1
        assert_same_outputs(graph.model(out), result)

    def test_of_two_pairs_with_different_scales_the_last_stays(self) -> None:
        graph = GraphWriter()
        out = int8_conv(graph, "layer", graph.pair(graph.pair("images", 0.01), 0.03), (3, 8))
        result, found = removed_by_hand(graph, out)
        assert found == {"drop_requantization": 1}
        (quantize,) = (node for node in result.graph.node if node.op_type == "QuantizeLinear")
        assert quantize.input[0] == "images"
        scale = next(item for item in result.graph.initializer if item.name == quantize.input[1])
        assert numpy_helper.to_array(scale) == np.float32(0.03)

    @pytest.mark.parametrize("activation", ["Relu", "HardSwish", "LeakyRelu"])
    def test_a_pair_between_a_convolution_and_its_activation_goes(self, activation: str) -> None:
        graph = GraphWriter()
        inner = int8_conv(graph, "inner", graph.pair("images", 0.01), (3, 8))
        acted = graph.node(activation, [graph.pair(inner, 0.02)], "acted")
        out = int8_conv(graph, "outer", graph.pair(acted, 0.02), (8, 4))
        result, found = removed_by_hand(graph, out)
        assert found == {"drop_pairs_in_fusions": 1}
        assert quantized_tensors(result) == {"images", "acted"}

    def test_of_an_additions_terms_only_the_shortcut_stays_quantized(self) -> None:
        graph = GraphWriter()
        trunk = graph.conv_relu("trunk", "images", (3, 8))
        shortcut = graph.pair(trunk, 0.02)
        branch = int8_conv(graph, "branch", shortcut, (8, 8))
        total = graph.node("Add", [shortcut, graph.pair(branch, 0.02)], "total")
        out = int8_conv(graph, "after", graph.pair(total, 0.03), (8, 4))
        result, found = removed_by_hand(graph, out)
        assert found == {"drop_pairs_in_fusions": 1}
        assert quantized_tensors(result) == {"trunk_relu", "total"}

    def test_pairs_around_a_gate_and_on_predictions_go(self) -> None:
        graph = GraphWriter()
        inner = int8_conv(graph, "inner", graph.pair("images", 0.01), (3, 8))
        gate = graph.pair(graph.node("Sigmoid", [inner], "gate"), 0.01)
        silu = graph.node("Mul", [inner, gate], "silu")
        out = graph.pair(int8_conv(graph, "outer", graph.pair(silu, 0.02), (8, 4)), 0.1)
        result, found = removed_by_hand(graph, out)
        assert found == {"drop_useless_pairs": 2}
        assert quantized_tensors(result) == {"images", "silu"}
        assert [item.name for item in result.graph.output] == [out]

    def test_a_pair_that_stands_for_a_relu_stays(self) -> None:
        # ONNX Runtime drops a ReLU where zero is the lowest level; the pair then does its work.
        graph = GraphWriter()
        inner = graph.conv("inner", "images", (3, 8))
        grid = [
            graph.constant("scale", np.array(0.02, np.float32)),
            graph.constant("lowest", np.array(-128, np.int8)),
        ]
        graph.node("QuantizeLinear", [inner, *grid], "q")
        out = graph.node("Sigmoid", [graph.node("DequantizeLinear", ["q", *grid], "dq")], "out")
        model = graph.model(out)
        assert clean(model)[1] == ()
        (exact,) = run(without_activation_pairs(model), random_images(1)[0])
        assert exact.min() == 0.5  # sigmoid of 0: nothing negative comes through

    def test_concatenated_tensors_get_one_scale_and_the_pair_behind_stays(self) -> None:
        graph = GraphWriter()
        arms = [
            graph.pair(graph.conv_relu(name, "images", (3, 8)), scale)
            for name, scale in (("left", 0.02), ("right", 0.005))
        ]
        both = graph.node("Concat", arms, "both", axis=1)
        out = int8_conv(graph, "after", graph.pair(both, 0.03), (16, 4))
        result, found = removed_by_hand(graph, out)
        assert found == {"unify_scales": 2}
        stored = {item.name: numpy_helper.to_array(item) for item in result.graph.initializer}
        pairs = [node for node in result.graph.node if node.op_type == "QuantizeLinear"]
        assert {node.input[0] for node in pairs} == {"left_relu", "right_relu", "both"}
        assert {float(stored[node.input[1]]) for node in pairs} == {float(np.float32(0.03))}

    def test_a_concatenation_with_a_float_input_keeps_its_pair(self) -> None:
        graph = GraphWriter()
        left, right = (graph.conv_relu(name, "images", (3, 8)) for name in ("left", "right"))
        both = graph.node("Concat", [graph.pair(left, 0.02), right], "both", axis=1)
        out = int8_conv(graph, "after", graph.pair(both, 0.02), (16, 4))
        result, found = removed_by_hand(graph, out)
        assert not found
        assert quantized_tensors(result) == {"left_relu", "both"}

    def test_biases_in_32_bits_become_float(self, tmp_path: Path) -> None:
        model = from_onnxruntime(
            tmp_path, **INT8, op_types_to_quantize=["Conv"], extra_options=SYMMETRIC
        )
        assert kinds(model)["fold_biases"] == 9


class TestBuild:
    """`build`, given a graph that came with Q/DQ nodes."""

    def test_surplus_nodes_go_and_images_show_that_nothing_else_moved(self, tmp_path: Path) -> None:
        model = from_onnxruntime(tmp_path, **INT8, extra_options=SYMMETRIC)
        wanted, removals = clean(model)
        assert removals
        images = noise_folder(tmp_path / "images")
        cases: list[tuple[dict[str, Any], str]] = [
            ({"calibration": images}, "quantization itself moves it by"),
            ({}, "not verified; calibration images compare the outputs"),
            ({"clean": False}, ""),
        ]
        for number, (options, said) in enumerate(cases):
            with logged() as lines:
                built = build(
                    tmp_path / "qdq.onnx",
                    backend="onnxruntime",
                    output=tmp_path / f"{number}.onnx",
                    **options,
                )
            assert any("surgery" in line and said in line for line in lines) is bool(said)
            kept = quantized_tensors(model if "clean" in options else wanted)
            assert quantized_tensors(onnx.load(built.path)) == kept

    def test_a_graph_without_surplus_nodes_stays_as_it_is(self, tmp_path: Path) -> None:
        onnx.save(clean(ours())[0], tmp_path / "ours.onnx")
        with logged() as lines:
            build(tmp_path / "ours.onnx", backend="onnxruntime", output=tmp_path / "engine.onnx")
        assert "surgery: no Q/DQ node of the graph is surplus" in lines


class TestProof:
    def test_a_graph_that_was_damaged_is_not_explained(self) -> None:
        model = ours()
        damaged = onnx.ModelProto()
        damaged.CopyFrom(model)
        for item in damaged.graph.initializer:
            if item.name == "merge.b":
                item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item) + 9, item.name))
        shifts = verify_clean(model, damaged, random_images(2))
        assert not all(shift.explained for shift in shifts)

    def test_the_same_graph_has_not_moved(self) -> None:
        model = ours()
        shifts: Sequence[OutputShift] = verify_clean(model, model, random_images(2))
        assert [shift.moved for shift in shifts] == [0, 0]
        assert all(shift.quantization > 0 and shift.explained for shift in shifts)

    def test_without_images_there_is_none(self) -> None:
        with pytest.raises(UserError, match="without images"):
            verify_clean(ours(), ours(), [])
