"""Ids, numbers, flags and names of images as real tools write them into annotations.

Ids come as texts, numbers as texts or whole floats, `iscrowd` as "0"; names of images with folders
of another machine. What is meant is plain, so it is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.errors import UserError

_FALSE = ("", "0", "false", "no", "none", "null")


def find_image(name: str, folders: Sequence[Path]) -> Path | None:
    """Return the file that an annotation file's name of an image means; None where there is none.

    Folders of another machine in front of it are passed over: of `images/val/a.jpg` and
    `C:\\\\set\\\\val\\\\a.jpg`, the longest end that is there counts.

    Args:
        name: with slashes or backslashes, of any system.
        folders: where images lie, the likeliest first.
    """
    direct = folders[0] / name
    try:
        if direct.is_file():
            return direct
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        while ".." in parts:
            del parts[: parts.index("..") + 1]
        for start in range(len(parts)):
            for folder in folders:
                path = folder.joinpath(*parts[start:])
                if path.is_file():
                    return path
    except (OSError, ValueError):  # a name too long, or with a NUL
        return None
    return None


def check_units(
    file: Path, boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]]
) -> None:
    """Refuse boxes that are not x, y, width, height in pixels.

    Args:
        file: of the annotations, for messages.
        boxes: (n, 4), finite.
        sizes: width and height in pixels of each box's image.

    Raises:
        UserError: all boxes lie within one pixel, as fractions of the image do; or they are corners
            by all signs: none ends before it begins, and many reach far beyond their image, which
            read as x1, y1, x2, y2 none does.
    """
    if not len(boxes):
        return
    table: NDArray[np.float64] = np.asarray(boxes, np.float64)
    size: NDArray[np.float64] = np.asarray(sizes, np.float64)
    ends = table[:, :2] + table[:, 2:]
    if (np.abs(table) <= 1).all() and (ends <= 1.01).all() and (size > 2).all():
        raise UserError(
            f"{file} has all its boxes within one pixel: they are fractions of the image; COCO's "
            "format has x, y, width and height in pixels."
        )
    as_corners = (table[:, 2:] > table[:, :2]).all() and (table[:, 2:] <= size + 1).all()
    beyond = (ends > 1.05 * size + 1).any(axis=1)
    if as_corners and len(table) >= 3 and beyond.mean() >= 0.2:
        raise UserError(
            f"{file} has boxes as x1, y1, x2, y2: read as x, y, width, height, {beyond.sum()} of "
            f"{len(table)} reach beyond their images; COCO's format has the width and the height."
        )


def number(value: object) -> object:
    """Return the number a text spells, whole where it is; anything else as it is."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def whole(value: object) -> object:
    """Return the integer that a value such as 3.0 or "3" stands for; other values as they are."""
    value = number(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def flag(value: object) -> int:
    """Return 0 or 1: "0" and "false" are 0."""
    if isinstance(value, str):
        return int(value.strip().lower() not in _FALSE)
    return int(bool(value))


def identity(value: object) -> int | str | None:
    """Return a comparable form of an id: 7, 7.0 and "7" are the same; None for other values."""
    value = whole(value)
    is_id = isinstance(value, (int, str)) and not isinstance(value, bool)
    return value if is_id else None  # type: ignore[return-value]
