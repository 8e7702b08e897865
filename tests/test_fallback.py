"""Float fallback: costs against PyTorch's count, search against brute force, a real detector."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.engines.build import BuiltEngine
from trt_yolov6.errors import UserError
from trt_yolov6.graph.operators import layer_names
from trt_yolov6.models.complexity import count_flops
from trt_yolov6.models.fusion import fuse
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.mixed_precision import (
    LayerCost,
    choose_float_layers,
    layer_costs,
    most_sensitive,
    rankings,
    tensors_for_any_choice,
)
from trt_yolov6.quantization.qdq.placement import place
from trt_yolov6.quantization.sensitivity import Distortion, Sensitivity, ranked

SHARED = Path(__file__).parents[1].parent / "shared"
LITE = SHARED / "models" / "yolov6lite_l_320.onnx"
IMAGES = SHARED / "data" / "coco256" / "images" / "train2017"


def test_multiply_adds_are_what_pytorch_counts_on_the_sample(
    sample_engine: BuiltEngine, root: Path
) -> None:
    graph = onnx.load(sample_engine.path)
    costs, names = layer_costs(graph), layer_names(graph)
    model = fuse(load_checkpoint(root / "samples" / "yolov6n_bccd_authors.pt").model)
    total = sum(cost.multiply_adds for cost in costs.values())
    # As in the paper, `count_flops` takes the two transposed convolutions for four times as much.
    transposed = sum(
        costs[names[node.output[0]]].multiply_adds
        for node in graph.graph.node
        if node.op_type == "ConvTranspose"
    )
    assert transposed > 0
    assert 2 * (total + 3 * transposed) == pytest.approx(count_flops(model, 640), rel=1e-4)
    assert math.fsum(cost.multiply_add_share for cost in costs.values()) == pytest.approx(1)
    assert math.fsum(cost.time_share for cost in costs.values()) == pytest.approx(1)


def convolutions() -> onnx.ModelProto:
    """A dense, a depthwise, a dense and a transposed convolution, the batch free."""
    shapes = {"dense": (64, 3, 3, 3), "wise": (64, 1, 3, 3), "mix": (64, 64, 1, 1)}
    weights = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    weights["up"] = np.ones((64, 8, 2, 2), np.float32)
    nodes = [
        helper.make_node("Conv", ["images", "dense_w"], ["a"], "dense", pads=[1] * 4),
        helper.make_node("Conv", ["a", "wise_w"], ["b"], "wise", pads=[1] * 4, group=64),
        helper.make_node("Conv", ["b", "mix_w"], ["c"], "mix", strides=[2, 2]),
        helper.make_node("ConvTranspose", ["c", "up_w"], ["out"], "up", strides=[2, 2]),
    ]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 8, 32, 32])],
        [numpy_helper.from_array(value, f"{name}_w") for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_multiply_adds_follow_from_the_shapes() -> None:
    counts = {name: cost.multiply_adds for name, cost in layer_costs(convolutions()).items()}
    assert counts == {
        "dense": 64 * 3 * 9 * 32 * 32,
        "wise": 64 * 9 * 32 * 32,
        "mix": 64 * 64 * 16 * 16,
        "up": 64 * 8 * 4 * 16 * 16,
    }


def test_a_depthwise_convolution_costs_the_time_of_its_traffic() -> None:
    costs = layer_costs(convolutions())
    # Reading and writing 64 channels takes longer than reading 3 and writing 64.
    assert costs["wise"].multiply_adds < costs["dense"].multiply_adds
    assert costs["wise"].time_share > costs["dense"].time_share


def test_costs_need_a_fixed_image_size() -> None:
    model = convolutions()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(UserError, match="dense"):
        layer_costs(model)


def test_as_many_layers_as_asked_the_most_sensitive_first() -> None:
    names = Sensitivity("snr", (("bad", 10.0), ("fair", 20.0), ("good", 30.0))).names
    assert most_sensitive(names, 0) == ()
    assert most_sensitive(names, 2) == ("bad", "fair")
    for count in (-1, 4):
        with pytest.raises(UserError, match="3 layers"):
            most_sensitive(names, count)


class Additive:
    """A network in which each INT8 layer costs its own, known part of the score."""

    def __init__(self, noise: dict[str, float]) -> None:
        self.noise = noise
        self.calls = 0

    def __call__(self, layers: Collection[str]) -> float:
        self.calls += 1
        return 1 - math.fsum(value for name, value in self.noise.items() if name not in layers)


def random_case(seed: int, count: int) -> tuple[Additive, dict[str, LayerCost]]:
    rng = np.random.default_rng(seed)
    noise, times, work = (rng.lognormal(0, 1.5, count) for _ in range(3))
    names = [f"layer{index}" for index in range(count)]
    score = Additive(dict(zip(names, (0.3 * noise / noise.sum()).tolist(), strict=True)))
    costs = {
        name: LayerCost(1, share, time)
        for name, share, time in zip(
            names, (work / work.sum()).tolist(), (times / times.sum()).tolist(), strict=True
        )
    }
    return score, costs


def orders(score: Additive, costs: dict[str, LayerCost]) -> tuple[tuple[str, ...], ...]:
    distortions = {name: Distortion(value, 1.0, 1.0, 1) for name, value in score.noise.items()}
    return rankings(distortions, costs)


@settings(max_examples=60, deadline=None)
@example(35999, 0.999)  # needs all nine layers, whose shares add up to a little more than 1
@given(st.integers(0, 2**32 - 1), st.floats(0.72, 0.999))
def test_what_is_chosen_reaches_the_score_and_no_layer_of_it_is_needless(
    seed: int, least: float
) -> None:
    score, costs = random_case(seed, 9)
    found = choose_float_layers(
        orders(score, costs), costs, score, least, most_share=1.0, most_trials=1000
    )
    assert found.met
    assert found.score == score(found.layers) >= least
    for layer in found.layers:
        assert score([name for name in found.layers if name != layer]) < least
    assert found.time_share == pytest.approx(sum(costs[name].time_share for name in found.layers))


def test_the_search_comes_near_the_cheapest_set_there_is() -> None:
    excess = []
    for seed in range(40):
        score, costs = random_case(seed, 9)
        names = list(costs)
        least = 0.93
        best = min(
            math.fsum(costs[name].time_share for name in layers)
            for count in range(10)
            for layers in itertools.combinations(names, count)
            if score(layers) >= least
        )
        found = choose_float_layers(orders(score, costs), costs, score, least, most_share=1.0)
        excess.append(found.time_share - best)
    assert min(excess) > -1e-9
    assert np.mean(excess) < 0.05
    assert np.median(excess) < 0.03


def test_where_int8_is_good_enough_one_trial_tells() -> None:
    score, costs = random_case(0, 9)
    found = choose_float_layers(orders(score, costs), costs, score, 0.5)
    assert found.layers == ()
    assert (found.met, found.time_share, found.multiply_add_share) == (True, 0, 0)
    assert score.calls == len(found.trials) == 1


def test_no_more_is_tried_than_allowed() -> None:
    score, costs = random_case(1, 100)
    found = choose_float_layers(orders(score, costs), costs, score, 0.99, most_trials=7)
    assert score.calls == 7
    assert len(found.trials) == 7


def test_half_of_the_multiply_adds_stay_in_int8_even_if_the_score_is_missed() -> None:
    for seed in range(20):
        score, costs = random_case(seed, 12)
        found = choose_float_layers(orders(score, costs), costs, score, 0.9999)
        assert not found.met
        assert found.multiply_add_share <= 0.5
        assert all(
            math.fsum(costs[name].multiply_add_share for name in trial.layers) <= 0.5
            for trial in found.trials
        )


def test_what_misses_the_score_is_worth_its_time() -> None:
    # One layer in twenty brings a third of what is missing, the others next to nothing.
    names = [f"layer{index}" for index in range(20)]
    noise = dict.fromkeys(names, 0.002) | {"layer0": 0.03}
    costs = {name: LayerCost(1, 0.05, 0.05) for name in names}
    found = choose_float_layers([names], costs, Additive(noise), 0.999)
    assert not found.met
    assert found.layers == ("layer0",)
    assert max(trial.score for trial in found.trials) > found.score
    assert max(trial.time_share for trial in found.trials) > 0.4


def test_nothing_is_left_in_float_for_a_gain_that_may_be_chance() -> None:
    names = [f"layer{index}" for index in range(20)]
    costs = {name: LayerCost(1, 0.05, 0.05) for name in names}
    score = Additive(dict.fromkeys(names, 0.0008))
    found = choose_float_layers([names], costs, score, 0.995, least_gain=0.01)
    assert (found.met, found.layers, found.time_share) == (False, (), 0)
    assert len(found.trials) > 3


@pytest.mark.parametrize("activation", [None, "Relu"])
def test_ranges_suffice_whatever_is_left_in_float(activation: str | None) -> None:
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(0, 1, shape).astype(np.float32))

    nodes, constants = [], []
    for name, source in (("one", "images"), ("two", "images"), ("three", "sum"), ("four", "cat")):
        tensor = weight(2, 4 if source == "cat" else 2, 1, 1)
        tensor.name = f"{name}_w"
        constants.append(tensor)
        if source == "sum":
            added = "sum" if activation is None else "total"  # as in a ResNet
            nodes.append(helper.make_node("Add", ["one_o", "two_o"], [added]))
            if activation is not None:
                nodes.append(helper.make_node(activation, [added], ["sum"]))
        if source == "cat":
            nodes.append(helper.make_node("Concat", ["sum", "three_o"], ["cat"], axis=1))
        nodes.append(helper.make_node("Conv", [source, tensor.name], [f"{name}_o"], name))
    shape = [1, 2, 4, 4]
    graph = helper.make_graph(
        nodes,
        "joined",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("four_o", TensorProto.FLOAT, shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    measured = set(tensors_for_any_choice(model))
    image = rng.normal(0, 1, shape).astype(np.float32)
    assert set(collect(model, [image], sorted(measured))) == measured
    names = ("one", "two", "three", "four")
    for count in range(5):
        for kept in itertools.combinations(names, count):
            for requantize in (False, True):
                assert set(place(model, kept, requantize=requantize).tensors) <= measured


@pytest.mark.slow
@pytest.mark.skipif(not LITE.exists(), reason="the shared YOLOv6Lite-L is not here")
def test_a_few_depthwise_layers_are_found_to_break_a_real_detector() -> None:
    from trt_yolov6.data.calibration import calibration_batches
    from trt_yolov6.data.images import list_images
    from trt_yolov6.graph.inputs import input_spec
    from trt_yolov6.graph.onnx_import import graph_from_onnx
    from trt_yolov6.quantization.calibrators import group_amax
    from trt_yolov6.quantization.judge import Judge
    from trt_yolov6.quantization.qdq.insert import insert_qdq
    from trt_yolov6.quantization.sensitivity import layer_distortions

    graph = graph_from_onnx(LITE)
    model, paths = graph.model, list_images(IMAGES)[::128]
    batches = list(calibration_batches(paths, input_spec(model)))
    everywhere = place(model, requantize=True)
    statistics = collect(model, batches, tensors_for_any_choice(model))
    amax = group_amax(statistics, everywhere.groups, "mse")
    distortions = layer_distortions(model, place(model), amax, batches)
    worst = ranked(distortions, "snr").names[:3]
    # Found by hand before there was any of this: each alone halves the agreement, or nearly.
    assert set(worst) == {"convdw_270", "convdw_272", "convdw_275"}

    judge = Judge(graph, paths)
    costs = layer_costs(model)

    def score(layers: tuple[str, ...]) -> float:
        return judge.agreement(insert_qdq(model, place(model, layers), amax))

    found = choose_float_layers(rankings(distortions, costs), costs, score, 0.85)
    assert found.trials[0].score < 0.5
    assert found.met
    assert found.multiply_add_share < 0.1
