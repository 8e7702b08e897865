"""The public names of the package: what they are, what importing costs, and their examples."""

from __future__ import annotations

import dataclasses
import doctest
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.logs import logged
from support.tiny_detector import CELL, load_named
from support.training_data import tiny_architecture, without_objects, write_shapes

import trt_yolov6
from trt_yolov6 import (
    Detector,
    LoadOptions,
    Precision,
    QuantizationSettings,
    UserError,
    read_image,
)
from trt_yolov6.checkpoints.native import Training, write_checkpoint
from trt_yolov6.cli import main as cli_main
from trt_yolov6.models import YOLOv6
from trt_yolov6.pipeline import quantization_settings
from trt_yolov6.quantization.types import FP8, INT8
from trt_yolov6.spec import BatchProfile, NmsSettings, PredictOptions

EXAMPLES = [
    example
    for name in sorted(trt_yolov6.__all__)
    for example in doctest.DocTestFinder().find(getattr(trt_yolov6, name), name)
    if example.examples
]


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the examples name: checkpoint, ONNX file, images, a data set of four."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copy(root / "samples" / "yolov6n_bccd.pt", folder / "yolov6n.pt")
    images = sorted((root / "samples" / "images" / "val").iterdir())[:4]
    content = json.loads((root / "samples" / "annotations" / "instances_val.json").read_text())
    names = {path.name for path in images}
    content["images"] = [one for one in content["images"] if one["file_name"] in names]
    ids = {one["id"] for one in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in ids]
    (folder / "cells" / "annotations").mkdir(parents=True)
    (folder / "cells" / "annotations" / "instances_val.json").write_text(json.dumps(content))
    for place in (folder / "images", folder / "calib", folder / "cells" / "images" / "val"):
        place.mkdir(parents=True)
        # Of four images, the search for INT8 would make everything twice.
        for path in images[:3] if place.name == "calib" else images:
            shutil.copy(path, place)
    trt_yolov6.export(folder / "yolov6n.pt", image_size=64, batch=1, output=folder / "yolov6n.onnx")
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
@pytest.mark.usefixtures("one_thread")
def test_examples_give_what_they_say(
    example: doctest.DocTest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    found = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert found.attempted > 0
    assert found.failed == 0


def test_every_verb_has_an_example() -> None:
    verbs = {name for name in trt_yolov6.__all__ if inspect.isfunction(getattr(trt_yolov6, name))}
    assert verbs - {example.name for example in EXAMPLES} == set()
    assert len(verbs) >= 9


def test_every_public_name_says_what_it_is_for() -> None:
    for name in trt_yolov6.__all__:
        assert (getattr(trt_yolov6, name).__doc__ or "").strip(), name
    assert set(trt_yolov6.__all__) <= set(dir(trt_yolov6))


def test_the_lint_rules_of_the_public_api_hold_where_its_names_come_from(root: Path) -> None:
    line = next(
        line
        for line in (root / "pyproject.toml").read_text().splitlines()
        if line.endswith('= ["FBT", "PLR0913"]')
    )
    checked = set(line[line.index("{") + 1 : line.index("}")].split(","))
    named = {getattr(trt_yolov6, name).__module__ for name in trt_yolov6.__all__}
    assert {module.split(".", 1)[1].replace(".", "/") for module in named} - checked == set()


def test_no_module_has_the_name_of_a_verb(root: Path) -> None:
    modules = {path.stem for path in (root / "trt_yolov6").iterdir()}
    assert modules & set(trt_yolov6.__all__) == set()


def test_importing_the_package_imports_none_of_the_frameworks() -> None:
    heavy = "{'torch', 'onnxruntime', 'numpy', 'onnx'}"
    code = f"import sys, trt_yolov6; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'predict'"):
        trt_yolov6.predict  # noqa: B018


# --- prediction ---------------------------------------------------------------------------------


@pytest.fixture
def detector(tmp_path: Path) -> Detector:
    return Detector(load_named(tmp_path))


