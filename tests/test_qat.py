"""Quantization-aware training: what PTQ breaks is repaired, what stays float or fixed stays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.accuracy import first_images
from support.logs import logged
from support.networks import ARCHITECTURES, tiny_graph
from support.pictures import noise_folder
from support.quantized import prepared_sample
from support.training_data import (
    CLASS_NAMES,
    tiny_architecture,
    unaugmented,
    without_objects,
    write_shapes,
    write_tiny,
)

from trt_yolov6.cli import main
from trt_yolov6.common.files import sole_writer
from trt_yolov6.data.coco import load_coco
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.errors import UserError
from trt_yolov6.graph.export import ExportSettings, export_onnx
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.graph.operators import layer_names
from trt_yolov6.models import YOLOv6
from trt_yolov6.quantization.implicit import inner_tensors
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.tensorrt_cache import read_cache
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.spec import PredictOptions
from trt_yolov6.training.dataset import TrainingSet, load_training_set
from trt_yolov6.training.qat.export import rounded_graph, trained_graph
from trt_yolov6.training.qat.onnx_module import GraphNetwork, _Compact
from trt_yolov6.training.qat.preparation import Start, prepare_graph
from trt_yolov6.training.qat.settings import QatSettings
from trt_yolov6.training.qat.training import (
    QatResult,
    evaluate_network,
    load_data,
    train_quantized,
)

MINMAX = QuantizationSettings(calibrator="minmax", equalize=False, bias_correction=False)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", images=8, size=64)


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_folder(tmp_path_factory.mktemp("noise") / "calib")


@pytest.fixture(scope="module")
def start(shapes: Path) -> Start:
    _, graph = tiny_graph("repvgg")
    folder = shapes / "images" / "train"
    return prepare_graph(graph, ARCHITECTURES["repvgg"], folder, quantization=MINMAX)


def settings_for(data: Path, **others: Any) -> QatSettings:
    return QatSettings(**{"data": str(data), "epochs": 1, "batch": 4, **others})


def structure(model: onnx.ModelProto) -> list[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    return [(n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in model.graph.node]


def test_the_graph_is_that_of_ptq_with_other_numbers(
    start: Start, shapes: Path, one_thread: None
) -> None:
    result = train_quantized(start, settings_for(shapes), device="cpu", progress=False)
    said = dataclasses.replace(start.graph, calibration={"agreement": 0.9, "images": 4})
    judged = dataclasses.replace(start, quantized=dataclasses.replace(start.quantized, graph=said))
    graph = trained_graph(judged, result.trained)
    assert structure(graph.model) == structure(start.graph.model)
    assert graph.model.SerializeToString() != start.graph.model.SerializeToString()
    assert graph.calibration is not None
    # What the network before training agreed to is not said of the trained one.
    assert graph.calibration == {"images": 4, "rest": "fp32", "quantization_aware_training": True}
    scales = {name: value for name, value in constants(graph.model).items() if "scale" in name}
    before = constants(start.graph.model)
    assert any(not np.array_equal(value, before[name]) for name, value in scales.items())


def test_fixed_scales_stay_and_weights_learn(start: Start, shapes: Path, one_thread: None) -> None:
    settings = settings_for(shapes, learn_scales=False)
    result = train_quantized(start, settings, device="cpu", progress=False)
    model = trained_graph(start, result.trained).model
    before, after = constants(start.graph.model), constants(model)
    for name, value in after.items():
        if name.endswith(("/scale", "/scale/0", "/scale/1")):
            np.testing.assert_array_equal(value, before[name])
    codes = [name for name in after if "/int8" in name]
    assert any(not np.array_equal(after[name], before[name]) for name in codes)


def test_partial_training_leaves_the_named_layers_in_float(shapes: Path, one_thread: None) -> None:
    _, graph = tiny_graph("repvgg")
    kept = ("neck.up5", "head.levels.0.reg_pred", "backbone.stages.1.body.0.conv")
    settings = dataclasses.replace(MINMAX, float_layers=kept)
    folder = shapes / "images" / "train"
    partial = prepare_graph(graph, ARCHITECTURES["repvgg"], folder, quantization=settings)
    result = train_quantized(partial, settings_for(shapes), device="cpu", progress=False)
    model = trained_graph(partial, result.trained).model
    dequantized = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    names = layer_names(model)
    in_float = {
        names[node.output[0]]
        for node in model.graph.node
        if node.output[0] in names and node.input[1] not in dequantized
    }
    assert in_float == set(kept)
    # They are trained all the same, and read what they read before: nothing rounded.
    moved = constants(result.trained.model)["model.neck.up5.weight"]
    assert not np.array_equal(moved, constants(graph.model)["model.neck.up5.weight"])
    assert structure(model) == structure(partial.graph.model)


def test_in_half_precision_it_learns_too(start: Start, shapes: Path, one_thread: None) -> None:
    settings = settings_for(shapes, epochs=3, precision="bf16", learning_rate=0.2)
    result = train_quantized(start, settings, device="cpu", progress=False)
    losses = [line["loss_detection"] for line in result.log]
    assert losses[-1] < losses[0]
    exact = settings_for(shapes, epochs=3, learning_rate=0.2)
    other = train_quantized(start, exact, device="cpu", progress=False)
    assert losses[0] == pytest.approx(other.log[0]["loss_detection"], rel=0.05)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}


@pytest.fixture(scope="module")
def taught(shapes: Path) -> YOLOv6:
    """The tiny network, trained in float until it knows its eight pictures."""
    from trt_yolov6.training.initialization import reset_predictions
    from trt_yolov6.training.losses import default_losses, detection_loss

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = YOLOv6(tiny_architecture())
    reset_predictions(model)
    data = load_training_set(shapes, "train", 64, "cpu", progress=False)
    images, targets = unaugmented(data, range(8))
    losses = dataclasses.replace(default_losses(model.arch), warmup_epochs=0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        loss = detection_loss(model.raw(images), model.arch, targets, losses).total
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.set_num_threads(threads)
    return model.eval()


def test_it_repairs_a_network_that_few_bits_break(
    taught: YOLOv6, shapes: Path, one_thread: None
) -> None:
    model = export_onnx(taught, ExportSettings((64, 64)), CLASS_NAMES, verify=False)
    graph = dataclasses.replace(tiny_graph("repvgg")[1], model=model)
    folder = shapes / "images" / "train"
    broken = prepare_graph(graph, taught.arch, folder, quantization=MINMAX, bits=3)

    def ap(network: GraphNetwork) -> float:
        return evaluate_network(network, graph, load_coco(shapes, "val")).ap or 0.0

    whole, damaged = ap(broken.teacher()), ap(broken.student().eval())
    settings = settings_for(shapes, epochs=30, learning_rate=0.02)
    result = train_quantized(broken, settings, device="cpu", progress=False)
    repaired = ap(result.network)
    assert whole > 0.5
    assert damaged < 0.5 * whole
    assert repaired > damaged + 0.5 * (whole - damaged)
    with pytest.raises(UserError, match="3 bits cannot be exported"):
        trained_graph(broken, result.trained)


def test_of_fewer_bits_first_and_last_layers_keep_eight(shapes: Path) -> None:
    _, graph = tiny_graph("repvgg")
    folder = shapes / "images" / "train"
    narrow = prepare_graph(
        graph, ARCHITECTURES["repvgg"], folder, quantization=MINMAX, bits=4
    ).quantization
    with pytest.raises(UserError, match="`bits` 1 is out of range; give 2 to 8"):
        prepare_graph(graph, ARCHITECTURES["repvgg"], folder, bits=1)
    wide = {name for name, bits in narrow.weight_bits.items() if bits == 8}
    predictions = {f"head.levels.{i}.{kind}_pred" for i in range(3) for kind in ("cls", "reg")}
    assert wide == {"backbone.stem.conv"} | predictions
    assert narrow.levels["images"].high == 127
    assert narrow.levels["relu"].low == 0
    assert narrow.levels["relu"].high == 15
    for group in narrow.placement.groups:
        assert len({(narrow.scales[name], narrow.levels[name]) for name in group}) == 1


@pytest.mark.slow
def test_the_exported_graph_has_the_network_s_ap(root: Path, tmp_path: Path) -> None:
    """The sample at a small size, moved as by training; exact arithmetic in ONNX Runtime.

    Tensor by tensor they agree (test_graph_network). Left to run, one value that falls the other
    way grows through fifty layers, in ONNX Runtime with other optimizations as well.
    """
    size = 192
    sample = prepared_sample(root, size, dataclasses.replace(MINMAX, image_limit=3))
    network = sample.student()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.scale_parameters():
            parameter.add_(5 * torch.randn(parameter.shape, generator=generator))
    trained = network.trained()
    images = first_images(load_coco(root / "samples", "val"), 36)
    ours = evaluate_network(network, sample.graph, images)
    built = build_engine(
        trained_graph(sample, trained), backend="onnxruntime", output=tmp_path / "q.onnx"
    )
    with load_engine(built.path) as engine:
        theirs = evaluate(engine, images, PredictOptions(batch=8), progress=False)
    assert built.manifest.int8_layers == 58
    assert ours.ap == pytest.approx(theirs.ap, abs=5e-3)
    # What `build --onnx` makes of the file is the same graph.
    assert graph_from_onnx(built.path).precision == "int8"


def test_without_pairs_the_weights_lie_on_the_levels(start: Start, shapes: Path) -> None:
    result = train_quantized(start, settings_for(shapes), device="cpu", progress=False)
    model = rounded_graph(result.trained)
    assert not any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    for name, scale in result.trained.weight_scales.items():
        weights = constants(model)[name]
        axis = 1 if "neck.up" in name else 0
        shape = [1] * 4
        shape[axis] = -1
        levels = weights / scale.reshape(shape)
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
        assert np.abs(np.rint(levels)).max() <= 127


class Stop(Exception):
    """Ends a training from inside."""


class Stopping:
    """A training set that gives out a number of batches and then raises `Stop`."""

    def __init__(self, data: TrainingSet, batches: int) -> None:
        self._data = data
        self._left = batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, *arguments: Any, **named: Any) -> Any:
        if not self._left:
            raise Stop
        self._left -= 1
        return self._data.batch(*arguments, **named)


@pytest.fixture(scope="module")
def two_epochs(start: Start, shapes: Path) -> QatResult:
    """A training of two epochs of two steps each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = train_quantized(start, settings_for(shapes, epochs=2), device="cpu", progress=False)
    torch.set_num_threads(threads)
    return result


