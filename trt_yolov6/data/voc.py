"""Data sets in Pascal VOC's format: an XML file of boxes for each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from trt_yolov6.common.files import read_bytes
from trt_yolov6.data.annotations import find_image, flag, number
from trt_yolov6.data.images import IMAGE_SUFFIXES, size_or_zero
from trt_yolov6.data.sources import Source
from trt_yolov6.errors import UserError

_WHOLE = "all"
"""The split of a data set that has no lists."""


def voc_splits(root: Path) -> dict[str, list[Path]]:
    """Return the XML files of each split; none where the folder is not such a data set.

    `ImageSets/Main/<split>.txt` lists those in `Annotations/`; without lists all are one split.
    Folders such as `train/` and `valid/` with XML next to their images are splits, too.
    """
    folder = root / "Annotations"
    if folder.is_dir():
        splits = {}
        for listing in sorted((root / "ImageSets" / "Main").glob("*.txt")):
            if "_" in listing.stem:  # lists of one class, `dog_train.txt`
                continue
            lines = listing.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            if listed := [_listed(folder, line.strip()) for line in lines if line.strip()]:
                splits[listing.stem] = listed
    else:
        folder = root
        splits = {
            "val" if inner.name == "valid" else inner.name: found
            for inner in sorted(path for path in root.glob("[!.]*") if path.is_dir())
            if (found := _xml_in(inner))
        }
    return splits or ({_WHOLE: found} if (found := _xml_in(folder)) else {})


def _xml_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.xml"))  # macOS and editors keep hidden files of their own


def _listed(folder: Path, line: str) -> Path:
    """Return the XML file that a line of a list means: a stem, or with -1, 0 or 1 after it."""
    whole = folder / f"{line}.xml"
    stem, *flag = line.rsplit(maxsplit=1)
    return (
        folder / f"{stem}.xml" if flag in (["-1"], ["0"], ["1"]) and not whole.is_file() else whole
    )


def read_voc(root: Path, split: str) -> Source:
    """Read a split as the content of a COCO file.

    Boxes are made of pixels xmin to xmax, both within and counted from 1, as the VOC development
    kit defines them. A size that is missing or 0 is read from the image; an image whose name in the
    XML is out of date is the one named like the XML. `difficult` objects become `iscrowd`: neither
    finding nor missing one counts. Classes are sorted by name.

    Raises:
        UserError: a file of the split is missing or is not such XML.
    """
    splits = voc_splits(root)
    # Over all splits, so that training and validation have the same order.
    parsed = {path: _parsed(path) for paths in splits.values() for path in paths}
    found = {item["name"] for record in parsed.values() for item in record["objects"]}
    names = sorted(found - {""})
    ids = {name: number for number, name in enumerate(names, start=1)}
    first = splits[split][0].parent
    likely = (root / "JPEGImages", root / "images") if first.name == "Annotations" else (first,)
    folders = (*(folder for folder in likely if folder.is_dir()), root)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, path in enumerate(splits[split], start=1):
        record = parsed[path]
        image = {**record["image"], "file_name": _name(record["image"]["file_name"], path, folders)}
        images.append({"id": index, **image, **_size(image, folders)})
        annotations += [
            {
                "image_id": index,
                "category_id": ids.get(item["name"]),
                "bbox": item["bbox"],
                "iscrowd": item["difficult"],
                "where": f"{path} object {number}",
            }
            for number, item in enumerate(record["objects"], start=1)
        ]
    return Source(
        file=first,
        split=split,
        content={
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in ids.items()],
        },
        folders=folders,
    )


def _name(written: str, file: Path, folders: Sequence[Path]) -> str:
    """Return an image's name in its XML or, if there is no such file, one like the XML's."""
    names = [written, *(file.stem + suffix for suffix in IMAGE_SUFFIXES)]
    return next((name for name in names if find_image(name, folders) is not None), written)


def _size(image: dict[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """Return the width and height of an image, from its file where some tool has left them 0."""
    if all(image[side] not in (0, "") for side in ("width", "height")):
        return {}
    file = find_image(image["file_name"], folders)
    return dict(
        zip(("width", "height"), (0, 0) if file is None else size_or_zero(file), strict=True)
    )


def _parsed(path: Path) -> dict[str, Any]:
    try:
        tree = ElementTree.fromstring(read_bytes(path))
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path} is not an XML file ({error}); correct or remove it.") from error
    if tree.tag != "annotation":
        raise UserError(f"{path} is not a Pascal VOC annotation; correct or remove it.")
    file_name = _text(tree, "filename")
    if Path(file_name).suffix.lower() not in IMAGE_SUFFIXES:
        file_name = f"{file_name or path.stem}.jpg"
    objects = []
    for item in tree.iter("object"):
        corners = [number(_text(item, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        box: Any = _text(item, "bndbox")
        if all(isinstance(value, (int, float)) for value in corners):
            x1, y1, x2, y2 = (float(value) for value in corners)  # type: ignore[arg-type]
            # A file that counts from 0 after all keeps its first pixel.
            left, top = max(x1 - 1, 0.0), max(y1 - 1, 0.0)
            box = [left, top, x2 - left, y2 - top]
        is_difficult = flag(_text(item, "difficult"))
        objects.append({"name": _text(item, "name"), "bbox": box, "difficult": is_difficult})
    width, height = (number(_text(tree, f"size/{key}")) for key in ("width", "height"))
    image = {"file_name": file_name, "width": width, "height": height}
    return {"image": image, "objects": objects}


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()
