"""Bad training data, named: what is wrong with a data set, and what is left out of training.

`load_coco` refuses a file at its first fault. Training reads files that nobody has cleaned, so
here every annotation is judged by itself and all that is wrong ends up in one report.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from trt_yolov6.common.files import write_json
from trt_yolov6.data.annotations import check_units, find_image
from trt_yolov6.data.class_matching import order_by_name
from trt_yolov6.data.coco import (
    CocoImage,
    check_distinct,
    check_unique,
    read_coco_image,
    read_records,
)
from trt_yolov6.data.images import read_image
from trt_yolov6.data.loader import default_workers
from trt_yolov6.data.sources import malformed, read_source
from trt_yolov6.errors import UserError

OnBadData = Literal["refuse", "skip"]

Kind = Literal[
    "missing-image",
    "unreadable-image",
    "wrong-size",
    "malformed",
    "unknown-image",
    "unknown-class",
    "not-finite",
    "empty-box",
    "outside",
    "duplicate",
    "clipped",
]
"""Kinds of findings. All but `clipped` are problems; a clipped box is only noted."""

OVERHANG = 0.01
"""Pixels a box may reach beyond its image unmentioned: rounding in the annotation file."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data set."""

    image: str | None
    """File name of the image, as the annotation file has it; None: there is no such image."""
    annotation_id: int | None
    """Id of the annotation; None: it has none, or the image itself is at fault."""
    kind: Kind
    """Kind of the problem."""
    sentence: str
    """The same for a reader."""


@dataclass(frozen=True)
class DataReport:
    """Findings in a split."""

    annotation_file: Path
    images: int
    """Images the file lists."""
    annotations: int
    """Annotations the file lists."""
    problems: tuple[Problem, ...]
    """Problems that must be corrected or left out."""
    clipped: tuple[Problem, ...]
    """Boxes that reach beyond their image by more than `OVERHANG`: cut off at its edge, kept."""
    crowds: int
    """Annotations of crowds, which are not trained on."""
    empty_images: int
    """Images that are left without an object: trained on as background."""


