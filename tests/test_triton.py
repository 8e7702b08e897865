"""Triton repositories, read back with Triton's own schema from the client package it comes with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.transformers.float16 import convert_float_to_float16
from support import family_graphs as families
from support.tiny_detector import NAMES, load_tiny
from support.training_data import write_tiny

from trt_yolov6 import build
from trt_yolov6.cli import main
from trt_yolov6.common.files import sha256_file
from trt_yolov6.engines import LoadOptions
from trt_yolov6.engines.build import build_engine
from trt_yolov6.engines.manifest import Manifest, read_manifest, write_manifest
from trt_yolov6.engines.onnxruntime.providers import on_gpu
from trt_yolov6.errors import UserError
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.serving.python_backend import Parameters, load_options, read_parameters
from trt_yolov6.serving.triton import ServingSettings, config_text, export_triton, served_model
from trt_yolov6.spec import BatchProfile, NmsSettings, PredictOptions


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
    onnx.save(convert_float_to_float16(families.yolov8(), keep_io_types=False), path)
    with pytest.raises(UserError, match=r"images \(float16\).*build --onnx"):
        served_model(path)


def test_the_sample_exported_end_to_end(sample_engine: Any, tmp_path: Path) -> None:
    (folder,) = export_triton([sample_engine.path], tmp_path / "models")
    config = parsed((folder / "config.pbtxt").read_text())
    assert config.name == "yolov6n_fp32"
    assert [list(one.dims) for one in config.output] == [[8400, 4], [8400, 3]]
    assert list(config.dynamic_batching.preferred_batch_size) == [32]
    assert (folder / "labels.txt").read_text().splitlines() == list(
        sample_engine.manifest.class_names
    )


# --- by this package, in Triton's Python backend ------------------------------------------------


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_an_entry_of_the_python_backend_is_whole(
    engine: Path, tmp_path: Path, backend: str
) -> None:
    plan = as_plan(engine, backend)
    (folder,) = export_triton([plan], tmp_path / "models", python="tensors")
    inside = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    files = ["1/engine.json", "1/engine.trt", "1/model.py"]
    assert inside == ["1", *files, "config.pbtxt", "labels.txt"]
    config = parsed((folder / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.platform) == ("tiny_int8_python", "python", "")
    assert config.default_model_filename == "model.py"
    # The same tensors as where Triton runs the engine itself.
    assert [list(one.dims) for one in (*config.input, *config.output)] == [
        [3, 64, 64],
        [64, 4],
        [64, 3],
    ]
    copy = folder / "1" / "engine.trt"
    assert copy.read_bytes() == plan.read_bytes()
    own, source = read_manifest(copy), read_manifest(plan)
    assert own is not None
    assert source is not None
    assert dataclasses.replace(own, engine=source.engine) == source
    code = (folder / "1" / "model.py").read_text()
    assert "TritonPythonModel" in compile(code, "model.py", "exec").co_names


def test_an_entry_for_pictures_takes_bytes_and_gives_boxes(engine: Path) -> None:
    settings = ServingSettings(gpus=(), predict=PredictOptions(confidence=0.25, max_detections=7))
    config = parsed(config_text(served_model(engine, python="pictures"), settings))
    (source,) = config.input
    assert (source.name, source.data_type, list(source.dims)) == (
        "picture",
        SCHEMA.TYPE_STRING,
        [1],
    )
    assert {one.name: (one.data_type, list(one.dims)) for one in config.output} == {
        "boxes": (SCHEMA.TYPE_FP32, [-1, 4]),
        "scores": (SCHEMA.TYPE_FP32, [-1]),
        "classes": (SCHEMA.TYPE_INT64, [-1]),
        "count": (SCHEMA.TYPE_INT32, [1]),
    }
    assert config.max_batch_size == 8
    # Triton would name scores by their place, which is not a class here.
    assert not any(one.label_filename for one in config.output)
    told = {key: value.string_value for key, value in config.parameters.items()}
    assert (told["confidence"], told["max_detections"]) == ("0.25", "7")
    assert "iou" not in told


def test_pictures_of_a_fixed_batch_and_of_shared_boxes_are_batched(tmp_path: Path) -> None:
    with load_tiny(tmp_path, batch=4) as tiny:
        config = parsed(config_text(served_model(tiny.path, python="pictures"), ServingSettings()))
    assert config.max_batch_size == 4
    path = tmp_path / "v7.onnx"
    onnx.save(families.yolov7_end2end(), path)
    config = parsed(config_text(served_model(path, python="pictures"), ServingSettings()))
    assert config.max_batch_size == 32
    assert config.HasField("dynamic_batching")


def test_all_three_entries_of_an_engine_go_into_one_repository(
    engine: Path, tmp_path: Path
) -> None:
    for python in (None, "tensors", "pictures"):
        export_triton([engine], tmp_path / "models", python=python)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [
        "tiny_fp32",
        "tiny_fp32_pictures",
        "tiny_fp32_python",
    ]


def test_an_onnx_file_without_a_manifest_says_how_to_read_it(tmp_path: Path) -> None:
    path = tmp_path / "grids.onnx"
    onnx.save(families.yolov5(grids=True), path)
    loading = LoadOptions(decoder="yolov5", preprocess={"colour": "bgr"})
    (folder,) = export_triton([path], tmp_path / "models", None, loading, python="tensors")
    config = parsed((folder / "config.pbtxt").read_text())
    told = {key: value.string_value for key, value in config.parameters.items()}
    options = load_options(
        read_parameters(told), folder / "1" / "engine.onnx", gpu=None, instances=1
    )
    assert (options.decoder, options.preprocess) == ("yolov5", {"colour": "bgr"})


def test_instances_on_a_cpu_share_its_cores(engine: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    threads = [
        load_options(read_parameters(told), engine, gpu=gpu, instances=count).threads
        for told, gpu, count in (
            ({}, None, 1),
            ({}, None, 2),
            ({}, 1, 2),
            ({"threads": "3"}, None, 2),
        )
    ]
    assert threads == [None, max(1, cores // 2), None, 3]
    with pytest.raises(UserError, match=r"threads: expected int.*config.pbtxt"):
        read_parameters({"threads": "many"})


def test_an_instance_of_a_gpu_runs_on_that_gpu(engine: Path) -> None:
    assert load_options(Parameters(), engine, gpu=None, instances=1).provider == "cpu"
    options = load_options(Parameters(), engine, gpu=3, instances=1)
    assert (options.provider, options.gpu) == (None, 3)
    assert on_gpu(["CUDAExecutionProvider", "CPUExecutionProvider"], options.gpu) == [
        ("CUDAExecutionProvider", {"device_id": "3"}),
        "CPUExecutionProvider",
    ]


def test_weights_in_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "apart.onnx"
    onnx.save(families.yolov8(), path, save_as_external_data=True, size_threshold=0)
    for python in (None, "tensors"):
        with pytest.raises(UserError, match=r"weights in other files.*build --onnx"):
            served_model(path, python=python)


# --- further fields of the configuration --------------------------------------------------------

EXTRA = """
# A comment with a { in it.
response_cache { enable: true }
dynamic_batching {
  priority_levels: 2
  default_priority_level: 2
  default_queue_policy { max_queue_size: 100 timeout_action: REJECT }
}
parameters { key: "note" value { string_value: "} dynamic_batching {" } }
instance_group [
  { count: 3 kind: KIND_CPU }
]
"""


def test_further_fields_take_the_place_of_ours(engine: Path) -> None:
    config = parsed(config_text(served_model(engine), ServingSettings(extra=EXTRA)))
    assert config.response_cache.enable
    batching = config.dynamic_batching
    assert (batching.priority_levels, batching.default_queue_policy.max_queue_size) == (2, 100)
    assert not batching.preferred_batch_size
    assert config.parameters["note"].string_value == "} dynamic_batching {"
    assert config.parameters["decoder"].string_value == "yolov6"
    assert [group.count for group in config.instance_group] == [3]
    assert config.name == "tiny_fp32"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("max_batch_size: 3", "max_batch_size, which the engine decides"),
        ('name: "other" input {}', "input, name"),
        ("response_cache {", r"cannot be read \(1:17"),
        ("response_cache { enable: true }}", r"cannot be read \(1:32"),
        ("version_policy\n= 3", r"cannot be read \(2:1"),
        ("{ enable: true }", r"cannot be read \(1:1"),
    ],
)
def test_fields_that_cannot_be_are_refused(extra: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ServingSettings(extra=extra)


def test_thresholds_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"confidence` 1\.5 is out of range"):
        ServingSettings(predict=PredictOptions(confidence=1.5))


# --- refused ------------------------------------------------------------------------------------


def test_a_plan_of_tensorrt_rtx_is_refused(engine: Path, tmp_path: Path) -> None:
    plan = as_plan(engine, "tensorrt-rtx")
    with pytest.raises(UserError, match=r"TensorRT-RTX, which Triton's TensorRT.*`python`"):
        export_triton([engine, plan], tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_engines_of_one_name_are_refused(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would both become tiny_fp32"):
        export_triton([engine, engine], tmp_path / "models")
    with pytest.raises(UserError, match="`names` has 1 names for 2 engines"):
        export_triton([engine, engine], tmp_path / "models", names=["one"])
    export_triton([engine, engine], tmp_path / "models", names=["one", "two"])
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
    # A manifest of an early version lacks the tensors, and there is no GPU to load the plan on.
    with pytest.raises(UserError, match=r"lists its tensors|NVIDIA GPU"):
        served_model(as_plan(engine, tensors=()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instances": 0}, "`instances`"),
        ({"max_queue_delay_us": -1}, "`max_queue_delay_us`"),
        ({"gpus": (0, 0)}, "`gpus`"),
        ({"gpus": (-1,)}, "`gpus`"),
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


def test_the_command_writes_entries_for_pictures(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = tmp_path / "cache.pbtxt"
    extra.write_text("response_cache { enable: true }")
    command = ["export-triton", "--engine", str(engine), "--output", str(tmp_path / "models")]
    python = [*command, "--cpu", "--python-backend"]
    assert main([*python, "pictures", "--conf", "0.2", "--config", str(extra)]) == 0
    assert "tiny_fp32_pictures: pictures" in capsys.readouterr().out
    config = parsed((tmp_path / "models/tiny_fp32_pictures/config.pbtxt").read_text())
    assert config.response_cache.enable
    assert config.parameters["confidence"].string_value == "0.2"
    assert main(python) == 0
    assert "tiny_fp32_python: tensors" in capsys.readouterr().out
    assert main([*python, "--conf", "0.2"]) == 2
    assert "for --python-backend pictures" in capsys.readouterr().err
    assert main([*command, "--config", str(tmp_path / "none")]) == 2
    assert "none cannot be read (No such file" in capsys.readouterr().err


def test_the_command_refuses_gpus_on_the_cpu(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "models")
    command = ["export-triton", "--engine", str(engine), "--output", output, "--cpu"]
    with pytest.raises(SystemExit):
        main([*command, "--gpus", "0"])
    assert "--gpus" in capsys.readouterr().err
    assert main(command) == 0


def test_thresholds_that_the_engine_has_decided_otherwise_are_found_before_a_server_loads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = write_tiny(tmp_path / "tiny.pt")
    path = build(weights, image_size=64, nms=NmsSettings(0.25), output=tmp_path / "e.onnx").path
    output = tmp_path / "models"
    command = ["export-triton", "--engine", str(path), "--output", str(output)]
    command += ["--cpu", "--python-backend", "pictures"]
    assert main([*command, "--conf", "0.1"]) == 2
    assert "drops scores below 0.25 itself; give --conf 0.25" in capsys.readouterr().err
    assert not output.exists()
    assert main(command) == 0


@pytest.mark.parametrize("changes", [("--decoder", "yolox"), ("--preprocess", "colour=bgr")])
def test_the_command_refuses_what_the_manifest_says(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: tuple[str, str]
) -> None:
    output = tmp_path / "models"
    command = ["export-triton", "--engine", str(engine), "--output", str(output), *changes]
    assert main(command) == 2
    assert "leave --decoder and --preprocess out" in capsys.readouterr().err
    assert not output.exists()


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
    assert "name one as --decoder" in capsys.readouterr().err
    assert main([*command, "--decoder", "yolov5"]) == 0
    text = next((tmp_path / "models").glob("*/config.pbtxt")).read_text()
    assert 'key: "decoder"' in text
    assert '"yolov5"' in text
