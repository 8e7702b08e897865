"""Images that judge do not calibrate, layers are ranked by what they move, and trials are told."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.pictures import save_noise
from support.quantized import MINMAX, convolutions, small_detector

from trt_yolov6.cli.options import percent
from trt_yolov6.common.statistics import Interval
from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import set_nodes
from trt_yolov6.graph.model import Graph
from trt_yolov6.quantization.bias_correction import BiasCorrection
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.judge import Judge, batches_of, images_to_build_from, split_images
from trt_yolov6.quantization.learned import learned_of, with_learned
from trt_yolov6.quantization.mixed_precision import (
    LayerCost,
    choose_float_layers,
    rankings_by_displacement,
)
from trt_yolov6.quantization.pipeline import calibrate, quantize
from trt_yolov6.quantization.preparation import RANGE_BITS, inputs_of
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.sensitivity import scores_alone
from trt_yolov6.quantization.settings import QuantizationSettings, check_settings
from trt_yolov6.quantization.table import Variant, write_table
from trt_yolov6.quantization.trials import Candidate, simplest_of_the_best, tried_table
from trt_yolov6.spec import Precision


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """YOLOv6 with few and narrow layers and random weights, for images of 64 x 64."""
    return small_detector(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pictures of noise: as few as half of them judge alone."""
    result = tmp_path_factory.mktemp("pictures")
    for number in range(16):
        save_noise(result / f"{number:02}.png", seed=number)
    return result


# --- images -------------------------------------------------------------------------------------


def test_of_many_images_half_judge_and_none_does_both() -> None:
    paths = [Path(f"{number}.jpg") for number in range(33)]
    (split,) = split_images(paths)
    assert split.is_held_out
    assert not set(split.calibrate) & set(split.judge)
    assert sorted((*split.calibrate, *split.judge)) == sorted(paths)
    assert len(split.calibrate) - len(split.judge) in (0, 1)


def test_of_few_images_each_half_judges_what_the_other_made() -> None:
    paths = [Path(f"{number:02}.jpg") for number in range(15)]
    folds = split_images(paths)
    assert all(fold.is_held_out for fold in folds)
    assert sorted(path for fold in folds for path in fold.judge) == paths
    assert images_to_build_from(folds) == tuple(paths)


def test_of_three_images_all_do_both() -> None:
    paths = [Path(f"{number}.jpg") for number in range(3)]
    (split,) = split_images(paths)
    assert split.calibrate == split.judge == tuple(paths)
    assert not split.is_held_out


def test_ranges_do_not_depend_on_the_images_that_judge(tiny: Graph, folder: Path) -> None:
    settings = dataclasses.replace(MINMAX, bias_correction=False)
    result = quantize(tiny, folder, settings)
    changed = split_images(sorted(folder.iterdir()))[0].judge[0]
    before = changed.read_bytes()
    try:
        save_noise(changed, seed=1000)
        assert quantize(tiny, folder, settings).table.amax == result.table.amax
    finally:
        changed.write_bytes(before)


def test_the_manifest_says_what_the_agreement_was_judged_on_and_what_was_tried(
    tiny: Graph, folder: Path
) -> None:
    result = quantize(tiny, folder, QuantizationSettings(shift=False))  # a form less to try
    said = result.graph.calibration
    assert said is not None
    assert said["judged_on"] == {"images": 8, "held_out": True, "folds": 1}
    low, high = said["agreement_interval"]
    assert low <= said["agreement"] <= high
    judge = Judge(tiny, split_images(sorted(folder.iterdir()))[0].judge)
    assert said["agreement"] == pytest.approx(judge.agreement(result.graph.model), abs=1e-4)
    assert len(said["tried"]) == len(result.candidates)
    assert {item["decides"] for item in said["tried"]} == {"graph", "ranges", "weights"}
    assert {"nearest", "reconstructed"} <= {item["weights"] for item in said["tried"]}
    table = tried_table(result.candidates)
    assert len(table) == 1 + len(result.candidates)
    assert table[0].split() == ["decision", "tried", "moved", "agreement", "slower", "seconds"]


