"""FP8 from the numbers to the engine: rounding, Q/DQ, placement, calibration, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from support.networks import ONE, TINY, random_model
from support.pictures import save_noise
from support.small_graphs import GraphWriter, detector, random_images

from trt_yolov6.cli import main
from trt_yolov6.data.coco import load_coco
from trt_yolov6.diagnostics.doctor import has_fp8
from trt_yolov6.diagnostics.inspection import inspect_file
from trt_yolov6.diagnostics.inspection_text import format_inspection
from trt_yolov6.engines import backend, load_engine
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.engines.build import build_engine
from trt_yolov6.engines.cuda import device as cuda_device
from trt_yolov6.engines.tensorrt import rtx as tensorrt_rtx
from trt_yolov6.engines.tensorrt.execution import Profiler
from trt_yolov6.engines.tensorrt.flavour import instance_of
from trt_yolov6.engines.tensorrt.layer_log import quantized_layers
from trt_yolov6.errors import UserError
from trt_yolov6.graph.export import ExportSettings, export_onnx
from trt_yolov6.graph.inspect import OnnxDetails
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.graph.operators import layer_names
from trt_yolov6.graph.reference import reference_session
from trt_yolov6.quantization.calibrators import amax_of, quantization_error
from trt_yolov6.quantization.pipeline import quantize
from trt_yolov6.quantization.qdq.cleanup import clean
from trt_yolov6.quantization.qdq.insert import insert_qdq, quantize_weights
from trt_yolov6.quantization.qdq.placement import (
    FP8_RULES,
    Rule,
    is_among_the_last,
    is_transposed,
    place,
    place_for,
    reads_few_channels,
    works_less_than,
)
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.statistics import Accumulator
from trt_yolov6.quantization.table import write_table
from trt_yolov6.quantization.types import E4M3_LEVELS, FP8, INT8
from trt_yolov6.runtime.sensitivity_report import LabelledAp

MINMAX = QuantizationSettings(
    quantized=FP8, calibrator="minmax", equalize=False, bias_correction=False
)

LAYERS = ("stem", "deep", "low", "reduce", "merge", "up", "join", "head", "cls", "reg")


def rounded(values: NDArray[np.floating[Any]], scale: float | NDArray[Any]) -> NDArray[np.float32]:
    """Values as FP8 represents them, by another implementation."""
    scaled = np.clip(values.astype(np.float32) / np.float32(scale), -448, 448)
    result = scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)
    return np.asarray(result)


def run(model: onnx.ModelProto, images: NDArray[Any]) -> list[NDArray[Any]]:
    session = reference_session(model)
    results: list[NDArray[Any]] = session.run(None, {model.graph.input[0].name: images})
    return results


def quantized_detector(fp16: bool = False) -> onnx.ModelProto:
    model = detector()
    placement = place(model, propagate=False)
    amax = dict.fromkeys(placement.tensors, 2.0)
    return insert_qdq(model, placement, amax, quantized=FP8, fp16=fp16)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A small YOLOv6 with random weights, some of whose layers are wide enough for FP8."""
    path = tmp_path_factory.mktemp("wide") / "wide.onnx"
    arch = dataclasses.replace(TINY, stage_channels=(8, 8, 128, 128, 128))
    onnx.save(export_onnx(random_model(arch), ExportSettings((64, 64), ONE), verify=False), path)
    return graph_from_onnx(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of noise."""
    result = tmp_path / "pictures"
    result.mkdir()
    for seed in range(3):
        save_noise(result / f"{seed}.png", seed)
    return result


# --- numbers ------------------------------------------------------------------------------------


def test_values_round_to_the_nearest_level_ties_to_even_and_saturate() -> None:
    rng = np.random.default_rng(0)
    middles = (E4M3_LEVELS[1:] + E4M3_LEVELS[:-1]) / 2
    random = [rng.normal(0, spread, 20_000) for spread in (1e-3, 0.1, 10, 300)]
    special = [464, 463.9, 464.1, 1e9, 0.0, -0.0, 2.0**-10, 2.0**-11]
    values = np.concatenate([*random, middles, -middles, E4M3_LEVELS, special]).astype(np.float32)
    expected = torch.from_numpy(np.clip(values, -448, 448)).to(torch.float8_e4m3fn)
    codes = FP8.encode(values)
    assert np.array_equal(codes.view(np.uint8), expected.view(torch.uint8).numpy())
    assert np.array_equal(decoded(codes), expected.float().numpy())


def decoded(codes: NDArray[np.int8]) -> NDArray[np.float32]:
    return np.asarray(codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


def test_every_level_is_its_own_code() -> None:
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8).view(np.int8)
    assert np.array_equal(FP8.encode(decoded(codes)), codes)
    assert E4M3_LEVELS[-1] == 448


@pytest.mark.parametrize("half", [False, True])
def test_weights_have_one_scale_that_clips_none_of_them(half: bool) -> None:
    weights = np.random.default_rng(0).normal(0, 1e-4, (8, 4, 3, 3)).astype(np.float32)
    codes, scale = quantize_weights(weights, None, FP8, half_scales=half)
    assert scale.shape == ()
    assert np.abs(weights).max() <= scale * 448 * (1 + 1e-6)
    # Of full precision in float16, which smaller ones are not.
    assert not half or (np.float16(scale) == scale and scale >= 2.0**-14)
    assert np.array_equal(decoded(codes) * scale, rounded(weights, scale))


@pytest.mark.parametrize("amax", [1.0, 6.0])
def test_the_error_of_a_range_is_that_of_rounding_the_values(amax: float) -> None:
    values = np.abs(np.random.default_rng(0).normal(0, 1, 200_000)).astype(np.float32)
    accumulator = Accumulator("x")
    accumulator.add(values.reshape(1, 1, -1))
    measured = float(np.mean(np.square(rounded(values, amax / 448) - values)))
    found = quantization_error(accumulator.result(), np.array([amax]), FP8)
    assert found[0] == pytest.approx(measured, rel=0.02)


def test_the_mse_calibrator_finds_no_worse_range_than_the_largest_value() -> None:
    accumulator = Accumulator("x")
    values = np.random.default_rng(0).standard_t(3, (1, 1, 100_000)).astype(np.float32)
    accumulator.add(values)
    statistics = accumulator.result()
    best = amax_of(statistics, "mse", FP8)
    errors = quantization_error(statistics, np.array([best, statistics.amax]), FP8)
    assert errors[0] <= errors[1]
    assert amax_of(statistics, "minmax", FP8) == statistics.amax


def test_entropy_is_for_evenly_spaced_levels() -> None:
    accumulator = Accumulator("x")
    accumulator.add(np.ones((1, 1, 8), np.float32))
    with pytest.raises(UserError, match="no calibrator 'entropy' for FP8; choose one of minmax"):
        amax_of(accumulator.result(), "entropy", FP8)


# --- the graph ----------------------------------------------------------------------------------


def test_a_quantized_convolution_computes_what_an_independent_one_does() -> None:
    graph = GraphWriter()
    relu = graph.conv_relu("first", "images", (3, 16), kernel=3)
    graph.conv("second", relu, (16, 8), kernel=3)
    model = graph.model("second_out", opset=19)
    placement = place(model, propagate=False)
    # The first range clips a part of the pixels, the second of the activations.
    amax = {"images": 0.75, "first_relu": 0.5}
    image = random_images(1)[0]
    found = run(insert_qdq(model, placement, amax, quantized=FP8), image)[0]

    def convolve(values: NDArray[Any], name: str) -> NDArray[np.float32]:
        weight = graph.constants[f"{name}.w"]
        largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
        exact = rounded(weight, largest / np.float32(448))
        bias = torch.from_numpy(graph.constants[f"{name}.b"])
        tensors = torch.from_numpy(values), torch.from_numpy(exact), bias
        return np.asarray(torch.nn.functional.conv2d(*tensors, padding=1))

    first = np.maximum(convolve(rounded(image, 0.75 / 448), "first"), 0)
    expected = convolve(rounded(first, 0.5 / 448), "second")
    # A sum in another order may round to the neighbouring level, here and there.
    off = np.abs(found - expected)
    assert np.median(off) < 1e-6
    assert off.max() < 0.02
    # Not rounding at all would be seen.
    plain = convolve(np.maximum(convolve(image, "first"), 0), "second")
    assert np.abs(plain - expected).max() > 10 * off.max()


def test_a_relu_before_a_pair_still_clips() -> None:
    """ONNX Runtime's own rewriting takes it away (seen in 1.32)."""
    graph = GraphWriter()
    graph.conv("only", graph.node("Relu", ["images"], "relu"), (3, 4))
    model = graph.model("only_out", opset=19)
    placement = place(model, propagate=False)
    quantized = insert_qdq(model, placement, {"relu": 1.0}, quantized=FP8)
    below = -np.ones((1, 3, 32, 32), np.float32)
    assert np.allclose(run(quantized, below)[0][0, :, 0, 0], graph.constants["only.b"], atol=1e-6)


@pytest.mark.parametrize("fp16", [False, True])
def test_weights_and_zero_points_are_stored_as_fp8_and_the_rest_is_as_asked(fp16: bool) -> None:
    model = quantized_detector(fp16)
    assert next(item.version for item in model.opset_import) >= 19
    stored = {item.name: item for item in model.graph.initializer}
    kinds = {item.data_type for item in stored.values() if not item.name.startswith("flat")}
    rest = TensorProto.FLOAT16 if fp16 else TensorProto.FLOAT
    assert {TensorProto.FLOAT8E4M3FN, rest} <= kinds
    assert TensorProto.INT8 not in kinds
    makers = {name: node for node in model.graph.node for name in node.output}
    for name in LAYERS:
        layer = next(node for node in model.graph.node if node.name == name)
        weights, scale, zero = (stored[item] for item in makers[layer.input[1]].input)
        assert weights.data_type == zero.data_type == TensorProto.FLOAT8E4M3FN
        # One scale for all would be left out by TensorRT-RTX on an H200.
        outputs = weights.dims[layer.op_type == "ConvTranspose"]
        assert list(scale.dims) == list(zero.dims) == [outputs]
        assert weights.raw_data
    assert all(np.isfinite(output).all() for output in run(model, random_images(1)[0]))


def test_the_same_arguments_give_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (quantized_detector(fp16=True).SerializeToString() for _ in range(2))
    assert capsys.readouterr().out == ""  # where GraphSurgeon would warn of FP8
    assert first == second


def test_half_precision_of_the_rest_moves_little() -> None:
    image = random_images(1)[0]
    for half, single in zip(
        run(quantized_detector(True), image), run(quantized_detector(), image), strict=True
    ):
        assert np.abs(half - single).max() < 0.1


def test_surgery_leaves_the_nodes_of_fp8_alone() -> None:
    model = quantized_detector(fp16=True)
    result, removals = clean(model)
    assert removals == ()
    assert result.SerializeToString() == model.SerializeToString()


# --- placement ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        (reads_few_channels, {"stem", "deep", "low", "head", "cls", "reg"}),
        (is_transposed, {"up"}),
        (is_among_the_last(1), {"cls", "reg"}),
        (is_among_the_last(2), {"cls", "reg", "head"}),
        # Multiply-adds a value read: 18, 72, 36, 8, 16, 32, 72, 72, 3, 4.
        (works_less_than(36), {"stem", "reduce", "merge", "up", "cls", "reg"}),
    ],
)
def test_a_rule_leaves_in_float_what_it_says(rule: Rule, left: set[str]) -> None:
    placement = place(detector(), exclude_rules=(rule,), propagate=False)
    assert set(placement.float_layers) == left
    assert set(placement.layers) == {*LAYERS} - left


