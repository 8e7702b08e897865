"""Bad training data, named: what is wrong with a data set, and what is left out of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trt_yolov6.errors import UserError

OnBadData = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data set."""

    image: str | None
    """File name of the image, as the annotation file has it; None: the annotation has none."""
    annotation_id: int | None
    """Id of the annotation; None: the image itself is at fault."""
    kind: str
    """What is wrong, in one of the words of `KINDS`."""
    sentence: str
    """The same for a reader."""


@dataclass(frozen=True)
class DataReport:
    """What was found in a split."""

    annotation_file: Path
    images: int
    """Images the file lists."""
    annotations: int
    """Annotations the file lists."""
    problems: tuple[Problem, ...]
    """What must be corrected or left out."""
    clipped: tuple[Problem, ...]
    """Boxes that reach beyond their image: cut off at its edge and kept."""
    crowds: int
    """Annotations of crowds, which are not trained on."""
    empty_images: int
    """Images that have no annotation: trained on as background."""


class BadDataError(UserError):
    """A data set was refused; `report` says all that is wrong."""

    def __init__(self, message: str, report: DataReport) -> None:
        super().__init__(message)
        self.report = report


def check_data(
    folder: str | Path, split: str | None = None, *, progress: bool = True
) -> DataReport:
    """Check a split in COCO format: every annotation, and every image by decoding it.

    Raises:
        UserError: there is no such split, or its annotation file is no such file at all.
    """
    raise NotImplementedError


def write_report(report: DataReport, path: str | Path) -> None:
    """Write a report as JSON."""
    raise NotImplementedError
