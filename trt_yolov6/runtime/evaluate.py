"""COCO average precision of an engine on a data set, and where the time went."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from trt_yolov6.data.class_matching import match_classes
from trt_yolov6.data.coco import CocoDataset, CocoImage, read_coco_image
from trt_yolov6.data.loader import Batch
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines.base import Engine
from trt_yolov6.errors import ClassesDifferError
from trt_yolov6.runtime.evaluation_plots import Confusion
from trt_yolov6.runtime.predict import process
from trt_yolov6.spec import NmsSettings


@dataclass(frozen=True)
class StageSeconds:
    """Seconds each stage took; they overlap, so their sum may exceed the wall time.

    Reading and pre-processing are summed over their threads.
    """

    read: float
    preprocess: float
    inference: float
    """The engine, with the copies to and from it; everything else overlaps it, up to `tail`."""
    postprocess: float
    coco: float
    """Matching, batch by batch in parallel with the engine, and scoring at the end."""
    tail: float
    """Wall time after the engine was done with its last batch: that batch's post-processing and
    matching, and the scoring. A part of both stages, so it is not to be added to them."""


@dataclass(frozen=True)
class Evaluation:
    """COCO AP in 0..1 (IoU 0.50:0.95, 100 detections an image) and the time it took.

    An AP is None where the data set has no object of the kind.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    per_class: tuple[float | None, ...]
    """AP by class of the data set."""
    class_names: tuple[str, ...]
    images: int
    detections: int
    seconds: StageSeconds
    wall_seconds: float
    engine: str
    """File name of the engine."""
    precision: str
    backend: str
    notes: tuple[str, ...] = ()
    """Notes for the reader of the figures."""
    curves: NDArray[np.float64] | None = dataclasses.field(default=None, repr=False)
    """(101, classes): precision at recalls 0, 0.01 ... 1 and IoU 0.5; -1 without an object."""
    confusion: NDArray[np.int64] | None = dataclasses.field(default=None, repr=False)
    """See `evaluation_plots.Confusion`; None unless asked for."""

    def to_json(self) -> dict[str, Any]:
        """Return a flat dictionary, ready for `json.dumps`; an undefined AP is null.

        `wall_s` is the time in all. The other times are `StageSeconds`': `coco_s` sums up what
        mostly overlaps the engine; only `tail_s` is spent after its last batch.
        """
        return {
            "AP": self.ap,
            "AP50": self.ap50,
            "AP75": self.ap75,
            "APs": self.ap_small,
            "APm": self.ap_medium,
            "APl": self.ap_large,
            "images": self.images,
            "engine": self.engine,
            "precision": self.precision,
            "backend": self.backend,
            "detections": self.detections,
            "read_s": self.seconds.read,
            "preprocess_s": self.seconds.preprocess,
            "inference_s": self.seconds.inference,
            "postprocess_s": self.seconds.postprocess,
            "coco_s": self.seconds.coco,
            "tail_s": self.seconds.tail,
            "wall_s": self.wall_seconds,
            "notes": list(self.notes),
            "per_class": [
                {"name": name, "AP": ap}
                for name, ap in zip(self.class_names, self.per_class, strict=True)
            ],
        }


@dataclass(frozen=True)
class _Matches:
    """Which detections of a batch meet which boxes."""

    by_image: dict[int, list[Any]]
    """pycocotools' matches by image id: one for each class and size range, in that order."""
    detections: int