def test_pairs_stand_right_before_layers_and_all_else_reads_unrounded_values() -> None:
    model = detector()
    result = insert_qdq(
        model,
        place(model, propagate=False),
        dict.fromkeys(place(model, propagate=False).tensors, 1.0),
        quantized=FP8,
    )
    names = layer_names(result)
    for node in result.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            read = [name.endswith("/dequantized") for name in node.input]
            assert any(read) == (node.output[0] in names), node.name


def test_the_rules_of_fp8_keep_what_does_much_work() -> None:
    graph = GraphWriter()
    first = graph.conv_relu("first", "images", (3, 128), kernel=3)
    worth = graph.conv_relu("worth", first, (128, 128), kernel=3)
    small = graph.conv_relu("small", worth, (128, 128))
    up = graph.conv("up", small, (128, 128), kernel=2, strides=[2, 2], op="ConvTranspose")
    stem = graph.conv_relu("head_stem", up, (128, 128), kernel=3)
    head = graph.conv_relu("head", stem, (128, 128), kernel=3)
    model = graph.model(graph.conv("prediction", head, (128, 4)))
    placement = place_for(FP8, model)
    assert placement.layers == ("worth",)
    assert placement.tensors == ("first_relu",)
    assert set(place_for(FP8, model, exclude=["worth"]).layers) == set()
    assert set(place_for(INT8, model).layers) == set(layer_names(model).values())
    assert len(FP8_RULES) > 0


