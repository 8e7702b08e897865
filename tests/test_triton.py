"""Triton repositories, read back with Triton's own schema from the client package it comes with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from support import family_graphs as families
from support.tiny_detector import NAMES, load_tiny

from trt_yolov6.cli import main
from trt_yolov6.common.files import sha256_file
from trt_yolov6.engines.build import build_engine
from trt_yolov6.engines.manifest import Manifest, read_manifest, write_manifest
from trt_yolov6.errors import UserError
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.serving.triton import ServingSettings, config_text, export_triton, served_model
from trt_yolov6.spec import BatchProfile


def _schema() -> Any:
    """Return Triton's `model_config_pb2`, without the client's gRPC that its package imports."""
    try:
        files = importlib.metadata.files("tritonclient") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = next(file for file in files if str(file) == "tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", found.locate())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCHEMA = _schema()
pytestmark = pytest.mark.skipif(SCHEMA is None, reason="needs tritonclient (pip install .[dev])")


def parsed(text: str) -> Any:
    """Return a configuration as Triton reads it; what its schema does not know raises."""
    return text_format.Parse(text, SCHEMA.ModelConfig())


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine with a free batch of 1 to 8, tuned for 4, as `build` writes it."""
    with load_tiny(tmp_path) as tiny:
        graph = graph_from_onnx(
            tiny.path, batch=BatchProfile(1, 4, 8), class_names=["red", 'gr"een', "bl\u00fc\n"]
        )
    graph = dataclasses.replace(graph, name="tiny")
    output = tmp_path / "engines" / "tiny.onnx"
    return build_engine(graph, backend="onnxruntime", output=output).path


def as_plan(engine: Path, backend: str = "tensorrt", **changes: Any) -> Path:
    """Return a file with the manifest that a TensorRT plan of the same network has."""
    manifest = read_manifest(engine)
    assert manifest is not None
    plan = engine.with_name(f"{backend}.trt")
    plan.write_bytes(b"a plan, which nothing here opens")
    write_manifest(
        plan,
        dataclasses.replace(
            manifest,
            engine=plan.name,
            backend=backend,
            backend_version="10.9.0",
            precision="int8",
            plan_sha256=sha256_file(plan),
            **changes,
        ),
    )
    return plan


def test_a_repository_is_as_triton_expects_it(engine: Path, tmp_path: Path) -> None:
    plan = as_plan(engine)
    folders = export_triton([engine, plan], tmp_path / "models")
    assert [folder.name for folder in folders] == ["tiny_fp32", "tiny_int8"]
    for folder, source, platform, file_name in zip(
        folders,
        (engine, plan),
        ("onnxruntime_onnx", "tensorrt_plan"),
        ("model.onnx", "model.plan"),
        strict=True,
    ):
        inside = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        assert inside == ["1", f"1/{file_name}", "config.pbtxt", "labels.txt"]
        assert (folder / "1" / file_name).read_bytes() == source.read_bytes()
        config = parsed((folder / "config.pbtxt").read_text())
        # Triton wants an entry's name to be its folder's.
        assert config.name == folder.name
        assert (config.platform, config.default_model_filename) == (platform, file_name)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [
        "tiny_fp32",
        "tiny_int8",
    ]


def test_tensors_and_batching_come_from_the_engine(engine: Path) -> None:
    config = parsed(config_text(served_model(engine), ServingSettings(2, (0, 3), 250)))
    assert config.max_batch_size == 8
    (source,) = config.input
    # The batch axis is Triton's own.
    assert (source.name, list(source.dims)) == ("images", [3, 64, 64])
    assert source.data_type == SCHEMA.TYPE_FP32
    assert [(one.name, list(one.dims)) for one in config.output] == [
        ("boxes", [64, 4]),
        ("scores", [64, 3]),
    ]
    assert [one.label_filename for one in config.output] == ["", "labels.txt"]
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    (group,) = config.instance_group
    assert (group.count, list(group.gpus)) == (2, [0, 3])
    assert group.kind == SCHEMA.ModelInstanceGroup.KIND_GPU


