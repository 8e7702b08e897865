"""Engines are named by what they are, so that one build does not take another's place unsaid."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.small_graphs import detector

from trt_yolov6.cli import main
from trt_yolov6.engines import base, find_engine, load_engine
from trt_yolov6.engines.build import build_engine, engine_path, engine_stem, write_graph
from trt_yolov6.errors import UserError
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.runtime.predict import default_nms, resolve
from trt_yolov6.spec import BatchProfile, NmsSettings, PredictOptions


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Graph:
    monkeypatch.chdir(tmp_path)
    Path("net.onnx").write_bytes(detector().SerializeToString())
    return graph_from_onnx("net.onnx")


@pytest.mark.parametrize(
    ("changes", "target", "stem"),
    [
        ({}, None, "cells-fp32"),
        ({"precision": "int8"}, "t4", "cells-int8-t4"),
        ({"image_size": (320, 320)}, None, "cells-fp32-320"),
        ({"image_size": (384, 640)}, None, "cells-fp32-384x640"),
        ({"batch": BatchProfile(1, 1, 1)}, None, "cells-fp32-b1"),
        ({"batch": BatchProfile(1, 4, 8)}, None, "cells-fp32-b1-4-8"),
        ({"output_layout": "end2end", "precision": "fp16"}, None, "cells-fp16-end2end"),
    ],
)
def test_a_name_says_checkpoint_precision_and_what_is_not_usual(
    graph: Graph, changes: dict[str, Any], target: str | None, stem: str
) -> None:
    described = {"image_size": (640, 640)} | {
        name: value for name, value in changes.items() if name in ("image_size", "output_layout")
    }
    built = dataclasses.replace(
        graph,
        source=Path("in/cells.pt"),
        detector=dataclasses.replace(graph.detector, **described),
        **{name: value for name, value in changes.items() if name not in described},
    )
    assert engine_stem(built, target) == stem
    assert engine_stem(dataclasses.replace(built, source=Path("cells.pth")), target) == stem
    assert engine_path(built, "onnxruntime", None, target) == Path("engines", f"{stem}.onnx")
    assert engine_path(built, "onnxruntime", "x.onnx", target) == Path("x.onnx")


@pytest.mark.parametrize(
    ("source", "target", "stem"),
    [
        ("cells-int8-32.onnx", None, "cells-int8-32"),
        ("cells-int8.onnx", "t4", "cells-int8-32-t4"),
        ("cells-fp32.onnx", None, "cells-fp32-int8-32"),
        ("uint8.onnx", None, "uint8-int8-32"),
        ("cells-int8-32.pt", None, "cells-int8-32-int8-32"),
    ],
)
def test_a_name_does_not_say_again_what_the_exported_file_says(
    graph: Graph, source: str, target: str | None, stem: str
) -> None:
    built = dataclasses.replace(graph, source=Path(source), precision="int8")
    assert engine_stem(built, target) == stem


def test_an_engine_does_not_take_the_place_of_the_engine_that_it_is_built_from(
    graph: Graph,
) -> None:
    first = build_engine(graph, backend="onnxruntime").path
    second = build_engine(graph_from_onnx(first), backend="onnxruntime").path
    assert (first.name, second.name) == ("net-fp32-32.onnx", "net-fp32-32-fp32.onnx")


def test_a_short_name_stands_for_the_newest_build_and_that_is_said(
    graph: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = build_engine(graph, backend="onnxruntime").path
    newer = build_engine(dataclasses.replace(graph, precision="fp16"), backend="onnxruntime").path
    assert older.name == "net-fp32-32.onnx"
    os.utime(older, (1, 1))
    assert find_engine("engines/net.onnx") == newer
    os.utime(newer, (0, 0))
    assert find_engine("engines/net.onnx") == older
    # A file of that very name goes first.
    Path("engines/net.onnx").write_bytes(b"")
    assert find_engine("engines/net.onnx") == Path("engines/net.onnx")
    Path("engines/net.onnx").unlink()
    assert main(["inspect", "engines/net.onnx"]) == 0
    assert f"engines/net.onnx: taking the newest build of it, {older}" in capsys.readouterr().out
    for missing in ("engines/other.onnx", "engines/net.trt", "engines/ne.onnx"):
        with pytest.raises(UserError, match="does not exist"):
            find_engine(missing)


def test_a_short_name_that_stands_for_no_build_is_answered_with_what_is_there(
    graph: Graph, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mine-int8", "mine-fp16", "min-fp16"):
        build_engine(graph_from_onnx("net.onnx"), backend="onnxruntime", output=f"{name}.onnx")
    for short in ("mine.trt", "mine.onnx", "mine"):
        assert main(["bench", "--engine", short]) == 2
        said = f"{short} does not exist, but its folder has mine-fp16.onnx, mine-int8.onnx; name"
        assert said in capsys.readouterr().err


def test_a_damaged_manifest_of_another_engine_is_passed_over(graph: Graph) -> None:
    built = build_engine(graph, backend="onnxruntime").path
    Path("engines/other.onnx").write_bytes(b"another")
    Path("engines/other.json").write_bytes(b"{")
    assert find_engine("engines/net.onnx") == built


def test_replacing_an_engine_is_said(graph: Graph, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", "--onnx", "net.onnx", "--backend", "onnxruntime", "--quiet"]
    assert main(command) == 0
    assert "replacing" not in capsys.readouterr().out
    assert main(command) == 0
    assert "replacing engines/net-fp32-32.onnx (fp32, of net.onnx)" in capsys.readouterr().out
    assert main([*command, "--fp16"]) == 0
    assert "replacing" not in capsys.readouterr().out
    model = onnx.load("net.onnx")
    model.doc_string = "trained again"
    onnx.save(model, "net.onnx")
    assert main(command) == 0
    assert "replacing engines/net-fp32-32.onnx (fp32, of another net.onnx)" in "".join(
        capsys.readouterr()
    )


def test_an_exported_graph_is_known_by_its_manifest(graph: Graph) -> None:
    path = write_graph(graph_from_onnx("net.onnx", fp16=True), "half.onnx")
    with load_engine(path) as engine:
        assert engine.precision == "fp16"


def test_what_is_shown_has_one_default_threshold(graph: Graph, tmp_path: Path) -> None:
    write_graph(graph, "plain.onnx")
    with load_engine("plain.onnx") as engine:
        assert default_nms(engine) == NmsSettings(confidence=0.4)
        # What a graph has decided itself is not asked for again.
        inside = NmsSettings(confidence=0.5, iou=0.7, max_detections=100)
        engine.detector = dataclasses.replace(engine.detector, nms=inside)
        assert default_nms(engine) == engine.nms
        assert resolve(engine, PredictOptions()) == (engine.nms, 0)
        inside = NmsSettings(confidence=0.1, iou=0.7)
        engine.detector = dataclasses.replace(engine.detector, nms=inside)
        assert default_nms(engine) == NmsSettings(confidence=0.4, iou=0.7)
        inside = NmsSettings(confidence=0.001, iou=0.7)
        engine.detector = dataclasses.replace(engine.detector, nms=inside)
        assert resolve(engine, PredictOptions())[0] == NmsSettings(confidence=0.03, iou=0.7)


def test_options_change_only_what_they_give() -> None:
    inside = NmsSettings(confidence=0.1, iou=0.7, max_detections=50)
    options = PredictOptions(iou=0.5, border=3, batch=2)
    assert options.nms(inside) == NmsSettings(0.1, 0.5, 50)
    assert options.nms() == NmsSettings(iou=0.5)
    assert options.over(inside) == PredictOptions(0.1, 0.5, 50, border=3, batch=2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"iou": 2}, "`iou`"),
        ({"confidence": 1}, "`confidence`"),
        ({"max_detections": 0}, "detections"),
        ({"border": -1}, "`border`"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        PredictOptions(**options)


@pytest.mark.parametrize(("options", "border"), [({"resize": 20}, 6), ({"border": 5}, 5), ({}, 0)])
def test_the_border_follows_from_the_size_to_resize_to(
    graph: Graph, options: dict[str, Any], border: int
) -> None:
    write_graph(graph, "plain.onnx")
    with load_engine("plain.onnx") as engine:
        assert engine.image_size == (32, 32)
        assert resolve(engine, PredictOptions(**options)) == (NmsSettings(), border)
        with pytest.raises(UserError, match="border"):
            resolve(engine, PredictOptions(border=16))


def test_an_int8_graph_that_would_all_be_computed_in_float_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX 1.7 builds for a T4 without a GPU, and has no INT8 convolution for it."""
    pytest.importorskip("tensorrt_rtx")
    from trt_yolov6.engines.int8_probe import computes
    from trt_yolov6.quantization.types import INT8

    settings = base.BuildSettings(target="t4")
    assert not computes("tensorrt-rtx", settings, INT8)
    assert computes("tensorrt-rtx", base.BuildSettings(target="ada"), INT8)
    assert computes("onnxruntime", base.BuildSettings(), INT8)
