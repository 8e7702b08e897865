"""AP equals pycocotools' on its own files, whatever the batch, layout and input of the engine."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from support.pictures import prepared
from support.tiny_detector import NAMES, SURE, load_named, load_tiny, write_cells

from trt_yolov6.data.class_matching import match_classes, order_by_name
from trt_yolov6.data.coco import CocoDataset, CocoImage, load_coco, read_coco_image
from trt_yolov6.data.loader import AHEAD, load_batches
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines import load_engine
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.runtime.predict import detect
from trt_yolov6.spec import NmsSettings, PredictOptions, TensorSpec


@pytest.fixture
def cells(tmp_path: Path) -> CocoDataset:
    return write_cells(tmp_path / "data")


def by_pycocotools(dataset: CocoDataset, results: list[dict[str, Any]]) -> list[float]:
    """Score results as pycocotools' own demonstration does: from files, through loadRes."""
    file = dataset.root / "results.json"
    file.write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(dataset.annotation_file))
        scorer = COCOeval(truth, truth.loadRes(str(file)), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return [float(value) for value in scorer.stats[:6]]


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize(("fixed", "batch"), [(None, 1), (None, 4), (None, None), (4, None)])
def test_a_perfect_detector_scores_1(
    tmp_path: Path, cells: CocoDataset, fixed: int | None, batch: int | None, uint8: bool
) -> None:
    with load_tiny(tmp_path, batch=fixed, uint8=uint8) as engine:
        result = evaluate(engine, cells, PredictOptions(0.6, batch=batch), progress=False)
    assert result.ap == pytest.approx(1)
    assert result.per_class == pytest.approx((1, 1, 1))
    assert (result.images, result.detections) == (11, 55)
    assert result.ap_large is None  # there are no large cells


def test_other_threads_may_print_meanwhile(
    tmp_path: Path,
    cells: CocoDataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    index = COCO.createIndex

    def heard(coco: COCO) -> None:
        index(coco)
        other = threading.Thread(target=print, args=("heard",))
        other.start()
        other.join()

    monkeypatch.setattr(COCO, "createIndex", heard)
    with load_tiny(tmp_path) as engine:
        evaluate(engine, cells, SURE, progress=False)
    assert set(capsys.readouterr().out.split()) == {"heard"}
    COCO().createIndex()  # it is quiet for `evaluate` only
    assert "index created!" in capsys.readouterr().out


def test_rows_score_objectness_times_class(tmp_path: Path, cells: CocoDataset) -> None:
    with load_tiny(tmp_path, "rows") as engine:
        # Its scores are half as high.
        nms = PredictOptions(confidence=0.3)
        result = evaluate(engine, cells, nms, progress=False)
        assert result.ap == pytest.approx(1)
        half = PredictOptions(confidence=0.51)
        assert evaluate(engine, cells, half, progress=False).detections == 0


def test_imperfect_results_score_as_pycocotools_scores_their_file(tmp_path: Path) -> None:
    dataset = write_cells(tmp_path / "data", images=20, spoil=0.5)
    # Its annotation with id 0 would never match; pycocotools' own file must not have one.
    content = json.loads(dataset.annotation_file.read_text())
    for box in content["annotations"]:
        box["id"] += 1
    dataset.annotation_file.write_text(json.dumps(content))
    nms = PredictOptions(confidence=0.7)  # misses the paler cells
    with load_tiny(tmp_path) as engine:
        result = evaluate(engine, dataset, nms, progress=False)
        found = detect(engine, [read_coco_image(image) for image in dataset.images], nms)
    records = [
        {
            "image_id": image.id,
            "category_id": dataset.category_ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image, one in zip(dataset.images, found, strict=True)
        for (x1, y1, x2, y2), score, label in zip(
            one.xyxy.tolist(), one.confidence.tolist(), one.class_id.tolist(), strict=True
        )
    ]
    mine = [result.ap, result.ap50, result.ap75, result.ap_small, result.ap_medium]
    theirs = by_pycocotools(dataset, records)
    assert mine == pytest.approx(theirs[:5])
    assert theirs[5] == -1  # no large cells
    assert result.ap_large is None
    assert result.ap is not None
    assert 0.2 < result.ap < 0.9


def test_a_border_moves_nothing_but_the_scale(tmp_path: Path) -> None:
    # 64 less twice 16: each cell of the small picture falls on a quarter of the detector's.
    dataset = write_cells(tmp_path / "data", images=2)
    with load_tiny(tmp_path) as engine:
        image = np.zeros((32, 32, 3), np.uint8)
        image[8:16, 16:24, 1] = 255
        (found,) = detect(engine, [image], PredictOptions(0.6, border=16))
        np.testing.assert_allclose(found.xyxy, [[16, 8, 24, 16]])
        assert (
            evaluate(engine, dataset, PredictOptions(0.6, border=16), progress=False).ap is not None
        )


def test_the_result_is_flat_json_with_null_for_sizes_without_objects(
    tmp_path: Path, cells: CocoDataset, capfd: pytest.CaptureFixture[str]
) -> None:
    with load_tiny(tmp_path) as engine:
        result = evaluate(engine, cells, SURE, progress=True)
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert value["AP"] == pytest.approx(1)
    assert value["APl"] is None
    assert value["images"] == 11
    assert value["engine"] == engine.path.name
    assert value["backend"] == "onnxruntime"
    assert {"AP50", "AP75", "APs", "APm", "precision"} < value.keys()
    stages = ("read_s", "preprocess_s", "inference_s", "postprocess_s", "coco_s", "tail_s")
    assert all(0 < value[stage] < 60 for stage in stages)
    # Matching may overlap with the engine; its end does not.
    assert value["wall_s"] >= value["inference_s"] + value["tail_s"]
    # Where standard error is not a terminal, there is no progress bar either.
    assert capfd.readouterr() == ("", "")


def test_nothing_found_scores_0(tmp_path: Path, cells: CocoDataset) -> None:
    with load_tiny(tmp_path) as engine:
        for image in cells.images:
            Image.new("RGB", (image.width, image.height)).save(image.path)
        result = evaluate(engine, cells, SURE, progress=False)
    assert (result.ap, result.detections) == (0, 0)
    assert "finds nothing in any image" in result.notes[0]


def test_without_an_object_there_is_no_ap_and_that_is_said(
    tmp_path: Path, cells: CocoDataset
) -> None:
    empty = rewrite(cells, lambda content: content["annotations"].clear())
    with load_tiny(tmp_path) as engine:
        result = evaluate(engine, empty, SURE, progress=False)
    assert result.ap is None
    assert result.notes == (f"{cells.annotation_file} has no object, so there is no AP",)


def test_faulty_objects_count_as_in_pycocotools_and_are_noted(
    tmp_path: Path, cells: CocoDataset
) -> None:
    def spoil(content: dict[str, Any]) -> None:
        content["annotations"][3]["bbox"] = [5000, 5000, 10, 10]
        content["annotations"].append({**content["annotations"][0], "id": 999})

    found: list[dict[str, Any]] = []

    def seen(image: CocoImage, detections: Detections) -> None:
        for (x1, y1, x2, y2), score, place in detections.as_tuples():
            box = [x1, y1, x2 - x1, y2 - y1]
            number = spoilt.category_ids[place]
            found.append({"image_id": image.id, "category_id": number, "bbox": box, "score": score})

    spoilt = rewrite(cells, spoil)
    with load_tiny(tmp_path) as engine:
        result = evaluate(engine, spoilt, SURE, progress=False, seen=seen)
    expected = by_pycocotools(spoilt, found)[0]
    assert result.ap == pytest.approx(expected, abs=1e-6)
    assert 0.8 < expected < 1
    assert "has 2 objects outside the image, without area or annotated twice" in result.notes[0]


def rewrite(dataset: CocoDataset, change: Callable[[dict[str, Any]], None]) -> CocoDataset:
    content = json.loads(dataset.annotation_file.read_text())
    change(content)
    dataset.annotation_file.write_text(json.dumps(content))
    return load_coco(dataset.root)


def test_a_class_with_objects_that_the_engine_does_not_know_is_refused(
    tmp_path: Path, cells: CocoDataset
) -> None:
    def add_class(content: dict[str, Any]) -> None:
        content["categories"].append({"id": 99, "name": "infrared"})
        content["annotations"][0]["category_id"] = 99

    with (
        load_named(tmp_path) as engine,
        pytest.raises(UserError, match=r"knows 3 classes \(red, green, blue\), but not infrared"),
    ):
        evaluate(engine, rewrite(cells, add_class), progress=False)
    with (
        load_tiny(tmp_path) as engine,
        pytest.raises(UserError, match=r"tiny.*3 classes.*instances_val\.json has 4"),
    ):
        evaluate(engine, load_coco(cells.root), progress=False)


@pytest.mark.parametrize("has_names", [True, False])
def test_a_category_that_nobody_annotated_is_left_out_and_named(
    tmp_path: Path, cells: CocoDataset, has_names: bool
) -> None:
    """Roboflow puts one in front that stands for the whole data set."""
    changed = rewrite(cells, lambda content: content["categories"].insert(0, ROOT_CATEGORY))
    with load_named(tmp_path) if has_names else load_tiny(tmp_path) as engine:
        result = evaluate(engine, changed, SURE, progress=False)
    assert result.ap == pytest.approx(1)
    assert result.class_names == NAMES
    assert "no object is of it: cells" in result.notes[0]


ROOT_CATEGORY = {"id": 0, "name": "cells", "supercategory": "none"}


def test_classes_in_another_order_are_matched_by_name_and_that_is_said(
    tmp_path: Path, cells: CocoDataset
) -> None:
    ids = {10: 3, 20: 1, 30: 2}

    def reorder(content: dict[str, Any]) -> None:
        for item in content["categories"]:
            item["id"] = ids[item["id"]]
            item["name"] = item["name"].upper()
        for item in content["annotations"]:
            item["category_id"] = ids[item["category_id"]]

    with load_named(tmp_path) as engine:
        straight = evaluate(engine, cells, SURE, progress=False)
        result = evaluate(engine, rewrite(cells, reorder), SURE, progress=False)
    assert straight.notes == ()
    assert (straight.ap, result.ap) == pytest.approx((1, 1))
    assert result.class_names == ("GREEN", "BLUE", "RED")
    assert "matched by name" in result.notes[0]


def test_numbers_are_names_where_both_sides_have_the_same() -> None:
    ours = tuple(map(str, range(1, 11)))
    theirs = tuple(sorted(ours))  # as VOC's classes are: "10" is the second
    every = [True] * 10
    places = match_classes("engine", ours, "data", theirs, every).matches
    assert tuple(theirs[place] for place in places if place is not None) == ours
    order = order_by_name(ours, theirs, every)
    assert order == tuple(int(name) - 1 for name in theirs)
    # Beside other names they only count.
    assert match_classes("engine", ("1", "0"), "data", ("cat", "dog"), every[:2]).matches == (0, 1)


def test_names_that_do_not_agree_are_taken_in_order_and_named(
    tmp_path: Path, cells: CocoDataset
) -> None:
    def rename(content: dict[str, Any]) -> None:
        content["categories"][2]["name"] = "azure"

    with load_named(tmp_path) as engine:
        result = evaluate(engine, rewrite(cells, rename), SURE, progress=False)
    assert result.ap == pytest.approx(1)
    assert result.notes == (
        "the names of some classes differ, so they are taken in order: blue as azure",
    )


def test_two_classes_of_one_name_are_taken_in_order_and_named(
    tmp_path: Path, cells: CocoDataset
) -> None:
    def rename(content: dict[str, Any]) -> None:
        content["categories"][2]["name"] = content["categories"][0]["name"]

    with load_named(tmp_path) as engine:
        result = evaluate(engine, rewrite(cells, rename), SURE, progress=False)
    assert result.ap == pytest.approx(1)
    assert "has two classes named red, so all are taken in order" in result.notes[0]


def test_a_data_set_with_some_of_the_classes_counts_those(
    tmp_path: Path, cells: CocoDataset
) -> None:
    def only_blue(content: dict[str, Any]) -> None:
        content["categories"] = content["categories"][2:]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 30]

    with load_named(tmp_path) as engine:
        result = evaluate(engine, rewrite(cells, only_blue), SURE, progress=False)
    assert result.ap == pytest.approx(1)
    assert result.notes[0].startswith("classes of ")
    assert result.notes[0].endswith("are not counted: red, green")


def test_a_class_the_data_does_not_have_is_refused_when_the_engine_names_none(
    tmp_path: Path, cells: CocoDataset
) -> None:
    content = json.loads(cells.annotation_file.read_text())
    content["categories"] = content["categories"][:1]
    content["annotations"] = []
    cells.annotation_file.write_text(json.dumps(content))
    with load_tiny(tmp_path, "end2end") as engine:
        (tmp_path / "bare.onnx").write_bytes(engine.path.read_bytes())
    with (
        load_engine(tmp_path / "bare.onnx") as engine,
        pytest.raises(UserError, match=r"class 1 .*has 1 class;"),
    ):
        evaluate(engine, load_coco(cells.root), PredictOptions(batch=1), progress=False)


def test_boxes_are_scored_as_predicted_not_clipped_to_the_image(tmp_path: Path) -> None:
    # The second picture has half the detector's height: above and below it all is gray.
    dataset = write_cells(tmp_path / "data", images=2)
    gray = PredictOptions(confidence=0.4)
    with load_tiny(tmp_path) as engine:
        pixels = [read_coco_image(image) for image in dataset.images]
        shown = sum(len(one) for one in detect(engine, pixels, gray))
        scored = evaluate(engine, dataset, gray, progress=False).detections
    # 32 gray cells, each found as all three classes, are not detections in the image.
    assert (shown, scored) == (10, 10 + 32 * 3)


def test_a_batch_the_engine_does_not_take_is_refused(tmp_path: Path, cells: CocoDataset) -> None:
    with (
        load_tiny(tmp_path, batch=4) as engine,
        pytest.raises(UserError, match="only batch 4, not 3"),
    ):
        evaluate(engine, cells, PredictOptions(batch=3), progress=False)


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        (PredictOptions(0.1, 0.65, 100), "`confidence` 0.2"),
        (PredictOptions(0.3, 0.5, 100), "`iou` 0.65"),
        (PredictOptions(0.3, 0.65, 101), "`max_detections` 100"),
    ],
)
def test_thresholds_an_end2end_engine_cannot_meet_are_refused(
    tmp_path: Path, cells: CocoDataset, asked: PredictOptions, option: str
) -> None:
    with load_tiny(tmp_path, "end2end", nms=NmsSettings(0.2, 0.65, 100)) as engine:
        with pytest.raises(UserError, match=option):
            evaluate(engine, cells, asked, progress=False)
        for possible in (PredictOptions(0.2, 0.65, 100), PredictOptions(0.3, 0.65, 50)):
            assert evaluate(engine, cells, possible, progress=False).detections == 11


