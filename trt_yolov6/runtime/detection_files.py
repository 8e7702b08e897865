"""Detections on disk: JSON, CSV and YOLO's text files, written entry by entry.

A long video's detections would not fit in memory.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from trt_yolov6.common.files import atomic_path, in_utf8, write_bytes
from trt_yolov6.detectors.detections import Detections

Format = Literal["json", "csv", "yolo"]

_NAMES: dict[Format, str] = {"json": "detections.json", "csv": "detections.csv", "yolo": "labels"}
"""Name of the file of a format, or of YOLO's folder of text files."""

_COLUMNS = (
    *("file", "frame", "seconds", "width", "height"),
    *("class", "name", "score", "x1", "y1", "x2", "y2"),
)


class DetectionFiles:
    """The files that a run writes; they appear when `open_detection_files`'s block ends well."""

    def __init__(
        self,
        folder: Path,
        formats: Sequence[Format],
        class_names: Sequence[str],
        stack: contextlib.ExitStack,
    ) -> None:
        self.images = 0
        """Images or frames so far."""
        self.objects = 0
        self._folder = folder
        self._formats = tuple(formats)
        self._class_names = class_names
        self._stack = stack
        self._open: dict[str, BinaryIO] = {}

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, and the folder of YOLO's text files."""
        return tuple(self._folder / _NAMES[form] for form in self._formats)

    def add(self, record: dict[str, Any], stem: str, detections: Detections) -> None:
        """Append an image or a frame.

        Args:
            record: `file`, `width` and `height` in pixels; of a frame also `frame`, from 0, and
                `seconds`.
            stem: path of its YOLO file below their folder, without the suffix.
            detections: what was found in it.
        """
        found = described(detections, self._class_names)
        readable = {**record, "file": in_utf8(record["file"])}
        if "json" in self._formats:
            text = json.dumps({**readable, "detections": found}, indent=2)
            start = ",\n" if self.images else "[\n"
            self._file("json").write((start + textwrap.indent(text, "  ")).encode())
        if "csv" in self._formats:
            lines = io.StringIO()
            writer = csv.DictWriter(lines, _COLUMNS, restval="", lineterminator="\n")
            if not self.images:
                writer.writeheader()
            for item in found:
                corners = dict(zip(("x1", "y1", "x2", "y2"), item["box"], strict=True))
                rest = {key: value for key, value in item.items() if key != "box"}
                writer.writerow({**readable, **rest, **corners})
            # A name that is not UTF-8 is written as it is.
            self._file("csv").write(lines.getvalue().encode(errors="surrogateescape"))
        if "yolo" in self._formats:
            path = self._folder / _NAMES["yolo"] / f"{stem}.txt"
            write_bytes(path, _yolo_lines(record, detections).encode())
        self.images += 1
        self.objects += len(detections)

    def end(self) -> None:
        """Finish the files."""
        if "json" in self._open:
            self._open["json"].write(b"\n]\n")
        for file in self._open.values():
            file.close()

    def _file(self, kind: Literal["json", "csv"]) -> BinaryIO:
        # Opened late: where nothing was readable, not even the folder is made.
        if kind not in self._open:
            path = self._stack.enter_context(atomic_path(self._folder / _NAMES[kind]))
            file = path.open("wb")
            self._open[kind] = file
            self._stack.callback(_discard, file)
        return self._open[kind]


@contextlib.contextmanager
def open_detection_files(
    folder: Path, formats: Sequence[Format], class_names: Sequence[str]
) -> Iterator[DetectionFiles]:
    """Yield the files of a run in `folder`, which appear when the block ends well.

    Raises:
        UserError: one cannot be written.
    """
    with contextlib.ExitStack() as stack:
        files = DetectionFiles(folder, formats, class_names, stack)
        yield files
        files.end()


def described(detections: Detections, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return detections as JSON has them: `box`, `score`, `class` and `name` of each."""
    return [
        {
            "box": [round(value, 2) for value in box],
            "score": round(score, 4),
            "class": label,
            "name": class_names[label] if label < len(class_names) else str(label),
        }
        for box, score, label in detections.as_tuples()
    ]


def _yolo_lines(record: dict[str, Any], detections: Detections) -> str:
    """Return a line an object: class, centre and sides as fractions of the image, score."""
    width, height = record["width"], record["height"]
    return "".join(
        f"{label} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
        f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f} {score:.4f}\n"
        for (x1, y1, x2, y2), score, label in detections.as_tuples()
    )


def _discard(file: BinaryIO) -> None:
    with contextlib.suppress(OSError):  # another is being raised already
        file.close()
