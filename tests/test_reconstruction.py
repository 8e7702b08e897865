"""Tuning by gradients: it computes what is deployed, learns, and comes back from disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from support.networks import ONE, random_model
from support.pictures import save_noise
from support.small_graphs import GraphWriter

from trt_yolov6.common.statistics import Interval
from trt_yolov6.errors import UserError
from trt_yolov6.graph.export import ExportSettings, export_onnx
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.graph.reference import reference_session
from trt_yolov6.quantization import search
from trt_yolov6.quantization.judge import batches_of
from trt_yolov6.quantization.learned import as_built, learned_of, with_learned
from trt_yolov6.quantization.pipeline import Calibrated, calibrate, quantize
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import place
from trt_yolov6.quantization.reconstruction import reconstruct
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.table import learned_path, reusable_table, write_table
from trt_yolov6.quantization.torch_graph import TorchGraph


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are not worth the threads, and tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PLAIN = QuantizationSettings(calibrator="minmax", equalize=False, bias_correction=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """YOLOv6 with few and narrow layers and random weights, for images of 64 x 64."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    onnx.save(export_onnx(random_model(), ExportSettings((64, 64), ONE), verify=False), path)
    return graph_from_onnx(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pictures of noise."""
    result = tmp_path_factory.mktemp("pictures")
    for number in range(16):
        save_noise(result / f"{number:02}.png", seed=number)
    return result


@pytest.fixture(scope="module")
def calibrated(tiny: Graph, folder: Path) -> Calibrated:
    return calibrate(tiny, folder, PLAIN)


@pytest.fixture(scope="module")
def quantized(calibrated: Calibrated) -> onnx.ModelProto:
    return insert_qdq(
        calibrated.prepared.model, calibrated.prepared.placement, calibrated.table.amax
    )


def run(model: onnx.ModelProto, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
    session = reference_session(model)
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: images}), strict=True))


def test_a_float_graph_computes_as_in_onnx_runtime(tiny: Graph, folder: Path) -> None:
    images = next(batches_of(tiny, sorted(folder.iterdir())))
    found = TorchGraph(tiny.model)(torch.from_numpy(images))
    for name, expected in run(tiny.model, images).items():
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_quantized_graph_computes_what_is_deployed_but_for_a_rounding(
    tiny: Graph, folder: Path, quantized: onnx.ModelProto
) -> None:
    images = next(batches_of(tiny, sorted(folder.iterdir())))
    found = TorchGraph(quantized)(torch.from_numpy(images))
    of_float = run(tiny.model, images)
    for name, expected in run(quantized, images).items():
        own = np.abs(found[name].detach().numpy() - expected).max()
        # A sum in another order may round the other way, which moves far less than INT8 does.
        assert own <= 0.25 * np.abs(expected - of_float[name]).max()


def test_what_has_not_learned_is_the_same_graph(quantized: onnx.ModelProto) -> None:
    same = TorchGraph(quantized).learned()
    before, after = learned_of(quantized), learned_of(same)
    for name, codes in before.codes.items():
        np.testing.assert_array_equal(after.codes[name], codes)
        np.testing.assert_allclose(after.biases[name], before.biases[name], atol=1e-7)


def test_a_grouped_transposed_convolution_learns_a_bias_for_each_channel() -> None:
    graph = GraphWriter()
    wide = graph.conv("wide", "images", (3, 8))
    up = graph.conv("up", wide, (8, 3), kernel=2, op="ConvTranspose", group=2, strides=[2, 2])
    model = graph.model(up)
    del model.graph.node[-1].input[2:]
    placement = place(model)
    biases = learned_of(insert_qdq(model, placement, dict.fromkeys(placement.tensors, 1.0))).biases
    assert {name: len(bias) for name, bias in biases.items()} == {"wide_out": 8, "up_out": 6}


def test_gradients_bring_outputs_nearer_to_float(
    tiny: Graph, folder: Path, calibrated: Calibrated
) -> None:
    # Ranges far too wide, as of a calibration gone wrong: scales have to shrink.
    wide = {name: 3 * amax for name, amax in calibrated.table.amax.items()}
    start = insert_qdq(calibrated.prepared.model, calibrated.prepared.placement, wide)
    paths = sorted(folder.iterdir())
    images = list(batches_of(tiny, paths[:12]))

    def tuned(seconds: float) -> onnx.ModelProto:
        return reconstruct(tiny, calibrated.prepared.model, start, images, seconds)

    def error(model: onnx.ModelProto) -> float:
        total = 0.0
        for held_out in batches_of(tiny, paths[12:]):
            own, expected = run(model, held_out), run(tiny.model, held_out)
            total += sum(float(np.square(own[n] - expected[n]).mean()) for n in own)
        return total

    # Longer on a machine that does other things as well.
    assert any(error(tuned(seconds)) < 0.9 * error(start) for seconds in (3, 40))


def test_what_was_learned_is_stored_and_makes_the_same_graph(
    calibrated: Calibrated, quantized: onnx.ModelProto
) -> None:
    changed, ranges = as_built(TorchGraph(quantized).learned())
    learned = learned_of(changed)
    amax = {**calibrated.table.amax, **ranges}
    again = with_learned(
        insert_qdq(calibrated.prepared.model, calibrated.prepared.placement, amax), learned
    )
    assert learned_of(again) == learned
    images = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    for one, other in zip(*(run(m, images).values() for m in (changed, again)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("gain", [0.02, -0.02])
def test_what_is_learned_is_kept_only_if_it_is_clearly_better(
    tiny: Graph, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    monkeypatch.setattr(search, "pooled_gain", lambda *_: Interval(gain, gain, gain))
    settings = dataclasses.replace(PLAIN, reconstruct_minutes=0.005)
    table = tmp_path / "tiny.calibration.json"
    result = quantize(tiny, folder, settings)
    assert (result.table.learned is not None) == (gain > 0)
    write_table(table, result.table)
    assert learned_path(table).is_file() == (gain > 0)
    again = quantize(tiny, folder, settings, table_file=table)
    assert "same model, images and settings" in again.note
    assert again.graph.model.SerializeToString() == result.graph.model.SerializeToString()
    assert again.graph.calibration is not None
    assert again.graph.calibration["calibrator"] == "minmax"
    assert [one.decides for one in result.candidates] == ["gradients"]


def test_a_table_without_what_was_learned_is_made_again(
    tiny: Graph, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "pooled_gain", lambda *_: Interval(1, 1, 1))
    settings = dataclasses.replace(PLAIN, reconstruct_minutes=0.005)
    table = tmp_path / "tiny.calibration.json"
    made = quantize(tiny, folder, settings).table
    write_table(table, made)
    whole = learned_path(table).read_bytes()
    for damaged in (b"", whole[:100], whole[:100] + bytes(30) + whole[130:]):
        learned_path(table).write_bytes(damaged)
        again, note = reusable_table(table, made.key)
        assert again is None
        assert note.startswith("Calibrating again")
    assert quantize(tiny, folder, settings, table_file=table).note == note


def test_without_images_to_judge_on_it_is_refused(
    tiny: Graph, folder: Path, tmp_path: Path
) -> None:
    for path in sorted(folder.iterdir())[:8]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = dataclasses.replace(PLAIN, reconstruct_minutes=1.0)
    with pytest.raises(UserError, match="needs 16 calibration images"):
        quantize(tiny, tmp_path, settings)