# --- quantization as a whole --------------------------------------------------------------------


def test_the_default_compares_the_calibrators_that_fp8_has(
    wide: Graph, folder: Path, one_thread: None
) -> None:
    result = quantize(wide, folder, QuantizationSettings(quantized=FP8))
    assert {item.method for item in result.candidates} == {"minmax", "percentile", "mse"}
    assert {item.variant for item in result.candidates} <= {"plain", "equalized"}
    assert result.graph.precision == "fp8"
    assert result.graph.calibration is not None
    assert result.graph.calibration["fp8_layers"] == len(result.placement.layers) > 0
    assert result.table.key.settings["type"] == "fp8"


def test_a_table_made_for_int8_is_not_used_for_fp8(
    wide: Graph, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "table.json"
    write_table(file, quantize(wide, folder, dataclasses.replace(MINMAX, quantized=INT8)).table)
    result = quantize(wide, folder, MINMAX, table_file=file)
    assert "with the setting type int8, now fp8" in result.note
    write_table(file, result.table)
    again = quantize(wide, folder, MINMAX, table_file=file)
    assert "same model, images and settings" in again.note
    assert again.graph.model.SerializeToString() == result.graph.model.SerializeToString()


def test_named_layers_stay_in_float(wide: Graph, folder: Path) -> None:
    name = quantize(wide, folder, MINMAX).placement.layers[0]
    result = quantize(wide, folder, dataclasses.replace(MINMAX, float_layers=(name,)))
    assert name not in result.placement.layers
    assert result.placement.float_layers[name] == "kept in float by choice"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"calibrator": "entropy"}, "`calibrator` entropy is for INT8"),
        ({"adaptive_rounding": True}, "`adaptive_rounding` is for INT8"),
        ({"float_layers": "auto"}, "`float_layers` auto ranks layers by their sensitivity to INT8"),
        ({"float_layers": 3}, "`float_layers` 3 ranks layers by their sensitivity to INT8"),
    ],
)
def test_what_is_about_int8s_levels_is_refused(
    wide: Graph, folder: Path, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        quantize(wide, folder, dataclasses.replace(MINMAX, **change))


def test_a_network_too_narrow_for_fp8_is_refused(wide: Graph, folder: Path) -> None:
    with pytest.raises(UserError, match="no convolution that FP8 would speed up"):
        quantize(dataclasses.replace(wide, model=detector()), folder, MINMAX)


@pytest.fixture(scope="module")
def sample_fp8(sample_320: Graph, root: Path) -> Graph:
    """The sample in FP8 with half precision, calibrated on eight images and judged on as many."""
    settings = dataclasses.replace(MINMAX, fp16=True, image_limit=16)
    return quantize(sample_320, root / "calib", settings).graph


def test_the_sample_loses_less_than_half_a_point(
    sample_fp8: Graph, sample_320_ap: float, root: Path
) -> None:
    # All of them: on 16 images ranges wider by 0.05 % moved the AP by as much as is allowed.
    images = load_coco(root / "samples")
    found = LabelledAp(sample_fp8, images)(sample_fp8.model)
    assert found > sample_320_ap - 0.005


def test_a_change_of_ap_comes_with_an_interval(
    sample_fp8: Graph, sample_320: Graph, root: Path
) -> None:
    images = load_coco(root / "samples")
    few = images.images[:6]
    kept = {image.id for image in few}
    boxes = tuple(item for item in images.annotations if item["image_id"] in kept)
    ap = LabelledAp(sample_fp8, dataclasses.replace(images, images=few, annotations=boxes))
    change = ap.change(sample_fp8.model, sample_320.model)
    assert change.value == pytest.approx(ap(sample_fp8.model) - ap(sample_320.model))
    assert change.low <= change.value <= change.high
    assert change.half_width > 0
    none = ap.change(sample_320.model, sample_320.model)
    assert none.value == none.low == none.high == 0


# --- engines ------------------------------------------------------------------------------------


def test_an_engine_says_what_it_has_in_fp8(wide: Graph, folder: Path, tmp_path: Path) -> None:
    result = quantize(wide, folder, dataclasses.replace(MINMAX, fp16=True))
    count = len(result.placement.layers)
    built = build_engine(result.graph, backend="onnxruntime", output=tmp_path / "wide.onnx")
    assert built.manifest.precision == "fp8"
    assert built.quantized_asked == built.manifest.fp8_layers == count
    assert built.manifest.int8_layers is None
    inspection = inspect_file(built.path)
    assert isinstance(inspection.details, OnnxDetails)
    assert inspection.details.precisions["fp8"] == count
    assert "float8e4m3fn" in inspection.details.storage
    assert re.search(f"in FP8 +{count} convolutions", format_inspection(inspection))
    with load_engine(built.path) as engine:
        assert engine.precision == "fp8"
        assert "the accuracy of FP8, not its speed" in engine.note
        assert engine.computed_in == "fp32"
    found = graph_from_onnx(built.path)
    assert found.precision == "fp8"
    with pytest.raises(UserError, match="leave fp16 out"):
        graph_from_onnx(built.path, fp16=True)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("t4", "--target t4 includes compute capability 7.5, which has no FP8"),
        ("a100", "--target a100 includes compute capability 8.0"),
        ("portable", "--target portable includes compute capability 8.0"),
    ],
)
def test_a_target_without_fp8_is_refused_before_work_starts(
    target: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    output = tmp_path / "engine.trt"
    command = ["build", "--fp8", "--backend", "tensorrt-rtx", "--target", target]
    assert main([*command, "--weights", "none.pt", "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert reason in captured.err
    assert captured.out == ""
    assert not output.exists()


def test_fp8_is_for_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(tensorrt_rtx, "_check_device", lambda flavour, device: None)
    for capability, has in (((9, 0), True), ((8, 9), True), ((8, 6), False)):
        device = cuda_device.Device("GPU", capability)
        monkeypatch.setattr(cuda_device, "current_device", lambda device=device: device)
        tensorrt_rtx.check(BuildSettings())
        with contextlib.nullcontext() if has else pytest.raises(UserError, match="has no FP8"):
            tensorrt_rtx.check(BuildSettings(fp8=True))


def test_tensorrt_rtx_computes_in_fp8_what_it_is_asked_to(sample_fp8: Graph) -> None:
    pytest.importorskip("tensorrt_rtx")
    names = layer_names(sample_fp8.model).values()
    said: list[str] = []
    settings = BuildSettings(
        batch=sample_fp8.batch, target="ada", fp8=True, progress=False, on_layers=said.append
    )
    assert backend("tensorrt-rtx").build(sample_fp8.model.SerializeToString(), settings)
    assert sample_fp8.calibration is not None
    assert len(quantized_layers(said[0], names, "fp8")) == sample_fp8.calibration["fp8_layers"]
    assert quantized_layers(said[0], names, "int8") == ()


def test_doctor_says_which_gpus_have_fp8() -> None:
    assert [has_fp8(version) for version in ("7.5", "8.6", "8.9", "9.0", "12.0")] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_int8_and_fp8_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", "--int8", "--fp8"])
    assert caught.value.code == 2
    assert "not allowed with argument --int8" in capsys.readouterr().err


def test_options_of_quantization_name_both_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--calibrator", "mse", "--backend", "onnxruntime"]) == 2
    assert "--calibrator is for --int8 and --fp8; add one of them." in capsys.readouterr().err


def test_build_fp8_writes_engine_manifest_and_table(
    wide: Graph, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.onnx"
    command = ["build", "--fp8", "--fp16", "--onnx", str(wide.source), "--calib", str(folder)]
    command += ["--calibrator", "minmax", "--no-equalize", "--no-bias-correction"]
    assert main([*command, "--backend", "onnxruntime", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    manifest = json.loads(output.with_suffix(".json").read_text())
    count = manifest["fp8_layers"]
    assert f"in FP8: all {count} convolutions asked for\n" in said
    assert said.count(f"{count} convolutions") == said.count("convolutions asked for") == 1
    assert "convolutions left in float: " in said
    assert manifest["precision"] == "fp8"
    assert manifest["calibration"]["rest"] == "fp16"
    table = json.loads(output.with_suffix(".calibration.json").read_text())
    assert table["key"]["settings"]["type"] == "fp8"
    stored = {item.data_type for item in onnx.load(output).graph.initializer}
    assert TensorProto.FLOAT8E4M3FN in stored
    # Given back as an ONNX file, it is built as it is.
    again = ["build", "--onnx", str(output), "--output", str(tmp_path / "again.onnx"), "--quiet"]
    assert main([*again, "--backend", "onnxruntime"]) == 0
    assert "FP8's Q/DQ nodes are left as they are" in capsys.readouterr().out
    assert (tmp_path / "again.onnx").read_bytes() == output.read_bytes()


def test_codes_are_read_back_by_onnx() -> None:
    values = np.array([[0.5, -448.0, 1.0, 3.0]], np.float32)
    tensor = FP8.tensor(FP8.encode(values), "x")
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.float32), values)


def test_each_kernels_times_are_kept_in_order() -> None:
    api = SimpleNamespace(IProfiler=type("IProfiler", (), {"__init__": lambda self: None}))
    profiler = instance_of(Profiler, api.IProfiler)
    for milliseconds in (2.0, 4.0):
        profiler.report_layer_time("first", milliseconds)
        profiler.report_layer_time("second", 1.0)
    assert profiler.times == {"first": [0.002, 0.004], "second": [0.001, 0.001]}
    assert list(profiler.times) == ["first", "second"]
