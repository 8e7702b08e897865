"""Five folds of BCCD: every image is judged by a network that never saw it, all of them together.

The 364 images (292 to train on and 72 to validate as published) are dealt into five folds at
random, once. A variant is five trainings; the detections of the five networks, each in its own
fold, are scored together, and variants are compared by a bootstrap over the images that is paired:
both are scored on the same draws (`trt_yolov6.quantization.resampling`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.files import read_json, write_json
from trt_yolov6.common.statistics import Interval
from trt_yolov6.data.coco import CocoDataset, load_coco
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.detectors.overlap import iou
from trt_yolov6.quantization.resampling import (
    IOU_THRESHOLDS,
    MatchedDetections,
    interval,
    match,
    matched,
)

FOLDS = 5
_SPLITS = ("train", "val")
"""The published splits, which are joined."""

CALIBRATION_IMAGES = 48
"""Images of a fold's training part that its networks are calibrated on."""

_PIXEL = 32
"""Parts of a pixel that boxes are stored in; AP changes by less than 0.0001."""

FOUND = np.dtype([("image", "<u2"), ("label", "u1"), ("score", "<u2"), ("box", "<i2", 4)])
"""A detection as it is stored: number of its image among all, class, score in 65535ths, corners."""


def train_split(fold: int) -> str:
    """Return the name of the split that a fold's network is trained on."""
    return f"fold{fold}-train"


def val_split(fold: int) -> str:
    """Return the name of the split that a fold's network is judged on."""
    return f"fold{fold}-val"


def calibration_folder(root: Path, fold: int) -> Path:
    """Return the folder of a fold's calibration images."""
    return root / "calib" / str(fold)


def deal(images: int, folds: int = FOLDS, seed: int = 0) -> NDArray[np.int64]:
    """Return the fold of each image: (images,), sizes equal except for one image."""
    return np.random.default_rng(seed).permutation(images) % folds


def write_folds(source: Path, target: Path, *, limit: int | None = None) -> Path:
    """Write the folds as splits of one data set, in COCO's layout.

    Args:
        source: BCCD with its published splits, in COCO's layout.
        target: folder of the data set to write; images are linked, not copied.
        limit: number of images to take, for a try; None for all.

    Returns:
        `target`. What is there already is left.
    """
    done = target / "folds.json"
    if done.is_file():
        return target
    images: list[tuple[str, dict[str, Any], list[Any]]] = []
    annotations: list[dict[str, Any]] = []
    categories = None
    pixels = target / "images" / "all"
    pixels.mkdir(parents=True, exist_ok=True)
    for split in _SPLITS:
        content = read_json(source / "annotations" / f"instances_{split}.json")
        categories = categories or content["categories"]
        boxes: dict[int, list[Any]] = {image["id"]: [] for image in content["images"]}
        for entry in content["annotations"]:
            boxes[entry["image_id"]].append(entry)
        for image in content["images"]:
            images.append((image["file_name"], image, boxes[image["id"]]))
            link = pixels / image["file_name"]
            if not link.exists():
                link.symlink_to((source / "images" / split / image["file_name"]).resolve())
    images.sort(key=lambda item: item[0])
    images = images[:limit]
    records = []
    for number, (_, image, entries) in enumerate(images):
        records.append({**image, "id": number + 1})
        for entry in entries:
            annotations.append({**entry, "id": len(annotations) + 1, "image_id": number + 1})
    fold_of = deal(len(records))
    for fold in range(FOLDS):
        for split, own in (
            (train_split(fold), fold_of != fold),
            (val_split(fold), fold_of == fold),
        ):
            chosen = [record for record, is_own in zip(records, own, strict=True) if is_own]
            kept = {record["id"] for record in chosen}
            boxes_of = [entry for entry in annotations if entry["image_id"] in kept]
            content = {"images": chosen, "annotations": boxes_of, "categories": categories}
            write_json(_created(target / "annotations") / f"instances_{split}.json", content)
            _link(target / "images" / split, Path("all"))
            if split == train_split(fold):
                folder = _created(calibration_folder(target, fold))
                count = min(CALIBRATION_IMAGES, len(chosen))
                for place in np.linspace(0, len(chosen) - 1, count).round().astype(int):
                    name = chosen[place]["file_name"]
                    _link(folder / name, (pixels / name).resolve())
    whole = {"images": records, "annotations": annotations, "categories": categories}
    write_json(target / "annotations" / "instances_all.json", whole)
    write_json(done, {"images": len(records), "fold_of": fold_of.tolist()})
    return target