def test_of_few_images_the_folds_judge_and_all_build(
    tiny: Graph, folder: Path, tmp_path: Path
) -> None:
    for path in sorted(folder.iterdir())[:6]:
        shutil.copy(path, tmp_path)
    result = quantize(tiny, tmp_path, dataclasses.replace(MINMAX, reconstruct=False))
    assert result.graph.calibration is not None
    assert result.graph.calibration["judged_on"] == {"images": 6, "held_out": True, "folds": 2}
    # What is built is calibrated on all six: no range is narrower than that of any image.
    images = list(batches_of(tiny, sorted(tmp_path.iterdir())))
    seen = collect(result.float_model, images, list(result.table.amax))
    within = 1 - 2.0**-RANGE_BITS
    assert all(result.table.amax[name] >= within * item.amax for name, item in seen.items())


@pytest.mark.parametrize(("tolerance", "taken"), [(0.05, "shifted"), (0.15, "smoothed")])
def test_the_simplest_is_taken_of_those_that_move_detections_nearly_as_little(
    tolerance: float, taken: str
) -> None:
    def one(variant: Variant, agreement: float, loss: float) -> Candidate:
        return Candidate("graph", variant, "margin", agreement, loss)

    # More of its detections match, by chance: that decides nothing.
    tried = [one("plain", 0.99, 0.05), one("smoothed", 0.94, 0.011), one("shifted", 0.95, 0.01)]
    assert simplest_of_the_best(tried, tolerance).variant == taken


# --- what layers move ---------------------------------------------------------------------------


def test_nothing_moves_in_the_float_graph(tiny: Graph, folder: Path) -> None:
    judge = Judge(tiny, sorted(folder.iterdir())[:2])
    assert judge.loss(tiny.model) == pytest.approx(0, abs=1e-6)


def test_a_thinned_judge_is_one_of_every_other_image(tiny: Graph, folder: Path) -> None:
    paths = sorted(folder.iterdir())
    model = calibrate(tiny, folder, MINMAX).with_float(())
    whole, half = Judge(tiny, paths), Judge(tiny, paths[::2])
    thinned = whole.thinned()
    assert thinned.images == half.images == 8
    assert thinned.loss(model) == half.loss(model) != whole.loss(model)
    assert thinned.agreement(model) == half.agreement(model)