def test_what_a_client_needs_is_in_the_parameters(engine: Path, tmp_path: Path) -> None:
    config = parsed(config_text(served_model(engine), ServingSettings()))
    told = {key: value.string_value for key, value in config.parameters.items()}
    assert (told["decoder"], told["output_layout"]) == ("yolov6", "split")
    assert told["preprocessing"] == "letterbox, RGB / 255"
    assert json.loads(told["class_names"]) == ["red", 'gr"een', "bl\u00fc\n"]
    (folder,) = export_triton([engine], tmp_path / "models")
    labels = (folder / "labels.txt").read_text("utf-8").splitlines()
    assert labels == ["red", 'gr"een', "bl\u00fc"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=50)
def test_any_text_survives_the_configuration(text: str) -> None:
    spec = served_model_of_nothing(text)
    config = parsed(config_text(spec, ServingSettings()))
    assert config.parameters["class_names"].string_value == text


def served_model_of_nothing(text: str) -> Any:
    import numpy as np

    from trt_yolov6.serving.triton import ServedModel
    from trt_yolov6.spec import TensorSpec

    spec = TensorSpec("x", (None, 3, 8, 8), np.dtype(np.float16))
    return ServedModel(
        Path("x"), "x", "onnxruntime_onnx", "model.onnx", spec, (spec,), BatchProfile(), (),
        {"class_names": text}, False,
    )  # fmt: skip


def test_a_fixed_batch_is_left_to_the_client(tmp_path: Path) -> None:
    with load_tiny(tmp_path, batch=2, uint8=True) as tiny:
        config = parsed(config_text(served_model(tiny.path), ServingSettings()))
    # Triton adds no axis: with batching it would want a free one.
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [2, 64, 64, 3]
    assert config.input[0].data_type == SCHEMA.TYPE_UINT8
    assert not config.HasField("dynamic_batching")


def test_boxes_of_all_images_together_are_not_batched(tmp_path: Path) -> None:
    path = tmp_path / "v7.onnx"
    onnx.save(families.yolov7_end2end(), path)
    config = parsed(config_text(served_model(path), ServingSettings()))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert (list(config.input[0].dims), list(config.output[0].dims)) == ([-1, 3, 64, 64], [-1, 7])


def test_an_onnx_file_without_a_manifest_is_looked_into(tmp_path: Path) -> None:
    path = tmp_path / "yolov8n.onnx"
    onnx.save(families.yolov8(), path)
    model = served_model(path)
    config = parsed(config_text(model, ServingSettings(gpus=())))
    assert config.name == "yolov8n_fp32"
    assert config.max_batch_size == 32
    assert list(config.output[0].dims) == [7, 84]
    assert config.parameters["preprocessing"].string_value == "letterbox (linear), RGB / 255"
    assert json.loads(config.parameters["class_names"].string_value) == list(NAMES)
    assert config.instance_group[0].kind == SCHEMA.ModelInstanceGroup.KIND_CPU


def test_an_onnx_file_with_inputs_that_building_fills_in_has_to_be_built(tmp_path: Path) -> None:
    path = tmp_path / "ppyoloe.onnx"
    onnx.save(families.ppyoloe(), path)
    with pytest.raises(UserError, match=r"scale_factor.*build --onnx"):
        served_model(path)
    graph = graph_from_onnx(path, class_names=families.NAMES, decoder="ppyoloe")
    built = build_engine(graph, backend="onnxruntime", output=tmp_path / "built.onnx").path
    (given,) = parsed(config_text(served_model(built), ServingSettings())).input
    assert given.name == onnx.load(built).graph.input[0].name == "image"
    assert len(onnx.load(built).graph.input) == 1


def test_the_sample_exported_end_to_end(sample_engine: Any, tmp_path: Path) -> None:
    (folder,) = export_triton([sample_engine.path], tmp_path / "models")
    config = parsed((folder / "config.pbtxt").read_text())
    assert config.name == "yolov6n_fp32"
    assert [list(one.dims) for one in config.output] == [[8400, 4], [8400, 3]]
    assert list(config.dynamic_batching.preferred_batch_size) == [32]
    assert (folder / "labels.txt").read_text().splitlines() == list(
        sample_engine.manifest.class_names
    )


# --- refused ------------------------------------------------------------------------------------


