"""NVIDIA's Polygraphy reads our ONNX files and computes what our engines compute."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from support.tiny_detector import load_tiny

pytest.importorskip("polygraphy")

from benchmarks import polygraphy_check as check
from trt_yolov6.engines.base import Engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_tiny(tmp_path_factory.mktemp("tiny"), batch=2)


def test_polygraphy_reads_our_file_and_gets_our_outputs(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    assert check.main(["--onnx", str(engine.path), "--json", str(file)]) == 0

    seen, ran = json.loads(file.read_text())["steps"]
    assert seen["step"] == "inspect"
    assert "1 Graph Input(s); 2 Graph Output(s)" in seen["found"]
    assert ran["command"].startswith("polygraphy run ")
    assert ran["difference"] < 1e-6


def test_outputs_that_differ_fail(engine: Engine) -> None:
    images = np.random.default_rng(0).random((2, 3, 64, 64), np.float32)
    step = check.run(
        engine.path,
        lambda batch: {name: 1.01 * value for name, value in engine.infer(batch).items()},
        engine.input.name,
        images,
    )
    assert not step.passed
    assert step.difference == pytest.approx(0.01, rel=1e-3)


def test_an_output_that_is_missing_fails(engine: Engine) -> None:
    images = np.zeros((2, 3, 64, 64), np.float32)
    step = check.run(
        engine.path, lambda batch: {"boxes": engine.infer(batch)["boxes"]}, "images", images
    )
    assert not step.passed
    assert step.found == "outputs on one side only: scores"


def test_a_file_that_polygraphy_cannot_read_fails_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    step = check.inspect(tmp_path / "no.onnx")
    assert not step.passed
    assert step.found


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_without_tensorrt_a_conversion_says_so(engine: Engine, tmp_path: Path) -> None:
    step = check.convert(engine.path, tmp_path / "tiny.trt", check.Conversion(), (2, 3, 64, 64))
    assert not step.passed
    assert "'tensorrt' is required" in step.found
