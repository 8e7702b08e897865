"""Data sets as pycocotools takes them: images and boxes, checked before use."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.annotations import check_units, find_image, flag
from trt_yolov6.data.images import read_image
from trt_yolov6.data.jpeg import Jpeg, open_image
from trt_yolov6.data.sources import malformed, read_source
from trt_yolov6.errors import UserError


@dataclass(frozen=True)
class CocoImage:
    """One image of a data set, of the size its annotations refer to, in pixels."""

    id: int
    path: Path
    height: int
    width: int


@dataclass(frozen=True)
class CocoDataset:
    """A split of a data set."""

    root: Path
    split: str
    annotation_file: Path
    images: tuple[CocoImage, ...]
    category_ids: tuple[int, ...]
    """The file's category ids, ascending; a class index is a place in this list."""
    class_names: tuple[str, ...]
    annotations: tuple[Mapping[str, Any], ...] = dataclasses.field(repr=False)
    """Boxes as pycocotools wants them: id (from 1), image_id, category_id, bbox, area, iscrowd."""


def load_coco(root: str | Path, split: str | None = None) -> CocoDataset:
    """Read a split of a data set, in COCO's, YOLO's or Pascal VOC's format.

    Args:
        root: the data set's folder, or its `data.yaml`; see `sources.read_source`.
        split: which part; default: the only one there is, else `val`, else `val2017`.

    Raises:
        UserError: the folder, the split or an image is missing, or the annotations are malformed.
    """
    source = read_source(root, split)
    file, content = source.file, source.content
    categories = sorted(
        read_records(file, content, "categories", {"id": int, "name": str}), key=_id
    )
    if not categories:
        raise malformed(file, "it has no categories")
    check_unique(file, "category", categories)
    records = read_records(
        file, content, "images", {"id": int, "file_name": str, "width": int, "height": int}
    )
    if not records:
        raise malformed(file, "it has no images")
    check_unique(file, "image", records)
    for record in records:
        if record["width"] < 1 or record["height"] < 1:
            raise malformed(file, f"image {record['file_name']} has no size, or cannot be read")

    paths = [find_image(record["file_name"], source.folders) for record in records]
    missing = [
        record["file_name"] for record, path in zip(records, paths, strict=True) if path is None
    ]
    if missing:
        raise UserError(
            f"{file} names {len(missing)} image{'s' * (len(missing) > 1)} that "
            f"{'are' if len(missing) > 1 else 'is'} not in {source.folders[0]}, the first being "
            f"{missing[0]}; add the images or take them out of the file."
        )
    check_distinct(
        file, {record["file_name"]: path for record, path in zip(records, paths, strict=True)}
    )
    images = tuple(
        CocoImage(record["id"], path, record["height"], record["width"])
        for record, path in zip(records, paths, strict=True)
        if path is not None
    )
    annotations = _boxes(
        file,
        content,
        {image.id for image in images},
        {category["id"] for category in categories},
    )
    sizes = {image.id: (image.width, image.height) for image in images}
    check_units(
        file,
        [entry["bbox"] for entry in annotations],
        [sizes[entry["image_id"]] for entry in annotations],
    )
    return CocoDataset(
        root=Path(root),
        split=source.split,
        annotation_file=file,
        images=images,
        category_ids=tuple(category["id"] for category in categories),
        class_names=tuple(category["name"] for category in categories),
        annotations=annotations,
    )


def read_coco_image(image: CocoImage) -> NDArray[np.uint8]:
    """Decode an image of a data set in the orientation its boxes refer to.

    A photograph with an EXIF rotation may have been annotated upright or as stored; the recorded
    size shows which, so the image is turned only if that fits the record.

    Returns:
        uint8 (height, width, 3) RGB, of the recorded size.

    Raises:
        UserError: the image is unreadable, or of another size than recorded either way.
    """
    recorded = image.height, image.width
    for as_stored in (False, True):
        pixels = read_image(image.path, as_stored=as_stored)
        if pixels.shape[:2] == recorded:
            return pixels
        if pixels.shape[1::-1] != recorded:
            break
    raise UserError(
        f"{image.path} is {pixels.shape[1]}x{pixels.shape[0]} pixels, but its annotations were "
        f"made for {image.width}x{image.height}; restore the image or correct the annotation file."
    )


