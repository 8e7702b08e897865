"""Small data sets in COCO layout for the tests of training: coloured shapes on gray."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from trt_yolov6.checkpoints.native import Training, write_checkpoint
from trt_yolov6.data.coco import DataReport
from trt_yolov6.models import Architecture, YOLOv6
from trt_yolov6.training.augmentation import AugmentationSettings
from trt_yolov6.training.data_validation import decode, read_split
from trt_yolov6.training.dataset import TrainingSet
from trt_yolov6.training.log import LOG_FILE
from trt_yolov6.training.targets import Targets

CLASS_NAMES = ("square", "disc")


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the epochs of a run's log; none before the first one's end."""
    file = run / LOG_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def write_shapes(folder: Path, images: int = 8, size: int = 96, seed: int = 0) -> Path:
    """Write `train` and `val` splits with the same images, of one to three shapes each."""
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
    for number in range(1, images + 1):
        picture = rng.integers(90, 130, (size, size, 3), dtype=np.uint8)
        for place in rng.permutation(4)[: rng.integers(1, 4)]:
            label = int(rng.integers(2))
            side = int(rng.integers(size // 5, size // 3))
            left = int(place % 2 * size // 2 + rng.integers(0, size // 2 - side))
            top = int(place // 2 * size // 2 + rng.integers(0, size // 2 - side))
            colour = (40, 60, 220) if label else (220, 180, 40)
            if label:
                centre = (left + side // 2, top + side // 2)
                cv2.circle(picture, centre, side // 2, colour, -1)
            else:
                cv2.rectangle(picture, (left, top), (left + side, top + side), colour, -1)
            box = [left, top, side, side]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": box,
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        name = f"{number:03}.png"
        for split in ("train", "val"):
            cv2.imwrite(str(folder / "images" / split / name), picture)
        records.append({"id": number, "file_name": name, "width": size, "height": size})
    content = {
        "images": records,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)],
    }
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def without_objects(data: Path, split: str) -> Path:
    """Take all objects out of a split of `write_shapes`; return the data set."""
    file = data / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    return data


def tiny_architecture(num_classes: int = len(CLASS_NAMES)) -> Architecture:
    """Return a network of the same parts as N, some 80 thousand weights in all."""
    return Architecture(
        name="yolov6-custom",
        stage_channels=(8, 8, 16, 16, 16),
        neck_channels=(16, 16, 16, 16, 16, 16),
        stage_repeats=(1, 1, 1, 1),
        neck_repeats=(1, 1, 1, 1),
        block="repvgg",
        csp_ratio=None,
        activation="relu",
        reg_max=0,
        num_classes=num_classes,
    )


def write_tiny(path: Path, num_classes: int = len(CLASS_NAMES)) -> Path:
    """Write a checkpoint of the tiny network with random weights, to train on from."""
    torch.manual_seed(0)
    model = YOLOv6(tiny_architecture(num_classes))
    names = CLASS_NAMES if num_classes == len(CLASS_NAMES) else tuple(map(str, range(num_classes)))
    write_checkpoint(path, model, names, Training({}, 0, None))
    return path


NO_AUGMENTATION = AugmentationSettings(
    mosaic=0, mixup=0, translate=0, scale=0, hsv_h=0, hsv_s=0, hsv_v=0, flip_lr=0
)
"""Everything off."""


def unaugmented(
    data: TrainingSet, indices: Sequence[int] | Tensor, border: int = 0
) -> tuple[Tensor, Targets]:
    """Return letterboxed images and their objects, as evaluation would see them."""
    plain = dataclasses.replace(NO_AUGMENTATION, border=border)
    return data.batch(indices, plain, torch.Generator(), strong=False)


def checked_data(folder: Path) -> DataReport:
    """Check every annotation of a data set, and every image by decoding it."""
    return decode(read_split(folder, None), lambda *_: None, progress=False)[0]


def pad_targets(boxes: Sequence[Tensor], classes: Sequence[Tensor]) -> Targets:
    """Join the objects of several images: boxes (n, 4) and classes (n,) an image."""
    most = max(1, *map(len, boxes))
    joined = torch.zeros(len(boxes), most, 4)
    labels = torch.zeros(len(boxes), most, dtype=torch.int64)
    present = torch.zeros(len(boxes), most, dtype=torch.bool)
    for row, (corners, names) in enumerate(zip(boxes, classes, strict=True)):
        joined[row, : len(corners)] = corners
        labels[row, : len(names)] = names
        present[row, : len(names)] = True
    return Targets(joined, labels, present)
