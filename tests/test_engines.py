"""Engine files: loading, refusing what is damaged or misused, and the manifest next to them."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.tiny_detector import NAMES, SIZE, load_tiny

from trt_yolov6.detectors.families import FAMILIES
from trt_yolov6.detectors.spec import DetectorSpec
from trt_yolov6.engines import LoadOptions, backend, load_engine
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.engines.build import build_engine
from trt_yolov6.engines.manifest import Manifest, read_manifest, write_manifest
from trt_yolov6.errors import UserError
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.spec import BatchProfile, NmsSettings, TensorSpec


def built(folder: Path, name: str = "tiny.onnx") -> Path:
    """Build the tiny detector as a user would, and return the engine's path."""
    source = load_tiny(folder / "source").path
    graph = graph_from_onnx(source, class_names=NAMES, batch=BatchProfile(1, 2, 4))
    return build_engine(graph, backend="onnxruntime", output=folder / name).path


@pytest.fixture
def engine_file(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return built(tmp_path)


def images(batch: int) -> np.ndarray:
    return np.zeros((batch, 3, SIZE, SIZE), np.float32)


def test_a_built_engine_runs_and_knows_its_classes(engine_file: Path) -> None:
    with load_engine(engine_file) as engine:
        assert engine.class_names == NAMES
        assert engine.image_size == (SIZE, SIZE)
        assert engine.precision == "fp32"
        outputs = engine.infer(images(3))
    assert outputs["boxes"].shape == (3, 64, 4)
    assert outputs["scores"].shape == (3, 64, 3)


@pytest.mark.parametrize("batch", [0, 5])
def test_a_batch_outside_the_profile_is_refused(engine_file: Path, batch: int) -> None:
    with load_engine(engine_file) as engine, pytest.raises(UserError, match="batches of 1 to 4"):
        engine.infer(images(batch))


def test_images_of_another_dtype_or_size_are_refused(engine_file: Path) -> None:
    with load_engine(engine_file) as engine:
        with pytest.raises(UserError, match="takes float32 images"):
            engine.infer(images(1).astype(np.uint8))
        with pytest.raises(UserError, match="takes float32 images"):
            engine.infer(np.zeros((1, 3, SIZE, SIZE * 2), np.float32))


def test_a_closed_engine_says_so(engine_file: Path) -> None:
    engine = load_engine(engine_file)
    engine.close()
    with pytest.raises(UserError, match="closed"):
        engine.infer(images(1))


def test_a_resident_run_lasts_as_long_as_its_work(engine_file: Path) -> None:
    with load_engine(engine_file) as engine:
        run = engine.resident_run(images(2))
        start = time.perf_counter()
        seconds = [run() for _ in range(5)]
        assert min(seconds) > 0
        assert sum(seconds) <= time.perf_counter() - start


def test_an_engine_cut_short_is_refused_at_any_length(engine_file: Path) -> None:
    whole = engine_file.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        engine_file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not the file its manifest describes"):
            load_engine(engine_file)


def test_an_onnx_file_cut_short_is_refused_without_a_manifest_too(
    engine_file: Path,
) -> None:
    whole = engine_file.read_bytes()
    engine_file.with_suffix(".json").unlink()
    for length in (0, 1, len(whole) // 2):
        engine_file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"tiny\.onnx is not an ONNX model"):
            load_engine(engine_file)


def test_asking_for_a_plan_where_only_the_onnx_engine_lies_says_so(engine_file: Path) -> None:
    wanted = engine_file.with_suffix(".trt")
    with pytest.raises(UserError, match=r"tiny\.trt does not exist, but .*tiny\.onnx does"):
        load_engine(wanted)


def test_a_missing_engine_names_the_command_that_builds_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trt-yolov6 build"):
        load_engine(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="is a folder"):
        load_engine(tmp_path)


def test_a_graph_that_is_no_detector_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "classifier.onnx"
    node = helper.make_node("GlobalAveragePool", ["images"], ["logits"])
    graph = helper.make_graph(
        [node],
        "classifier",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3, 1, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    with pytest.raises(UserError, match="outputs of no known layout"):
        load_engine(path)
    with pytest.raises(UserError, match="outputs of no known layout"):
        graph_from_onnx(path)


def test_the_kind_of_a_file_is_told_by_its_ending_in_any_case(
    engine_file: Path, tmp_path: Path
) -> None:
    loud = tmp_path / "NET.ONNX"
    loud.write_bytes(engine_file.read_bytes())
    load_engine(loud).close()
    for name in ("net.pth", "NET.PT"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match=rf"{name} is a checkpoint, not an engine"):
            load_engine(tmp_path / name)


def test_a_provider_that_is_not_installed_is_refused(engine_file: Path) -> None:
    with pytest.raises(UserError, match="onnxruntime-gpu"):
        load_engine(engine_file, options=LoadOptions(provider="tensorrt"))


@pytest.mark.parametrize("content", ['{"images": []}', "// not JSON", '{"engine": "n.onnx"}'])
def test_a_file_that_is_no_manifest_is_never_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "n.json").write_text(content)
    assert write_manifest(tmp_path / "n.onnx", MANIFEST) == tmp_path / "n.onnx.json"
    assert read_manifest(tmp_path / "n.onnx") == MANIFEST
    assert (tmp_path / "n.json").read_text() == content


def test_where_the_manifest_cannot_go_there_is_no_plan_either(
    engine_file: Path, tmp_path: Path
) -> None:
    for name in ("d.json", "d.onnx.json"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="in the way of the manifest"):
        build_engine(
            graph_from_onnx(engine_file), backend="onnxruntime", output=tmp_path / "d.onnx"
        )
    assert not (tmp_path / "d.onnx").exists()


def test_a_graph_tells_its_classes_and_thresholds_without_a_manifest(tmp_path: Path) -> None:
    path = load_tiny(tmp_path, "end2end", nms=NmsSettings(0.3, 0.5)).path
    model = onnx.load(path)
    model.metadata_props.add(key="names", value='["x", "y", "z"]')
    model.metadata_props.add(
        key="nms", value='{"confidence": 0.3, "iou": 0.5, "max_detections": 9}'
    )
    onnx.save(model, tmp_path / "alone.onnx")
    with load_engine(tmp_path / "alone.onnx") as engine:
        assert engine.class_names == ("x", "y", "z")
        assert engine.nms == NmsSettings(0.3, 0.5, 9)


def detector(path: Path, kind: int, shape: list[int], rows: list[int]) -> Path:
    """Write a graph with one input and one output that are what they are said to be."""
    node = helper.make_node("RandomUniform", [], ["rows"], shape=[max(1, n) for n in rows])
    graph = helper.make_graph(
        [node],
        "detector",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, rows)],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )
    return path


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (TensorProto.DOUBLE, [1, 3, 64, 64], "takes float64"),
        (TensorProto.INT64, [1, 3, 64, 64], "takes int64"),
        (TensorProto.FLOAT, [1, 4, 64, 64], "an engine takes float32"),
        (TensorProto.FLOAT, [1, 64, 64, 3], "an engine takes float32"),
        (TensorProto.FLOAT, [1, 3, -1, -1], "`image_size`"),
    ],
)
def test_an_input_that_no_engine_takes_is_refused_when_building(
    kind: int, shape: list[int], message: str, tmp_path: Path
) -> None:
    path = detector(tmp_path / "odd.onnx", kind, shape, [1, 100, 9])
    with pytest.raises(UserError, match=message):
        graph_from_onnx(path)