class BadDataError(UserError):
    """A data set was refused; `report` says all that is wrong with it."""

    def __init__(self, message: str, report: DataReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class CheckedSplit:
    """The usable part of a split, judged without decoding its images."""

    images: tuple[CocoImage, ...]
    """The images whose file exists and whose size is recorded."""
    class_names: tuple[str, ...]
    """In the order of the category ids; a class index is a place in this list."""
    boxes: tuple[NDArray[np.float64], ...]
    """An image: (k, 4), x1, y1, x2, y2 in its recorded pixels, inside it, of positive area."""
    classes: tuple[NDArray[np.int64], ...]
    """An image: (k,)."""
    report: DataReport


def write_report(report: DataReport, path: str | Path) -> None:
    """Write a report as JSON: the fields of `DataReport`, problems as objects.

    Raises:
        UserError: the file cannot be written.
    """
    content = dataclasses.asdict(report)
    content["annotation_file"] = str(report.annotation_file)
    write_json(path, content)


def refuse(report: DataReport, report_file: str | Path | None = None) -> None:
    """Raise BadDataError if a report has problems: how many, the first, and what to do."""
    if not report.problems:
        return
    count = len(report.problems)
    where = f"; all are listed in {report_file}" if report_file is not None else ""
    raise BadDataError(
        f"{report.annotation_file} has {count} problem{'s' * (count > 1)}, the first being that "
        f"{report.problems[0].sentence}; correct the data set or give `on_bad_data` skip to leave "
        f"{'them' if count > 1 else 'it'} out{where if count > 1 else ''}.",
        report,
    )


def read_split(folder: str | Path, split: str | None) -> CheckedSplit:
    """Read a split and judge everything but the content of its images.

    Raises:
        UserError: there is no such split, its file cannot be made out at all (it is not JSON, has
            no list of categories, images or annotations, or an image lacks its id or name), or all
            boxes are in other units than pixels.
    """
    source = read_source(folder, split)
    file, content = source.file, source.content
    categories = read_records(file, content, "categories", {"id": int, "name": str})
    records = read_records(file, content, "images", {"id": int, "file_name": str})
    annotations = content.get("annotations")
    for what, found in (("categories", categories), ("images", records)):
        if not found:
            raise malformed(file, f"it has no {what}")
    if not isinstance(annotations, list):
        raise malformed(file, "it has no list 'annotations'")
    check_unique(file, "category", categories)
    check_unique(file, "image", records)

    categories = sorted(categories, key=lambda category: int(category["id"]))
    class_of = {category["id"]: place for place, category in enumerate(categories)}
    images, problems = _judge_images(file, records, source.folders)
    names = {record["id"]: record["file_name"] for record in records}
    judged = _judge_annotations(annotations, names, {image.id: image for image in images}, class_of)
    objects = [judged.objects.get(image.id, []) for image in images]
    check_units(file, *_boxes_as_written(annotations, images))
    boxes = tuple(
        np.array([item.box for item in items], np.float64).reshape(-1, 4) for items in objects
    )
    classes = tuple(np.array([item.class_index for item in items], np.int64) for items in objects)
    return CheckedSplit(
        images=tuple(images),
        class_names=tuple(category["name"] for category in categories),
        boxes=boxes,
        classes=classes,
        report=DataReport(
            annotation_file=file,
            images=len(records),
            annotations=len(annotations),
            problems=(*problems, *judged.problems),
            clipped=tuple(judged.clipped),
            crowds=judged.crowds,
            empty_images=sum(not len(item) for item in boxes),
        ),
    )


def in_order(checked: CheckedSplit, names: Sequence[str]) -> CheckedSplit:
    """Return a split with its classes in a network's order, where it has the same by name.

    Args:
        checked: returned as it is where the names differ, or the order does not.
        names: of the network's classes.
    """
    found = np.concatenate([np.empty(0, np.int64), *checked.classes])
    used = np.bincount(found, minlength=len(checked.class_names)) > 0
    places = order_by_name(names, checked.class_names, used.tolist())
    if places is None or places == tuple(range(len(names))):
        return checked
    # The classes that the network does not know have no object.
    table = np.array([-1 if place is None else place for place in places], np.int64)
    return dataclasses.replace(
        checked,
        class_names=tuple(names),
        classes=tuple(table[classes] for classes in checked.classes),
    )


def for_each_image(
    images: tuple[CocoImage, ...],
    use: Callable[[int, NDArray[np.uint8]], None],
    *,
    progress: bool,
) -> dict[int, Problem]:
    """Decode images in threads and hand each to `use`.

    Args:
        images: what to read.
        use: takes an image's place in `images` and its pixels, uint8 (height, width, 3) RGB of
            the recorded size; called from several threads, in any order.
        progress: show a bar, on a terminal.

    Returns:
        What is wrong with each image that could not be used, by its place.
    """
    faults: dict[int, Problem] = {}

    def read(index: int) -> Problem | None:
        image = images[index]
        try:
            pixels = read_coco_image(image)
        except UserError as error:
            # A file that decodes by itself failed for its size.
            try:
                read_image(image.path)
            except UserError:
                kind: Kind = "unreadable-image"
            else:
                kind = "wrong-size"
            return Problem(image.path.name, None, kind, str(error).split(";")[0].rstrip("."))
        use(index, pixels)
        return None

    bar = tqdm(total=len(images), desc="load", unit="image", disable=None if progress else True)
    pool = ThreadPoolExecutor(default_workers(), thread_name_prefix="decode")
    try:
        with bar:
            places = {pool.submit(read, index): index for index in range(len(images))}
            for future in as_completed(places):
                fault = future.result()
                if fault is not None:
                    faults[places[future]] = fault
                bar.update()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return faults


def full_report(checked: CheckedSplit, faults: dict[int, Problem]) -> DataReport:
    """Add what decoding the images of a split found; in the order of the images."""
    report = checked.report
    found = tuple(faults[index] for index in sorted(faults))
    empty = sum(not len(boxes) for index, boxes in enumerate(checked.boxes) if index not in faults)
    return dataclasses.replace(report, problems=(*found, *report.problems), empty_images=empty)


Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class _Object:
    """An annotation that can be trained on."""

    image_id: int
    box: Corners
    """x1, y1, x2, y2, inside the image."""
    class_index: int
    clipped: str | None
    """If the box was cut off: how, as the end of a sentence."""


@dataclass
class _Judged:
    objects: dict[int, list[_Object]]
    """By image id."""
    problems: list[Problem]
    clipped: list[Problem]
    crowds: int


def _judge_images(
    file: Path, records: list[dict[str, Any]], folders: Sequence[Path]
) -> tuple[list[CocoImage], list[Problem]]:
    images, problems = [], []
    paths = {record["file_name"]: find_image(record["file_name"], folders) for record in records}
    check_distinct(file, paths)
    for record in records:
        name = record["file_name"]
        path = paths[name]
        height, width = _integer(record.get("height")), _integer(record.get("width"))
        if path is None:
            problems.append(
                Problem(name, None, "missing-image", f"image {name} is not in {folders[0]}")
            )
        elif height is None or width is None or min(height, width) < 1:
            problems.append(
                Problem(name, None, "wrong-size", f"the record of image {name} gives it no size")
            )
        else:
            images.append(CocoImage(record["id"], path, height, width))
    return images, problems


def _judge_annotations(
    annotations: list[Any],
    names: dict[int, str],
    images: dict[int, CocoImage],
    class_of: dict[int, int],
) -> _Judged:
    """Sort annotations into objects to train on and problems."""
    judged = _Judged({}, [], [], 0)
    seen: set[tuple[int, int, Corners]] = set()
    for number, entry in enumerate(annotations, start=1):
        if isinstance(entry, dict) and entry.get("iscrowd"):
            judged.crowds += 1
            continue
        verdict = _judge(entry, names, images, class_of)
        if isinstance(verdict, _Object):
            key = verdict.image_id, verdict.class_index, verdict.box
            if key in seen:
                verdict = "duplicate", f"repeats the box {_short(entry['bbox'])} of another one"
        if isinstance(verdict, _Object):
            seen.add(key)
            judged.objects.setdefault(verdict.image_id, []).append(verdict)
            if verdict.clipped is not None:
                judged.clipped.append(_problem(number, entry, names, "clipped", verdict.clipped))
        elif verdict is not None:
            judged.problems.append(_problem(number, entry, names, *verdict))
    return judged


def _judge(
    entry: Any,
    names: dict[int, str],
    images: dict[int, CocoImage],
    class_of: dict[int, int],
) -> _Object | tuple[Kind, str] | None:
    """Return an annotation's object, or what is wrong with it, or None if its image is at fault."""
    if not isinstance(entry, dict):
        return "malformed", "is not a JSON object"
    image_id, class_id = _integer(entry.get("image_id")), _integer(entry.get("category_id"))
    if image_id is None or image_id not in names:
        return "unknown-image", f"is for image {_short(entry.get('image_id'))}, which is not listed"
    if class_id is None or class_id not in class_of:
        return (
            "unknown-class",
            f"is of category {_short(entry.get('category_id'))}, which does not exist",
        )
    corners = _corners(entry.get("bbox"))
    if corners is None:
        return "malformed", f"has {_short(entry.get('bbox'))} where a box of four numbers should be"
    box = f"has the box {_short(entry['bbox'])}"
    if not all(map(math.isfinite, corners)):
        return "not-finite", f"{box}, which is not finite"
    x1, y1, x2, y2 = corners
    if x2 <= x1 or y2 <= y1:
        return "empty-box", f"{box}, which has no area"
    image = images.get(image_id)
    if image is None:
        return None
    size = f"its {image.width}x{image.height} pixels"
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, image.width), min(y2, image.height)
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return "outside", f"{box}, which lies outside {size}"
    beyond = max(-x1, -y1, x2 - image.width, y2 - image.height)
    clipped = f"{box}, which reaches beyond {size}" if beyond > OVERHANG else None
    return _Object(image_id, inside, class_of[class_id], clipped)


