"""The confusion matrix counts by hand-made cases; the pictures are drawn, alike each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_detector import SURE, load_tiny, write_cells

from trt_yolov6.detectors.detections import Detections
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.runtime.evaluation_plots import Confusion, write_plots

OBJECTS = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], np.float64)
LABELS = np.array([0, 1, 1])


def found(*items: tuple[list[float], float, int]) -> Detections:
    boxes, scores, labels = zip(*items, strict=True)
    return Detections(
        np.array(boxes, np.float32), np.array(scores, np.float32), np.array(labels, np.int64)
    )


def test_every_object_and_every_sure_detection_is_counted_once() -> None:
    confusion = Confusion(2)
    confusion.add(
        found(
            ([0, 0, 10, 10], 0.9, 0),  # right
            ([20, 0, 30, 11], 0.8, 0),  # taken for the other class
            ([0, 0, 10, 9], 0.7, 0),  # a second one for the same object: nothing is left there
            ([80, 80, 90, 90], 0.6, 1),  # nothing is there
            ([40, 0, 50, 10], 0.1, 1),  # not sure enough: the third object is missed
        ),
        [0, 1],
        OBJECTS,
        LABELS,
    )
    # Rows: found as 0, as 1, not at all; columns: is 0, is 1, is nothing.
    assert confusion.counts.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 0]]


def test_classes_that_the_data_set_does_not_have_are_not_counted() -> None:
    confusion = Confusion(1)
    one = found(([0, 0, 10, 10], 0.9, 0), ([0, 0, 10, 10], 0.8, 1))
    confusion.add(one, [None, 0], OBJECTS[:1], LABELS[:1])
    assert confusion.counts.tolist() == [[1, 0], [0, 0]]


def test_a_perfect_detector_is_on_the_diagonal_and_drawn(tmp_path: Path) -> None:
    cells = write_cells(tmp_path / "data")
    with load_tiny(tmp_path) as engine:
        result = evaluate(engine, cells, SURE, progress=False, confusion=True)
    assert result.confusion is not None
    assert result.curves is not None
    assert result.confusion.sum() == np.trace(result.confusion) == 55
    assert result.curves.shape == (101, 3)
    assert result.curves.mean() == pytest.approx(1)
    for folder in ("one", "two"):
        write_plots(tmp_path / folder, cells.class_names, result.curves, result.confusion)
    for name in ("pr-curves.png", "confusion.png"):
        with Image.open(tmp_path / "one" / name) as picture:
            assert picture.format == "PNG"
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    no_formulas = (r"$\half$", "_background_", "a$b")
    write_plots(tmp_path / "three", no_formulas, result.curves, result.confusion)
