"""Validation of training data: a report on all faults of a data set, and what to leave out.

`load_coco` refuses a file at its first fault. Training reads files that nobody has cleaned, so one
report lists all faults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.files import write_json
from trt_yolov6.common.progress import progress_bar
from trt_yolov6.common.text import counted
from trt_yolov6.data.class_matching import order_by_name
from trt_yolov6.data.coco import (
    CocoImage,
    DataReport,
    Kind,
    Problem,
    read_annotations,
    read_coco_image,
)
from trt_yolov6.data.images import read_image
from trt_yolov6.data.loader import default_workers
from trt_yolov6.errors import UserError

OnBadData = Literal["refuse", "skip"]


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
    """Names in the order of the category ids, by class index."""
    boxes: tuple[NDArray[np.float64], ...]
    """An image: (k, 4), x1, y1, x2, y2 in its recorded pixels, inside it, of positive area."""
    classes: tuple[NDArray[np.int64], ...]
    """An image: (k,)."""
    report: DataReport


def settle(
    report: DataReport, on_bad_data: OnBadData, report_file: str | Path | None = None
) -> None:
    """Write a report, or delete an old one if nothing is in it; refuse a data set with problems.

    Args:
        report: on the whole split.
        on_bad_data: `skip` to go on with problems.
        report_file: takes the fields of `DataReport` as JSON; None: written nowhere.

    Raises:
        BadDataError: there are problems; says how many, the first, and what to do.
        UserError: the file cannot be written.
    """
    if report_file is not None and (report.problems or report.clipped):
        content = {**dataclasses.asdict(report), "annotation_file": str(report.annotation_file)}
        write_json(report_file, content)
    elif report_file is not None:
        try:
            Path(report_file).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{report_file} is of other data and cannot be deleted ({error.strerror}); delete "
                "it, or name another file."
            ) from error
    count = len(report.problems)
    if not count or on_bad_data == "skip":
        return
    where = f"; all are listed in {report_file}" if report_file is not None else ""
    raise BadDataError(
        f"{report.annotation_file} has {counted(count, 'problem')}, the first being that "
        f"{report.problems[0].sentence}; correct the data set or give `on_bad_data` skip to leave "
        f"{'them' if count > 1 else 'it'} out{where if count > 1 else ''}.",
        report,
    )


def read_split(folder: str | Path, split: str | None) -> CheckedSplit:
    """Read a split and judge everything but the content of its images.

    Raises:
        UserError: see `read_annotations`.
    """
    found = read_annotations(folder, split, crowds=False)
    objects = found.dataset.grouped(found.corners).values()
    return CheckedSplit(
        images=found.dataset.images,
        class_names=found.dataset.class_names,
        boxes=tuple(boxes for boxes, _ in objects),
        classes=tuple(classes for _, classes in objects),
        report=found.report,
    )


def in_order(checked: CheckedSplit, names: Sequence[str]) -> CheckedSplit:
    """Return a split with its classes in a network's order, where it has the same by name.

    It is returned as it is where the names differ, or the order does not.
    """
    found = np.concatenate([np.empty(0, np.int64), *checked.classes])
    used = np.bincount(found, minlength=len(checked.class_names)) > 0
    order = order_by_name(names, checked.class_names, used.tolist())
    if order is None or order == tuple(range(len(names))):
        return checked
    # The classes that the network does not know have no object.
    table = np.array([-1 if index is None else index for index in order], np.int64)
    return dataclasses.replace(
        checked,
        class_names=tuple(names),
        classes=tuple(table[classes] for classes in checked.classes),
    )


def decode(
    checked: CheckedSplit, use: Callable[[int, NDArray[np.uint8]], None], *, progress: bool
) -> tuple[DataReport, list[int]]:
    """Decode the images of a split in threads and hand each to `use`.

    Args:
        use: takes an image's index in the split and its pixels, uint8 (height, width, 3) RGB of
            the recorded size; called from several threads, in any order.

    Returns:
        The report on the whole split, and the indices of the images that could be used.
    """

    def read(index: int) -> Problem | None:
        image = checked.images[index]
        try:
            pixels = read_coco_image(image)
        except UserError as error:
            # A file that can be decoded has another size than recorded.
            try:
                read_image(image.path)
            except UserError:
                kind: Kind = "unreadable-image"
            else:
                kind = "wrong-size"
            return Problem(image.path.name, kind, str(error).split(";")[0].rstrip("."))
        use(index, pixels)
        return None

    count, faults, good = len(checked.images), list[Problem](), list[int]()
    with (
        progress_bar(count, shown=progress, desc="load", unit="image") as bar,
        ThreadPoolExecutor(default_workers(), thread_name_prefix="decode") as pool,
    ):
        for index, fault in enumerate(pool.map(read, range(count))):
            if fault is None:
                good.append(index)
            else:
                faults.append(fault)
            bar.update()
    report = dataclasses.replace(
        checked.report,
        problems=(*faults, *checked.report.problems),
        empty_images=sum(not len(checked.boxes[index]) for index in good),
    )
    return report, good
