"""COCO average precision of an engine on a data set, and where the time went."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trt_yolov6.common.progress import progress_bar
from trt_yolov6.common.ranges import of_class
from trt_yolov6.common.text import counted
from trt_yolov6.data.class_matching import match_classes
from trt_yolov6.data.coco import CocoDataset, CocoImage, open_coco_image, read_coco_image
from trt_yolov6.data.loader import Batch
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines.base import Engine, EngineFacts
from trt_yolov6.errors import ClassesDifferError
from trt_yolov6.runtime.evaluation_plots import Confusion
from trt_yolov6.runtime.predict import Processed, process
from trt_yolov6.runtime.several_gpus import check_gpus, process_on_gpus
from trt_yolov6.spec import EnginePrecision, NmsSettings, PredictOptions

_this_thread = threading.local()


def _print(*args: Any, **options: Any) -> None:
    if not getattr(_this_thread, "is_quiet", False):
        print(*args, **options)


# Redirecting standard output would hide what other threads print, and two overlapping redirections
# may leave it redirected.
for _module in (pycocotools.coco, pycocotools.cocoeval):
    _module.print = _print


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep pycocotools from printing in this thread."""
    _this_thread.is_quiet = True
    try:
        yield
    finally:
        _this_thread.is_quiet = False


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
    """Wall time after the engine's last batch: that batch's post-processing and matching, and the
    scoring. The stages above contain it."""


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
    precision: EnginePrecision
    backend: str
    notes: tuple[str, ...] = ()
    """Notes for the reader of the figures."""
    curves: NDArray[np.float64] | None = dataclasses.field(default=None, repr=False)
    """(101, classes): precision at recalls 0, 0.01 ... 1 and IoU 0.5; -1 without an object."""
    confusion: NDArray[np.int64] | None = dataclasses.field(default=None, repr=False)
    """See `evaluation_plots.Confusion`; None unless asked for."""

    def to_json(self) -> dict[str, Any]:
        """Return a flat dictionary, ready for `json.dumps`; an undefined AP is null.

        `wall_s` is the time in all, the other times are `StageSeconds`'.
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
            **{f"{stage}_s": value for stage, value in vars(self.seconds).items()},
            "wall_s": self.wall_seconds,
            "notes": list(self.notes),
            "per_class": [
                {"name": name, "AP": ap}
                for name, ap in zip(self.class_names, self.per_class, strict=True)
            ],
        }


def evaluate(
    engine: Engine,
    dataset: CocoDataset,
    options: PredictOptions | None = None,
    *,
    progress: bool = True,
    confusion: bool = False,
    seen: Callable[[CocoImage, Detections], None] | None = None,
) -> Evaluation:
    """Measure an engine's COCO AP.

    Boxes are scored as predicted, even beyond the image, as pycocotools takes them. The authors'
    evaluator clamps them to the image first, which raises the AP where the border cuts off many
    objects: the sample's is 0.5207 as predicted, the reference figure, and 0.528 clamped.

    Args:
        engine: any loaded engine.
        dataset: a split with the engine's classes, see `class_matching.match_classes`.
        options: see `api.evaluate`; without `clip`.
        progress, confusion: see `api.evaluate`.
        seen: called with each image and its detections, whose class ids are the data set's, without
            those of classes that the data set lacks.

    Raises:
        UserError: the classes do not match, an image is unreadable or not of the recorded size, or
            the engine cannot do what is asked.
    """
    tally = _Tally(engine.facts, dataset, confusion=confusion)
    options = dataclasses.replace(of_class(options, PredictOptions, "options"), clip=False)
    matcher = _Matcher(tally.truth, keeps_found=confusion or seen is not None)
    run: Callable[..., Iterator[Processed[CocoImage, _Matched]]] = process
    if options.gpus > 1:
        run = functools.partial(process_on_gpus, check_gpus(options.gpus))
    with (
        progress_bar(len(dataset.images), desc="eval", unit="image", shown=progress) as bar,
        ThreadPoolExecutor(1, "coco") as pool,
    ):
        annotated = pool.submit(matcher.annotated)
        for step in run(
            engine, dataset.images, read_coco_image, matcher, options, open_item=open_coco_image
        ):
            tally.engine_done = step.inference_end
            seconds = {**step.stage_seconds, "coco": step.finish_seconds}
            tally.add(step.batch.items, step.result, step.notes, seconds)
            if seen is not None:
                for image, detections in zip(step.batch.items, step.result.found, strict=True):
                    seen(image, _in_classes_of(dataset, tally.truth, detections))
            bar.update(len(step.batch.items))
    return tally.evaluation(annotated.result())


@dataclass(frozen=True)
class _Matched:
    """Which detections of a batch meet which boxes."""

    by_image: dict[int, list[Any]]
    """pycocotools' matches by image id: one for each class and size range, in that order."""
    detections: int
    found: Sequence[Detections]
    """The detections, if the matcher keeps them; else empty."""


