"""`compare` as a whole, with small detectors that really run: nothing twice, nothing lost."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from support import family_graphs
from support.kills import Kill, run_killed
from support.logs import logged

from trt_yolov6.cli import main
from trt_yolov6.common.files import sha256_file, write_json
from trt_yolov6.comparison.cache import Steps
from trt_yolov6.comparison.engines import Work, cases_of
from trt_yolov6.comparison.plan import ModelEntry, Plan, plan_of
from trt_yolov6.comparison.results import read_results
from trt_yolov6.comparison.run import compare
from trt_yolov6.data.coco import load_coco
from trt_yolov6.engines import load_engine
from trt_yolov6.errors import UserError
from trt_yolov6.pipeline import build, quantize
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.runtime.evaluate import evaluate

IMAGES = 6


def write_detector(path: Path, kernel: int = 8, seed: int = 0) -> Path:
    """A float detector of three classes whose boxes lie all over the image: rows, any batch."""
    side, cells = 64, 64 // kernel
    generator = np.random.default_rng(seed)
    weights: dict[str, NDArray[Any]] = {
        "w": (0.3 * generator.standard_normal((8, 3, kernel, kernel))).astype(np.float32),
        "b": generator.standard_normal(8).astype(np.float32),
        "shape": np.array([0, 8, cells * cells], np.int64),
        "scale": np.array([30, 30, 12, 12, 1, 1, 1, 1], np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "w", "b"], ["features"], strides=[kernel] * 2),
            helper.make_node("Sigmoid", ["features"], ["squashed"]),
            helper.make_node("Reshape", ["squashed", "shape"], ["columns"]),
            helper.make_node("Transpose", ["columns"], ["unscaled"], perm=[0, 2, 1]),
            helper.make_node("Mul", ["unscaled", "scale"], ["rows"]),
        ],
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, side, side])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", cells * cells, 8])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """The first images of the sample data set."""
    folder = tmp_path_factory.mktemp("data")
    content = json.loads((root / "samples/annotations/instances_val.json").read_text())
    content["images"] = content["images"][:IMAGES]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    write_json(folder / "annotations" / "instances_val.json", content)
    (folder / "images" / "val").mkdir(parents=True)
    for image in content["images"]:
        shutil.copy(root / "samples/images/val" / image["file_name"], folder / "images" / "val")
    return folder


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Plan:
    folder = tmp_path_factory.mktemp("models")
    return Plan(
        models=(
            ModelEntry(write_detector(folder / "coarse.onnx", 16)),
            ModelEntry(write_detector(folder / "fine.onnx", 4), precisions=("fp32", "fp16")),
        ),
        batches=(1, 4),
        data=data,
        rounds=16,
        duration=0.2,
        examples=2,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> Path:
    """The folder of a comparison that was made once."""
    folder = tmp_path_factory.mktemp("run")
    compare(plan, folder, progress=False)
    return folder


def test_engines_and_onnx_files_are_compared_without_pytorch(tmp_path: Path, data: Path) -> None:
    """The image of docker/cpu.Dockerfile leaves it out."""
    file = write_detector(tmp_path / "coarse.onnx", 16)
    arguments = ["compare", str(file), "--data", str(data), "--batches", "1", "--rounds", "3"]
    arguments += ["--duration", "0.05", "--threads", "1", "--output", str(tmp_path / "run")]
    code = "import sys; sys.modules['torch'] = None; from trt_yolov6.cli import main"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit(main({arguments}))"], check=True)
    assert read_results(tmp_path / "run" / "results.json")["engines"]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != "results.json"
    }


def test_every_engine_has_the_ap_that_eval_gives_it(finished: Path, data: Path) -> None:
    results = read_results(finished)
    names = [engine["engine"] for engine in results["engines"]]
    assert names == ["coarse fp32", "fine fp32", "fine fp16"]
    dataset = load_coco(data, "val")
    files = {timing["engine"]: timing["engine_file"] for timing in results["timings"]}
    for record in results["engines"]:
        with load_engine(finished / files[record["engine"]]) as engine:
            expected = evaluate(engine, dataset, progress=False)
        assert (record["AP"], record["AP50"]) == (expected.ap, expected.ap50)
        assert record["detections"] == expected.detections > 0


def test_results_say_what_was_measured_on_what(finished: Path, data: Path) -> None:
    results = read_results(finished)
    assert [(one["engine"], one["batch"]) for one in results["timings"]] == [
        (engine, batch) for batch in (1, 4) for engine in ("coarse fp32", "fine fp32", "fine fp16")
    ]
    for timing in results["timings"]:
        low, high = timing["latency_ms"]["interval"]
        assert 0 <= low <= timing["latency_ms"]["median"] <= high
        assert timing["throughput_fps"] == pytest.approx(
            1e3 * timing["batch"] / timing["latency_ms"]["median"]
        )
        assert timing["engine_sha256"] == sha256_file(finished / timing["engine_file"])
        assert len(timing["latency_ms"]["rounds"]) in (15, 16)
    assert results["data"]["images"] == IMAGES
    assert (results["environment"]["cpu"] or {})["model"]
    assert results["environment"]["packages"]["onnxruntime"]
    fine = next(one for one in results["layers"] if one["engine"] == "fine fp32")
    convolution = next(layer for layer in fine["layers"] if layer["operator"] == "Conv")
    assert convolution["precision"] == "fp32"
    assert (convolution["roofline_ms"] or 0) > 0
    # 16 x 16 places of 8 values, each a sum over 3 x 4 x 4 products.
    assert results["engines"][1]["flops"] == 2 * 16 * 16 * 8 * 48
    assert results["engines"][1]["parameters"] == 8 * 48 + 8


def test_a_sixteenth_of_the_boxes_is_faster(finished: Path) -> None:
    # With as many multiply-adds, so it is not sixteen times as fast, and by how much is open.
    ratios = {(one["engine"], one["batch"]): one for one in read_results(finished)["ratios"]}
    assert ratios["fine fp32", 4]["to"] == "coarse fp32"
    assert ratios["fine fp32", 4]["ratio"] > 1


def test_a_second_run_repeats_nothing_and_says_the_same(finished: Path, plan: Plan) -> None:
    before, results = contents(finished), (finished / "results.json").read_bytes()
    compare(plan, finished, progress=False)
    assert contents(finished) == before
    assert (finished / "results.json").read_bytes() == results


def test_what_changed_is_measured_again_and_nothing_else(
    finished: Path, plan: Plan, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = contents(folder)
    changed = copy.copy(plan)
    object.__setattr__(changed, "iou", 0.5)
    compare(changed, folder, progress=False)
    new = {name for name in contents(folder) if name not in before}
    steps = sorted(name for name in new if name.startswith("steps/"))
    assert [name.split("-")[0] for name in steps] == ["steps/accuracy"] * 3
    assert new == {*steps}
    compare(plan, folder, again=True, progress=False)
    after = contents(folder)
    touched = {name for name, value in before.items() if after[name] != value}
    assert {name.split("-")[0] for name in touched if name.startswith("steps")} == {"steps/timing"}


def test_an_engine_that_was_replaced_is_built_again(
    finished: Path, plan: Plan, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    engine = folder / "engines" / "coarse_fp32.onnx"
    good = engine.read_bytes()
    engine.write_bytes(b"something else")
    compare(plan, folder, progress=False)
    assert engine.read_bytes() == good


def test_a_run_that_is_killed_again_and_again_ends_as_one_left_alone(
    finished: Path, plan: Plan, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    models = [str(model.path) for model in plan.models]
    command = ["compare", *models, "--precisions", "fp32", "--batches", "1,4"]
    command += ["--data", str(plan.data), "--output", str(folder)]
    command += ["--rounds", "4", "--duration", "0.1", "--no-layers", "--quiet"]
    code = "import sys\nfrom trt_yolov6.cli import main\nsys.exit(main(sys.argv[1:]))"
    for kill, rounds in (
        (Kill("build-", 1, after=True), 0),
        (Kill("timing-", 2, after=False), 1),  # at the end of the second round
        (Kill("timing-", 2, after=True), 3),
    ):
        run_killed(code, command, kill)
        kept = [json.loads(file.read_text())["value"] for file in folder.glob("steps/timing-*")]
        # What was done is never lost.
        assert sum(map(len, kept)) == rounds
    assert main(command) == 0
    results = read_results(folder)
    assert len(results["timings"]) == 4
    left_alone = {one["engine"]: one["AP"] for one in read_results(finished)["engines"]}
    assert {one["engine"]: one["AP"] for one in results["engines"]} == {
        name: left_alone[name] for name in ("coarse fp32", "fine fp32")
    }
    assert not [path for path in folder.rglob(".*") if path.suffix == ".tmp"]


@pytest.mark.filterwarnings("error:every anchor")  # a note of the comparison, not Python's
def test_an_engine_is_taken_as_it_is_and_a_fixed_batch_leaves_others_out(
    finished: Path, plan: Plan, tmp_path: Path
) -> None:
    engine = finished / "engines" / "coarse_fp32.onnx"
    fixed = tmp_path / "fixed.onnx"
    model = onnx.load(plan.models[0].path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, fixed)
    both = Plan(
        models=(ModelEntry(engine, "engine"), ModelEntry(fixed)),
        precisions=("fp16",),
        batches=(1, 4),
        data=plan.data,
        rounds=3,
        duration=0.1,
        layers=False,
    )
    results = compare(both, tmp_path / "run", progress=False)
    measured = [(one["engine"], one["batch"]) for one in results["timings"]]
    assert measured == [("engine fp32", 1), ("engine fp32", 4), ("fixed fp16", 4)]
    assert results["left_out"] == ["fixed fp16 takes batch 4: batch 1 was not measured."]


def test_steps_are_found_by_what_they_depend_on(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    steps.keep("build", {"a": 1, "b": (2, 3)}, {"x": 1})
    assert steps.find("build", {"b": [2, 3], "a": 1}) == {"x": 1}
    assert steps.find("build", {"a": 2, "b": [2, 3]}) is None
    assert steps.find("accuracy", {"a": 1, "b": [2, 3]}) is None
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:20])
    assert steps.find("build", {"a": 1, "b": [2, 3]}) is None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda value: value.update(schema=2), "schema 2"),
        (lambda value: value.update(kind="other"), "no results of a comparison"),
        (lambda value: value.pop("timings"), "damaged"),
        (lambda value: value["engines"][0].update(AP=52.0), "damaged"),
        (lambda value: value["timings"][0].update(engine="other"), "damaged"),
        (lambda value: value["timings"][0]["latency_ms"].update(median=-1), "damaged"),
        (lambda value: value["timings"][0]["latency_ms"].update(median=math.nan), "damaged"),
        (lambda value: value["timings"][0].pop("runs"), "damaged"),
        (lambda value: value["engines"][0].update(image_size=[64]), "damaged"),
        (lambda value: value["engines"][0].pop("note"), "damaged"),
        (lambda value: value.pop("settings"), "damaged"),
        (lambda value: value["data"].update(images_sha256=7), "damaged"),
        (lambda value: value["layers"][0]["layers"][0].pop("ms"), "damaged"),
        (lambda value: value["examples"][0]["annotated"].append([1, 2]), "damaged"),
        (lambda value: value["environment"].update(packages=None), "damaged"),
        (lambda value: value["environment"].update(gpus=[{"slowed_by": 3}]), "slowed_by"),
        (lambda value: value["engines"][0].update(calibration=[1]), "calibration"),
        (lambda value: value["engines"][0].update(calibration={"tried": [{}]}), "tried"),
        (lambda value: value["engines"][0].update(float_layers=3), "float_layers"),
        (lambda value: value["engines"][0].update(bytes=10**400), "bytes"),
        (lambda value: value["engines"][0].update(APs="?"), "APs"),
        (lambda value: value["timings"][0].update(batch=10**400), "batch"),
        (
            lambda value: value["timings"][0]["latency_ms"].update(
                median=1e308, interval=[1, 1e308]
            ),
            "median",
        ),
    ],
)
def test_damaged_results_are_refused(
    finished: Path, tmp_path: Path, damage: Any, words: str
) -> None:
    value = json.loads((finished / "results.json").read_text())
    damage(value)
    write_json(tmp_path / "results.json", value)
    with pytest.raises(UserError, match=words):
        read_results(tmp_path)


# --- the command


def arguments(plan: Plan, output: Path, *more: str) -> list[str]:
    model = str(plan.models[0].path)
    common = ["--data", str(plan.data), "--batches", "1", "--rounds", "3", "--duration", "0.1"]
    return ["compare", model, *common, "--no-layers", "--quiet", "--output", str(output), *more]


def test_the_gate_passes_what_is_unchanged_and_fails_a_drop_with_exit_code_1(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(plan, tmp_path / "run")) == 0
    output = capsys.readouterr().out
    assert "coarse fp32" in output
    assert "results.json: written" in output
    baseline = tmp_path / "run" / "results.json"
    # The same file: side by side it would be itself, so that nothing is left to noise.
    unchanged = arguments(plan, tmp_path / "again", "--baseline", str(baseline))
    assert main([*unchanged, "--max-slowdown", "0%"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "gate: passed"
    value = json.loads(baseline.read_text())
    value["engines"][0]["AP"] += 0.003
    write_json(tmp_path / "better.json", value)
    better = arguments(plan, tmp_path / "again", "--baseline", str(tmp_path / "better.json"))
    assert main([*better, "--max-ap-drop", "0.2"]) == 1
    assert "failed: coarse fp32: AP" in capsys.readouterr().out
    assert main([*better, "--max-ap-drop", "0.4"]) == 0


def test_a_slower_engine_fails_side_by_side_with_the_baselines(
    plan: Plan, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    quick, slow = models / "quick", models / "slow"
    for folder, kernel in ((quick, 16), (slow, 2)):
        folder.mkdir()
        write_detector(folder / "n.onnx", kernel)
    common = ["--data", str(plan.data), "--batches", "4", "--rounds", "4", "--duration", "0.4"]
    common += ["--no-layers", "--quiet"]
    output = str(tmp_path / "first")
    assert main(["compare", str(quick / "n.onnx"), *common, "--output", output]) == 0
    gate = ["--baseline", output, "--max-ap-drop", "100"]
    second = ["compare", str(slow / "n.onnx"), *common, "--output", str(tmp_path / "second")]
    assert main([*second, *gate]) == 1
    assert "side by side" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--strict"], "--baseline"),
        (["--max-slowdown", "3"], "--baseline"),
        (["--precisions", "int4"], "int4"),
        (["--batches", "0"], "above 0"),
        (["--rounds", "1"], "at least 3"),
        (["--baseline", "none.json"], "none.json"),
        (["--split", "none"], "none"),
        (["plan.yaml"], "give it alone"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    plan: Plan,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    command = arguments(plan, tmp_path / "run")
    positional = [item for item in more if item.endswith(".yaml")]
    rest = [item for item in more if item not in positional]
    try:
        code = main([*command[:2], *positional, *command[2:], *rest])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("wrong", ["graph", "calib", "names"])
def test_every_input_is_checked_before_anything_is_built(
    plan: Plan, tmp_path: Path, wrong: str
) -> None:
    second = ModelEntry(write_detector(tmp_path / "second.onnx"))
    changes: dict[str, Any] = {}
    if wrong == "graph":
        model = onnx.load(second.path)
        model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 3
        model.graph.node[-1].op_type = "Max"
        onnx.save(model, second.path)
        second = dataclasses.replace(second, decoder="ppyoloe")
    elif wrong == "calib":
        changes = {"precisions": ("fp32", "int8"), "calibration": tmp_path / "nowhere"}
    else:
        second = dataclasses.replace(second, names=tmp_path / "nowhere.txt")
    both = dataclasses.replace(plan, models=(plan.models[0], second), **changes)
    with pytest.raises(UserError, match=r"second\.onnx|nowhere"):
        compare(both, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "engines").exists()


def test_a_detector_of_other_classes_is_timed_without_ap(
    plan: Plan, tmp_path: Path, data: Path
) -> None:
    content = json.loads((data / "annotations" / "instances_val.json").read_text())
    content["categories"].append({"id": 99, "name": "more"})
    content["annotations"].append({**content["annotations"][0], "id": 10**6, "category_id": 99})
    shutil.copytree(data / "images", tmp_path / "data" / "images")
    write_json(tmp_path / "data" / "annotations" / "instances_val.json", content)
    other = dataclasses.replace(
        plan, models=plan.models[:1], data=tmp_path / "data", batches=(1,), rounds=3
    )
    with logged() as told:
        results = compare(other, tmp_path / "out", progress=False)
    assert results["engines"][0]["AP"] is None
    assert results["timings"][0]["latency_ms"]["median"] > 0
    assert any("is timed without AP" in line for line in told)
    read_results(tmp_path / "out")


@pytest.mark.parametrize(
    "asked",
    [{"precisions": ("int8",)}, {"backends": ("tensorrt-rtx",)}, {"image_size": (32, 32)}, {}],
)
def test_an_engine_that_is_not_as_asked_is_said_to_be_taken_as_it_is(
    finished: Path, data: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    engine = finished / "engines" / "coarse_fp32.onnx"
    plan = plan_of([engine], data=data, batches=(1,), **asked)
    with logged() as told:
        cases = cases_of(Work(plan, tmp_path, Steps(tmp_path)))
    assert [(case.choice, case.source.precision) for case in cases] == [(None, "fp32")]
    assert any("is fp32 already and is taken as it is" in line for line in told) is bool(asked)


def test_the_image_size_is_that_of_every_model_that_has_none_of_its_own(tmp_path: Path) -> None:
    paths = [tmp_path / "a.pt", tmp_path / "b.onnx"]
    assert [entry.image_size for entry in plan_of(paths, image_size=(320, 320)).models] == [
        (320, 320)
    ] * 2
    plan = tmp_path / "plan.yaml"
    plan.write_text("models: [a.pt, {path: b.pt, image_size: 96}]\nimage_size: 64\n")
    assert [entry.image_size for entry in plan_of(plan).models] == [(64, 64), (96, 96)]
    assert [entry.image_size for entry in plan_of(plan, image_size=(32, 32)).models] == [
        (32, 32),
        (96, 96),
    ]
    plan.write_text("models: [a.pt]\nimage_sizes: 64\n")
    with pytest.raises(
        UserError, match=r"'image_sizes' is not a key \(did you mean image_size\?\)"
    ):
        plan_of(plan)


def test_two_models_of_one_name_need_names(plan: Plan, tmp_path: Path) -> None:
    os.makedirs(tmp_path / "other")
    other = write_detector(tmp_path / "other" / "coarse.onnx", 16, seed=1)
    twice = Plan(models=(plan.models[0], ModelEntry(other)), data=plan.data)
    with pytest.raises(UserError, match="'coarse fp32'"):
        compare(twice, tmp_path / "run", progress=False)
    # Two names, but one file.
    twice = Plan(
        models=(ModelEntry(plan.models[0].path, "a b"), ModelEntry(other, "a_b")), data=plan.data
    )
    with pytest.raises(UserError, match="a_b_fp32"):
        compare(twice, tmp_path / "run", progress=False)


def test_a_checkpoint_takes_no_decoder_or_names(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "n.pt").write_bytes(b"")
    for entry in (
        ModelEntry(tmp_path / "n.pt", decoder="yolox"),
        ModelEntry(tmp_path / "n.pt", names=tmp_path / "names.txt"),
        ModelEntry(tmp_path / "n.pt", preprocess=("colour=bgr",)),
    ):
        with pytest.raises(UserError, match=r"n\.pt is a checkpoint"):
            compare(Plan(models=(entry,), data=plan.data), tmp_path / "run", progress=False)


def test_class_names_that_are_missing_are_a_line(plan: Plan, tmp_path: Path) -> None:
    entry = ModelEntry(plan.models[0].path, names=tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"none\.txt"):
        compare(Plan(models=(entry,), data=plan.data), tmp_path / "run", progress=False)


def test_other_families_come_with_their_decoder_and_preprocessing(tmp_path: Path) -> None:
    # PP-YOLOE's images are stretched; its graph does not show which release's normalization it has.
    onnx.save(family_graphs.ppyoloe(), tmp_path / "ppyoloe.onnx")
    family_graphs.write_dataset(tmp_path / "data", "stretch")
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "models: [{path: ppyoloe.onnx, decoder: ppyoloe, names: names.txt}]\n"
        "batches: 1\ndata: data\nrounds: 3\nduration: 0.1\nexamples: 0\n"
    )
    (tmp_path / "names.txt").write_text("\n".join(family_graphs.NAMES))
    assert main(["compare", str(plan), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    (result,) = read_results(tmp_path / "out" / "results.json")["engines"]
    assert result["AP"] == pytest.approx(1)


def test_other_preprocessing_is_evaluated_anew(tmp_path: Path) -> None:
    # It stands in the manifest, not in the engine's file, which stays the same.
    onnx.save(family_graphs.ppyoloe(), tmp_path / "ppyoloe.onnx")
    data = family_graphs.write_dataset(tmp_path / "data", "stretch")

    def ap(path: Path, *changes: str) -> float:
        decoder = None if path.parent.name == "engines" else "ppyoloe"
        names = None if decoder is None else tmp_path / "names.txt"
        entry = ModelEntry(path, "n", names=names, decoder=decoder, preprocess=changes)
        results = compare(
            Plan((entry,), batches=(1,), data=data, rounds=3, duration=0.1, layers=False),
            tmp_path / "out",
            progress=False,
        )
        return results["engines"][0]["AP"] or 0.0

    (tmp_path / "names.txt").write_text("\n".join(family_graphs.NAMES))
    assert ap(tmp_path / "ppyoloe.onnx") == pytest.approx(1)
    assert ap(tmp_path / "ppyoloe.onnx", "fit=letterbox") < 0.9
    assert ap(tmp_path / "ppyoloe.onnx") == pytest.approx(1)
    # The same of an engine that is taken as it is.
    engine = tmp_path / "out" / "engines" / "n_fp32.onnx"
    assert ap(engine) == pytest.approx(1)
    assert ap(engine, "fit=letterbox") < 0.9


def test_corrected_class_names_are_evaluated_again(tmp_path: Path) -> None:
    # They stand in the manifest, too.
    onnx.save(family_graphs.ppyoloe(), tmp_path / "ppyoloe.onnx")
    data = family_graphs.write_dataset(tmp_path / "data", "stretch")
    entry = ModelEntry(tmp_path / "ppyoloe.onnx", names=tmp_path / "n.txt", decoder="ppyoloe")
    plan = Plan((entry,), batches=(1,), data=data, rounds=3, duration=0.1, layers=False)
    found = []
    for names in (family_graphs.NAMES[::-1], family_graphs.NAMES):
        (tmp_path / "n.txt").write_text("\n".join(names))
        results = compare(plan, tmp_path / "out", progress=False)
        found.append(results["engines"][0]["AP"])
    assert found[0] is not None
    assert found[0] < 0.9
    assert found[1] == pytest.approx(1)


def test_a_graph_of_another_precision_is_called_by_it_and_takes_no_names(
    data: Path, tmp_path: Path
) -> None:
    from onnxruntime.quantization import quantize_dynamic

    path = tmp_path / "dynamic.onnx"
    quantize_dynamic(write_detector(tmp_path / "float.onnx", 16), path)
    plan = Plan((ModelEntry(path),), batches=(1,), data=data, rounds=3, duration=0.1, layers=False)
    (engine,) = compare(plan, tmp_path / "run", progress=False)["engines"]
    assert (engine["engine"], engine["precision"]) == ("dynamic int8-dynamic", "int8-dynamic")
    named = dataclasses.replace(plan, models=(ModelEntry(path, names=tmp_path / "names.txt"),))
    with pytest.raises(UserError, match=r"int8-dynamic already .* leave `names` out"):
        compare(named, tmp_path / "run", progress=False)


def test_an_engine_agrees_with_the_most_precise_one_of_its_network_whatever_their_names(
    data: Path, tmp_path: Path
) -> None:
    source = write_detector(tmp_path / "source.onnx", 16)
    quick = QuantizationSettings(
        calibrator="minmax", equalize=False, bias_correction=False, reconstruct=False
    )
    calib = data / "images" / "val"
    quantized = quantize(source, calib, settings=quick, output=tmp_path / "quantized.onnx")
    other = write_detector(tmp_path / "other.onnx", 16, seed=1)
    files = [
        build(graph, output=tmp_path / f"{name}.onnx", precision=precision).path
        for name, graph, precision in (
            ("a", quantized, None),
            ("b", other, None),
            ("c", source, "fp16"),
            ("d", source, None),
        )
    ]
    # Of an engine's file, which is of the network, too.
    files.append(build(files[0], output=tmp_path / "e.onnx").path)
    plan = plan_of(files, data=data, batches=(1,), rounds=3, duration=0.05, layers=False)
    compare(plan, tmp_path / "run", progress=False)
    engines = json.loads((tmp_path / "run" / "results.json").read_text())["engines"]
    found = [(one["engine"], one["agreement"] and one["agreement"]["with"]) for one in engines]
    assert found == [
        ("a int8", "d fp32"),
        ("b fp32", None),
        ("c fp16", None),
        ("d fp32", None),
        ("e int8", "d fp32"),
    ]


def test_a_strip_of_pixels_may_be_an_example(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    cv2.imwrite(str(data / "strip.png"), np.full((2, 5000, 3), 90, np.uint8))
    (data / "data.yaml").write_text("names: [a, b, c]\nval: .\n")
    (data / "strip.txt").write_text("0 0.5 0.5 0.5 1\n")
    detector = write_detector(tmp_path / "n.onnx", 16)
    plan = Plan((ModelEntry(detector),), batches=(1,), data=data, rounds=3, duration=0.1)
    compare(plan, tmp_path / "out", progress=False)
    picture = cv2.imread(str(tmp_path / "out" / "examples" / "0.jpg"))
    assert picture is not None
    assert picture.shape == (1, 640, 3)


def test_a_baseline_of_something_else_is_refused_before_anything_is_measured(
    plan: Plan, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(plan, tmp_path / "run", "--baseline", str(finished / "results.json"))
    assert main([*command, "--iou", "0.5"]) == 2
    assert "evaluated with iou" in capsys.readouterr().err
    value = json.loads((finished / "results.json").read_text())
    value["data"]["images_sha256"] = "0" * 64
    write_json(tmp_path / "other.json", value)
    assert main([*command[:-1], str(tmp_path / "other.json")]) == 2
    assert "another data set" in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()
    value = json.loads((finished / "results.json").read_text())
    for engine in value["engines"]:
        engine["device"] = "another cpu"
    write_json(tmp_path / "other.json", value)
    assert main([*command[:-1], str(tmp_path / "other.json")]) == 2
    assert "measured on another cpu" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "steps").glob("accuracy-*"))
    allowed = main([*command[:-1], str(tmp_path / "other.json"), "--allow-other-device"])
    assert allowed == 1
    assert "gate: failed" in capsys.readouterr().out
