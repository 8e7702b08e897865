"""Sensitivity: metrics against PyTorch's own convolutions; one pass; the chart as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch.nn import functional

from trt_yolov6.data.images import list_images, read_image
from trt_yolov6.data.letterbox import letterbox
from trt_yolov6.errors import UserError
from trt_yolov6.graph.model import Graph
from trt_yolov6.quantization.calibrators import group_amax
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.metrics import TENSOR_METRICS, Metric, direction
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import place
from trt_yolov6.quantization.sensitivity import (
    Distortion,
    Sensitivity,
    by_value,
    layer_distortions,
    only_layer,
    ranked,
    scores_alone,
    write_chart,
)

SHAPES = {"first": (6, 3, 3, 3), "wise": (6, 1, 3, 3), "up": (6, 5, 2, 2), "last": (4, 11, 1, 1)}


def network() -> onnx.ModelProto:
    """A convolution, a depthwise one and a transposed one, joined by a concatenation; the last."""
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in SHAPES.items()}
    weights["wise"] *= np.array([0.01, 1, 0.1, 3, 0.3, 1], np.float32).reshape(-1, 1, 1, 1)
    biases = {name: rng.normal(0, 0.1, n) for name, n in (("first", 6), ("wise", 6), ("last", 4))}
    nodes = [
        helper.make_node(
            "Conv", ["images", "first_w", "first_b"], ["a"], "first", pads=[1] * 4, strides=[2, 2]
        ),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "wise_w", "wise_b"], ["c"], "wise", pads=[1] * 4, group=6),
        helper.make_node("ConvTranspose", ["b", "up_w"], ["d"], "up", strides=[2, 2]),
        helper.make_node("MaxPool", ["d"], ["e"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Concat", ["c", "e"], ["f"], axis=1),
        helper.make_node("Conv", ["f", "last_w", "last_b"], ["out"], "last"),
    ]
    constants = {f"{name}_w": value for name, value in weights.items()}
    constants.update({f"{name}_b": value.astype(np.float32) for name, value in biases.items()})
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 4, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


RANGES = {"images": 1.0, "b": 1.5, "c": 2.5, "d": 2.5, "e": 2.5, "f": 2.5}


def images(count: int = 3) -> Iterator[NDArray[np.float32]]:
    rng = np.random.default_rng(1)
    for _ in range(count):
        yield rng.uniform(0, 1, (1, 3, 16, 16)).astype(np.float32)


def rounded(values: torch.Tensor, step: torch.Tensor | float) -> torch.Tensor:
    # QuantizeLinear saturates at -128.
    return torch.clamp(torch.round(values / step), -128, 127) * step


def expected() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's output in float and, from the same float input, in INT8, of all images."""
    tensors = {
        item.name: torch.from_numpy(numpy_helper.to_array(item).copy()).double()
        for item in network().graph.initializer
    }

    def both(name: str, value: torch.Tensor, amax: float) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = tensors[f"{name}_w"], tensors.get(f"{name}_b")
        # Output channels are axis 0, but axis 1 of a transposed convolution's weights.
        others = (0, 2, 3) if name == "up" else (1, 2, 3)
        step = weight.abs().amax(dim=others, keepdim=True) / 127

        def compute(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            if name == "up":
                return functional.conv_transpose2d(value, weight, stride=2)
            return functional.conv2d(
                value,
                weight,
                bias,
                stride=2 if name == "first" else 1,
                padding=0 if name == "last" else 1,
                groups=6 if name == "wise" else 1,
            )

        quantized = compute(rounded(value, amax / 127), rounded(weight, step))
        return compute(value, weight), quantized

    batch = torch.from_numpy(np.concatenate(list(images()))).double()
    result = {"first": both("first", batch, 1.0)}
    relu = result["first"][0].relu()
    result["wise"] = both("wise", relu, 1.5)
    result["up"] = both("up", relu, 1.5)
    joined = torch.cat([result["wise"][0], functional.max_pool2d(result["up"][0], 2)], dim=1)
    result["last"] = both("last", joined, 2.5)
    return result


@pytest.fixture(scope="module")
def measured() -> dict[str, Distortion]:
    model = network()
    return layer_distortions(model, place(model), RANGES, images())


@pytest.mark.parametrize("layer", list(SHAPES))
def test_metrics_are_those_of_the_layer_computed_in_pytorch(
    measured: dict[str, Distortion], layer: str
) -> None:
    float_output, quantized = (value.flatten() for value in expected()[layer])
    error = float_output - quantized
    found = measured[layer]
    # A value on the border between two steps may fall to either side in float32.
    assert found.mse == pytest.approx(float((error**2).mean()), rel=0.01)
    power = float((float_output**2).mean() / (error**2).mean())
    assert found.snr == pytest.approx(10 * math.log10(power), abs=0.1)
    cosine = functional.cosine_similarity(float_output, quantized, dim=0)
    assert 1 - found.cosine == pytest.approx(1 - float(cosine), rel=0.03)
    assert found.count == float_output.numel()


def test_one_pass_over_the_images_serves_all_metrics_of_all_layers() -> None:
    model = network()
    taken = 0

    def once() -> Iterator[NDArray[np.float32]]:
        nonlocal taken
        for image in images(5):
            taken += 1
            yield image

    found = layer_distortions(model, place(model), RANGES, once())
    assert taken == 5
    for metric in TENSOR_METRICS:
        assert set(ranked(found, metric).names) == set(SHAPES)


def test_the_most_sensitive_layer_comes_first_by_every_metric() -> None:
    found = {
        "good": Distortion(error=1, reference=1000, values=1000, count=10),
        "worst": Distortion(error=500, reference=1000, values=900, count=10),
        "bad": Distortion(error=50, reference=1000, values=1000, count=10),
    }
    for metric in TENSOR_METRICS:
        assert ranked(found, metric).names == ("worst", "bad", "good")


def test_a_layer_that_int8_holds_exactly_has_no_noise() -> None:
    weight = np.array([[[[127.0]]], [[[-64.0]]]], np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "w"], ["out"], "exact")],
        "exact",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 2, 8, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    image = (np.arange(64, dtype=np.float32) + 60).reshape(1, 1, 8, 8)
    found = layer_distortions(model, place(model), {"images": 127.0}, [image])
    assert (found["exact"].mse, found["exact"].snr, found["exact"].cosine) == (0, math.inf, 1)
    report = ranked(found, "snr").to_json()
    assert json.loads(json.dumps(report, allow_nan=False)) == {
        "metric": "snr",
        "unit": "signal-to-noise ratio of the layer's output, in dB",
        "direction": "lowest = most sensitive",
        "layers": [{"name": "exact", "value": None}],
    }