def evaluate(
    engine: Engine,
    dataset: CocoDataset,
    *,
    batch: int | None = None,
    nms: NmsSettings | None = None,
    border: int = 0,
    workers: int | None = None,
    progress: bool = True,
    confusion: bool = False,
) -> Evaluation:
    """Measure an engine's COCO AP.

    Boxes are scored as predicted, even beyond the image, as pycocotools takes them. The authors'
    evaluator clamps them to the image first, which raises the AP where the border cuts off many
    objects: the sample's is 0.5207 as predicted, the reference figure, and 0.528 clamped.

    Args:
        engine: any loaded engine.
        dataset: a split with the engine's classes, see `class_matching.match_classes`.
        batch: images at a time; default: see `inference.choose_batch`.
        nms: thresholds; default: `NmsSettings()`, confidence 0.03 and IoU 0.65.
        border: gray pixels around the image, see `letterbox.fit`.
        workers: threads that read and pre-process; default: one a core, at most eight.
        progress: show a progress bar on stderr.
        confusion: count which class objects are taken for.

    Raises:
        UserError: the classes do not match, an image is unreadable or not of the recorded size, or
            the engine cannot do what is asked.
    """
    match_of = match_classes(
        engine.path.name,
        engine.class_names,
        dataset.annotation_file,
        dataset.class_names,
        _used(dataset),
    )
    notes = list(match_of.notes)
    # Of each class of the engine, its category; None: the data set does not have it.
    categories = tuple(
        None if place is None else dataset.category_ids[place] for place in match_of.places
    )
    dataset = dataclasses.replace(
        dataset,
        category_ids=tuple(dataset.category_ids[place] for place in match_of.kept),
        class_names=tuple(dataset.class_names[place] for place in match_of.kept),
    )
    start = time.perf_counter()
    read = preprocess = inference = postprocess = scoring = 0.0
    engine_done = start
    found_in_all = 0
    matches: dict[int, list[Any]] = {}

    counted = Confusion(len(dataset.class_names)) if confusion else None
    rows = [
        None if place is None else match_of.kept.index(place) for place in match_of.places
    ] or list(range(len(dataset.class_names)))
    objects = _objects_by_image(dataset) if confusion else {}

    def match(batch: Batch[CocoImage], found: list[Detections]) -> _Matches:
        if counted is not None:
            for image, detections in zip(batch.items, found, strict=True):
                counted.add(detections, rows, *objects[image.id])
        return _match(truth.result(), dataset, categories, batch.items, found)

    bar = tqdm(
        total=len(dataset.images), desc="eval", unit="image", disable=None if progress else True
    )
    with bar, ThreadPoolExecutor(1, thread_name_prefix="coco") as pool:
        truth = pool.submit(_coco, dataset, dataset.images, dataset.annotations)
        for step in process(
            engine,
            dataset.images,
            read_coco_image,
            match,
            nms=nms,
            border=border,
            batch=batch,
            workers=workers,
            clip=False,
            tell=notes.append,
        ):
            matches.update(step.result.by_image)
            read += step.batch.read_seconds
            preprocess += step.batch.preprocess_seconds
            inference += step.inference_seconds
            engine_done = step.inference_end
            postprocess += step.postprocess_seconds
            scoring += step.finish_seconds
            found_in_all += step.result.detections
            bar.update(len(step.batch.items))
    before = time.perf_counter()
    (ap, ap50, ap75, ap_small, ap_medium, ap_large), per_class, curves = _average_precision(
        truth.result(), matches
    )
    end = time.perf_counter()
    scoring += end - before
    return Evaluation(
        ap=ap,
        ap50=ap50,
        ap75=ap75,
        ap_small=ap_small,
        ap_medium=ap_medium,
        ap_large=ap_large,
        per_class=per_class,
        class_names=dataset.class_names,
        images=len(dataset.images),
        detections=found_in_all,
        seconds=StageSeconds(
            read, preprocess, inference, postprocess, scoring, tail=end - engine_done
        ),
        wall_seconds=end - start,
        engine=engine.path.name,
        precision=engine.precision,
        backend=engine.backend,
        notes=tuple(notes),
        curves=curves,
        confusion=None if counted is None else counted.counts,
    )


def _to_coco(
    image: CocoImage, detections: Detections, category_ids: Sequence[int | None]
) -> list[dict[str, Any]]:
    corners = detections.xyxy.astype(np.float64)
    corners[:, 2:] -= corners[:, :2]
    return [
        {
            "image_id": image.id,
            "category_id": category_ids[index],
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "score": score,
        }
        for box, score, index in zip(
            corners.tolist(),
            detections.confidence.tolist(),
            detections.class_id.tolist(),
            strict=True,
        )
        if category_ids[index] is not None
    ]


