"""Data sets of YOLO's kind: a text file of boxes for each image, and `data.yaml` over all."""

from __future__ import annotations

import contextlib
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trt_yolov6.common.records import read_yaml
from trt_yolov6.common.text import counted
from trt_yolov6.data.annotations import whole
from trt_yolov6.data.images import images_below, size_or_zero
from trt_yolov6.data.sources import Source
from trt_yolov6.errors import UserError

SPLITS = ("train", "val", "test")
"""The keys of `data.yaml` that name images; `valid` is read as `val`."""

DataYaml = Mapping[str, Any]
"""Content of `data.yaml`: texts, lists and dictionaries."""

_NULL = ("", "~", "null", "Null", "NULL")
"""Texts that YAML has for nothing."""

_MOST = 1.5
"""Most that a box in fractions of the image has; more is in pixels."""

_EXPECTED = "a class number and four fractions of the image"


def find_yaml(data: Path) -> tuple[Path, DataYaml] | None:
    """Return the YAML file that describes a data set, the one given or in a folder, and its keys.

    Raises:
        UserError: the file is not such YAML.
    """
    if data.is_file():
        return (data, _read_yaml(data)) if data.suffix in (".yaml", ".yml") else None
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (data / name).is_file():
            return data / name, _read_yaml(data / name)
    others = []
    for path in sorted(data.glob("*.y*ml")):
        with contextlib.suppress(UserError):
            if "names" in (content := _read_yaml(path)):
                others.append((path, content))
    return others[0] if len(others) == 1 else None


def yolo_splits(file: Path, content: DataYaml) -> dict[str, list[Path]]:
    """Return the folders or lists of images of each split that `data.yaml` names.

    Paths may be relative to the key `path`, to the file or to the working directory.

    Args:
        file, content: from `find_yaml`.

    Raises:
        UserError: a split is something else.
    """
    splits: dict[str, list[Path]] = {}
    for key in (*SPLITS, "valid"):
        value = content.get(key)
        if not value:
            continue
        listed = value if isinstance(value, list) else [value]
        places = [place for place in listed if isinstance(place, str)]
        if len(places) < len(listed):
            raise UserError(f"{file} has {key}: {str(value)[:80]}; give a folder of images.")
        name = "val" if key == "valid" else key
        splits.setdefault(name, [_resolved(file, content, place) for place in places])
    return splits


def read_yolo(file: Path, content: DataYaml, split: str) -> Source:
    """Read a split as the content of a COCO file.

    The boxes of `images/a.jpg` are in `labels/a.txt`, or in `a.txt` next to it: a line per object,
    `class x y width height`, the centre and the sides as fractions of the image; or `class x1 y1
    x2 y2 x3 y3 ...`, a polygon. With `kpt_shape` in the YAML, keypoints follow the box. An image
    without such a file has no objects, which is noted, and so is a file of several images.

    Args:
        file, content: from `find_yaml`.
        split: one of `yolo_splits`.

    Raises:
        UserError: the YAML names no classes, the split has no image, or none of them has labels.
    """
    names, has_keypoints = _class_names(file, content), "kpt_shape" in content
    places = yolo_splits(file, content)[split]
    paths = list(dict.fromkeys(path for place in places for path in _images(file, split, place)))
    if not paths:
        raise UserError(f"{file}: {split} has no image in {places[0]}; check the path.")
    labels_of = _label_files(paths)
    if not labels_of:
        if not paths[0].is_file():
            raise UserError(f"{file}: image {paths[0]} of {split} is not there; correct its list.")
        raise UserError(
            f"{file}: no image of {split} has labels; put those of {paths[0]} into "
            f"{label_path(paths[0])}."
        )
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(size_or_zero, paths))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True), start=1):
        width, height = size
        images.append({"id": number, "file_name": str(path), "width": width, "height": height})
        if path in labels_of:
            for entry in _objects(labels_of[path], width, height, has_keypoints):
                annotations.append({"image_id": number, **entry})
    # Only a whole split of pixels is refused as such; a stray line is a malformed one.
    pixels = [item for item in annotations if max(item.get("fractions", (0,))) > _MOST]
    if pixels and len(pixels) > 0.5 * len(annotations):
        raise UserError(
            f"{pixels[0]['where']} has numbers above 1: YOLO's format has the centre and the sides "
            "as fractions of the image, not in pixels."
        )
    labels = {item["category_id"] for item in annotations}
    if len(names) in labels and labels <= set(range(1, len(names) + 1)):
        for item in annotations:
            item["numbering"] = " (class numbers start at 0, and these labels seem to start at 1)"
    for item in pixels:
        values = item["category_id"], *item["fractions"]
        item["bbox"] = " ".join(map("{:g}".format, values))[:100]
    return Source(
        file=file,
        split=split,
        content={
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in names.items()],
        },
        folders=(places[0] if places[0].is_dir() else file.parent,),
        notes=tuple(_notes(split, paths, labels_of)),
    )