def _problem(number: int, entry: Any, names: dict[int, str], kind: Kind, told: str) -> Problem:
    """Name an annotation, the `number`th of the file, and what is wrong with it."""
    label = image_id = None
    if isinstance(entry, dict):
        label, image_id = _integer(entry.get("id")), _integer(entry.get("image_id"))
    image = None if image_id is None else names.get(image_id)
    called = f"annotation {label}" if label is not None else f"annotation number {number}"
    if isinstance(entry, dict) and "where" in entry:
        called = str(entry["where"])
    of_image = f" of image {image}" if image is not None else ""
    return Problem(image, label, kind, f"{called}{of_image} {told}")


def _boxes_as_written(
    annotations: list[Any], images: Sequence[CocoImage]
) -> tuple[list[list[float]], list[tuple[int, int]]]:
    """Return the boxes that are four finite numbers, and width and height of their images."""
    sizes = {image.id: (image.width, image.height) for image in images}
    boxes, of_image = [], []
    for entry in annotations:
        box = entry.get("bbox") if isinstance(entry, dict) else None
        corners = _corners(box)
        size = sizes.get(_integer(entry.get("image_id")) or 0) if corners else None
        if corners and size and isinstance(box, list) and all(map(math.isfinite, corners)):
            boxes.append([float(value) for value in box])
            of_image.append(size)
    return boxes, of_image


def _corners(box: object) -> Corners | None:
    """Return x1, y1, x2, y2 of a COCO box, or None if it is not a list of four numbers."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in box):
        return None
    try:
        x, y, width, height = map(float, box)
    except OverflowError:  # a whole number beyond the range of floats
        return math.inf, math.inf, math.inf, math.inf
    return x, y, x + width, y + height


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
