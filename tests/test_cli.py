"""The command line: promised spellings work, and a user's mistake is one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from support.tiny_detector import load_tiny, write_cells
from support.training_data import write_shapes, write_tiny

from trt_yolov6.cli import main, parser
from trt_yolov6.engines import runs_here
from trt_yolov6.engines.build import BuiltEngine


@pytest.fixture
def workplace(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the repository's root, with an empty engines/."""
    for name in ("samples", "calib"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "engines").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


TINY_LAYERS = 36
"""Convolutions of `training_data.write_tiny`'s network."""


@pytest.fixture
def tiny(workplace: Path) -> str:
    """A checkpoint of a small network in that folder; building from it takes a few seconds."""
    return write_tiny(workplace / "tiny.pt").name


@pytest.fixture
def with_engine(workplace: Path, sample_engine: BuiltEngine) -> Path:
    """The same, with the sample's engine in engines/."""
    for path in (sample_engine.path, sample_engine.manifest_path):
        (workplace / "engines" / path.name).write_bytes(path.read_bytes())
    return workplace


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail as a user's mistake; return the line it prints."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    error = capsys.readouterr().err
    assert code == 2, error
    lines = error.splitlines()
    assert len(lines) == 1, error
    return lines[0]


@pytest.mark.parametrize("words", [("--source", ""), ("--source=",)])
def test_an_empty_value_is_not_the_working_directory(
    words: tuple[str, ...], with_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64)).save(with_engine / "a.png")
    said = refusal(capsys, "infer", *words)
    assert said.startswith("trt-yolov6 infer: --source has an empty value: an unset variable")
    assert not (with_engine / "runs").exists()