def open_coco_image(image: CocoImage) -> Jpeg | NDArray[np.uint8]:
    """Read an image of a data set but leave a JPEG encoded that a GPU can decode.

    Returns:
        As `read_coco_image`, or a `Jpeg` of the recorded size.

    Raises:
        UserError: as `read_coco_image`; a file that is damaged further in is found later.
    """
    opened = open_image(image.path)
    recorded = image.height, image.width
    if isinstance(opened, Jpeg):
        if opened.size == recorded:
            return opened
        as_stored = dataclasses.replace(opened.header, orientation=1)
        if as_stored.size == recorded:
            return dataclasses.replace(opened, header=as_stored)
    elif opened.shape[:2] == recorded:
        return opened
    return read_coco_image(image)


def read_records(
    file: Path, content: Mapping[str, Any], key: str, fields: Mapping[str, type]
) -> list[dict[str, Any]]:
    """Return the list under `key`, each record checked to have the fields, of their types."""
    records = content.get(key)
    if not isinstance(records, list):
        raise malformed(file, f"it has no list {key!r}")
    for number, record in enumerate(records):
        for field, kind in fields.items():
            value = record.get(field) if isinstance(record, dict) else None
            if (
                not isinstance(value, kind)
                or isinstance(value, bool)
                or (isinstance(value, int) and abs(value) >= 2**63)
            ):
                told = record.get("where") if isinstance(record, dict) else None
                raise malformed(
                    file,
                    f"{told or f'entry {number} of {key!r}'} lacks {field!r} or has a wrong one",
                )
    return records


def _boxes(
    file: Path, content: Mapping[str, Any], image_ids: set[int], category_ids: set[int]
) -> tuple[Mapping[str, Any], ...]:
    annotations = read_records(
        file, content, "annotations", {"image_id": int, "category_id": int, "bbox": list}
    )
    check_unique(file, "annotation", [entry for entry in annotations if "id" in entry])
    boxes = []
    # pycocotools takes id 0 for "no match", so the ids are given again.
    for number, entry in enumerate(annotations, start=1):
        box = entry["bbox"]
        label = entry.get("where", f"annotation {number}")
        if (
            len(box) != 4
            or not all(_is_finite(value) for value in box)
            or min(box[2:]) < 0
            or not _is_finite(box[2] * box[3])
        ):
            raise malformed(file, f"{label} has the box {_short(box)}")
        if entry["image_id"] not in image_ids:
            raise malformed(file, f"{label} is for image {entry['image_id']}, which is not listed")
        if entry["category_id"] not in category_ids:
            raise malformed(
                file,
                f"{label} is of category {entry['category_id']}, which is not listed",
            )
        area = entry.get("area")
        boxes.append(
            {
                "id": number,
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "bbox": box,
                "area": area if _is_finite(area) else box[2] * box[3],
                "iscrowd": flag(entry.get("iscrowd", 0)),
            }
        )
    return tuple(boxes)


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _id(record: Mapping[str, Any]) -> int:
    number: int = record["id"]
    return number


def check_unique(file: Path, what: str, records: list[dict[str, Any]]) -> None:
    counts = Counter(str(record["id"]) for record in records)
    for number, count in counts.items():
        if count > 1:
            raise malformed(file, f"{what} id {number} occurs {count} times")


def check_distinct(file: Path, paths: Mapping[str, Path | None]) -> None:
    """Raise UserError where two names stand for one image, as `find_image` leaves folders out."""
    names: dict[Path, str] = {}
    for name, path in paths.items():
        if path is not None and names.setdefault(path, name) != name:
            raise malformed(file, f"{names[path]} and {name} are both found as {path}")