class _Matcher:
    """Matches the detections of batches to a data set's boxes; can be pickled."""

    def __init__(self, truth: _Truth, *, keeps_found: bool) -> None:
        self._truth = truth
        self._keeps_found = keeps_found
        self._lock = threading.Lock()
        self._annotated: Any = None

    def annotated(self) -> Any:
        """Return pycocotools' object of the data set, made once a process."""
        with self._lock:
            if self._annotated is None:
                data = self._truth.dataset
                self._annotated = _coco(data, data.images, data.annotations)
            return self._annotated

    def __call__(self, batch: Batch[CocoImage], found: list[Detections]) -> _Matched:
        return self.match(batch.items, found)

    def match(self, images: Sequence[CocoImage], found: Sequence[Detections]) -> _Matched:
        """Match the detections in some images to the annotated boxes.

        Raises:
            UserError: a detection is of a class that the data set does not have.
        """
        truth = self._truth
        highest = max((int(one.class_id.max(initial=0)) for one in found), default=0)
        if highest >= len(truth.categories):
            raise ClassesDifferError(
                f"the engine finds class {highest} (from 0), {truth.dataset.annotation_file} has "
                f"{counted(len(truth.categories), 'class')}; evaluate the engine on the data set "
                "it was trained for."
            )
        results = [
            entry
            for image, detections in zip(images, found, strict=True)
            for entry in _to_coco(image, detections, truth.categories)
        ]
        for number, entry in enumerate(results, start=1):
            entry["id"] = number
        scorer = COCOeval(self.annotated(), _coco(truth.dataset, images, results), "bbox")
        scorer.params.imgIds = [image.id for image in images]
        with _quietly():
            scorer.evaluate()
        # A list by class, then size range, then image, the images sorted.
        ids = sorted(image.id for image in images)
        by_image = {image: scorer.evalImgs[index :: len(ids)] for index, image in enumerate(ids)}
        return _Matched(by_image, len(results), found if self._keeps_found else ())

    def __getstate__(self) -> dict[str, Any]:
        return {"truth": self._truth, "keeps_found": self._keeps_found}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


@dataclass(frozen=True)
class FoundBatch:
    """Detections in some images of a data set, from any process."""

    images: tuple[CocoImage, ...]
    detections: tuple[Detections, ...]
    """Detections of each image, not clipped to it (see `postprocess`)."""
    notes: tuple[str, ...] = ()
    """Notes on odd outputs."""
    stage_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Seconds by stage, see `Processed.stage_seconds`."""


def evaluate_found(
    engine: EngineFacts,
    dataset: CocoDataset,
    batches: Iterable[FoundBatch],
    *,
    progress: bool,
    confusion: bool,
) -> Evaluation:
    """Measure the COCO AP of detections that come in batches, in any order, as `evaluate` does.

    Each image of the data set is in one batch; the other arguments are those of `evaluate`.

    Raises:
        UserError: the classes do not match.
    """
    tally = _Tally(engine, dataset, confusion=confusion)
    matcher = _Matcher(tally.truth, keeps_found=confusion)
    annotated = matcher.annotated()
    with progress_bar(len(dataset.images), desc="eval", unit="image", shown=progress) as bar:
        for batch in batches:
            tally.engine_done = time.perf_counter()
            matched = matcher.match(batch.images, batch.detections)
            seconds = {**batch.stage_seconds, "coco": time.perf_counter() - tally.engine_done}
            tally.add(batch.images, matched, batch.notes, seconds)
            bar.update(len(batch.images))
    return tally.evaluation(annotated)


@dataclass(frozen=True)
class _Truth:
    """A data set whose classes are matched to a detector's."""

    dataset: CocoDataset
    """Categories of the data set, those that count."""
    categories: tuple[int | None, ...]
    """Category of each class of the engine; None where the data set lacks it."""
    rows: list[int | None]
    """Index of each class of the engine among the classes that count."""
    notes: tuple[str, ...]


def _truth(name: str, class_names: Sequence[str], dataset: CocoDataset) -> _Truth:
    match = match_classes(
        name, class_names, dataset.annotation_file, dataset.class_names, dataset.used()
    )
    counting = dataclasses.replace(
        dataset,
        category_ids=tuple(dataset.category_ids[index] for index in match.kept),
        class_names=tuple(dataset.class_names[index] for index in match.kept),
    )
    return _Truth(
        counting,
        tuple(None if index is None else dataset.category_ids[index] for index in match.matches),
        [None if index is None else match.kept.index(index) for index in match.matches]
        or list(range(len(counting.class_names))),
        (*dataset.notes, *match.notes),
    )