def test_a_plan_of_tensorrt_rtx_is_refused(engine: Path, tmp_path: Path) -> None:
    plan = as_plan(engine, "tensorrt-rtx")
    with pytest.raises(UserError, match="TensorRT-RTX, which Triton's TensorRT backend does not"):
        export_triton([engine, plan], tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_engines_of_one_name_are_refused(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would both become tiny_fp32"):
        export_triton([engine, engine], tmp_path / "models")
    export_triton([engine], tmp_path / "models")
    with pytest.raises(UserError, match=r"models/tiny_fp32 is there already"):
        export_triton([engine], tmp_path / "models")


def test_batches_that_triton_cannot_promise_are_refused(engine: Path) -> None:
    with pytest.raises(UserError, match="takes batches of 4 or more"):
        served_model(as_plan(engine, batch=BatchProfile(4, 8, 8)))


def test_a_plan_on_the_cpu_is_refused(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="runs on GPUs only"):
        export_triton([as_plan(engine)], tmp_path / "models", ServingSettings(gpus=()))


def test_a_plan_that_cannot_be_asked_is_refused_with_the_reason(engine: Path) -> None:
    # A manifest of an early version does not tell the tensors, and there is no GPU to load it on.
    with pytest.raises(UserError, match=r"tells its tensors|NVIDIA GPU"):
        served_model(as_plan(engine, tensors=()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instances": 0}, "--instances"),
        ({"max_queue_delay_us": -1}, "--max-queue-delay-us"),
        ({"gpus": (0, 0)}, "--gpus"),
        ({"gpus": (-1,)}, "--gpus"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ServingSettings(**changes)


def test_a_failure_half_way_leaves_nothing(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    copied: list[Any] = []

    def full(source: Any, target: Any) -> None:
        if copied:
            raise OSError(28, "No space left on device")
        copied.append(target)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left on device"):
        export_triton([engine, as_plan(engine)], tmp_path / "a" / "models")
    assert copied
    assert not (tmp_path / "a").exists()
    # What was there before stays.
    (tmp_path / "models" / "other").mkdir(parents=True)
    with pytest.raises(UserError, match="No space left"):
        export_triton([engine], tmp_path / "models")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["other"]


@pytest.mark.parametrize("name", ["../../evil", "..", "a/b c", ""])
def test_a_name_in_a_file_leads_nowhere(name: str, engine: Path, tmp_path: Path) -> None:
    plan = as_plan(engine, model=name)
    (folder,) = export_triton([plan], tmp_path / "models")
    assert folder.parent == tmp_path / "models"
    assert parsed((folder / "config.pbtxt").read_text()).name == folder.name


# --- the command --------------------------------------------------------------------------------


def test_the_command_writes_a_repository(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "models"
    command = ["export-triton", "--engine", str(engine), "--output", str(output)]
    assert main([*command, "--instances", "2", "--gpus", "0,1", "--max-queue-delay-us", "50"]) == 0
    assert f"{output / 'tiny_fp32'}: onnxruntime_onnx" in capsys.readouterr().out
    config = parsed((output / "tiny_fp32" / "config.pbtxt").read_text())
    assert list(config.instance_group[0].gpus) == [0, 1]
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_command_refuses_gpus_on_the_cpu(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "models")
    command = ["export-triton", "--engine", str(engine), "--output", output, "--cpu"]
    with pytest.raises(SystemExit):
        main([*command, "--gpus", "0"])
    assert "--gpus" in capsys.readouterr().err
    assert main(command) == 0


def test_manifests_tell_the_tensors(engine: Path) -> None:
    manifest = read_manifest(engine)
    assert isinstance(manifest, Manifest)
    assert [spec.name for spec in manifest.tensors] == ["images", "boxes", "scores"]
    assert manifest.tensors[0].shape == (None, 3, 64, 64)


def test_an_export_that_does_not_tell_its_family_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grids.onnx"
    onnx.save(families.yolov5(grids=True), path)
    command = ["export-triton", "--engine", str(path), "--output", str(tmp_path / "models")]
    assert main(command) == 2
    assert "name it with --decoder" in capsys.readouterr().err
    assert main([*command, "--decoder", "yolov5"]) == 0
    text = next((tmp_path / "models").glob("*/config.pbtxt")).read_text()
    assert 'key: "decoder"' in text
    assert '"yolov5"' in text