def _objects_by_image(
    dataset: CocoDataset,
) -> dict[int, tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Return the corners and the classes of each image's objects, crowds aside."""
    place_of = {number: place for place, number in enumerate(dataset.category_ids)}
    found: dict[int, list[tuple[list[float], int]]] = {image.id: [] for image in dataset.images}
    for entry in dataset.annotations:
        place = place_of.get(entry["category_id"])
        if place is not None and not entry["iscrowd"]:
            x, y, width, height = entry["bbox"]
            found[entry["image_id"]].append(([x, y, x + width, y + height], place))
    return {
        number: (
            np.array([box for box, _ in items], np.float64).reshape(-1, 4),
            np.array([place for _, place in items], np.int64),
        )
        for number, items in found.items()
    }


def _used(dataset: CocoDataset) -> list[bool]:
    """Return of each category whether any object is of it."""
    used = {entry["category_id"] for entry in dataset.annotations}
    return [number in used for number in dataset.category_ids]


def _coco(dataset: CocoDataset, images: Sequence[CocoImage], annotations: Sequence[Any]) -> Any:
    """Return a pycocotools COCO object of some of the data set's images with these annotations."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image.id} for image in images],
        "categories": [{"id": number} for number in dataset.category_ids],
        "annotations": list(annotations),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _match(
    truth: Any,
    dataset: CocoDataset,
    categories: Sequence[int | None],
    images: Sequence[CocoImage],
    found: Sequence[Detections],
) -> _Matches:
    """Match the detections of a batch to the annotated boxes.

    Raises:
        UserError: a detection is of a class that the data set does not have.
    """
    highest = max((int(one.class_id.max(initial=0)) for one in found), default=0)
    if highest >= len(categories):
        raise ClassesDifferError(
            f"the engine finds class {highest} (from 0), {dataset.annotation_file} has "
            f"{len(categories)} classes; evaluate the engine on the data set it was "
            "trained for."
        )
    results = [
        entry
        for image, detections in zip(images, found, strict=True)
        for entry in _to_coco(image, detections, categories)
    ]
    for number, entry in enumerate(results, start=1):
        entry["id"] = number
    scorer = COCOeval(truth, _coco(dataset, images, results), "bbox")
    scorer.params.imgIds = [image.id for image in images]
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.evaluate()
    # A list by class, then size range, then image, the images sorted.
    ids = sorted(image.id for image in images)
    by_image = {number: scorer.evalImgs[place :: len(ids)] for place, number in enumerate(ids)}
    return _Matches(by_image, len(results))


def _average_precision(
    truth: Any, matches: Mapping[int, list[Any]]
) -> tuple[list[float | None], tuple[float | None, ...], NDArray[np.float64]]:
    """Return AP, AP50, AP75, APs, APm, APl; AP by class; precision by recall and class at 0.5."""
    scorer = COCOeval(truth, iouType="bbox")
    by_image = [matches[number] for number in scorer.params.imgIds]
    scorer.evalImgs = [match for same_kind in zip(*by_image, strict=True) for match in same_kind]
    # The attributes that `evaluate` leaves for `accumulate`.
    scorer._paramsEval = copy.deepcopy(scorer.params)
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.accumulate()
        scorer.summarize()
    # Axes: IoU threshold, recall, class, size range (0: all), detections an image (2: 100).
    precision = scorer.eval["precision"][:, :, :, 0, 2]
    per_class = (
        _defined(values[values > -1].mean() if (values > -1).any() else -1.0)
        for values in np.moveaxis(precision, 2, 0)
    )
    return [_defined(value) for value in scorer.stats[:6]], tuple(per_class), precision[0]


def _defined(value: float) -> float | None:
    """Return None for pycocotools' -1: no object of the kind."""
    return None if value < 0 else float(value)