def test_outputs_without_scores_are_refused(tmp_path: Path) -> None:
    path = detector(tmp_path / "boxes.onnx", TensorProto.FLOAT, [1, 3, 64, 64], [1, 4, 84])
    with pytest.raises(UserError, match="outputs of no known layout"):
        graph_from_onnx(path)


def test_an_unknown_backend_lists_the_known_ones(engine_file: Path) -> None:
    with pytest.raises(UserError, match="auto, tensorrt, tensorrt-rtx, onnxruntime"):
        load_engine(engine_file, "openvino")


@pytest.mark.parametrize(
    ("option", "settings"),
    [
        ("`target`", BuildSettings(target="t4")),
        ("`timing_cache`", BuildSettings(timing_cache=Path("cache"))),
        ("`workspace_mib`", BuildSettings(workspace_mib=64)),
        ("`optimization_level`", BuildSettings(optimization_level=3)),
    ],
)
def test_onnxruntime_refuses_what_only_tensorrt_has(
    option: str, settings: BuildSettings, engine_file: Path
) -> None:
    with pytest.raises(UserError, match=option):
        backend("onnxruntime").build(engine_file.read_bytes(), settings)


def test_an_output_name_of_another_backend_is_refused(engine_file: Path) -> None:
    graph = graph_from_onnx(engine_file)
    with pytest.raises(UserError, match=r"ends in \.onnx"):
        build_engine(graph, backend="onnxruntime", output=engine_file.with_suffix(".trt"))


