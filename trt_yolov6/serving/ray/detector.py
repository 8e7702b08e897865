"""The actor: loads an engine once, and detects in the pictures that Ray Data hands it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.coco import CocoImage, read_coco_image
from trt_yolov6.data.loader import Batch
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines.base import Engine, LoadOptions
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.predict import process
from trt_yolov6.serving.ray.engine_files import load_here
from trt_yolov6.serving.ray.pictures import read_remote
from trt_yolov6.spec import PredictOptions

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """Task of every actor of a job."""

    engine: Any
    """Ray's reference to the `EngineFiles`."""
    sha256: str
    backend: str
    options: LoadOptions
    predict: PredictOptions
    is_evaluation: bool
    """Pictures are those of a data set: boxes are not clipped, and all have to be readable."""


@dataclass(frozen=True)
class FoundInPicture:
    """Result for one picture."""

    index: int
    """Its place in the job."""
    error: str | None
    """Why it could not be read: a sentence."""
    size: tuple[int, int]
    """Height and width in pixels."""
    detections: Detections


@dataclass(frozen=True)
class FoundInBlock:
    """Result for pictures that an actor processed together."""

    pictures: tuple[FoundInPicture, ...]
    fault: str | None
    """Why the whole job cannot be done: a sentence."""
    notes: tuple[str, ...]
    read_seconds: float = 0.0
    preprocess_seconds: float = 0.0
    inference_seconds: float = 0.0
    postprocess_seconds: float = 0.0


def picture_rows(items: Sequence[tuple[int, str, str]]) -> pyarrow.Table:
    """Return the table that tells an actor what to read: index, store and path of pictures."""
    import pyarrow as pa

    columns = list(zip(*items, strict=True))
    return pa.table({"index": columns[0], "store": columns[1], "path": columns[2]})


def dataset_rows(items: Sequence[tuple[int, CocoImage]]) -> pyarrow.Table:
    """Return the table that tells an actor which images of a data set to read."""
    import pyarrow as pa

    images = [image for _, image in items]
    return pa.table(
        {
            "index": [index for index, _ in items],
            "path": [str(image.path.absolute()) for image in images],
            "height": [image.height for image in images],
            "width": [image.width for image in images],
        }
    )


class Detector:
    """One engine, loaded once, and what it finds in one block of pictures after another.

    Ray makes it in a process of its own and calls it with tables of `picture_rows` or
    `dataset_rows`. Errors of the user come back as values: Ray would wrap them in its own traces.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._fault: str | None = None
        self._engine: Engine | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        try:
            self._load()
        except UserError as error:
            self._fault = str(error)
        except ModuleNotFoundError as error:
            self._fault = f"a machine of the cluster lacks the Python package {error.name}."

    def _load(self) -> None:
        import cv2
        import ray

        # The cores of an actor are its own; Ray does not hold it to them.
        cv2.setNumThreads(self._work.predict.workers or 1)
        files = ray.get(self._work.engine)
        self._engine, self._folder = load_here(
            files, self._work.sha256, self._work.backend, self._work.options
        )

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Detect in the pictures of a table; see `blocks_of` for what comes back."""
        rows = table.to_pylist()
        if self._engine is None:
            return _table([], {"fault": self._fault})
        notes: list[str] = []
        found: list[Row] = []
        sums = dict.fromkeys(("read", "preprocess", "inference", "postprocess"), 0.0)

        def finish(batch: Batch[Row], detections: list[Detections]) -> list[Row]:
            return [
                _found_row(row["index"], placed.source, one)
                for row, placed, one in zip(batch.items, batch.letterboxes, detections, strict=True)
            ]

        work = self._work
        try:
            for step in process(
                self._engine,
                rows,
                _read_dataset_row if work.is_evaluation else _read_picture_row,
                finish,
                work.predict,
                skip_unreadable=not work.is_evaluation,
            ):
                found += step.result
                notes += step.notes
                found += [_failed_row(row["index"], str(e)) for row, e in step.batch.failures]
                sums["read"] += step.batch.read_seconds
                sums["preprocess"] += step.batch.preprocess_seconds
                sums["inference"] += step.inference_seconds
                sums["postprocess"] += step.postprocess_seconds
        except UserError as error:
            return _table([], {"fault": str(error)})
        return _table(found, {"notes": notes, **sums})


def _read_picture_row(row: Row) -> NDArray[np.uint8]:
    return read_remote(row["store"], row["path"])


def _read_dataset_row(row: Row) -> NDArray[np.uint8]:
    return read_coco_image(CocoImage(row["index"], Path(row["path"]), row["height"], row["width"]))


def _found_row(index: int, size: tuple[int, int], found: Detections) -> Row:
    return {
        "index": index,
        "error": None,
        "height": size[0],
        "width": size[1],
        "boxes": found.xyxy.reshape(-1),
        "scores": found.confidence,
        "classes": found.class_id,
    }


def _failed_row(index: int, why: str) -> Row:
    nothing = np.zeros(0, np.float32)
    sizes = {"height": 0, "width": 0}
    return {
        "index": index,
        "error": why,
        **sizes,
        "boxes": nothing,
        "scores": nothing,
        "classes": nothing.astype(np.int64),
    }


def _table(rows: list[Row], told: dict[str, Any]) -> pyarrow.Table:
    """Return rows as a table, with what is told of the block as one more row of index -1."""
    import pyarrow as pa

    last = {**_failed_row(-1, json.dumps(told))}
    schema = pa.schema(
        [
            ("index", pa.int64()),
            ("error", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("boxes", pa.list_(pa.float32())),
            ("scores", pa.list_(pa.float32())),
            ("classes", pa.list_(pa.int64())),
        ]
    )
    every = [*rows, last]
    columns = [pa.array([row[name] for row in every], kind) for name, kind in _types(schema)]
    return pa.Table.from_arrays(columns, schema=schema)


def _types(schema: pyarrow.Schema) -> list[tuple[str, Any]]:
    return [(field.name, field.type) for field in schema]


def block_of(table: pyarrow.Table) -> FoundInBlock:
    """Read what actors sent back; a table may hold several of their blocks, or a part of one."""
    told: list[dict[str, Any]] = []
    pictures = []
    for row in table.to_pylist():
        if row["index"] < 0:
            told.append(json.loads(row["error"]))
            continue
        pictures.append(
            FoundInPicture(
                row["index"],
                row["error"],
                (row["height"], row["width"]),
                Detections(
                    np.array(row["boxes"], np.float32).reshape(-1, 4),
                    np.array(row["scores"], np.float32),
                    np.array(row["classes"], np.int64),
                ),
            )
        )
    return FoundInBlock(
        tuple(pictures),
        next((one["fault"] for one in told if "fault" in one), None),
        tuple(note for one in told for note in one.get("notes", ())),
        *(
            sum(one.get(name, 0.0) for one in told)
            for name in ("read", "preprocess", "inference", "postprocess")
        ),
    )
