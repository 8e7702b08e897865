"""Data sets on disk, in any of the formats that are read, as the content of a COCO file."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_yolov6.common.files import path_of, read_json
from trt_yolov6.common.ranges import fitting
from trt_yolov6.errors import UserError, did_you_mean

_PREFIX = "instances_"
_ROBOFLOW = "_annotations.coco.json"


@dataclass(frozen=True)
class Source:
    """One split of a data set as it was found; nothing in it has been checked."""

    file: Path
    """Path for messages: the annotation file, `data.yaml`, or a folder of XML."""
    split: str
    content: Mapping[str, Any]
    """Lists `images`, `categories` and `annotations`, as in a COCO file. An annotation may have
    `where`: its file and line."""
    folders: tuple[Path, ...]
    """Folders of images, the likeliest first."""
    notes: tuple[str, ...] = ()
    """Notes for whoever uses the split."""


def read_source(data: str | Path, split: str | None) -> Source:
    """Find out what a data set is and read one split of it.

    Known are COCO (`annotations/instances_<split>.json`, or Roboflow's
    `<split>/_annotations.coco.json`), YOLO (`data.yaml`, itself or in the folder) and Pascal VOC
    (`Annotations/*.xml`, or XML next to the images).

    Args:
        data: a folder, or a YAML file.
        split: which part; default: the only one there is, else `val`, else `val2017`.

    Raises:
        UserError: it is none of these, has no such split, or cannot be read.
    """
    return _reader(path_of(data, "data"), split)()


def _reader(data: Path, split: str | None, parameter: str = "split") -> Callable[[], Source]:
    """Find out which split of what kind of data set is meant; return what reads it."""
    from trt_yolov6.data.voc import read_voc, voc_splits
    from trt_yolov6.data.yolo import find_yaml, read_yolo, yolo_splits

    if not os.path.isdir(data) and not (os.path.isfile(data) and data.suffix in (".yaml", ".yml")):
        raise UserError(
            f"{data} is not a folder; give the data set's folder, or its data.yaml, as `data`.",
        )
    files = _coco_files(data) if data.is_dir() else {}
    if files:
        chosen = choose_split(data, sorted(files), split, parameter)
        return functools.partial(_read_coco, data, files[chosen], chosen)
    found = find_yaml(data)
    if found is not None:
        chosen = choose_split(found[0], list(yolo_splits(*found)), split, parameter)
        return functools.partial(read_yolo, *found, chosen)
    xml = voc_splits(data)
    if xml:
        return functools.partial(read_voc, data, choose_split(data, list(xml), split, parameter))
    raise UserError(
        f"{data} has no annotations/instances_<split>.json, no data.yaml and no Pascal VOC "
        "Annotations/; give a data set in COCO, YOLO or VOC layout."
    )


def check_source(data: str | Path, split: str | None, parameter: str = "split") -> None:
    """Refuse a path without a data set, or an unknown split; quick, so call it before any work.

    Args:
        data, split: see `read_source`.
        parameter: name of the one that gives the split, for messages.

    Raises:
        UserError: see `read_source`; the annotations themselves are not read.
    """
    _reader(path_of(data, "data"), split, parameter)


def choose_split(data: Path, splits: list[str], split: str | None, parameter: str) -> str:
    """Return the split to take.

    Raises:
        UserError: there is no such split, or several and none was named.
    """
    if not splits:
        raise UserError(f"{data} names no images under train, val or test; add them.")
    present = ", ".join(splits)
    fitting(split, str | None, f"`{parameter}`")
    if split is not None:
        if split not in splits:
            raise UserError(
                f"{data} has no split {split!r}{did_you_mean(split, splits)}; give one of these as "
                f"`{parameter}`: {present}."
            )
        return split
    if len(splits) == 1:
        return splits[0]
    for usual in ("val", "val2017"):
        if usual in splits:
            return usual
    raise UserError(f"{data} has several splits; give one of these as `{parameter}`: {present}.")


def _coco_files(root: Path) -> dict[str, Path]:
    files = {
        path.stem[len(_PREFIX) :]: path for path in (root / "annotations").glob(f"{_PREFIX}*.json")
    }
    if files:
        return files
    return {
        "val" if path.parent.name == "valid" else path.parent.name: path
        for path in root.glob(f"*/{_ROBOFLOW}")
    }


def _read_coco(root: Path, file: Path, split: str) -> Source:
    content = read_json(file)
    if not isinstance(content, dict):
        raise malformed(file, "it is not a JSON object")
    folder = file.parent if file.name == _ROBOFLOW else _image_folder(root, split)
    return Source(file, split, content, (folder, root))


def _image_folder(root: Path, split: str) -> Path:
    for folder in (root / "images" / split, root / split, root / "images"):
        if folder.is_dir():
            return folder
    raise UserError(
        f"{root} has neither images/{split}/ nor {split}/ nor images/; put the images of the split "
        "there."
    )


def malformed(file: Path, what: str) -> UserError:
    """Return the error for annotations that cannot be used."""
    return UserError(f"{file} cannot be used as annotations: {what}; correct it.")