def test_an_unreadable_image_ends_the_evaluation_and_its_threads(
    tmp_path: Path, cells: CocoDataset
) -> None:
    cells.images[5].path.write_bytes(b"")
    before = threading.active_count()
    with load_tiny(tmp_path) as engine, pytest.raises(UserError, match=r"5\.png is empty"):
        evaluate(engine, cells, PredictOptions(batch=2), progress=False)
    assert threading.active_count() == before


FLOATS = TensorSpec("images", (None, 3, 32, 32), np.dtype(np.float32))


def test_the_loader_reads_a_bounded_number_of_images_ahead() -> None:
    begun: list[int] = []

    def read(index: int) -> NDArray[np.uint8]:
        begun.append(index)
        return np.full((32, 32, 3), index, np.uint8)

    before = threading.active_count()
    batches = load_batches(range(1000), read, FLOATS, batch=5, workers=2)
    for number in range(3):
        batch = next(batches)
        assert batch.items == tuple(range(5 * number, 5 * number + 5))
        np.testing.assert_allclose(batch.input[:, 0, 0, 0] * 255, batch.items, rtol=1e-6)
        assert len(begun) <= 5 * (number + 1 + AHEAD)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_the_last_batch_is_padded_and_unreadable_items_leave_no_gap() -> None:
    def read(index: int) -> NDArray[np.uint8]:
        if index in (1, 4):
            raise UserError(f"{index} is bad.")
        return np.full((32, 32, 3), 50 + index, np.uint8)

    first, second = load_batches(range(5), read, FLOATS, batch=4, pad_to=4, skip_unreadable=True)
    assert first.items == (0, 2, 3)
    assert [(item, str(error)) for item, error in first.failures] == [(1, "1 is bad.")]
    np.testing.assert_allclose(first.input[:, 1, 5, 5] * 255, [50, 52, 53, 0], rtol=1e-6)
    assert (second.items, len(second.input)) == ((), 4)


@pytest.mark.parametrize("kind", [np.float32, np.uint8])
def test_images_are_laid_out_as_the_engine_reads_them(kind: type) -> None:
    shape = (None, 3, 8, 16) if kind is np.float32 else (None, 8, 16, 3)
    images = list(np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3)).astype(np.uint8))
    made = prepared(images, TensorSpec("images", shape, np.dtype(kind)))
    stacked = np.stack(images)
    wanted = stacked.transpose(0, 3, 1, 2) / np.float32(255) if kind is np.float32 else stacked
    assert made.flags.c_contiguous
    assert made.dtype == kind
    np.testing.assert_array_equal(made, wanted)
