"""The figures that the sample and a foreign detector must give, through every form of the graph.

Expected: an independent evaluation in FP32 (letterbox 640, confidence 0.03, IoU 0.65, boxes as
predicted) gave the sample AP 0.5207, AP50 0.8606, and YOLOv6Lite-L on 128 COCO images AP 0.3476.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.accuracy import average_precision, first_images, graph_precision

from trt_yolov6.data.coco import CocoDataset, load_coco
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.build import BuiltEngine, build_engine, write_graph
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.runtime.evaluate import Evaluation, evaluate
from trt_yolov6.spec import BatchProfile, NmsSettings, PredictOptions

pytestmark = pytest.mark.slow

EIGHT = PredictOptions(batch=8)


@pytest.fixture(scope="module")
def reference(sample_engine: BuiltEngine, root: Path) -> Evaluation:
    with load_engine(sample_engine.path) as engine:
        return evaluate(engine, load_coco(root / "samples"), EIGHT, progress=False)


@pytest.fixture(scope="module")
def few(root: Path) -> CocoDataset:
    """Two batches, the second not full."""
    return first_images(load_coco(root / "samples"), 12)


def test_fp32_gives_the_independent_figures(reference: Evaluation) -> None:
    assert reference.images == 72
    assert reference.ap == pytest.approx(0.5207, abs=0.003)
    assert reference.ap50 == pytest.approx(0.8606, abs=0.003)


def test_most_of_the_time_is_the_engines_own(reference: Evaluation) -> None:
    seconds = reference.seconds
    # Both are measured in the same run, so a busy machine slows both: some 10 times on an idle one.
    assert seconds.inference > 2 * (seconds.postprocess + seconds.coco)


@pytest.fixture(scope="module")
def expected_320(
    sample_320: Graph, few: CocoDataset, tmp_path_factory: pytest.TempPathFactory
) -> float:
    """AP of the sample on them, of smaller images, for a quarter of the time."""
    return graph_precision(sample_320.model, tmp_path_factory.mktemp("320"), few)


def test_batch_1_gives_the_same(
    sample_320: Graph, few: CocoDataset, expected_320: float, tmp_path: Path
) -> None:
    path = write_graph(sample_320, tmp_path / "graph.onnx")
    assert average_precision(path, few, batch=1) == pytest.approx(expected_320, abs=1e-4)


SMALL = ExportSettings((320, 320))


@pytest.mark.parametrize(
    "settings",
    [
        dataclasses.replace(SMALL, uint8_input=True),
        dataclasses.replace(SMALL, nms=NmsSettings()),
        dataclasses.replace(SMALL, batch=BatchProfile(8, 8, 8)),
        dataclasses.replace(SMALL, fp16=True),
    ],
    ids=["uint8", "end2end", "static batch 8", "fp16"],
)
def test_every_form_of_the_graph_gives_the_same(
    settings: ExportSettings, root: Path, tmp_path: Path, few: CocoDataset, expected_320: float
) -> None:
    graph = graph_from_checkpoint(root / "samples" / "yolov6n_bccd_authors.pt", settings)
    built = build_engine(graph, backend="onnxruntime", output=tmp_path / "engine.onnx")
    assert average_precision(built.path, few) == pytest.approx(expected_320, abs=0.004)


def test_a_foreign_detector_whose_category_ids_have_gaps(root: Path, tmp_path: Path) -> None:
    shared = root.parent / "shared"
    model = shared / "models" / "yolov6lite_l_320.onnx"
    if not model.is_file():
        pytest.skip(f"{model} is not here")
    built = build_engine(
        graph_from_onnx(model), backend="onnxruntime", output=tmp_path / "lite.onnx"
    )
    with load_engine(built.path) as engine:
        result = evaluate(
            engine,
            load_coco(shared / "data" / "coco256", "val2017"),
            PredictOptions(batch=8),
            progress=False,
        )
    assert len(result.per_class) == 80
    assert result.ap == pytest.approx(0.3476, abs=0.003)