def _created(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _link(link: Path, target: Path) -> None:
    if not os.path.lexists(link):
        link.symlink_to(target)


# --- detections ---------------------------------------------------------------------------------


def pack(found: Mapping[int, Detections]) -> NDArray[Any]:
    """Return detections by image id (from 1) as an array of `FOUND`."""
    parts = []
    for number, one in found.items():
        rows = np.zeros(len(one), FOUND)
        rows["image"], rows["label"] = number, one.class_id
        rows["score"] = np.round(one.confidence * 65535)
        rows["box"] = np.round(one.xyxy * _PIXEL).clip(-32768, 32767)
        parts.append(rows)
    return np.concatenate(parts) if parts else np.zeros(0, FOUND)


def unpack(rows: NDArray[Any], images: Sequence[int]) -> list[Detections]:
    """Return the detections of each of the images, by id."""
    order = np.argsort(rows["image"], kind="stable")
    rows = rows[order]
    starts = np.searchsorted(rows["image"], np.array(images), "left")
    ends = np.searchsorted(rows["image"], np.array(images), "right")
    return [
        Detections(
            xyxy=part["box"].astype(np.float32) / np.float32(_PIXEL),
            confidence=part["score"].astype(np.float32) / np.float32(65535),
            class_id=part["label"].astype(np.int64),
        )
        for part in (rows[start:end] for start, end in zip(starts, ends, strict=True))
    ]


_RISING = ("image", "score")
"""Fields whose values follow each other closely: differences are stored."""


def stored(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Return detections of `FOUND` as bytes that compress well: a field after the other."""
    rows = rows[np.lexsort((-rows["score"].astype(np.int64), rows["image"]))]
    parts = []
    for name in FOUND.names or ():
        values = np.ascontiguousarray(rows[name])
        if name in _RISING:
            values[1:] = values[1:] - values[:-1]  # around zero where it must
        planes = values.view(np.uint8).reshape(len(rows), FOUND[name].itemsize)
        parts.append(planes.T.ravel())
    return np.concatenate([np.frombuffer(np.int64(len(rows)).tobytes(), np.uint8), *parts])


def restored(data: NDArray[np.uint8]) -> NDArray[Any]:
    """Return the detections of which `stored` made bytes, the best of an image first."""
    count = int(data[:8].view(np.int64)[0])
    rows = np.zeros(count, FOUND)
    start = 8
    for name in FOUND.names or ():
        kind = FOUND[name]
        size = count * kind.itemsize
        planes = data[start : start + size].reshape(kind.itemsize, count)
        values = np.ascontiguousarray(planes.T).view(kind.base).reshape(count, *kind.shape)
        rows[name] = np.cumsum(values, dtype=kind.base) if name in _RISING else values
        start += size
    return rows


@dataclass(frozen=True)
class Truth:
    """The objects of all images, by image, and the fold of each."""

    images: tuple[int, ...]
    """Ids."""
    objects: tuple[Detections, ...]
    fold_of: NDArray[np.int64]


def read_truth(root: Path) -> Truth:
    """Return the objects in the images of a data set that `write_folds` wrote."""
    dataset = load_folds(root)
    index_of = dataset.class_indices
    boxes: dict[int, list[list[float]]] = {image.id: [] for image in dataset.images}
    labels: dict[int, list[int]] = {image.id: [] for image in dataset.images}
    for entry in dataset.annotations:
        x, y, width, height = entry["bbox"]
        boxes[entry["image_id"]].append([x, y, x + width, y + height])
        labels[entry["image_id"]].append(index_of[entry["category_id"]])
    objects = tuple(
        Detections(
            xyxy=np.array(boxes[image.id], np.float32).reshape(-1, 4),
            confidence=np.ones(len(boxes[image.id]), np.float32),
            class_id=np.array(labels[image.id], np.int64),
        )
        for image in dataset.images
    )
    fold_of = np.array(read_json(root / "folds.json")["fold_of"])
    return Truth(tuple(image.id for image in dataset.images), objects, fold_of)


def load_folds(root: Path) -> CocoDataset:
    """Return all images of a data set that `write_folds` wrote."""
    folder = root / "images" / "all"
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    return load_coco(root, "all")


# --- figures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Remembered(MatchedDetections):
    """Matched detections that score a draw once, for all that they are compared with."""

    known: dict[bytes, float] = field(default_factory=dict)

    def ap(self, draws: NDArray[np.int64] | None = None) -> float:
        key = b"" if draws is None else draws.astype(np.int16).tobytes()
        if key not in self.known:
            self.known[key] = super().ap(draws)
        return self.known[key]


def match_all(truth: Truth, rows: NDArray[Any]) -> MatchedDetections:
    """Match the detections of all folds with the objects of all images."""
    found = matched(truth.objects, unpack(rows, truth.images))
    return _Remembered(found.classes, found.images)


def without_missing_boxes(truth: Truth, rows: NDArray[Any]) -> NDArray[Any]:
    """Return detections, the best of an image first, without the boxes that take no object.

    Of those only the score counts, so AP is the same for every draw of images.
    """
    rows = rows[np.lexsort((-rows["score"].astype(np.int64), rows["image"]))]
    index_of = {image: index for index, image in enumerate(truth.images)}
    for image in np.unique(rows["image"]):
        objects = truth.objects[index_of[int(image)]]
        for label in np.unique(rows["label"][rows["image"] == image]):
            own = np.flatnonzero((rows["image"] == image) & (rows["label"] == label))
            boxes = objects.xyxy[objects.class_id == label].astype(np.float64)
            given = rows["box"][own].astype(np.float64) / _PIXEL
            taken, _ = match(iou(given[:, None], boxes[None]), IOU_THRESHOLDS, len(given))
            rows["box"][own[(taken < 0).all(axis=0)]] = 0
    return rows


class Scorable(Protocol):
    """Detections of networks, to be scored over any draw of the images."""

    @property
    def images(self) -> int:
        """Number of images."""

    def ap(self, draws: NDArray[np.int64] | None = None) -> float:
        """Return AP, 0..1; `draws` (images,): how often each image counts."""


@dataclass(frozen=True)
class MeanOf:
    """Trainings that differ in nothing but their seeds: their AP is the mean of theirs."""

    parts: tuple[MatchedDetections, ...]

    @property
    def images(self) -> int:
        """Number of images."""
        return self.parts[0].images

    def ap(self, draws: NDArray[np.int64] | None = None) -> float:
        """Return the mean AP, 0..1; `draws` (images,): how often each image counts."""
        return float(np.mean([part.ap(draws) for part in self.parts]))


def of_class(found: MatchedDetections | MeanOf, place: int) -> MatchedDetections | MeanOf:
    """Return the detections of one class alone, by its place among the classes."""
    if isinstance(found, MeanOf):
        return MeanOf(tuple(_of_class(part, place) for part in found.parts))
    return _of_class(found, place)


def _of_class(found: MatchedDetections, place: int) -> MatchedDetections:
    return _Remembered((found.classes[place],), found.images)


def ap_of(found: Scorable) -> Interval:
    """Return the AP over all images, 0..1, with its interval over images."""
    return interval(found.ap, found.images)


def ap_by_fold(truth: Truth, found: Scorable) -> list[float]:
    """Return the AP of each fold's network in its own fold."""
    folds = range(int(truth.fold_of.max()) + 1)
    return [found.ap((truth.fold_of == fold).astype(np.int64)) for fold in folds]


def difference(own: Scorable, base: Scorable) -> Interval:
    """Return how much higher an AP is than another one, paired: both on the same draws."""
    return interval(lambda draws: own.ap(draws) - base.ap(draws), own.images)