def image(x: int, y: int, channel: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return a black image with one cell of a pure colour."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL, channel] = 255
    return pixels


def test_images_come_as_arrays_files_folders_and_mixtures(
    detector: Detector, tmp_path: Path
) -> None:
    place = tmp_path / "images"
    place.mkdir()
    for index, name in enumerate(("b.png", "a.png")):
        Image.fromarray(image(index, 0, index)).save(place / name)
    red = image(0, 0, 0)
    for images, expected in (
        (red, [0]),
        (np.stack([red, red]), [0, 0]),
        (Image.fromarray(red), [0]),
        (torch.from_numpy(red), [0]),
        (np.array([str(place / "a.png"), str(place / "b.png")]), [1, 0]),
        (place / "b.png", [0]),
        (str(place / "a.png"), [1]),
        (place, [1, 0]),
        (str(place / "*.png"), [1, 0]),
        ([place, red, place / "a.png"], [1, 0, 0, 1]),
        ((one for one in (red, image(2, 2, 2))), [0, 2]),
        ([], []),
    ):
        found = detector.predict(images, confidence=0.6)  # type: ignore[arg-type]
        assert [one.class_id.tolist() for one in found] == [[label] for label in expected]
    assert detector.predict([Image.fromarray(red)])[0].class_id.tolist() == [0]
    assert [one.path for one in detector.predict([place, red])] == [
        place / "a.png",
        place / "b.png",
        None,
    ]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "HSV", "YCbCr"])
def test_a_pil_image_of_other_channels_is_refused(detector: Detector, mode: str) -> None:
    red = Image.fromarray(image(0, 0, 0))
    with pytest.raises(UserError, match=f"image 1 is in mode {mode}; give "):
        detector.predict([red, red.convert(mode)])


