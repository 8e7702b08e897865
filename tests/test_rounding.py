"""Adaptive rounding brings layers' outputs nearer to float than rounding to the nearest does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.utils
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch.profiler import ProfilerActivity, profile

from trt_yolov6.data.calibration import calibration_batches
from trt_yolov6.graph.inputs import input_spec
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.quantized import quantized_layers
from trt_yolov6.graph.reference import reference_session
from trt_yolov6.quantization.bias_correction import layers_of_both
from trt_yolov6.quantization.calibrators import amax_of
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.gptq import _Job, adapt_rounding, rounded_rows
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import place

Floats = NDArray[np.float32]


def quantized(model: onnx.ModelProto, images: Sequence[Floats]) -> onnx.ModelProto:
    placement = place(model)
    found = collect(model, images, [*placement.tensors, model.graph.node[0].output[0]])
    ranges = {name: amax_of(found[name], "minmax") for name in placement.tensors}
    return insert_qdq(model, placement, ranges)


def squared_error(
    one: onnx.ModelProto, other: onnx.ModelProto, images: Sequence[Floats]
) -> list[float]:
    sessions = [reference_session(model) for model in (one, other)]
    source = sessions[0].get_inputs()[0].name
    errors = [
        [
            float(np.mean((first - second) ** 2))
            for first, second in zip(*(s.run(None, {source: image}) for s in sessions), strict=True)
        ]
        for image in images
    ]
    return [float(value) for value in np.mean(errors, axis=0)]


def one_layer(
    op: str, groups: int, kernel: int, stride: int, *, channels: int = 8, side: int = 16
) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shape = (channels, 16 // groups) if op == "ConvTranspose" else (16, channels // groups)
    weight = rng.normal(size=(*shape, kernel, kernel)).astype(np.float32)
    pads = [0] * 4 if op == "ConvTranspose" else [kernel // 2] * 4
    strides = [stride, stride]
    node = helper.make_node(
        op, ["images", "w", "b"], ["y"], group=groups, pads=pads, strides=strides
    )
    constants = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(rng.normal(size=16).astype(np.float32), "b"),
    ]
    ends = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, channels, side, side]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, "height", "width"]),
    ]
    graph = helper.make_graph([node], "layer", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def correlated_images(count: int, seed: int) -> list[Floats]:
    """Positive and correlated between channels and between neighbours, as activations are."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).random((8, 3)).astype(np.float32)
    result = []
    for _ in range(count):
        coarse = rng.random((3, 8, 8), np.float32).repeat(2, axis=1).repeat(2, axis=2)
        result.append(
            np.einsum("ck,khw->chw", mixing, coarse)[None]
            + rng.random((1, 8, 16, 16), np.float32) * np.float32(0.1)
        )
    return result


@pytest.mark.parametrize(
    ("op", "groups", "kernel", "stride"),
    [
        ("Conv", 1, 3, 1),
        ("Conv", 1, 3, 2),
        ("Conv", 2, 3, 1),
        ("Conv", 8, 3, 1),
        ("Conv", 1, 1, 1),
        ("ConvTranspose", 1, 2, 2),
        ("ConvTranspose", 2, 2, 2),
    ],
)
def test_a_layers_output_comes_nearer(op: str, groups: int, kernel: int, stride: int) -> None:
    model, images = one_layer(op, groups, kernel, stride), correlated_images(8, 0)
    nearest = quantized(model, images)
    adapted = adapt_rounding(model, nearest, images)
    unseen = correlated_images(8, 1)
    assert squared_error(model, adapted, unseen)[0] < squared_error(model, nearest, unseen)[0]