def test_images_that_fill_up_a_fixed_batch_do_not_count_twice(tiny: Graph, folder: Path) -> None:
    def of_three(model: onnx.ModelProto) -> onnx.ModelProto:
        result = onnx.ModelProto()
        result.CopyFrom(model)
        for value in (*result.graph.input, *result.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 3
        return result

    paths = sorted(folder.iterdir())[:4]
    model = calibrate(tiny, folder, MINMAX).with_float(())
    alone = Judge(tiny, paths)
    three = Judge(dataclasses.replace(tiny, model=of_three(tiny.model)), paths)
    assert three.images == 4
    assert three.loss(of_three(model)) == pytest.approx(alone.loss(model))
    assert three.agreement(of_three(model)) == alone.agreement(model)
    assert three.harmless_agreement() == pytest.approx(alone.harmless_agreement())


def test_a_light_network_is_calibrated_with_mirrored_images_too(tiny: Graph, folder: Path) -> None:
    paths = sorted(folder.iterdir())[:2]
    image, mirrored, other, _ = inputs_of(tiny, paths)
    assert not np.array_equal(image, image[..., ::-1])
    np.testing.assert_array_equal(mirrored, image[..., ::-1])
    np.testing.assert_array_equal(other, list(batches_of(tiny, paths))[1])


def test_a_score_that_changes_counts_by_its_change(tiny: Graph, folder: Path) -> None:
    judge = Judge(tiny, sorted(folder.iterdir())[:2])
    model = onnx.ModelProto()
    model.CopyFrom(tiny.model)
    maker = next(node for node in model.graph.node if "scores" in node.output)
    maker.output[0] = "as before"
    change = np.zeros(len(tiny.class_names), np.float32)
    change[0] = -0.125
    model.graph.initializer.append(numpy_helper.from_array(change, "change"))
    model.graph.node.append(onnx.helper.make_node("Add", ["as before", "change"], ["scores"]))
    assert judge.loss(model) == pytest.approx(0.125, abs=1e-6)


def test_the_layer_that_is_rounded_coarsely_moves_most(tiny: Graph, folder: Path) -> None:
    found = calibrate(tiny, folder, MINMAX)
    judge = Judge(tiny, sorted(folder.iterdir())[:2])
    name = found.prepared.placement.layers[-3]
    tensor = next(node.input[0] for node in found.prepared.model.graph.node if node.name == name)
    fine = scores_alone(
        found.prepared.model, found.prepared.placement, found.table.amax, judge.loss
    )
    assert set(fine) == set(found.prepared.placement.layers)
    coarse = {**found.table.amax, tensor: 100 * found.table.amax[tensor]}
    moved = scores_alone(found.prepared.model, found.prepared.placement, coarse, judge.loss)
    assert moved[name] > 3 * fine[name]


def test_layers_are_left_in_float_for_what_they_move_by_their_time() -> None:
    costs = {name: LayerCost(1, 0.25, share) for name, share in (("a", 0.8), ("b", 0.1))}
    worth, plain = rankings_by_displacement({"a": 0.2, "b": 0.1}, costs)
    assert (worth, plain) == (("b", "a"), ("a", "b"))


def test_a_budget_in_time_is_kept_and_the_best_within_it_is_taken() -> None:
    costs = {name: LayerCost(1, 0.05, 0.04) for name in "abcdefgh"}
    gains = dict(zip("abcdefgh", (1, 8, 2, 7, 0.5, 0.1, 0.2, 0.3), strict=True))

    def score(layers: tuple[str, ...]) -> float:
        return 0.5 + 0.01 * sum(gains[name] for name in layers)

    orders = [sorted(gains, key=lambda name: -gains[name])]
    found = choose_float_layers(orders, costs, score, 1.0, most_time=0.10)
    assert not found.met
    assert set(found.layers) == {"b", "d"}
    assert found.time_share <= 0.10
    assert all(trial.time_share <= 0.10 + 1e-9 for trial in found.trials)


def test_a_layer_that_does_not_fit_does_not_keep_out_those_that_do() -> None:
    costs = {"large": LayerCost(1, 0.1, 0.2), **{n: LayerCost(1, 0.05, 0.02) for n in "abc"}}
    orders = [("a", "large", "b", "c")]
    found = choose_float_layers(orders, costs, lambda one: len(one) / 10, 1.0, most_time=0.05)
    assert set(found.layers) == {"a", "b"}


# --- weights ------------------------------------------------------------------------------------


def test_layers_of_another_graph_are_taken_over_and_float_ones_stay(
    tiny: Graph, folder: Path
) -> None:
    found = calibrate(tiny, folder, MINMAX)
    whole = insert_qdq(found.prepared.model, found.prepared.placement, found.table.amax)
    images = list(batches_of(tiny, sorted(folder.iterdir())[:4]))
    tuned = BiasCorrection(found.prepared.model, images).correct(whole)
    assert with_learned(whole, learned_of(tuned)).SerializeToString() == tuned.SerializeToString()
    kept = convolutions(tiny.model)[3]
    partly = with_learned(found.with_float((kept,)), learned_of(tuned))

    def biases(model: onnx.ModelProto) -> dict[str, np.ndarray[tuple[int, ...], np.dtype]]:
        stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
        return {
            node.name: stored[node.input[2]]
            for node in model.graph.node
            if node.name in convolutions(model) and len(node.input) > 2
        }

    taken, theirs, own = biases(partly), biases(tuned), biases(found.prepared.model)
    for name, value in taken.items():
        np.testing.assert_allclose(value, (own if name == kept else theirs)[name], rtol=1e-6)


@dataclasses.dataclass
class Scored:
    """Labelled images on which quantizing costs nothing."""

    data_sha256: str

    def __call__(self, model: onnx.ModelProto) -> float:
        return 0.5

    def change(self, model: onnx.ModelProto, base: onnx.ModelProto) -> Interval:
        return Interval(0.0, 0.0, 0.0)


def test_layers_chosen_on_other_labelled_images_are_chosen_again(
    tiny: Graph, folder: Path, tmp_path: Path
) -> None:
    # Weights and biases, which have nothing to do with it, would take most of the time.
    settings = dataclasses.replace(MINMAX, float_layers="auto", bias_correction=False)
    table = tmp_path / "t.json"
    write_table(table, quantize(tiny, folder, settings, score=Scored("aa")).table)
    again = quantize(tiny, folder, settings, score=Scored("aa"), table_file=table)
    other = quantize(tiny, folder, settings, score=Scored("bb"), table_file=table)
    assert again.note.startswith("Using the calibration in")
    assert "with the setting labelled data aa, now bb" in other.note


# --- options ------------------------------------------------------------------------------------


def test_a_graph_without_a_layer_for_int8_is_refused(tiny: Graph, folder: Path) -> None:
    stored = calibrate(tiny, folder, MINMAX).with_float(())
    nodes = [node for node in stored.graph.node if not node.name.endswith("/quantize")]
    weights_alone = dataclasses.replace(tiny, model=onnx.ModelProto())
    weights_alone.model.CopyFrom(stored)
    set_nodes(weights_alone.model.graph, nodes)
    names = tuple(convolutions(tiny.model))
    for graph, layers, said in (
        (weights_alone, (), "none has weights that are stored in float"),
        (tiny, names, "`float_layers` leaves no layer in INT8"),
        (tiny, len(names), "`float_layers` leaves no layer in INT8"),
        (dataclasses.replace(tiny, precision="fp16"), (), "starts from a float32 graph"),
    ):
        settings = dataclasses.replace(MINMAX, float_layers=layers)
        with pytest.raises(UserError, match=said):
            quantize(graph, folder, settings)
        if not layers:
            with pytest.raises(UserError, match=said):
                calibrate(graph, folder, settings)


def test_percentages_are_read_with_and_without_their_sign() -> None:
    assert percent("5%") == percent("5") == 5
    assert percent("0") == 0
    for wrong in ("-1", "five", "inf", "nan"):
        with pytest.raises(argparse.ArgumentTypeError):
            percent(wrong)


@pytest.mark.parametrize(
    "change",
    [
        *({"max_slowdown": value} for value in (0.0, -1.0, 200.0, math.inf, math.nan)),
        *({"reconstruct_minutes": value} for value in (-1.0, math.inf, math.nan)),
        {"calibrator": "entropi"},
        {"border": -1},
        {"image_limit": 2.5},
        *({"float_layers": value} for value in ("stem", ["stem"], (1,), 1.0, True)),
    ],
)
def test_settings_of_another_kind_or_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^`{next(iter(change))}`"):
        check_settings(dataclasses.replace(MINMAX, **change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_slowdown": 5.0}, "are for `float_layers` auto"),
        ({"max_ap_drop": None}, "are for `float_layers` auto"),
        ({"max_ap_drop": None, "float_layers": "auto"}, "`float_layers` auto needs a budget"),
        ({"max_ap_drop": 0.1, "float_layers": 3}, "are for `float_layers` auto"),
        ({"adaptive_rounding": True, "bias_correction": False}, "what `bias_correction` turns off"),
        ({"adaptive_rounding": True, "reconstruct": False}, "what `reconstruct` turns off"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_settings(QuantizationSettings(**change))


@pytest.mark.parametrize("layers", ["stem", ["stem"], None])
def test_a_precision_s_float_layers_are_a_number_auto_or_names(layers: Any) -> None:
    with pytest.raises(UserError, match=r"^`float_layers` is .* auto or a tuple of names"):
        Precision("int8", float_layers=layers)