def test_a_pil_image_that_is_to_be_turned_is_refused(detector: Detector, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(image(0, 0, 0)).save(tmp_path / "a.jpg", exif=turned)
    photograph = Image.open(tmp_path / "a.jpg")
    with pytest.raises(
        UserError, match=r"image 0 .* give `PIL\.ImageOps\.exif_transpose\(image\)`"
    ):
        detector.predict(photograph)
    (upright,) = detector.predict(ImageOps.exif_transpose(photograph))
    (from_file,) = detector.predict(tmp_path / "a.jpg")
    np.testing.assert_array_equal(upright.xyxy, from_file.xyxy)


def test_bytes_are_answered_with_what_decodes_them(detector: Detector, tmp_path: Path) -> None:
    Image.fromarray(image(0, 0, 0)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for images in (content, [content]):
        with pytest.raises(UserError, match="image 0 is bytes; give what `read_image` makes of"):
            detector.predict(images)  # type: ignore[arg-type]
    assert len(detector.predict(read_image(content))) == 1


def test_many_images_give_what_each_gives_alone(detector: Detector) -> None:
    several = [image(index % 8, index // 8, index % 3) for index in range(20)]
    together = detector.predict(several, PredictOptions(batch=3))
    for one, pixels in zip(together, several, strict=True):
        (alone,) = detector.predict(pixels)
        np.testing.assert_array_equal(one.xyxy, alone.xyxy)
        np.testing.assert_array_equal(one.class_id, alone.class_id)


def test_thresholds_are_those_given(detector: Detector) -> None:
    gray = image(1, 1, 0) // 2
    assert len(detector.predict(gray)[0]) == 1
    assert len(detector.predict(gray, confidence=0.6)[0]) == 0
    with pytest.raises(UserError, match=r"give `iou` in 0\.\.1"):
        detector.predict(gray, iou=2.0)
    with pytest.raises(UserError, match="`workers` -1 is out of range"):
        PredictOptions(workers=-1)


def test_what_is_not_an_image_and_options_without_an_effect_are_refused(detector: Detector) -> None:
    with pytest.raises(UserError, match="image 0 is None; check that it could be read"):
        detector.predict(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="`gpus` is for `annotate` and `evaluate`"):
        detector.predict(image(0, 0, 0), PredictOptions(gpus=2))


@pytest.mark.parametrize(
    ("options", "given", "sentence"),
    [
        (PredictOptions, {"batch": 1.5}, "`batch` 1.5 is out of range; give a whole number from 1"),
        (
            PredictOptions,
            {"max_detections": 7.5},
            "`max_detections` 7.5 is out of range; give a wh",
        ),
        (PredictOptions, {"iou": math.nan}, "IoU threshold nan is out of range"),
        (LoadOptions, {"threads": 7.5}, "`threads` must be a whole number, got 7.5."),
        (LoadOptions, {"gpu": -1}, "`gpu` must be at least 0, got -1."),
        (LoadOptions, {"preprocess": ["fit=stretch"]}, "`preprocess` must be a dictionary"),
        (BatchProfile, {"min": True}, "`min` must be a whole number, got True."),
        (BatchProfile, {"opt": "8"}, "`opt` must be a whole number, got 8."),
        (QuantizationSettings, {"shift": {}}, "`shift` must be true or false, got {}."),
    ],
)
def test_numbers_that_options_do_not_take_are_refused_in_a_sentence(
    options: Any, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        options(**given)


def test_images_of_a_data_set_with_items_alone_are_several(detector: Detector) -> None:
    class Pair:  # as PyTorch's `Subset`
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            if index > 1:
                raise IndexError
            return image(index, 0, 0)

    assert len(detector.predict(Pair())) == 2  # type: ignore[arg-type]


def test_a_batch_in_the_settings_may_be_the_graphs(folder: Path) -> None:
    graph = trt_yolov6.export(folder / "yolov6n.pt", batch=1, image_size=64)
    settings = trt_yolov6.BuildSettings(batch=graph.batch)
    built = trt_yolov6.build(graph, settings=settings, output=folder / "again.onnx")
    assert built.manifest.batch == graph.batch


def test_a_video_is_not_an_image(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`annotate` reads those"):
        detector.predict("rtsp://camera/stream")


def test_formats_and_frames_are_refused_before_the_work(detector: Detector, tmp_path: Path) -> None:
    Image.fromarray(image(0, 0, 0)).save(tmp_path / "a.png")
    unknown: Any = ["json", "xml"]
    with pytest.raises(UserError, match="'xml' is not known; give `formats` of json, csv, yolo"):
        detector.annotate(tmp_path / "a.png", tmp_path / "drawn", formats=unknown)
    assert not (tmp_path / "drawn").exists()
    with pytest.raises(UserError, match="`frames` must be at least 1, got 0"):
        detector.annotate(tmp_path / "a.png", tmp_path / "drawn", frames=0)
    done = detector.annotate(tmp_path / "a.png", tmp_path / "drawn", formats="csv")
    assert done.files == (tmp_path / "drawn" / "detections.csv",)
    assert done.files[0].is_file()


# --- building -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int9"}, "not a precision"),
        ({"precision": "int8"}, "name a folder of them as `calibration`"),
        ({"precision": "fp32", "nms": NmsSettings()}, "`nms` is not for an ONNX file"),
        ({"uint8_input": True}, "`uint8_input` is not for an ONNX file"),
        ({"preprocess": {"color": "bgr"}}, r"no field color \(did you mean colour\?\)"),
        ({"calibration": "calib"}, "`calibration` is for INT8 and FP8; give one of them as"),
        (
            {"precision": "fp16", "data": "cells"},
            "`data` is for a precision such as int8:auto, not",
        ),
        ({"quantization": trt_yolov6.QuantizationSettings()}, "`quantization` is for INT8 and FP8"),
    ],
)
def test_python_callers_are_told_of_parameters(
    options: dict[str, object], message: str, folder: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        trt_yolov6.build(folder / "yolov6n.onnx", **options)  # type: ignore[arg-type]
    assert "--" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"image_size": "320"}, "`image_size` is '320'; give an integer, or two (height, width)."),
        ({"image_size": 320.0}, "`image_size` is 320.0; give an integer, or two (height, width)."),
        ({"batch": "4"}, "`batch` is '4'; give an integer, or three (min, opt, max)."),
        ({"batch": [4]}, "`batch` is [4]; give an integer, or three (min, opt, max)."),
        ({"batch": (1, 4)}, "`batch` is (1, 4); give an integer, or three (min, opt, max)."),
        ({"opset": True}, "`opset` is True; give an integer."),
        ({"nms": False}, "`nms` is False; give thresholds, such as NmsSettings(), or None."),
        (
            {"calibration": ["a.jpg"]},
            "`calibration` is ['a.jpg']; give the path of a folder of images.",
        ),
        ({"source": None}, "`source` is None; give the path of a checkpoint or ONNX file."),
        ({"source": 3}, "`source` is 3; give the path of a checkpoint or ONNX file."),
        ({"output": 3}, "`output` is 3; give a path."),
        ({"preprocess": "fit=stretch"}, "`preprocess` must be a dictionary, got fit=stretch."),
    ],
)
def test_arguments_of_other_types_are_refused_in_a_sentence(
    arguments: dict[str, Any], sentence: str
) -> None:
    call: dict[str, Any] = {"source": "n.pt", "precision": "int8", "calibration": "calib"}
    with pytest.raises(UserError, match=re.escape(sentence)):
        trt_yolov6.build(**(call | arguments))


def test_each_verb_refuses_what_is_another_s(folder: Path, tmp_path: Path) -> None:
    graph = folder / "yolov6n.onnx"
    with pytest.raises(UserError, match="export writes fp32 or fp16, not int8"):
        trt_yolov6.export(graph, precision="int8")
    with pytest.raises(UserError, match="quantize makes int8 or fp8, not fp16"):
        trt_yolov6.quantize(graph, folder / "calib", precision="fp16")
    with pytest.raises(UserError, match=r"`data` is for a precision such as int8:auto, not int8\."):
        trt_yolov6.quantize(graph, folder / "calib", data=folder / "cells")
    with pytest.raises(UserError, match=r"`data` is for a precision such as int8:auto, not fp16\."):
        trt_yolov6.build(graph, precision="fp16", data=folder / "cells")
    with pytest.raises(UserError, match="`split` is part of a data set; name that as `data`"):
        trt_yolov6.quantize(graph, folder / "calib", precision="int8:auto", split="val")
    unlabelled = without_objects(write_shapes(tmp_path / "data"), "val")
    with pytest.raises(
        UserError, match="no object to evaluate on; give annotations, or leave `data` out"
    ):
        trt_yolov6.quantize(
            graph, folder / "calib", precision="int8:auto", data=unlabelled, split="val"
        )
    with pytest.raises(UserError, match="`predict` is for timing with `images`"):
        trt_yolov6.benchmark([graph], predict=PredictOptions())
    with pytest.raises(UserError, match="no detector to time; name one as `detectors`"):
        trt_yolov6.benchmark([])
    with pytest.raises(UserError, match="`streams` is for the engine alone"):
        trt_yolov6.benchmark([graph], images=folder / "images", streams=2)


def test_a_checkpoint_is_known_by_its_content(folder: Path, tmp_path: Path) -> None:
    plain, text = tmp_path / "weights", tmp_path / "notes"
    shutil.copy(folder / "yolov6n.pt", plain)
    named, found = (
        trt_yolov6.export(path, image_size=64, batch=1) for path in (folder / "yolov6n.pt", plain)
    )
    assert found.model.graph == named.model.graph
    text.write_text("nothing that detects")
    with pytest.raises(UserError, match="is not an ONNX model"):
        trt_yolov6.export(text)


def test_what_is_quantized_is_written_where_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    quick = trt_yolov6.QuantizationSettings(
        calibrator="minmax", equalize=False, bias_correction=False, reconstruct=False
    )
    written = tmp_path / "int8.onnx"
    graph = trt_yolov6.quantize(
        folder / "yolov6n.onnx", folder / "calib", settings=quick, output=written
    )
    assert trt_yolov6.export(written).precision == graph.precision == "int8"


@pytest.mark.parametrize("value", ["0.3", True, np.array([0.3]), [0.3]])
def test_a_threshold_that_is_not_a_number_is_named(value: Any) -> None:
    with pytest.raises(UserError, match="`confidence` must be a number, got "):
        PredictOptions(confidence=value)


def test_options_given_as_a_dictionary_are_named_with_their_class(
    folder: Path, tmp_path: Path
) -> None:
    options: Any = {"confidence": 0.3}
    with Detector(load_named(tmp_path)) as detector:
        path = detector.engine.path
        calls = {
            "give PredictOptions, such as PredictOptions(confidence=...).": (
                lambda: detector.predict("images", options),
                lambda: detector.annotate(folder / "images", tmp_path / "out", options),
                lambda: trt_yolov6.evaluate(detector, folder / "cells", options=options),
            ),
            "`predict` is of type dict": (
                lambda: trt_yolov6.benchmark(detector, images=folder / "images", predict=options),
            ),
            "`options` is of type dict; give LoadOptions": (
                lambda: trt_yolov6.load(path, options),
            ),
            "`quantization` is of type dict; give Quant": (
                lambda: trt_yolov6.build(
                    path, precision="int8", calibration="calib", quantization=options
                ),
            ),
            "`settings` is of type dict; give Quant": (
                lambda: trt_yolov6.quantize(path, "calib", settings=options),
            ),
            "`settings` is of type dict; give BuildSettings": (
                lambda: trt_yolov6.build(path, settings=options),
            ),
        }
        for said, some in calls.items():
            for call in some:
                with pytest.raises(UserError, match=re.escape(said)):
                    call()


def test_what_is_not_a_path_is_named(folder: Path, tmp_path: Path) -> None:
    wrong: Any
    for wrong in (3, None, ["yolov6n.onnx"]):
        calls = {
            "path": (trt_yolov6.load, trt_yolov6.inspect),
            "detector": (lambda path: trt_yolov6.evaluate(path, folder / "cells"),),
            "data": (
                lambda path: trt_yolov6.evaluate(folder / "yolov6n.onnx", path),
                lambda path: trt_yolov6.compare(folder / "yolov6n.onnx", data=path),
                trt_yolov6.train,
            ),
            "models": (lambda path: trt_yolov6.compare([path]),),
            "source": (trt_yolov6.read_image,),
        }
        for name, some in calls.items():
            for call in some:
                said = re.escape(f"`{name}` is {wrong}; give a path.")
                with pytest.raises(UserError, match=said):
                    call(wrong)
    for options in ({"output": 3}, {"baseline": 3}):
        with pytest.raises(UserError, match="` is 3; give a path"):
            trt_yolov6.compare(folder / "yolov6n.onnx", **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="`detector` is 3; give a path"):
        trt_yolov6.benchmark(3)  # type: ignore[call-overload]


def test_a_path_longer_than_any_is_named(tmp_path: Path) -> None:
    detector = Detector(load_named(tmp_path))
    name = 300 * "a"
    for call in (
        detector.predict,
        trt_yolov6.load,
        trt_yolov6.export,
        trt_yolov6.inspect,
        lambda path: trt_yolov6.train(tmp_path, weights=path),
        lambda path: trt_yolov6.evaluate(detector, path),
        lambda path: trt_yolov6.compare([f"{path}.onnx"], tmp_path / "run", data="samples"),
        lambda path: trt_yolov6.compare("plan.onnx", baseline=path),
        lambda path: trt_yolov6.build("none.onnx", output=f"{path}.onnx"),
    ):
        with pytest.raises(UserError, match=name):
            call(name)


@pytest.mark.parametrize("change", [{"float_layers": 2}, {"quantized": FP8}, {"fp16": True}])
def test_settings_that_precision_contradicts_are_refused(
    folder: Path, change: dict[str, Any]
) -> None:
    settings = trt_yolov6.QuantizationSettings(**change)
    (name,) = change
    with pytest.raises(UserError, match=f"contradicts `precision` int8 on `{name}`; give it in"):
        trt_yolov6.quantize(folder / "yolov6n.onnx", folder / "calib", settings=settings)
    with pytest.raises(UserError, match=f"contradicts `precision` int8 on `{name}`; give it in"):
        trt_yolov6.build(
            folder / "yolov6n.onnx",
            precision="int8",
            calibration=folder / "calib",
            quantization=settings,
        )


@pytest.mark.parametrize(
    ("precision", "given"),
    [
        ("int8", {"float_layers": 0}),
        ("int8:6", {"float_layers": np.int64(6)}),
        (Precision("int8", float_layers=("stem",)), {"float_layers": ("stem",)}),
        ("fp8+fp16", {"quantized": FP8, "fp16": True}),
        ("fp8", {"quantized": INT8}),
    ],
)
def test_settings_may_say_what_precision_says(
    precision: str | Precision, given: dict[str, Any]
) -> None:
    wanted = Precision.parse(precision)
    result = quantization_settings(wanted, trt_yolov6.QuantizationSettings(**given))
    assert (result.quantized.name, result.fp16) == (wanted.base, wanted.rest == "fp16")
    assert result.float_layers == (wanted.float_layers or ())


def test_only_the_calibration_images_that_are_taken_are_read(folder: Path, tmp_path: Path) -> None:
    images = sorted((folder / "cells" / "images" / "val").iterdir())[:4]
    for number, image in enumerate(images):
        copy = Path(shutil.copy(image, tmp_path / f"{number}.jpg"))
        if number % 2 == 0:  # those that a limit of two takes
            copy.write_bytes(b"no image")
    limited = trt_yolov6.QuantizationSettings(image_limit=2)
    with logged() as said, pytest.raises(UserError, match="can be read"):
        trt_yolov6.build(
            folder / "yolov6n.pt", precision="int8", calibration=tmp_path, quantization=limited
        )
    assert said == []  # nothing was exported before


def test_a_graph_knows_its_source_as_it_was(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "net.onnx"
    shutil.copy(folder / "yolov6n.onnx", source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    graph = trt_yolov6.export(source)
    source.unlink()
    built = trt_yolov6.build(graph, output=tmp_path / "engine.onnx")
    assert (built.manifest.source, built.manifest.source_sha256) == ("net.onnx", digest)
    # Through the file that was exported from it, and through the engine's, which is one, too.
    checkpoint = hashlib.sha256((folder / "yolov6n.pt").read_bytes()).hexdigest()
    again = trt_yolov6.build(built, output=tmp_path / "again.onnx")
    assert [one.manifest.checkpoint_sha256 for one in (built, again)] == [checkpoint] * 2


def test_a_checkpoint_brings_its_names_and_a_graph_its_size(folder: Path) -> None:
    with pytest.raises(UserError, match="`class_names` is not for a checkpoint"):
        trt_yolov6.export(folder / "yolov6n.pt", class_names=("a", "b", "c"))
    graph = trt_yolov6.export(folder / "yolov6n.onnx")
    with pytest.raises(UserError, match="`image_size` is not for a graph"):
        trt_yolov6.build(graph, image_size=64)
    with pytest.raises(UserError, match="is fp32 and cannot be made fp16"):
        trt_yolov6.build(graph, precision="fp16")
    with pytest.raises(TypeError, match="imagesize"):
        trt_yolov6.export(folder / "yolov6n.pt", imagesize=64)  # type: ignore[call-arg]
    sizes = np.array([64, 4])
    graph = trt_yolov6.export(folder / "yolov6n.pt", image_size=sizes[0], batch=sizes[1])
    assert graph.image_size == (64, 64)
    assert graph.batch == BatchProfile(4, 4, 4)


@pytest.mark.parametrize(
    ("settings", "size"),
    [({"image_size": 96}, 96), ({"image_size": 64}, 64), ({"image_size": "wide"}, 640), ({}, 640)],
)
def test_a_graph_has_the_size_of_the_training(
    tmp_path: Path, settings: dict[str, Any], size: int
) -> None:
    model = YOLOv6(tiny_architecture(2))
    write_checkpoint(tmp_path / "net.pt", model, ("a", "b"), Training(settings, 1, None))
    graph = trt_yolov6.export(tmp_path / "net.pt")
    assert graph.image_size == (size, size)
    assert trt_yolov6.export(tmp_path / "net.pt", image_size=128).image_size == (128, 128)


def test_no_verb_writes_over_what_it_reads(folder: Path, tmp_path: Path) -> None:
    checkpoint, graph = tmp_path / "best.pt", tmp_path / "float.onnx"
    shutil.copy(folder / "yolov6n.pt", checkpoint)
    shutil.copy(folder / "yolov6n.onnx", graph)
    before = checkpoint.read_bytes(), graph.read_bytes()
    link = tmp_path / "same.onnx"
    link.symlink_to(graph)
    with pytest.raises(UserError, match=r"best\.pt is the source itself; give another file"):
        trt_yolov6.export(checkpoint, output=checkpoint)
    with pytest.raises(UserError, match=r"a name ending in \.onnx"):
        trt_yolov6.export(checkpoint, output=tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"same\.onnx is the source itself"):
        trt_yolov6.quantize(graph, folder / "calib", output=link)
    with pytest.raises(UserError, match=r"float\.onnx is the source itself"):
        trt_yolov6.build(link, backend="onnxruntime", output=graph)
    assert (checkpoint.read_bytes(), graph.read_bytes()) == before
    for file in (checkpoint, graph):
        assert cli_main(["export", "--weights", str(file), "--output", str(file), "--fp16"]) == 2
    assert (checkpoint.read_bytes(), graph.read_bytes()) == before


def test_what_build_returns_is_a_path(folder: Path, tmp_path: Path) -> None:
    built = trt_yolov6.build(folder / "yolov6n.onnx", output=tmp_path / "detector.onnx")
    assert os.fspath(built) == str(tmp_path / "detector.onnx")
    with trt_yolov6.load(built) as detector:
        assert detector.class_names == ("RBC", "WBC", "Platelets")
        assert "detector.onnx" in repr(detector)
    assert trt_yolov6.inspect(built).path == built.path
    assert trt_yolov6.export(built).image_size == built.manifest.image_size
    assert trt_yolov6.evaluate(built, folder / "cells", progress=False).images == 4
    timed = trt_yolov6.benchmark(built, duration=0.01, warm_up=0, progress=False)
    assert timed.engine == built.path
    several = trt_yolov6.benchmark([built, built.path], duration=0.01, warm_up=0, progress=False)
    assert [one.engine for one in several] == [built.path] * 2
    compared = trt_yolov6.compare(
        built,
        tmp_path / "compared",
        data=folder / "cells",
        batches=(1,),
        rounds=3,
        duration=0.03,
        examples=0,
        layers=False,
        progress=False,
    )
    assert [one["engine"] for one in compared["engines"]] == ["detector fp32"]


def test_precisions_are_written_as_they_are_read() -> None:
    for text in ("fp32", "fp16", "int8", "fp8", "int8+fp16", "int8:6", "int8+fp16:auto"):
        assert str(Precision.parse(text)) == text
    named = Precision("int8", float_layers=("a", "b"))
    assert str(named) == "int8:a,b"
    assert Precision.parse(named) is named
    with pytest.raises(UserError, match="only int8 and fp8"):
        dataclasses.replace(named, base="fp16")
    for unknown in ({"base": "int4"}, {"base": "int8", "rest": "bf16"}):
        with pytest.raises(UserError, match="is not a precision; give fp32, fp16, int8 or fp8"):
            Precision(**unknown)  # type: ignore[arg-type]