@pytest.mark.parametrize(
    ("kernel", "pads"),
    [
        ((3, 3), (1, 1, 1, 1)),
        ((3, 3), (0, 2, 1, 0)),
        ((1, 5), (0, 0, 0, 0)),
        ((5, 3), (4, 0, 3, 2)),
    ],
)
def test_levels_follow_from_the_covariance_over_all_windows(
    kernel: tuple[int, int], pads: tuple[int, int, int, int]
) -> None:
    generator = np.random.default_rng(0)
    model = one_layer("Conv", 1, 3, 1, side=40)
    node = model.graph.node[0]
    next(item for item in node.attribute if item.name == "pads").ints[:] = pads
    weight = generator.normal(size=(16, 8, *kernel)).astype(np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    images = [image.repeat(3, 2).repeat(3, 3)[..., :40, :40] for image in correlated_images(3, 0)]
    nearest = quantized(model, images)
    (before,), (after,) = (
        quantized_layers(one) for one in (nearest, adapt_rounding(model, nearest, images))
    )
    assert before.activations is not None
    assert before.activations.scale is not None
    scale = float(numpy_helper.to_array(before.activations.scale).reshape(-1)[0])
    top, left, bottom, right = pads
    codes = np.clip(np.rint(np.concatenate(images) / scale), -127, 127).astype(np.float64)
    padded = np.pad(codes, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = torch.nn.functional.unfold(torch.from_numpy(padded), kernel)
    inputs = windows.transpose(0, 1).flatten(1)
    # Sums of whole numbers are exact, so that nothing depends on their order.
    mean = inputs.sum(dim=1) * (scale / inputs.shape[1])
    covariance = (inputs @ inputs.T) * (scale**2 / inputs.shape[1])
    covariance = covariance[None].baddbmm_(mean[None, :, None], mean[None, None], alpha=-1)
    rows = torch.from_numpy(weight.reshape(1, 16, -1).astype(np.float64))
    steps = torch.from_numpy(before.scale.reshape(1, 16, -1)[:, :, :1].astype(np.float64))
    wanted = rounded_rows(rows, steps, covariance).numpy().reshape(weight.shape)
    np.testing.assert_array_equal(np.rint(after.weights.values() / after.scale), wanted)


@pytest.mark.parametrize(("groups", "kernel"), [(1, 1), (1, 3), (16, 3)])
@pytest.mark.parametrize("side", [16, 64])
def test_sums_take_the_memory_that_is_reckoned_with(groups: int, kernel: int, side: int) -> None:
    """By PyTorch's record of what is allocated and not freed again."""
    model = one_layer("Conv", groups, kernel, 1, channels=64, side=side)
    images = list(np.random.default_rng(0).random((3, 1, 64, side, side), np.float32))
    (both,) = layers_of_both(quantized(model, images), model)
    job = _Job(*both)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        for image in images:
            job.add(image)
    held = sum(event.self_cpu_memory_usage for event in record.events())
    assert held <= job.bytes <= 1.3 * held


def test_a_depthwise_layers_few_weights_get_the_scale_that_suits_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, images = one_layer("Conv", 8, 3, 1), correlated_images(8, 0)
    nearest, unseen = quantized(model, images), correlated_images(8, 1)
    free = adapt_rounding(model, nearest, images)
    monkeypatch.setattr("trt_yolov6.quantization.gptq._SHORT_ROW", 0)
    fixed = adapt_rounding(model, nearest, images)
    before, after = (quantized_layers(one)[0].scale.reshape(-1) for one in (fixed, free))
    np.testing.assert_array_equal(before, quantized_layers(nearest)[0].scale.reshape(-1))
    # No weight is clipped by more than a fifth, nor left with fewer levels than nine in ten.
    assert ((after / before > 0.799) & (after / before < 1.101)).all()

    def weight_error(tuned: onnx.ModelProto) -> float:
        # The input's rounding, the same in both, is left out: float convolutions of the images.
        only_weights = float_weights(model, tuned)
        return squared_error(model, only_weights, unseen)[0]

    assert weight_error(free) < 0.8 * weight_error(fixed)


def float_weights(model: onnx.ModelProto, tuned: onnx.ModelProto) -> onnx.ModelProto:
    """Return the float layer with the weights and the bias that a Q/DQ graph of it stores."""
    (layer,) = quantized_layers(tuned)
    stored = {item.name: item for item in tuned.graph.initializer}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    own = {item.name: item for item in result.graph.initializer}
    own["w"].CopyFrom(numpy_helper.from_array(layer.weights.values(), "w"))
    bias = numpy_helper.to_array(stored[layer.node.input[2]])
    own["b"].CopyFrom(numpy_helper.from_array(bias.astype(np.float32), "b"))
    return result


def test_uncorrelated_inputs_leave_nothing_to_gain() -> None:
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(1, 8, 20)))
    scale = rows.abs().amax(dim=2, keepdim=True) / 127
    eye = torch.eye(20, dtype=torch.float64).unsqueeze(0)
    assert torch.equal(rounded_rows(rows, scale, eye), (rows / scale).round())