def test_build_without_arguments_takes_the_sample_and_says_so(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "--backend", "onnxruntime", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "taking the sample's samples/yolov6n_bccd.pt" in captured.out
    assert "next, " not in captured.out  # --quiet
    assert "engines/yolov6n_bccd-fp32.onnx" in captured.out
    manifest = json.loads((workplace / "engines" / "yolov6n_bccd-fp32.json").read_text())
    assert manifest["model"] == "yolov6n"
    assert manifest["class_names"] == ["RBC", "WBC", "Platelets"]


def test_bench_takes_the_newest_engine_and_writes_the_documented_keys(
    with_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--duration", "0.2", "--json", "out/bench.json", "--quiet"]) == 0
    assert "taking the newest, engines/yolov6n.onnx" in capsys.readouterr().out
    value = json.loads((with_engine / "out" / "bench.json").read_text())
    wanted = {"batch", "latency_ms", "throughput_fps", "engine", "precision", "backend", "device"}
    assert wanted <= value.keys()
    assert {"median", "mean", "p90", "p99"} <= value["latency_ms"].keys()
    assert value["throughput_fps"] == pytest.approx(1000 / value["latency_ms"]["median"])


def test_bench_lists_the_layers_that_take_longest(
    with_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--duration", "0.1", "--quiet", "--layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.endswith(" ms one by one"))
    shares = [float(line.split("%")[0]) for line in lines[start + 1 :]]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert shares[:-1] == sorted(shares[:-1], reverse=True)


@pytest.mark.parametrize(
    ("command", "option", "dest"),
    [
        ("bench", "--engine", "engine"),
        ("bench", "--preprocess", "preprocess"),
        ("infer --source x", "--format", "formats"),
        ("report x", "--output", "output"),
        ("export-triton --output x", "--engine", "engine"),
        ("export-triton --output x --engine x", "--name", "names"),
    ],
)
def test_an_option_of_several_values_may_be_given_again(
    command: str, option: str, dest: str
) -> None:
    given = parser().parse_args([*command.split(), option, "csv", "json", option, "yolo"])
    assert [str(value) for value in getattr(given, dest)] == ["csv", "json", "yolo"]


def test_an_engine_for_another_machine_is_passed_over(
    with_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = with_engine / "engines" / "yolov6n.trt"
    newer.write_bytes(b"plan")
    manifest = json.loads((with_engine / "engines" / "yolov6n.json").read_text())
    manifest |= {"engine": "yolov6n.trt", "backend": "tensorrt"}
    (with_engine / "engines" / "yolov6n.trt.json").write_text(json.dumps(manifest))
    os.utime(newer, (time.time() + 60, time.time() + 60))
    if not runs_here(newer):
        assert main(["bench", "--duration", "0.1", "--quiet"]) == 0
        assert "not engines/yolov6n.trt" in capsys.readouterr().out


def test_infer_draws_a_picture_and_writes_its_detections(
    with_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = next((with_engine / "samples" / "images" / "val").glob("*.jpg"))
    assert main(["infer", "--source", str(picture), "--output", "drawn", "--quiet"]) == 0
    assert (with_engine / "drawn" / picture.name).is_file()
    (found,) = json.loads((with_engine / "drawn" / "detections.json").read_text())
    assert found["file"] == picture.name
    assert {item["name"] for item in found["detections"]} <= {"RBC", "WBC", "Platelets"}
    assert f"{len(found['detections'])} objects in 1 image, " in capsys.readouterr().out


def test_inspect_and_doctor_answer(with_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "engines/yolov6n.onnx"]) == 0
    captured = capsys.readouterr().out
    assert "yolov6n" in captured
    assert captured.splitlines()[-1].endswith("trt-yolov6 bench --engine engines/yolov6n.onnx")
    assert main(["doctor"]) == 0
    assert "onnxruntime" in capsys.readouterr().out


def test_the_next_step_is_ready_for_a_shell(
    tiny: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "my cells").mkdir()
    checkpoint = (workplace / tiny).rename(workplace / "my cells" / "größe 1.pt")
    assert main(["inspect", str(checkpoint)]) == 0
    command = capsys.readouterr().out.splitlines()[-1].partition(": ")[2]
    printed = subprocess.run(
        ["bash", "-c", f"trt-yolov6() {{ printf '%s\\n' \"$@\"; }}; {command}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.splitlines() == ["build", "--weights", str(checkpoint)]


def test_samples_that_are_not_here_are_not_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    load_tiny(tmp_path).close()
    for stages in ("--end-to-end", "--stages"):
        said = refusal(capsys, "bench", "--engine", "tiny_split_None_False.onnx", stages)
        assert said.endswith(
            "--source is missing, and the sample's samples/images/val is not here; name yours."
        )
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("build --weights FILE.pt")


def test_json_is_never_written_over_something_else(
    with_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = with_engine / "engines" / "yolov6n.onnx"
    before = engine.read_bytes()
    said = refusal(capsys, "eval", "--json", "engines/yolov6n.onnx")  # as if --json were a flag
    assert said.endswith(
        "--json engines/yolov6n.onnx is there and is not JSON; choose another file."
    )
    assert engine.read_bytes() == before
    for _ in range(2):
        assert main(["inspect", "engines/yolov6n.onnx", "--json", "inspected.json"]) == 0
    assert json.loads((with_engine / "inspected.json").read_text())["kind"] == "onnx"


def test_eval_prints_ap_in_all_and_by_class_and_draws(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cells(workplace / "data", images=3)
    load_tiny(workplace).close()
    command = ["eval", "--engine", "tiny_split_None_False.onnx", "--data", "data", "--conf", "0.6"]
    assert main([*command, "--plots", "plots", "--json", "eval.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tiny_split_None_False.onnx (fp32, onnxruntime) on 3 images, 15 detections" in lines
    assert "  AP 1.0000   class_0" in [line.replace("red", "class_0") for line in lines]
    assert (workplace / "plots" / "pr-curves.png").is_file()
    assert (workplace / "plots" / "confusion.png").is_file()
    assert lines[-1].startswith("next, its speed: trt-yolov6 bench --engine tiny")


def test_export_writes_a_graph_that_is_known_by_its_manifest_and_eval_takes(
    tiny: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shapes(workplace / "shapes")
    command = ["export", "--weights", tiny, "--fp16", "--batch", "1", "--imgsz", "64"]
    assert main([*command, "--output", "n.onnx"]) == 0
    assert json.loads((workplace / "n.json").read_text())["precision"] == "fp16"
    command = ["eval", "--engine", "n.onnx", "--data", "shapes", "--split", "val", "--quiet"]
    assert main([*command, "--json", "eval.json"]) == 0
    value = json.loads((workplace / "eval.json").read_text())
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "images"} <= value.keys()
    assert value["images"] == 8
    assert value["precision"] == "fp16"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"just some text\n", "text.pt"), (b"PK\x03\x04 cut", "text.pt")],
)
def test_a_checkpoint_that_is_none_is_one_line(
    content: bytes, reason: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "text.pt").write_bytes(content)
    assert reason in refusal(capsys, "build", "--weights", "text.pt")
    assert not list((workplace / "engines").iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["build", "--weights", "none.pt"], "none.pt"),
        (["build", "--onnx", "none.onnx"], "none.onnx"),
        (["build", "--imgsz", "100"], "multiple of 32"),
        (["build", "--dynamic", "4,2,8"], "not increasing"),
        (["build", "--dynamic", "1,2"], "MIN,OPT,MAX"),
        (["build", "--batch", "0"], "above 0"),
        (["build", "--backend", "openvino"], "invalid choice"),
        (["build", "--target", "t4", "--backend", "onnxruntime"], "--target"),
        (["build", "--conf", "0.5"], "--end2end"),
        (["build", "--onnx", "x.onnx", "--end2end"], "--end2end"),
        (["build", "--onnx", "x.onnx", "--conf", "0"], "--conf"),
        (["build", "--int8", "--float-layers", ","], "names no layer"),
        (["build", "--int8", "--calib", "nowhere/"], "nowhere"),
        (["build", "--calib", "calib/"], "--calib is for --int8"),
        (["build", "--calibrator", "mse"], "--calibrator is for --int8"),
        (["build", "--int8", "--max-ap-drop", "1"], "--float-layers auto"),
        (["build", "--int8", "--calibration-cache", "x"], "leave --int8"),
        (["build", "--int8", "--calibrator", "best"], "invalid choice"),
        (["export", "--calibrator", "mse"], "--calibration-cache"),
        (["export", "--calibration-cache", "samples/README.md"], "is not a calibration cache"),
        (["export", "--calibration-cache", "x", "--cache-version", "11.0.0"], "11.0.0"),
        (["export", "--calibration-cache", "x", "--fp16"], "leave --fp16 out"),
        (["sensitivity", "--split", "val"], "--data"),
        (["sensitivity", "--onnx", "none.onnx"], "none.onnx"),
        (["sensitivity", "--data", "samples"], "--data is for --metric ap and --report"),
        (["build", "--fp16", "--fp32"], "not allowed with"),
        (["build", "--int8", "--no-reconstruct", "--adaptive-rounding"], "not allowed with"),
        (["build", "--imgsz", "99968"], "pixels"),
        (["build", "--names", "coco.txt"], "--names is for --onnx"),
        (["bench", "--conf", "0.5"], "--conf is for --end-to-end"),
        (["inspect", "samples/README.md", "--json", "samples"], "samples"),
        (["eval", "--engine", "samples/yolov6n_bccd.pt"], "trt-yolov6 build --weights"),
        (["eval", "--engine", "samples/README.md"], "samples/README.md is not an engine"),
        (
            ["bench", "--stages", "--layers"],
            "--layers and --stages are separate",
        ),
        (["bench"], "trt-yolov6 build"),
        (["eval", "--engine", "engines/none.trt"], "engines/none.trt"),
        (["eval", "--conf", "2", "--engine", "none.onnx"], "none.onnx"),
        (["compare", "samples/yolov6n_bccd.pt", "--backends", "x"], "--backends x is not known"),
        (
            ["compare", "samples/yolov6n_bccd.pt", "--imgsz", "100"],
            "--imgsz 100x100 is not a multi",
        ),
        (["sensitivity", "--plot", "x.jpg", "--onnx", "none.onnx"], "--plot x.jpg is not a PNG"),
        (["eval", "--plots", "samples/README.md", "--engine", "none.onnx"], "README.md is a file"),
        (["infer", "--source", "nowhere"], "trt-yolov6 build"),
        (["infer"], "--source"),
        (["inspect", "nowhere.onnx"], "nowhere.onnx"),
        (["export", "--opset", "9"], "--opset 9"),
        (["fly"], "invalid choice"),
        (["buld"], "did you mean build?"),
        (["build", "--batchs", "2"], "did you mean --batch?"),
        (["build", "--backend", "tensort"], "did you mean tensorrt?"),
        (["export", "--weights", "samples/README.md"], "give an ONNX file (.onnx) or a YOLOv6"),
        (["build", "best.pt"], "give it as --weights best.pt"),
        (["build", "--int8", "yolov8n.onnx"], "give it as --onnx yolov8n.onnx"),
        (["bench", "engines/s.trt"], "give it as --engine engines/s.trt"),
        (["eval", "bccd"], "give it as --data bccd"),
        (["build", "--onnx", "x.onnx", "--decoder", "yolov9"], "x.onnx"),
        (["train"], "--data is missing"),
        (["train", "--data", "nowhere"], "nowhere is not a folder"),
        (["train", "--data", "samples"], "--split: val"),
        (["qat", "--data", "samples", "--split", "vall"], "did you mean val?"),
        (["sensitivity", "--data", "nowhere"], "nowhere is not a folder"),
        (["build", "--int8", "--float-layers", "auto", "--data", "calib"], "COCO, YOLO or VOC"),
        ([], "COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], reason: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reason in refusal(capsys, *arguments)
    assert not list((workplace / "engines").iterdir())


def test_calibration_without_images_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "tiny.pt")
    said = refusal(capsys, "build", "--weights", "tiny.pt", "--int8")
    assert "--calib is missing, and the sample's calib is not here; name yours." in said


def test_a_checkpoint_is_built_though_it_is_given_as_an_onnx_file(tiny: str) -> None:
    assert main(["build", "--onnx", tiny, "--imgsz", "64", "--output", "tiny.onnx", "--quiet"]) == 0
    assert Path("tiny.onnx").is_file()


def test_ctrl_c_in_an_import_is_an_interruption_though_cleaning_up_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise AttributeError("module 'sympy' has no attribute 'core'")

    monkeypatch.setattr("trt_yolov6.cli.doctor.run", run)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "trt-yolov6 doctor: interrupted\n"


@pytest.mark.parametrize("command", ["train", "qat"])
def test_a_mistake_in_the_data_is_found_before_pytorch_is_imported(
    command: str, workplace: Path
) -> None:
    code = (
        "import sys, trt_yolov6.cli as cli\n"
        f"code = cli.main(['{command}', '--data', 'calib', '--weights', 'x.pt'])\n"
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "COCO, YOLO or VOC" in done.stderr


def test_a_default_folder_that_cannot_be_written_is_refused_before_the_work(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "engines").rmdir()
    (workplace / "engines").write_text("a file")
    # The checkpoint is not even looked at.
    error = refusal(capsys, "build", "--int8", "--backend", "onnxruntime", "--weights", "none.pt")
    assert f"{workplace}/engines cannot be written" in error
    assert "choose another path" in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["bench", "--batch", "64"], "not 64"),
        (["bench", "--duration", "-1"], "duration"),
        (["eval", "--engine", "engines/yolov6n.trt"], "engines/yolov6n.onnx does"),
        (["eval", "--data", "nowhere"], "nowhere"),
        (["eval", "--split", "test"], "test"),
        (["eval", "--conf", "2"], "--conf"),
        (["eval", "--iou", "0"], "--iou"),
        (["eval", "--resize", "600", "--border", "3"], "--resize"),
        (["infer", "--source", "nowhere.jpg"], "nowhere.jpg"),
        (["infer", "--source", "samples/LICENSE"], "LICENSE"),
        (["bench", "--json", "engines/yolov6n.json"], "is the manifest of yolov6n.onnx"),
        (["bench", "--json", "engines"], "is a folder"),
        (["bench", "--threads", "9999"], "--threads 9999"),
        (["build", "--output", "samples/annotations/instances_val.txt"], "ends in .onnx"),
    ],
)
def test_a_mistake_with_an_engine_is_one_line_and_exit_code_2(
    arguments: list[str], reason: str, with_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reason in refusal(capsys, *arguments)


def test_a_damaged_engine_is_one_line(
    with_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_engine / "engines" / "yolov6n.onnx"
    path.write_bytes(path.read_bytes()[:100_000])
    for command in ("eval", "bench"):
        assert "cut short" in refusal(capsys, command, "--engine", str(path))


def test_output_into_a_file_that_is_no_folder_is_one_line(
    with_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").touch()
    line = refusal(capsys, "bench", "--duration", "0.1", "--quiet", "--json", "taken/x.json")
    assert "taken" in line


def test_help_answers_within_half_a_second_and_without_heavy_imports() -> None:
    code = (
        "import resource, sys, trt_yolov6.cli as cli\n"
        "try: cli.main(['build', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'cv2', 'numpy', 'tensorrt', 'pycocotools'}\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, file=sys.stderr)\n"
        "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Processor time, as the machine may be busy: a sixth of it on a quiet one.
    assert float(done.stderr) < 0.5


@pytest.mark.parametrize("closed", [">&-", "2>&- >out.txt"])
def test_closed_streams_are_no_error(with_engine: Path, root: Path, closed: str) -> None:
    command = f"{sys.executable} -m trt_yolov6 inspect engines/yolov6n.onnx {closed}"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, shell=True, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_reader_that_leaves_early_is_no_error(with_engine: Path, root: Path) -> None:
    command = f"{sys.executable} -m trt_yolov6 inspect --layers engines/yolov6n.onnx | head -1"
    done = subprocess.run(
        command,
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stderr == ""


def test_int8_as_promised_writes_engine_manifest_and_table(
    tiny: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", "--weights", tiny, "--int8", "--calib", "calib/", "--calib-images", "3"]
    command += ["--imgsz", "64", "--backend", "onnxruntime", "--float-layers", "2", "--quiet"]
    # The search for the best graph has tests of its own.
    command += ["--calibrator", "minmax", "--no-equalize", "--no-reconstruct"]
    assert main(command) == 0
    layers = TINY_LAYERS - 2
    assert f"in INT8: all {layers} convolutions asked for\n" in capsys.readouterr().out
    manifest = json.loads((workplace / "engines" / "tiny-int8-64.json").read_text())
    assert manifest["precision"] == "int8"
    assert len(manifest["float_layers"]) == 2
    assert manifest["int8_layers"] == layers
    assert (workplace / "engines" / "tiny-int8-64.calibration.json").is_file()
    assert main(["bench", "--duration", "0.1", "--quiet"]) == 0
    assert "the accuracy of INT8, not its speed" in capsys.readouterr().out


def test_sensitivity_writes_ranking_and_chart(
    tiny: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sensitivity", "--weights", tiny, "--calib-images", "2", "--imgsz", "64"]
    command += ["--no-equalize", "--json", "s.json", "--plot", "s.png", "--top", "3"]
    assert main(command) == 0
    value = json.loads((workplace / "s.json").read_text())
    assert value["metric"] == "snr"
    assert len(value["layers"]) == TINY_LAYERS
    values = [layer["value"] for layer in value["layers"]]
    assert values == sorted(values)
    assert (workplace / "s.png").read_bytes().startswith(b"\x89PNG")
    assert f"{TINY_LAYERS - 3} more, less sensitive" in capsys.readouterr().out


def test_a_calibration_cache_names_the_tensors_of_the_graph_beside_it(
    tiny: str, workplace: Path
) -> None:
    command = ["export", "--weights", tiny, "--calibration-cache", "n.cache", "--imgsz", "64"]
    command += ["--calib-images", "2", "--calibrator", "minmax", "--no-equalize"]
    assert main([*command, "--output", "n.onnx"]) == 0
    import onnx

    graph = onnx.load("n.onnx").graph
    assert not [node for node in graph.node if node.op_type == "QuantizeLinear"]
    tensors = {name for node in graph.node for name in node.output} | {"images"}
    lines = (workplace / "n.cache").read_text().splitlines()
    assert lines[0] == "TRT-8601-EntropyCalibration2"
    assert {line.split(":")[0] for line in lines[1:]} <= tensors


def test_a_missing_package_is_one_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "trt_yolov6.graph.export", raising=False)
    assert "needs the Python package torch" in refusal(capsys, "export")
