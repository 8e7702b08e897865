"""Rooflines: the work of layers in closed form, kernels and their layers, ceilings."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from trt_yolov6.bench.roofline import (
    GraphWork,
    cpu_ceilings,
    graph_work,
    layer_times,
)
from trt_yolov6.bench.sampling import random_input
from trt_yolov6.engines import LoadOptions, load_engine
from trt_yolov6.graph.cost import Ceilings, Layer


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    """Two convolutions with activations, and a branch that adds both up: rows of 5 + 3."""
    generator = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(generator.random(shape, dtype=np.float32), name)

    nodes = [
        helper.make_node("Conv", ["images", "w1"], ["c1"], "first", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "act"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "second"),
        helper.make_node("Sigmoid", ["c2"], ["s2"], "squash"),
        helper.make_node("Reshape", ["s2", "shape"], ["columns"], "flat"),
        helper.make_node("Transpose", ["columns"], ["rows"], "turn", perm=[0, 2, 1]),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 64, 64])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 1024, 8])],
        [
            weight("w1", 16, 3, 3, 3),
            weight("w2", 8, 16, 1, 1),
            numpy_helper.from_array(np.array([0, 8, 1024], np.int64), "shape"),
        ],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def layer(precision: str, flops: int, values: int, weights: int) -> Layer:
    return Layer(
        "a", "Conv", (weights, 1, 1, 1), (1, 1), (1, 1), 1, precision, flops, flops, values
    )


def test_the_work_of_a_layer_is_the_textbooks(graph: onnx.ModelProto) -> None:
    first, second = graph_work(graph).layers
    assert (first.name, first.operator, first.precision) == ("first", "Conv", "fp32")
    assert first.flops == 2 * 32 * 32 * 16 * 3 * 9
    assert first.values == 3 * 64 * 64 + 16 * 32 * 32
    assert first.weights == 16 * 3 * 9
    assert second.flops == 2 * 32 * 32 * 8 * 16
    assert second.bytes_moved(batch=4, element=2) == 2 * (4 * (16 + 8) * 32 * 32 + 8 * 16)


def test_a_fixed_batch_has_the_same_work_an_image(graph: onnx.ModelProto) -> None:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(graph)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    assert graph_work(fixed).layers == graph_work(graph).layers


@pytest.mark.parametrize(
    ("kernel", "layer"),
    [
        ("first", "first"),
        ("act_nchwc", "first"),
        ("r1_nchwc", "first"),
        ("second_myl0_12", "second"),
        ("s2", "second"),
        ("ReorderOutput_token_7", "ReorderOutput_token_7"),
        ("flat", "flat"),
    ],
)
def test_a_kernel_is_of_the_layer_whose_output_it_computes(
    graph: onnx.ModelProto, kernel: str, layer: str
) -> None:
    (found,) = layer_times({kernel: 1.0}, graph_work(graph), 1, None)
    assert found.name == layer
    assert (found.operator == "Conv") == (layer in ("first", "second"))


@pytest.mark.parametrize(
    ("rate", "bandwidth", "seconds", "bound"),
    [(1e6, 1e12, 2.0, "arithmetic"), (1e12, 1e3, 0.84, "memory")],
)
def test_the_roofline_is_the_larger_of_both_times(
    rate: float, bandwidth: float, seconds: float, bound: str
) -> None:
    work = GraphWork((layer("fp32", flops=1_000_000, values=100, weights=10),), {"a": "a"})
    ceilings = Ceilings(bandwidth, {"fp32": rate}, "made up")
    (found,) = layer_times({"a": 3.0}, work, 2, ceilings)
    assert found.roofline == pytest.approx(seconds)
    assert found.bound == bound


def test_a_precision_without_a_ceiling_has_no_roofline() -> None:
    work = GraphWork((layer("fp8", flops=1, values=1, weights=1),), {"a": "a"})
    ceilings = Ceilings(1.0, {"fp32": 1.0}, "made up")
    (found,) = layer_times({"a": 3.0}, work, 1, ceilings)
    assert found.roofline is None
    (computed,) = layer_times({"a": 3.0}, work, 1, ceilings, computed_in="fp32")
    assert computed.roofline is not None
    assert computed.precision == "fp8"


def test_onnx_runtime_times_the_kernels_of_every_layer(
    graph: onnx.ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "g.onnx"
    onnx.save(graph, path)
    with load_engine(path, options=LoadOptions(threads=1)) as engine:
        kernels = engine.layer_times(random_input(engine, 2), runs=5)
    assert all(seconds > 0 for seconds in kernels.values())
    named = {one.name for one in layer_times(kernels, graph_work(graph), 2, None) if one.operator}
    assert named == {"first", "second"}
    assert not list(tmp_path.glob("*.json"))  # the profile is gone


def test_ceilings_are_what_numpy_and_memory_do_on_this_machine(one_thread: None) -> None:
    side, size = 512, 1 << 26
    a = torch.rand(side, side)
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    found, flops, bytes_per_second = [], [], []
    for _ in range(3):  # in turns, the best of each, until they agree: others use the machine, too
        ceilings = cpu_ceilings(threads=1)
        found.append((ceilings.flops["fp32"], ceilings.bytes_per_second))
        flops.append(2 * side**3 / fastest(lambda: a @ a))
        # A copy reads and writes.
        bytes_per_second.append(2 * size / fastest(lambda: np.copyto(target, source)))
        product, copy = map(max, zip(*found, strict=True))
        ratios = product / max(flops), copy / max(bytes_per_second)
        if all(1 / 3 < ratio < 3 for ratio in ratios):
            return
    pytest.fail(f"{ratios} are not near 1")


def fastest(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of ten runs."""
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
