"""Calibration images: a folder in, the graph's letterboxed inputs out, always in the same order."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from trt_yolov6.common.files import read_bytes
from trt_yolov6.data.images import list_images, read_image
from trt_yolov6.data.loader import default_workers, load_batches
from trt_yolov6.data.preprocessing import YOLOV6, Preprocessing
from trt_yolov6.errors import UserError
from trt_yolov6.spec import TensorSpec

_log = logging.getLogger(__name__)

MINIMUM = 2
"""Minimum number of calibration images: one image does not show a range."""

Item = TypeVar("Item")


def evenly(items: Sequence[Item], count: int) -> Sequence[Item]:
    """Return `count` evenly spaced items; all if there are no more."""
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]


def calibration_images(
    folder: str | Path, limit: int | None = None, *, report: bool = False
) -> list[Path]:
    """Return the images of a calibration folder that can be used, sorted by path.

    Unreadable images are left out, and so are copies of another image, pixel for pixel.

    Args:
        folder: searched with its sub-folders.
        limit: take this many, evenly spaced in the order of paths; None: all.
        report: log each image left out, and the number of copies.

    Raises:
        UserError: the folder is missing, holds fewer than `MINIMUM` different images that can be
            read, or only images of a single colour.
    """
    paths = list_images(folder)
    if limit is not None and limit < MINIMUM:
        raise UserError(
            f"{limit} calibration images are too few; take {MINIMUM} at least, better 32 or more."
        )
    if limit is not None:
        paths = list(evenly(paths, limit))
    level = logging.INFO if report else logging.DEBUG
    if limit is not None and limit > len(paths):
        _log.log(level, "%s has %d images, not %d", folder, len(paths), limit)
    usable: list[Path] = []
    reasons: list[str] = []
    seen: dict[str, Path] = {}
    copies = blank = 0
    for path, looked in zip(paths, _look_at(paths), strict=True):
        if isinstance(looked, UserError):
            reasons.append(str(looked))
            _log.log(level, "left out of the calibration: %s", looked)
            continue
        sha256, is_blank = looked
        if seen.setdefault(sha256, path) != path:
            copies += 1
            continue
        blank += is_blank
        usable.append(path)
    if not usable:
        raise UserError(f"no image in {folder} can be read; the first problem: {reasons[0]}")
    if blank == len(usable):
        raise UserError(
            f"every image in {folder} is of a single colour, such as all black: no range can be "
            "found on them; give `calibration` images like those the detector will see.",
        )
    if len(usable) < MINIMUM:
        same = f", {copies + 1} times" if copies else ""
        raise UserError(
            f"one image is too few to calibrate with ({usable[0]}{same}); give `calibration` a "
            "folder of 32 or more that look like those the detector will see.",
        )
    if copies:
        _log.log(level, "left out of the calibration: %d copies of other images", copies)
    if blank:
        _log.log(level, "%d of %d calibration images are of a single colour", blank, len(usable))
    return usable


_Look = tuple[str, bool]
"""Hash of an image's pixels, and whether it is of a single colour."""


def _look_at(paths: Sequence[Path]) -> tuple[_Look | UserError, ...]:
    """Describe each image, or say why it cannot be read."""
    # Several steps of a build ask for the same images.
    states = [(path, path.stat()) for path in paths]
    return _look_at_files(tuple((path, one.st_size, one.st_mtime_ns) for path, one in states))


@functools.lru_cache(maxsize=2)
def _look_at_files(files: tuple[tuple[Path, int, int], ...]) -> tuple[_Look | UserError, ...]:
    def look(file: tuple[Path, int, int]) -> _Look | UserError:
        try:
            pixels = read_image(file[0])
        except UserError as error:
            return error
        contrast = int((pixels.max(axis=(0, 1)) - pixels.min(axis=(0, 1))).max())
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        return digest, contrast < _CONTRAST

    with ThreadPoolExecutor(default_workers(), thread_name_prefix="look") as pool:
        return tuple(pool.map(look, files))


_CONTRAST = 8
"""Levels of 255 between the darkest and the brightest pixel from which an image shows anything."""


def calibration_batches(
    folder: str | Path | Sequence[Path],
    spec: TensorSpec,
    *,
    limit: int | None = None,
    border: int = 0,
    preprocessing: Preprocessing = YOLOV6,
) -> Iterator[NDArray[Any]]:
    """Yield the graph's input for one calibration image after the other, sorted by path.

    Args:
        folder: a folder, or the list that `calibration_images` made of one.
        spec: the graph's input. One with a fixed batch gets that many images at a time; the first
            images come again to fill the last batch.
        limit: see `calibration_images`.
        border: gray pixels on every side, see `data.letterbox.fit`.
        preprocessing: how images are prepared (`Graph.preprocessing`).

    Yields:
        float32 (batch, 3, height, width), in 0..1 unless `preprocessing` says otherwise, or uint8
        (batch, height, width, 3), as `spec` has it; batch is 1 where it is free.

    Raises:
        UserError: see `calibration_images`, or an image cannot be read.
    """
    paths = (
        calibration_images(folder, limit)
        if isinstance(folder, (str, Path))
        else list(folder)[:limit]
    )
    batch = spec.shape[0] or 1
    missing = -len(paths) % batch
    paths += [paths[index % len(paths)] for index in range(missing)]
    for loaded in load_batches(
        paths, read_image, spec, batch=batch, border=border, preprocessing=preprocessing
    ):
        yield loaded.input


def images_sha256(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the images' contents in their order; their names do not count.

    Raises:
        UserError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    return digest.hexdigest()
