"""Agreement of a quantized engine's detections with those of the same model's float engine.

An AP on a hundred images varies by points from one hundred to another, so two engines' APs say
little about the quantization between them. Comparing with the float engine's own detections, image
by image, shows much smaller differences; and the difference of two APs varies far less over
resampled images than either AP.
"""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trt_yolov6.common.files import sha256_bytes, sha256_file
from trt_yolov6.common.statistics import Interval
from trt_yolov6.comparison.engines import BuiltCase, Work, origins
from trt_yolov6.data.calibration import calibration_images
from trt_yolov6.data.coco import CocoDataset
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.detectors.labels import objects_of
from trt_yolov6.quantization.agreement import CONFIDENT, least_score
from trt_yolov6.quantization.resampling import interval, matched

_log = logging.getLogger(__name__)

FLOAT = ("fp32", "fp16")
"""Precisions that a quantized engine is held against, the first one there is."""


def packed(found: Sequence[Detections]) -> str:
    """Return the detections in a data set's images, in its order, as text: NPZ in base64."""
    content = io.BytesIO()
    np.savez_compressed(
        content,
        counts=np.array([len(one) for one in found], np.int64),
        boxes=np.concatenate([one.xyxy for one in found]).astype(np.float32),
        scores=np.concatenate([one.confidence for one in found]).astype(np.float32),
        classes=np.concatenate([one.class_id for one in found]).astype(np.int64),
    )
    return base64.b64encode(content.getvalue()).decode()


def unpacked(text: str) -> list[Detections]:
    """Return the detections in a text by `packed`."""
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as stored:
        ends = np.cumsum(stored["counts"])[:-1]
        parts = (np.split(stored[name], ends) for name in ("boxes", "scores", "classes"))
        return [Detections(*one) for one in zip(*parts, strict=True)]


def agreements(
    work: Work,
    dataset: CocoDataset,
    built: Sequence[BuiltCase],
    accuracies: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any] | None]:
    """Return each quantized engine's agreement with its model's float engine, see `results`.

    Args:
        work: what the comparison's steps share.
        dataset: what AP was measured on.
        built: the engines.
        accuracies: from `measure.accuracy`, one an engine.

    Returns:
        One an engine; None for a float one, and for one without a float engine to hold against.
    """
    pairs = list(zip(built, accuracies, strict=True))
    known = origins(built)
    found = []
    for index, (one, own) in enumerate(pairs):
        base = None if own["precision"] in FLOAT else _float_engine(index, pairs, known)
        found.append(None if base is None else _agreement(work, dataset, (one, own), base))
    return found


_Measured = tuple[BuiltCase, Mapping[str, Any]]


def _float_engine(index: int, pairs: Sequence[_Measured], known: Sequence[str]) -> _Measured | None:
    """Return the same model's float engine of the same image size, on any backend.

    It is of the same origin, else of the same name.
    """
    labels = [one.case.entry.label for one, _ in pairs]
    size = pairs[index][1]["image_size"]
    for names in (known, labels):
        for precision in FLOAT:
            sought = names[index], precision, size
            for pair, name in zip(pairs, names, strict=True):
                found = pair[1]
                if (name, found["precision"], found["image_size"]) == sought and found["found"]:
                    return pair
    return None


def _agreement(
    work: Work, dataset: CocoDataset, measured: _Measured, base: _Measured
) -> dict[str, Any] | None:
    one, own = measured
    other, reference = base
    if not own["found"]:
        return None
    inputs = {
        "detections": [sha256_bytes(item["found"].encode()) for item in (own, reference)],
        "boxes": [[*item["bbox"], item["category_id"]] for item in dataset.annotations],
        "calibration": [str(path) for path in _calibration(work, one)],
    }

    def measure() -> dict[str, Any] | None:
        _log.info(f"agreement of {one.name} with {other.name} ...")
        own_found, float_found = (unpacked(item["found"]) for item in (own, reference))
        figures = _figures(objects_of(dataset, dataset.images), own_found, float_found)
        return figures and {**figures, "calibrated_on": _judged_images(work, dataset, one)}

    known = work.steps.once("agreement", inputs, measure)
    return known and {"with": other.name, **known}


def _figures(
    objects: Sequence[Detections], own: Sequence[Detections], reference: Sequence[Detections]
) -> dict[str, Any] | None:
    """Return the figures; None where the float engine finds nothing, or no image has an object."""
    count = len(objects)
    agree = matched(reference, own, least_score(reference, CONFIDENT))
    of_own, of_float = matched(objects, own), matched(objects, reference)
    agreed = interval(agree.ap, count)
    change = interval(lambda draws: of_own.ap(draws) - of_float.ap(draws), count)
    if not (math.isfinite(agreed.value) and math.isfinite(change.value)):
        return None
    return {**_rounded(agreed), "ap_change": _rounded(change), "images": count}


def _rounded(found: Interval) -> dict[str, Any]:
    low, high = round(found.low, 4), round(found.high, 4)
    return {"value": round(found.value, 4), "interval": [low, high]}


def _calibration(work: Work, one: BuiltCase) -> Sequence[Path]:
    """Return the images that calibrated an engine, as far as this comparison built it."""
    choice = one.case.choice
    if choice is None or not choice.quantizes:
        return ()
    return calibration_images(work.plan.calibration)


def _judged_images(work: Work, dataset: CocoDataset, one: BuiltCase) -> int:
    """Return how many of the data set's images calibrated the engine, too."""
    used = {sha256_file(path) for path in _calibration(work, one)}
    return sum(sha256_file(image.path) in used for image in dataset.images) if used else 0