MANIFEST = Manifest(
    engine="n.onnx",
    model="yolov6n",
    detector=DetectorSpec(("a", "b"), (320, 640), "end2end", nms=NmsSettings(0.1, 0.5, 100)),
    batch=BatchProfile(1, 4, 8),
    precision="fp16",
    backend="onnxruntime",
    backend_version="1.0",
    target="any",
    plan_sha256="0" * 64,
    source="n.pt",
    source_sha256="1" * 64,
    float_layers=("head",),
)


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "n.onnx", MANIFEST)
    assert path == tmp_path / "n.json"
    assert read_manifest(tmp_path / "n.onnx") == MANIFEST
    for family in FAMILIES.values():
        detector = dataclasses.replace(MANIFEST.detector, preprocessing=family.preprocessing)
        tensors = (TensorSpec("images", (None, 3, 320, 640), np.dtype("float32")),)
        manifest = dataclasses.replace(MANIFEST, detector=detector, tensors=tensors)
        write_manifest(tmp_path / "n.onnx", manifest)
        assert read_manifest(tmp_path / "n.onnx") == manifest


def test_two_engines_of_one_name_keep_a_manifest_each(tmp_path: Path) -> None:
    plan = dataclasses.replace(MANIFEST, engine="n.trt", backend="tensorrt")
    for manifest in (MANIFEST, plan):
        (tmp_path / manifest.engine).touch()
        write_manifest(tmp_path / manifest.engine, manifest)
    assert read_manifest(tmp_path / "n.onnx") == MANIFEST
    assert read_manifest(tmp_path / "n.trt") == plan


def test_a_manifest_of_an_engine_that_is_gone_gives_way(tmp_path: Path) -> None:
    write_manifest(tmp_path / "n.onnx", MANIFEST)
    plan = dataclasses.replace(MANIFEST, engine="n.trt", backend="tensorrt")
    assert write_manifest(tmp_path / "n.trt", plan) == tmp_path / "n.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99"),
        ({"image_size": [640, "x"]}, r"damaged: image_size\[1\]: expected int, got str;"),
        ({"batch": {"min": 1}}, None),
        ({"batch": {"min": "1"}}, r"is damaged: batch\.min: expected int, got str;"),
        ({"class_names": None}, "is damaged"),
        ({"class_names": "abc"}, "is damaged"),
        ({"precision": 7}, "is damaged"),
        ({"output_layout": "x"}, "is damaged"),
        ({"backend": "foo"}, "is damaged"),
        ({"batch": {"min": 0}}, r"n\.json is damaged"),
        ({"nms": {"confidence": 5}}, r"n\.json is damaged"),
    ],
)
def test_a_damaged_manifest_is_named(
    change: dict[str, object], message: str | None, tmp_path: Path
) -> None:
    path = write_manifest(tmp_path / "n.onnx", MANIFEST)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if message is None:
        assert read_manifest(tmp_path / "n.onnx")
    else:
        with pytest.raises(UserError, match=message):
            read_manifest(tmp_path / "n.onnx")


@pytest.mark.parametrize("profile", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_a_batch_profile_must_increase(profile: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="not increasing"):
        BatchProfile(*profile)