def _notes(split: str, paths: Sequence[Path], labels_of: Mapping[Path, Path]) -> Iterator[str]:
    bare = [path for path in paths if path not in labels_of]
    if bare:
        yield (
            f"{len(bare)} of {len(paths)} images of {split} have no label file and count as "
            f"without objects; the first: {bare[0]}"
        )
    images_of: dict[Path, list[Path]] = {}
    for path, labels in labels_of.items():
        images_of.setdefault(labels, []).append(path)
    shared = [(labels, images) for labels, images in images_of.items() if len(images) > 1]
    if shared:
        labels, images = shared[0]
        yield (
            f"images of {split} share {counted(len(shared), 'label file')}, whose boxes count for "
            f"each of them; the first: {labels}, of {images[0].name} and {images[1].name}"
        )


def label_path(image: Path) -> Path:
    """Return the path of an image's labels: in `labels/` for `images/`, else next to it."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            return Path(*parts).with_suffix(".txt")
    return image.with_suffix(".txt")


def _label_files(images: Sequence[Path]) -> dict[Path, Path]:
    """Return the label file of each image that has one: in `labels/`, or without that next to it.

    Capitals do not matter, nor how an umlaut is composed: macOS takes `ä` apart in some names.
    """
    found: dict[Path, Path] = {}
    expected = {image: label_path(image) for image in images}
    for image, path in expected.items():
        # Where there is such a folder, a text next to an image may be anything, such as a caption.
        if not path.parent.is_dir():
            expected[image] = image.with_suffix(".txt")
    taken = set(expected.values())
    listed: dict[Path, dict[str, Path]] = {}
    for image, path in expected.items():
        if not path.is_file():
            if path.parent not in listed:
                there = path.parent.iterdir() if path.parent.is_dir() else ()
                listed[path.parent] = {_spelling(one): one for one in there if one not in taken}
            path = listed[path.parent].get(_spelling(path), path)
        if path.is_file():
            found[image] = path
    return found


def _spelling(path: Path) -> str:
    return unicodedata.normalize("NFC", path.name).casefold()


def _objects(
    labels: Path, width: int, height: int, has_keypoints: bool
) -> Iterator[dict[str, Any]]:
    try:
        lines = labels.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{labels} is not a readable text file; replace it.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{labels} line {number}"
        try:
            values = [float(word) for word in line.split()][: 5 if has_keypoints else None]
        except ValueError:
            values = []
        if (
            len(values) < 5
            or not all(map(math.isfinite, values))
            or values[0] != int(values[0])
            or (len(values) > 5 and len(values) % 2 == 0)
        ):
            yield {"category_id": None, "bbox": line[:100], "where": where, "expected": _EXPECTED}
            continue
        entry: dict[str, Any] = {
            "category_id": int(values[0]),
            "where": where,
            "expected": _EXPECTED,
        }
        if len(values) == 5:
            x, y, w, h = values[1:]
            x, y = x - w / 2, y - h / 2
        else:
            xs, ys = values[1::2], values[2::2]
            x, y = min(xs), min(ys)
            w, h = max(xs) - x, max(ys) - y
        entry["bbox"] = [x * width, y * height, w * width, h * height]
        entry["fractions"] = values[1:]
        yield entry


def _images(file: Path, split: str, place: Path) -> list[Path]:
    if place.is_dir():
        return images_below(place)
    if place.is_file() and place.suffix == ".txt":
        lines = place.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        listed = [line.strip() for line in lines if line.strip()]
        return [
            path if (path := Path(line)).is_absolute() else place.parent / path for line in listed
        ]
    raise UserError(f"{file} says that {split} is in {place}, which is not there; correct it.")


def _resolved(file: Path, content: DataYaml, place: str) -> Path:
    root = content.get("path")
    roots = [file.parent / root, Path(root)] if isinstance(root, str) and root else []
    candidates = [base / place for base in (*roots, file.parent, Path())]
    # Roboflow writes `../train/images` for a folder next to the file.
    plain = place
    while plain.startswith("../"):
        plain = plain[3:]
        candidates.append(file.parent / plain)
    return next((path for path in candidates if path.exists()), candidates[0])


def _class_names(file: Path, content: DataYaml) -> dict[int, str]:
    """Return the names by the numbers that labels have for them: the keys, or 0, 1 and so on."""
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        numbered = {int(key): name for key, name in dict(names or ()).items()}
    except (ValueError, TypeError):
        numbered = {}
    if not numbered or not all(isinstance(name, str) for name in numbered.values()):
        raise UserError(f"{file} has no list 'names'; give the class names there.")
    count = content.get("nc")
    # With gaps in the numbers, some count them, too.
    if count is not None and whole(count) not in (len(numbered), max(numbered) + 1):
        raise UserError(
            f"{file} says nc: {str(count)[:80]}, but 'names' has {len(numbered)}; correct "
            "one of them."
        )
    return numbered


def _read_yaml(file: Path) -> DataYaml:
    """Return the keys that have a value, numbers and the like as the texts they are written as."""
    content = read_yaml(file, texts=True)
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold keys such as train, val and names; correct it.")
    return {key: value for key, value in content.items() if value not in _NULL}