@pytest.mark.parametrize("seconds", [30, 0], ids=["after an epoch", "after a step"])
def test_it_goes_on_where_it_was_stopped(
    start: Start,
    shapes: Path,
    tmp_path: Path,
    two_epochs: QatResult,
    one_thread: None,
    seconds: float,
) -> None:
    settings, state = settings_for(shapes, epochs=2), tmp_path / "state.pt"
    stopping: Any = Stopping(load_training_set(shapes, "train", 64, "cpu", progress=False), 3)
    with pytest.raises(Stop):
        train_quantized(
            start,
            settings,
            device="cpu",
            progress=False,
            state_file=state,
            state_seconds=seconds,
            data=stopping,
        )
    with logged() as said:
        resumed = train_quantized(start, settings, device="cpu", state_file=state)
    assert "2 epochs, 1 of them done" in said[0]
    for name, value in constants(two_epochs.trained.model).items():
        np.testing.assert_array_equal(constants(resumed.trained.model)[name], value)
    assert resumed.trained.amax == two_epochs.trained.amax
    for one, other in zip(resumed.log, two_epochs.log, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_state_of_another_training_is_refused(start: Start, shapes: Path, tmp_path: Path) -> None:
    settings, state = settings_for(shapes), tmp_path / "state.pt"
    train_quantized(start, settings, device="cpu", progress=False, state_file=state)
    other = dataclasses.replace(settings, seed=5)
    with pytest.raises(UserError, match="other settings"):
        train_quantized(start, other, device="cpu", progress=False, state_file=state)
    fewer = prepare_graph(
        tiny_graph("repvgg")[1],
        ARCHITECTURES["repvgg"],
        shapes / "images" / "train",
        quantization=dataclasses.replace(MINMAX, image_limit=3),
    )
    with pytest.raises(UserError, match="another network, on other data or with other"):
        train_quantized(fewer, settings, device="cpu", progress=False, state_file=state)
    state.write_bytes(b"junk")
    with pytest.raises(UserError, match="delete it to start again"):
        train_quantized(start, settings, device="cpu", progress=False, state_file=state)


def test_it_keeps_no_more_than_twice_what_float_training_keeps(start: Start) -> None:
    """Counted are the tensors kept for the backward pass, which grow with batch and image.

    On a GPU, float training is in half precision, and quantized training is not.
    """
    torch.manual_seed(0)
    float_network = YOLOv6(ARCHITECTURES["repvgg"]).train()
    network = start.student().train()
    images = torch.rand(8, 3, 64, 64)

    def half() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return float_network.raw(images)

    quantized = kept_bytes(lambda: network(images))
    assert 0 < quantized <= 1.2 * kept_bytes(lambda: float_network.raw(images))
    assert quantized <= 2 * kept_bytes(half)


def kept_bytes(forward: Callable[[], object]) -> int:
    """Return the bytes of the different memories that a forward pass keeps."""
    storages: dict[int, int] = {}
    compact = _Compact.pack

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def packed_and_counted(self: _Compact, tensor: torch.Tensor) -> Any:
        packed = compact(self, tensor)
        count(packed if isinstance(packed, torch.Tensor) else packed[0])
        return packed

    # The network's own hooks are the inner ones, and only the innermost are called.
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        patch.setattr(_Compact, "pack", packed_and_counted)
        kept = forward()
        total = sum(storages.values())
    del kept
    return total


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
        ({"batch": 0}, "`batch` must be at least 1"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be above 0"),
        ({"scale_learning_rate": -1.0}, "`scale_learning_rate` must be above 0"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"distill_weight": -1.0}, "`distill_weight` must be at least 0"),
    ],
)
def test_wrong_settings_are_refused(named: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        QatSettings(data="d", **named)


def test_a_data_set_of_other_classes_is_refused(root: Path, start: Start) -> None:
    settings = settings_for(root / "samples", train_split="val")
    with pytest.raises(UserError, match="has 3 classes, the checkpoint 2"):
        train_quantized(start, settings, device="cpu", progress=False)


@pytest.mark.parametrize(
    ("known", "warning"),
    [
        (("disc", "square"), None),
        (("box", "disc"), "the names of some classes differ, so they are taken in order"),
    ],
)
def test_classes_are_matched_by_name_and_other_names_in_order(
    start: Start, shapes: Path, known: tuple[str, str], warning: str | None
) -> None:
    with logged() as said:
        data = load_data(settings_for(shapes), knowing(start.graph, known), torch.device("cpu"))
    assert data.class_names == (known if warning is None else ("square", "disc"))
    assert any("taken in order" in line for line in said) is (warning is not None)


def test_classes_in_another_order_and_by_other_names_are_refused(
    start: Start, shapes: Path
) -> None:
    with pytest.raises(UserError, match="in another order and some by other names; name them disc"):
        load_data(settings_for(shapes), knowing(start.graph, ("disc", "box")), torch.device("cpu"))


def knowing(graph: Graph, names: tuple[str, ...]) -> Graph:
    """Return a graph with other names of classes."""
    detector = dataclasses.replace(graph.detector, class_names=names)
    return dataclasses.replace(graph, detector=detector)


def test_nothing_but_float_layers_is_refused(calib: Path) -> None:
    _, graph = tiny_graph("repvgg")
    every = tuple(layer_names(graph.model).values())
    settings = dataclasses.replace(MINMAX, float_layers=every)
    with pytest.raises(UserError, match="`float_layers` leaves no layer in INT8"):
        prepare_graph(graph, ARCHITECTURES["repvgg"], calib, quantization=settings)


# --- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny.pt")


def test_the_command_writes_a_graph_that_builds(
    checkpoint: Path,
    shapes: Path,
    tmp_path: Path,
    one_thread: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, result, cache = tmp_path / "run", tmp_path / "result.json", tmp_path / "scales.cache"
    arguments = ["qat", "--weights", str(checkpoint), "--data", str(shapes), "--imgsz", "64"]
    arguments += ["--calib", str(shapes / "images" / "train"), "--calibrator", "minmax"]
    arguments += ["--no-equalize", "--epochs", "1", "--batch", "8", "--device", "cpu", "--quiet"]
    arguments += ["--float-layers", "2", "--output", str(output), "--json", str(result)]
    arguments += ["--calibration-cache", str(cache)]
    assert main(arguments) == 0, capsys.readouterr().err
    said = json.loads(result.read_text())
    assert said["engine"] == str(output / "yolov6-custom.onnx")
    assert len(said["float_layers"]) == 2
    assert {"AP", "AP_float", "AP_ptq", "seconds", "log"} <= said.keys()
    assert not (output / "state.pt").exists()
    lines = (output / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == said["log"]

    built = tmp_path / "built.onnx"
    build = ["build", "--onnx", said["engine"], "--backend", "onnxruntime", "--output", str(built)]
    assert main(build) == 0
    printed = capsys.readouterr().out
    assert "warning: training has 8 of 8 validation images, too" in printed
    assert "no Q/DQ node of the graph is surplus" in printed
    with load_engine(built) as engine:
        found = evaluate(
            engine, load_coco(shapes, "val"), PredictOptions(batch=8), progress=False
        ).ap
    assert found == pytest.approx(said["AP"], abs=1e-3)

    plain = onnx.load(output / "yolov6-custom.float.onnx")
    tensors = {name for node in plain.graph.node for name in node.output} | {"images"}
    ranges = set(read_cache(cache))
    left = {out for out, name in layer_names(plain).items() if name in said["float_layers"]}
    # TensorRT takes a layer as INT8 where all that it reads and writes has a range.
    assert ranges <= tensors - left
    assert set(inner_tensors(plain)) - left <= ranges

    assert main(arguments) == 2
    assert "holds a training already" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 2
    assert "is complete; give another --output" in capsys.readouterr().err


def test_killed_in_its_first_epoch_it_starts_again(
    checkpoint: Path, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = write_shapes(tmp_path / "data", size=64)
    (shapes / "images" / "train" / "003.png").write_bytes(b"no image")
    output = tmp_path / "run"
    output.mkdir()
    (output / "settings.json").write_text("{}")  # written before the first epoch
    leftover = output / ".state.abc.pt"
    leftover.write_bytes(b"half")
    arguments = ["qat", "--weights", str(checkpoint), "--data", str(shapes), "--imgsz", "64"]
    arguments += ["--calib", str(shapes / "images" / "train"), "--calibrator", "minmax"]
    arguments += ["--no-equalize", "--epochs", "1", "--batch", "8", "--device", "cpu", "--quiet"]
    arguments += ["--val-split", "none", "--output", str(output), "--resume"]
    arguments += ["--bad-data", "skip"]
    assert main(arguments) == 0
    # What was left out is listed, as `train` lists it.
    said = f"left out of training: 1 problem of the data; see {output / 'bad_data.json'}."
    assert said in capsys.readouterr().out
    assert "003.png" in (output / "bad_data.json").read_text()
    assert (output / "yolov6-custom.onnx").is_file()
    assert not leftover.exists()


def test_bad_data_is_found_before_the_calibration(
    checkpoint: Path, root: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["qat", "--weights", str(checkpoint), "--imgsz", "64", "--device", "cpu", "--quiet"]
    common += ["--calib", str(shapes / "images" / "train"), "--output", str(tmp_path / "run")]
    unlabelled = without_objects(write_shapes(tmp_path / "data", size=64), "val")
    for arguments, message in (
        (["--data", str(tmp_path / "none")], "is not a folder"),
        (["--data", str(unlabelled)], "has no object to evaluate on; give annotations"),
        (["--data", str(shapes), "--split", "other"], "no split 'other'"),
        (["--data", str(shapes), "--val-split", "other"], "no split 'other'"),
        (["--data", str(root / "samples"), "--split", "val"], "3 classes, the checkpoint 2"),
    ):
        assert main([*common, *arguments]) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert "images ..." not in said.out, "it calibrated first"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is missing"),
        (["--data", "{shapes}"], "--weights is missing"),
        (["--data", "{shapes}", "--weights", "none.pt"], "none.pt"),
        (["--data", "{shapes}", "--weights", "{tiny}", "--model", "s"], "leave --model out"),
        (
            ["--data", "{shapes}", "--weights", "{tiny}", "--lr", "0"],
            "--lr must be above 0, got 0.0",
        ),
        (
            ["--data", "{shapes}", "--weights", "{tiny}", "--no-distillation", "--temperature=2"],
            "leave --no-distillation out",
        ),
        (
            ["--data", "{shapes}", "--weights", "{tiny}", "--fixed-scales", "--scale-lr", "0.1"],
            "leave --fixed-scales out",
        ),
        (["--data", "{shapes}", "--weights", "{tiny}", "--cache-version", "8.6.1"], "add it"),
        (["--data", "{shapes}", "--weights", "{tiny}", "--resume"], "leave --resume out"),
        (["--data", "{shapes}", "--weights", "{tiny}", "--imgsz", "100"], "multiple of 32"),
        (["--data", "{shapes}", "--weights", "{tiny}", "--device", "tpu"], "give cpu, cuda"),
        (["--data", "{shapes}", "--weights", "{tiny}", "--device", "meta"], "give cpu, cuda"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [text.format(shapes=shapes, tiny=checkpoint) for text in arguments]
    assert main(["qat", *filled, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("trt-yolov6 qat: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_folder_that_another_run_writes_to_is_refused(
    checkpoint: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["qat", "--data", str(shapes), "--weights", str(checkpoint)]
    with sole_writer(tmp_path / "run"):
        assert main([*command, "--output", str(tmp_path / "run")]) == 2
    assert "another process is writing to" in capsys.readouterr().err


def test_several_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # All of them would write the same files.
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["qat", "--data", "bccd", "--weights", "n.pt", "--output", str(tmp_path / "run")]
    assert main(command) == 2
    assert "start it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
