"""`bench --stages`: every stage is timed, and the whole is no faster than the slowest place."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from support.host_images import HostDecoder, HostImagesEngine
from support.kernels_on_cpu import letterbox_on_cpu
from support.tiny_detector import load_tiny

from trt_yolov6.bench.stages import (
    Stage,
    StageReport,
    Together,
    benchmark_stages,
    format_stages,
)
from trt_yolov6.cli import main
from trt_yolov6.data.images import list_images
from trt_yolov6.errors import UserError
from trt_yolov6.spec import NmsSettings, PredictOptions

IMAGES = list_images(Path(__file__).parents[1] / "samples" / "images" / "val")[:3]
SURE = PredictOptions(confidence=0.5)


def test_the_limit_is_the_slowest_place_whose_stages_follow_one_another() -> None:
    stages = (
        Stage("decode", "CPU", 0.010),
        Stage("letterbox", "GPU", 0.006),
        Stage("engine", "GPU", 0.014),
        Stage("boxes", "thread", 0.001),
    )
    whole = Together(1500.0, 1.5, 7.0)
    report = StageReport(Path("a.trt"), "fp16", "x", "GPU", 32, 0.03, stages, whole)
    assert report.places == pytest.approx({"CPU": 3200, "GPU": 1600, "thread": 32000})
    place, fps = report.limit
    assert place == "GPU"
    assert fps == pytest.approx(1600)
    value = report.to_json()
    assert value["to_slowest_place"] == pytest.approx(1500 / 1600)
    assert value["stages"][0] == {"name": "decode", "place": "CPU", "ms": 10, "fps": 3200}
    assert "94% of what the slowest place, GPU, allows (1600)" in format_stages(report)


def test_on_a_cpu_every_stage_is_timed(tmp_path: Path) -> None:
    with load_tiny(tmp_path) as engine:
        report = benchmark_stages(engine, IMAGES, SURE, batch=2, duration=0.4)
    assert [stage.name for stage in report.stages] == [
        *("decode", "letterbox", "engine", "suppression")
    ]
    assert all(stage.seconds > 0 for stage in report.stages)
    assert report.together.fps > 0
    assert report.together.cores > 0


class StagedEngine(HostImagesEngine):
    """Has stages, too."""

    placed: Any = None

    def image_stage_seconds(self, images: Any, placed: Any, nms: NmsSettings) -> dict[str, float]:
        assert len(images) == len(placed)
        self.placed = placed
        return {"letterbox": 0.001, "engine": 0.002, "suppression and copy back": 0.0005}


def test_on_an_engine_that_takes_images_its_own_stages_are_shown(tmp_path: Path) -> None:
    kernel = resources.files("trt_yolov6.engines.cuda") / "letterbox.cu"
    with resources.as_file(kernel) as source:
        library = letterbox_on_cpu(source, tmp_path, byte_input=False)
    with load_tiny(tmp_path) as plain:
        engine = StagedEngine(plain, library, HostDecoder())
        options = dataclasses.replace(SURE, border=3)
        report = benchmark_stages(engine, IMAGES, options, batch=2, duration=0.4)
    assert all(min(one.top, one.left) >= 3 for one in engine.placed)
    assert [stage.name for stage in report.stages] == [
        *("read and decode", "letterbox", "engine", "suppression and copy back"),
        "boxes to the images",
    ]
    assert report.stages[0].place == "GPU's decoder"


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with load_tiny(tmp_path) as engine:
        path = engine.path
    source = IMAGES[0].parent
    result = tmp_path / "stages.json"
    arguments = ["bench", "--engine", str(path), "--stages", "--source", str(source)]
    main([*arguments, "--batch", "2", "--duration", "0.4", "--conf", "0.5", "--json", str(result)])
    out = capsys.readouterr().out
    assert "images/s alone" in out
    assert "all together" in out
    assert {stage["name"] for stage in json.loads(result.read_text())["stages"]} >= {"engine"}


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    content = IMAGES[0].read_bytes()
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(content[: len(content) // 2])
    with load_tiny(tmp_path) as engine:
        for batch in (1, 2):
            with pytest.raises(UserError, match=r"damaged\.jpg is cut short"):
                benchmark_stages(engine, [IMAGES[0], damaged], batch=batch, duration=0.4)


def test_without_images_there_is_nothing_to_time(tmp_path: Path) -> None:
    with load_tiny(tmp_path) as engine, pytest.raises(UserError, match="no image to time"):
        benchmark_stages(engine, [], batch=1)
