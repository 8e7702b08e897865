"""Data sets as pycocotools takes them: images and boxes, checked before use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.files import sha256_bytes
from trt_yolov6.common.text import counted
from trt_yolov6.data.annotations import check_units, find_image, flag, identity, number, whole
from trt_yolov6.data.images import read_image, upright_size
from trt_yolov6.data.jpeg import Jpeg, open_image
from trt_yolov6.data.sources import Source, malformed, read_source
from trt_yolov6.errors import UserError

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

TOLERATED: tuple[Kind, ...] = ("empty-box", "outside", "duplicate")
"""Problems of objects that count in an evaluation nevertheless, as pycocotools has it."""

OVERHANG = 0.01
"""Pixels a box may reach beyond its image unmentioned: rounding in the annotation file."""

Corners = tuple[float, float, float, float]

Objects = tuple[NDArray[np.float64], NDArray[np.int64]]
"""Corners (n, 4) of boxes in pixels, and their classes' indices in `category_ids`."""


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
    """The file's category ids, ascending, by class index."""
    class_names: tuple[str, ...]
    annotations: tuple[Mapping[str, Any], ...] = field(repr=False)
    """Boxes as pycocotools wants them: id (from 1), image_id, category_id, bbox, area, iscrowd."""
    notes: tuple[str, ...] = ()
    """Notes to report with an AP on it."""

    @property
    def class_indices(self) -> dict[int, int]:
        """Class index by category id."""
        return {number: index for index, number in enumerate(self.category_ids)}

    @property
    def labels_sha256(self) -> str:
        """Hash of the images' names and of their labels, not of pixels."""
        names = [(one.id, one.path.name) for one in self.images]
        return sha256_bytes(repr((names, self.class_names, self.annotations)).encode())

    def used(self) -> list[bool]:
        """Return, of each class, whether any object is of it."""
        found = {item["category_id"] for item in self.annotations}
        return [number in found for number in self.category_ids]

    def objects(self, *, crowds: bool = False) -> dict[int, Objects]:
        """Return the objects of each image; with crowds if they are to count as well."""
        sides = [
            None if item["iscrowd"] and not crowds else item["bbox"] for item in self.annotations
        ]
        return self.grouped(
            [one and (one[0], one[1], one[0] + one[2], one[1] + one[3]) for one in sides]
        )

    def grouped(self, corners: Iterable[Corners | None]) -> dict[int, Objects]:
        """Return objects by image, from each annotation's corners; None leaves it out."""
        index_of = self.class_indices
        found: dict[int, list[tuple[Corners, int]]] = {image.id: [] for image in self.images}
        for item, box in zip(self.annotations, corners, strict=True):
            index = index_of.get(item["category_id"])
            if box is not None and index is not None and item["image_id"] in found:
                found[item["image_id"]].append((box, index))
        return {
            number: (
                np.array([box for box, _ in items], np.float64).reshape(-1, 4),
                np.array([index for _, index in items], np.int64),
            )
            for number, items in found.items()
        }


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data set."""

    image: str | None
    """File name in the annotation file; None: there is no such image."""
    kind: Kind
    """Kind of the problem."""
    sentence: str
    """Description of the problem, one sentence."""


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
    empty_images: int = 0
    """Images that are left without an object: trained on as background."""
    notes: tuple[str, ...] = ()
    """Notes for whoever uses the split."""


@dataclass(frozen=True)
class AnnotatedSplit:
    """A split: its usable images and annotations, and a report on the rest."""

    dataset: CocoDataset
    """Images whose file exists and whose size is recorded, and their well-formed annotations."""
    corners: tuple[Corners | None, ...]
    """Box of each annotation inside its image, x1, y1, x2, y2; None for a `TOLERATED` problem."""
    report: DataReport


def load_coco(root: str | Path, split: str | None = None) -> CocoDataset:
    """Read a split of a data set, in COCO's, YOLO's or Pascal VOC's format.

    Args:
        root: the data set's folder, or its `data.yaml`; see `sources.read_source`.
        split: which part; default: the only one there is, else `val`, else `val2017`.

    Raises:
        UserError: the folder, the split or an image is missing, or the annotations are malformed.
    """
    found = read_annotations(root, split)
    file, problems = found.report.annotation_file, found.report.problems
    missing = [problem for problem in problems if problem.kind == "missing-image"]
    if len(missing) > 1:
        raise malformed(file, f"{len(missing)} images are missing, and {missing[0].sentence}")
    for problem in problems:
        if problem.kind not in TOLERATED:
            raise malformed(file, problem.sentence)
    notes = found.report.notes
    if problems:
        notes += (
            f"{file} has {counted(len(problems), 'object')} outside the image, without area or "
            f"annotated twice, counted as well; the first: {problems[0].sentence}",
        )
    return dataclasses.replace(found.dataset, notes=notes)


def check_objects(dataset: CocoDataset, remedy: str) -> None:
    """Raise UserError for a split without an object to measure AP on; `remedy` ends the message."""
    if all(item["iscrowd"] for item in dataset.annotations):
        raise UserError(f"{dataset.annotation_file} has no object to evaluate on; {remedy}.")


def read_annotations(
    root: str | Path, split: str | None = None, *, crowds: bool = True
) -> AnnotatedSplit:
    """Read a split, checking each image and each annotation separately.

    Args:
        root, split: as for `load_coco`.
        crowds: read annotations of crowds; they are counted either way.

    Raises:
        UserError: there is no such split, its file cannot be made out at all (it is not JSON, has
            no list of categories, images or annotations, or an image lacks its id or name), or all
            boxes are in other units than pixels.
    """
    source = read_source(root, split)
    categories = _records(source, "categories", "category", "name")
    records = _records(source, "images", "image", "file_name")
    entries = source.content.get("annotations")
    if not isinstance(entries, list):
        raise malformed(source.file, "it has no list 'annotations'")
    images, problems = _images(source, records)
    judge = _Judge(records, categories, images, problems)
    for position, entry in enumerate(entries, start=1):
        judge.take(position, entry, crowds=crowds)
    sizes = [images[entry["image_id"]] for entry in judge.annotations]
    check_units(
        source.file,
        [entry["bbox"] for entry in judge.annotations],
        [(image.width, image.height) for image in sizes],
    )
    ordered = sorted(categories.values(), key=lambda record: record.id)
    dataset = CocoDataset(
        root=Path(root),
        split=source.split,
        annotation_file=source.file,
        images=tuple(images.values()),
        category_ids=tuple(record.id for record in ordered),
        class_names=tuple(record.text for record in ordered),
        annotations=tuple(judge.annotations),
    )
    report = DataReport(
        annotation_file=source.file,
        images=len(records),
        annotations=len(entries),
        problems=tuple(problems),
        clipped=tuple(judge.clipped),
        crowds=judge.crowds,
        notes=source.notes,
    )
    return AnnotatedSplit(dataset, tuple(judge.corners), report)


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


class _Record(NamedTuple):
    """An image or a category of the file."""

    id: int
    """Id in the file, or the position from 1 on where ids are not integers."""
    text: str
    """File name, or name of the class."""
    fields: Mapping[str, Any]


def _records(source: Source, key: str, what: str, text: str) -> dict[object, _Record]:
    """Return the records under `key` by their ids, each checked to have an id and its text."""
    records = source.content.get(key)
    if not isinstance(records, list) or not records:
        raise malformed(source.file, f"it has no {key}")
    found: dict[object, _Record] = {}
    for index, record in enumerate(records):
        fields = record if isinstance(record, dict) else {}
        own, name = identity(fields.get("id")), fields.get(text)
        if text == "name" and isinstance(name, (int, float)):
            name = str(name)
        is_id = isinstance(own, str) or (isinstance(own, int) and abs(own) < 2**63)
        if not is_id or not isinstance(name, str):
            fault = f"entry {index} of {key!r} lacks {text if is_id else 'id'!r} or has a wrong one"
            raise malformed(source.file, fault)
        if own in found:
            raise malformed(source.file, f"{what} id {own} occurs twice")
        found[own] = _Record(own if isinstance(own, int) else -1, name, fields)
    if all(isinstance(own, int) for own in found):
        return found
    return {
        own: record._replace(id=number)
        for number, (own, record) in enumerate(found.items(), start=1)
    }


def _images(
    source: Source, records: Mapping[object, _Record]
) -> tuple[dict[int, CocoImage], list[Problem]]:
    images: dict[int, CocoImage] = {}
    problems: list[Problem] = []
    names: dict[Path, str] = {}
    for own, record in records.items():
        name, path = record.text, find_image(record.text, source.folders)
        # `find_image` leaves out folders, where they are another machine's.
        if path is not None and path in names:
            fault = f"image {name} is listed twice, the second time with id {own}"
            if names[path] != name:
                fault = f"{names[path]} and {name} are both found as {path}"
            raise malformed(source.file, fault)
        if path is not None:
            names[path] = name
        height, width = (whole(record.fields.get(key)) for key in ("height", "width"))
        if path is None:
            fault = f"image {name} is not in {source.folders[0]}"
            problems.append(Problem(name, "missing-image", fault))
        elif isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
            images[record.id] = CocoImage(record.id, path, height, width)
        else:
            problems.append(_without_size(name, path))
    return images, problems


def _without_size(name: str, path: Path) -> Problem:
    try:
        upright_size(path)
    except UserError as error:
        return Problem(name, "unreadable-image", str(error).split(";")[0])
    return Problem(name, "wrong-size", f"image {name} has no recorded size")


@dataclass
class _Judge:
    """Sorts annotations, one by one, into those to use and problems."""

    records: Mapping[object, _Record]
    categories: Mapping[object, _Record]
    images: Mapping[int, CocoImage]
    problems: list[Problem]
    annotations: list[Mapping[str, Any]] = field(default_factory=list)
    corners: list[Corners | None] = field(default_factory=list)
    clipped: list[Problem] = field(default_factory=list)
    crowds: int = 0
    seen: set[tuple[object, ...]] = field(default_factory=set)

    def take(self, position: int, entry: Any, *, crowds: bool) -> None:
        """Judge an annotation, the `position`th of the file."""
        fields = entry if isinstance(entry, dict) else {}
        is_crowd = bool(flag(fields.get("iscrowd")))
        self.crowds += is_crowd
        if is_crowd and not crowds:
            return
        if fields is entry:
            kind, fault = self._judged(fields, is_crowd=is_crowd)
        else:
            kind, fault = "malformed", "is not a JSON object"
        if kind is None:
            return
        record = self.records.get(identity(fields.get("image_id")))
        image = record.text if record else None
        label = whole(fields.get("id"))
        subject = f"annotation {label if isinstance(label, int) else f'number {position}'}"
        subject = fields.get("where") or (f"{subject} of image {image}" if image else subject)
        found = self.clipped if kind == "clipped" else self.problems
        found.append(Problem(image, kind, f"{subject} {fault}"))

    def _judged(self, entry: Mapping[str, Any], *, is_crowd: bool) -> tuple[Kind | None, str]:
        """Keep an annotation if it is well-formed; return what is wrong with it, if anything."""
        record = self.records.get(identity(entry.get("image_id")))
        if record is None:
            fault = f"is for image {_short(entry.get('image_id'))}, which is not listed"
            return "unknown-image", fault
        written = entry.get("bbox")
        box: Any = [number(value) for value in written] if isinstance(written, list) else []
        if len(box) != 4 or not all(type(value) in (int, float) for value in box):
            expected = entry.get("expected", "a box of four numbers")
            return "malformed", f"has {_short(written)} where {expected} should be"
        category = self.categories.get(identity(entry.get("category_id")))
        if category is None:
            fault = f"is of category {_short(entry.get('category_id'))}, which is not listed"
            return "unknown-class", f"{fault}{entry.get('numbering', '')}"
        fault = f"has the box {_short(written)}"
        x, y, width, height = map(_float, box)
        if not all(map(math.isfinite, (x, y, x + width, y + height, width * height))):
            return "not-finite", f"{fault}, which is not finite"
        if min(width, height) < 0:
            return "malformed", f"{fault}, whose sides are negative"
        image = self.images.get(record.id)
        if image is None:  # reported as a problem of the image
            return None, ""
        area = _float(number(entry.get("area")))
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,  # pycocotools takes 0 for "no match"
                "image_id": record.id,
                "category_id": category.id,
                "bbox": box,
                # Some tools write -1 for no area, with which pycocotools would ignore the object.
                "area": area if 0 <= area < math.inf else box[2] * box[3],
                "iscrowd": int(is_crowd),
            }
        )
        size = f"its {image.width}x{image.height} pixels"
        right, bottom = x + width, y + height
        inside = max(x, 0.0), max(y, 0.0), min(right, image.width), min(bottom, image.height)
        key = (record.id, category.id, inside)
        kind: Kind | None = None
        if not width or not height:
            kind, fault = "empty-box", f"{fault}, which has no area"
        elif inside[2] <= inside[0] or inside[3] <= inside[1]:
            kind, fault = "outside", f"{fault}, which lies outside {size}"
        elif key in self.seen:
            kind, fault = "duplicate", f"repeats the box {_short(written)} of another one"
        self.corners.append(inside if kind is None else None)
        if kind is None:
            self.seen.add(key)
            if max(-x, -y, right - image.width, bottom - image.height) > OVERHANG:
                kind, fault = "clipped", f"{fault}, which reaches beyond {size}"
        return kind, fault


def _float(value: object) -> float:
    """Return a number as a float; infinity for other values and beyond the range of floats."""
    try:
        return float(value) if isinstance(value, (int, float)) else math.inf
    except OverflowError:
        return math.inf


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