class _Tally:
    """Running totals of an evaluation: matches, seconds and notes."""

    def __init__(self, engine: EngineFacts, dataset: CocoDataset, *, confusion: bool) -> None:
        self.engine = engine
        self.truth = _truth(engine.name, engine.class_names, dataset)
        self.start = self.engine_done = time.perf_counter()
        self._notes = dict.fromkeys(self.truth.notes)
        if engine.nms not in (None, NmsSettings()):
            self._notes[f"{engine.name} suppresses boxes itself, at {_listed(engine.nms)}"] = None
        self._seconds = dict.fromkeys(
            ("read", "preprocess", "inference", "postprocess", "coco"), 0.0
        )
        self._confusion = Confusion(len(self.truth.dataset.class_names)) if confusion else None
        self._objects = self.truth.dataset.objects() if confusion else {}
        self._matches: dict[int, list[Any]] = {}
        self._detections = 0

    def add(
        self,
        images: Sequence[CocoImage],
        matched: _Matched,
        notes: Iterable[str],
        seconds: Mapping[str, float],
    ) -> None:
        """Take some images: their matches, notes (each once), and the seconds of the stages."""
        self._matches.update(matched.by_image)
        self._detections += matched.detections
        self._notes.update(dict.fromkeys(notes))
        for stage, value in seconds.items():
            self._seconds[stage] += value
        if self._confusion is not None:
            for image, detections in zip(images, matched.found, strict=True):
                self._confusion.add(detections, self.truth.rows, *self._objects[image.id])

    def evaluation(self, annotated: Any) -> Evaluation:
        """Compute the AP of all that was matched."""
        before = time.perf_counter()
        (ap, ap50, ap75, small, medium, large), per_class, curves = _average_precision(
            annotated, self._matches
        )
        end = time.perf_counter()
        self._seconds["coco"] += end - before
        notes = [*self._notes]
        if ap is None:
            notes.append(f"{self.truth.dataset.annotation_file} has no object, so there is no AP")
        elif not self._detections:
            notes.append(
                f"{self.engine.name} finds nothing in any image, as a network does that is given "
                "another family's preprocessing"
            )
        return Evaluation(
            *(ap, ap50, ap75, small, medium, large),
            per_class=per_class,
            class_names=self.truth.dataset.class_names,
            images=len(self.truth.dataset.images),
            detections=self._detections,
            seconds=StageSeconds(**self._seconds, tail=end - self.engine_done),
            wall_seconds=end - self.start,
            engine=self.engine.name,
            precision=self.engine.precision,
            backend=self.engine.backend,
            notes=tuple(notes),
            curves=curves,
            confusion=None if self._confusion is None else self._confusion.counts,
        )


def _listed(nms: NmsSettings) -> str:
    return f"confidence {nms.confidence:g}, IoU {nms.iou:g}, at most {nms.max_detections} an image"


def _in_classes_of(dataset: CocoDataset, truth: _Truth, found: Detections) -> Detections:
    """Return detections with the data set's class ids, without classes that it lacks."""
    index_of = dataset.class_indices
    indices = np.array([-1 if n is None else index_of[n] for n in truth.categories], np.int64)
    classes = indices[found.class_id]
    kept = classes >= 0
    return Detections(found.xyxy[kept], found.confidence[kept], classes[kept])


def _to_coco(
    image: CocoImage, detections: Detections, category_ids: Sequence[int | None]
) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image.id,
            "category_id": category_ids[index],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
            "score": score,
        }
        for (x1, y1, x2, y2), score, index in detections.as_tuples()
        if category_ids[index] is not None
    ]


def _coco(dataset: CocoDataset, images: Sequence[CocoImage], annotations: Sequence[Any]) -> Any:
    """Return a pycocotools COCO object of some of the data set's images with these annotations."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image.id} for image in images],
        "categories": [{"id": number} for number in dataset.category_ids],
        "annotations": list(annotations),
    }
    with _quietly():
        coco.createIndex()
    return coco


def _average_precision(
    truth: Any, matches: Mapping[int, list[Any]]
) -> tuple[list[float | None], tuple[float | None, ...], NDArray[np.float64]]:
    """Return AP, AP50, AP75, APs, APm, APl; AP by class; precision by recall and class at 0.5."""
    scorer = COCOeval(truth, iouType="bbox")
    by_image = [matches[number] for number in scorer.params.imgIds]
    scorer.evalImgs = [match for same_kind in zip(*by_image, strict=True) for match in same_kind]
    # The attributes that `evaluate` leaves for `accumulate`.
    scorer._paramsEval = copy.deepcopy(scorer.params)
    with _quietly():
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