def test_the_best_of_all_roundings_is_not_far() -> None:
    """There are 2^8 ways to round 8 weights up or down; the cheapest is found, or nearly."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(20):
        inputs = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 8)) + rng.normal(size=(200, 8)) / 5
        covariance = inputs.T @ inputs / 200
        row, scale = rng.normal(size=8), 0.5

        def cost(levels: NDArray[np.float64], row=row, scale=scale, by=covariance) -> float:  # type: ignore[no-untyped-def]
            error = levels * scale - row
            return float(error @ by @ error)

        ways = np.floor(row / scale) + np.array(list(np.ndindex(*(2,) * 8)))
        best = min(cost(way) for way in ways)
        nearest = cost(np.rint(row / scale))
        found = rounded_rows(
            torch.from_numpy(row.reshape(1, 1, 8)),
            torch.full((1, 1, 1), scale, dtype=torch.float64),
            torch.from_numpy(covariance[None]),
        )
        ratios.append((cost(found.numpy().reshape(8)) / nearest, best / nearest))
    found_mean, best_mean = np.mean(ratios, axis=0)
    assert found_mean < 0.6
    assert found_mean < 2 * best_mean


def test_inputs_that_do_not_vary_leave_weights_rounded_to_the_nearest() -> None:
    # As where a network has learnt little. Computed less exactly, variances of 1e-17 of either sign
    # were left of such inputs, whose matrix has no factors.
    for seed in range(10):
        level = np.random.default_rng(seed).random((1, 8, 1, 1), np.float32)
        images = [np.tile(level, (1, 1, 16, 16))] * 3
        model = one_layer("Conv", 1, 1, 1)
        nearest = quantized(model, images)
        (before,), (after,) = (
            quantized_layers(one) for one in (nearest, adapt_rounding(model, nearest, images))
        )
        np.testing.assert_array_equal(after.weights.values(), before.weights.values())


def test_levels_stay_in_range_and_bytes_repeat() -> None:
    model, images = one_layer("Conv", 1, 3, 1), correlated_images(4, 0)
    nearest = quantized(model, images)
    results = [adapt_rounding(model, nearest, images) for _ in range(2)]
    first, second = (item.SerializeToString(deterministic=True) for item in results)
    assert first == second
    stored = {item.name: item for item in results[0].graph.initializer}
    for layer in quantized_layers(results[0]):
        assert numpy_helper.to_array(stored[layer.weight]).min() >= -127


@pytest.mark.slow
def test_real_layers_come_nearer(sample_320: Graph, root: Path) -> None:
    """The first eight layers of the sample, each judged at its own output."""
    whole = sample_320.model
    convolutions = [node.output[0] for node in whole.graph.node if node.op_type == "Conv"][:8]
    extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(whole))
    model = extractor.extract_model(["images"], [convolutions[-1]])
    images = list(calibration_batches(root / "calib", input_spec(model), limit=6))
    unseen = list(
        calibration_batches(root / "samples" / "images" / "val", input_spec(model), limit=4)
    )
    nearest = quantized(model, images)
    adapted = adapt_rounding(model, nearest, images)
    for graph in (model, nearest, adapted):
        graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in convolutions[:-1])
    before = squared_error(model, nearest, unseen)
    after = squared_error(model, adapted, unseen)
    assert all(second < first for first, second in zip(before, after, strict=True))
    assert after[0] < 0.5 * before[0]