def test_by_ap_each_graph_has_one_layer_in_int8_and_the_rest_as_it_was() -> None:
    model = network()
    seen: list[onnx.ModelProto] = []

    def score(candidate: onnx.ModelProto) -> float:
        seen.append(candidate)
        return 1 - len(seen) / 10

    found = by_value("ap", scores_alone(model, place(model), RANGES, score))
    assert found.names == ("last", "up", "wise", "first")
    assert found.layers[0][1] == pytest.approx(0.6)
    for candidate, layer in zip(seen, SHAPES, strict=True):
        stored = [item for item in candidate.graph.initializer if item.name.startswith(f"{layer}_")]
        kinds = {item.data_type for item in stored if "_w" in item.name}
        assert TensorProto.INT8 in kinds
        assert sum(node.op_type == "QuantizeLinear" for node in candidate.graph.node) == 1
        others = {f"{name}_w" for name in SHAPES if name != layer}
        assert others <= {item.name for item in candidate.graph.initializer}


def test_a_single_layers_graph_differs_by_that_layers_noise_alone() -> None:
    import onnxruntime

    model = network()
    alone = insert_qdq(model, only_layer(model, place(model), "last"), RANGES)
    image = next(images())
    outputs = [
        onnxruntime.InferenceSession(item.SerializeToString()).run(None, {"images": image})[0]
        for item in (model, alone)
    ]
    float_output, quantized = expected()["last"]
    assert np.abs(outputs[0] - float_output[0].numpy()).max() < 1e-5
    assert np.abs(outputs[1] - quantized[0].numpy()).max() < 0.02


def test_without_images_there_is_a_sentence() -> None:
    model = network()
    with pytest.raises(UserError, match="no calibration image"):
        layer_distortions(model, place(model), RANGES, [])


@pytest.mark.parametrize("metric", ["mse", "snr", "cosine", "ap"])
def test_the_chart_draws_longer_bars_for_larger_values(tmp_path: Path, metric: Metric) -> None:
    values = {
        "mse": [3.0, 0.1, 0.002],
        "snr": [10.0, 20.0, 35.0],
        "cosine": [0.7, 0.99, 0.9999],
        "ap": [0.2, 0.5, 0.9],
    }[metric]
    result = Sensitivity(metric, tuple(zip(("one", "two", "three"), values, strict=True)))
    path = tmp_path / "chart.png"
    write_chart(result, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"), int)
    blue = (pixels[:, :, 2] - pixels[:, :, 0]) > 60
    runs = blue.sum(axis=1)
    rows = np.flatnonzero(runs > 5)
    bars = [runs[part].max() for part in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)]
    assert len(bars) == 3
    # As the console and the JSON have them: of all but mse, the lowest is the most sensitive.
    assert bars == sorted(bars, reverse=metric == "mse")
    assert direction(metric).startswith("highest" if metric == "mse" else "lowest")
    assert result.to_json()["direction"] == direction(metric)
    again = tmp_path / "again.png"
    write_chart(result, again)
    assert again.read_bytes() == path.read_bytes()


def test_a_chart_must_be_called_png(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.png"):
        write_chart(Sensitivity("snr", (("one", 1.0),)), tmp_path / "chart.jpg")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_layer_of_the_sample_is_measured(sample_320: Graph, root: Path) -> None:
    model = sample_320.model
    placement = place(model)
    batches = [
        letterbox(read_image(path), (320, 320))[0].transpose(2, 0, 1)[None].astype(np.float32) / 255
        for path in list_images(root / "calib")[:2]
    ]
    statistics = collect(model, batches, placement.tensors)
    amax = group_amax(statistics, placement.groups, "minmax")
    found = layer_distortions(model, placement, amax, batches)
    assert tuple(found) == placement.layers
    assert len(found) > 50
    # The sample loses nothing in INT8, so no layer can be buried in noise.
    assert all(15 < item.snr < 80 and 0.98 < item.cosine <= 1 for item in found.values())
