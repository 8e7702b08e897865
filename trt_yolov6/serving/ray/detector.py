"""The actor: loads an engine once, and detects in the pictures that Ray Data hands it."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.coco import CocoImage, open_coco_image, read_coco_image
from trt_yolov6.data.images import read_image
from trt_yolov6.data.jpeg import Jpeg, open_image
from trt_yolov6.data.loader import Batch
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines.base import Engine, LoadOptions
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.detection_files import described
from trt_yolov6.runtime.predict import process
from trt_yolov6.serving.ray.engine_files import load_here
from trt_yolov6.serving.ray.pictures import RemotePicture
from trt_yolov6.spec import PredictOptions

if TYPE_CHECKING:
    import pyarrow

Item = tuple[int, RemotePicture | CocoImage]
"""A picture's place in the job, and the picture."""


@dataclass(frozen=True)
class Work:
    """Task of every actor of a job."""

    engine: Any
    """Ray's reference to the `EngineFiles`."""
    backend: str
    options: LoadOptions
    predict: PredictOptions
    class_names: tuple[str, ...]
    is_evaluation: bool
    """Pictures are those of a data set: boxes are not clipped, and all have to be readable."""


@dataclass(frozen=True)
class Row:
    """One picture's row of the results.

    The actors write it: one process alone could not for many GPUs.
    """

    index: int
    """The picture's place in the job."""
    objects: int
    text: str
    """A JSON object on one line: `file`, `width`, `height` and `detections`."""


@dataclass
class FoundInBlock:
    """Result for pictures that an actor processed together."""

    pictures: tuple[tuple[int, Detections], ...] = ()
    """Places of the pictures of an evaluation, with the detections; other jobs have `rows`."""
    rows: tuple[Row, ...] = ()
    """Rows of the results; an evaluation has `pictures`."""
    failures: tuple[tuple[int, str], ...] = ()
    """Places of pictures that could not be read, each with why: a sentence."""
    fault: str | None = None
    """Why the whole job cannot be done: a sentence."""
    notes: tuple[str, ...] = ()
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, see `Processed.stage_seconds`."""


def row_of(value: Sequence[Item] | FoundInBlock) -> dict[str, bytes]:
    """Return a message to or from an actor as a row of a table, which Ray Data moves.

    It is pickled, as is all that Ray sends between its processes.
    """
    return {"pickle": pickle.dumps(value)}


def values_of(table: pyarrow.Table) -> Iterator[Any]:
    """Yield the values of a table of `row_of`'s rows, of which Ray Data may have joined several."""
    yield from map(pickle.loads, table["pickle"].to_pylist())


class Detector:
    """One engine, loaded once, and what it finds in one block of pictures after another.

    Ray makes it in a process of its own and calls it with tables of pictures. Errors of the user
    come back as values: Ray would wrap them in its own traces.
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
        self._engine, self._folder = load_here(files, self._work.backend, self._work.options)

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Detect in the pictures of a table of `Item`s; return one of a `FoundInBlock`."""
        import pyarrow

        items = [item for block in values_of(table) for item in block]
        return pyarrow.Table.from_pylist([row_of(self._answer(items))])

    def _answer(self, items: Sequence[Item]) -> FoundInBlock:
        if self._engine is None:
            return FoundInBlock(fault=self._fault)
        try:
            return self._found(self._engine, items)
        except UserError as error:
            return FoundInBlock(fault=str(error))

    def _found(self, engine: Engine, items: Sequence[Item]) -> FoundInBlock:
        block = FoundInBlock()
        for step in process(
            engine,
            items,
            _read,
            self._finish,
            self._work.predict,
            open_item=_open,
            skip_unreadable=not self._work.is_evaluation,
        ):
            pictures, rows = step.result
            block.pictures += pictures
            block.rows += rows
            block.notes += tuple(step.notes)
            block.failures += tuple((index, str(why)) for (index, _), why in step.batch.failures)
            for stage, seconds in step.stage_seconds.items():
                block.stage_seconds[stage] = block.stage_seconds.get(stage, 0.0) + seconds
        return block

    def _finish(
        self, batch: Batch[Item], found: list[Detections]
    ) -> tuple[tuple[tuple[int, Detections], ...], tuple[Row, ...]]:
        if self._work.is_evaluation:
            indices = (index for index, _ in batch.items)
            return tuple(zip(indices, found, strict=True)), ()
        rows = []
        for (index, picture), placed, one in zip(
            batch.items, batch.letterboxes, found, strict=True
        ):
            assert isinstance(picture, RemotePicture)
            height, width = placed.source
            record = {"file": picture.name, "width": width, "height": height}
            record["detections"] = described(one, self._work.class_names)
            rows.append(Row(index, len(one), json.dumps(record)))
        return (), tuple(rows)


def _read(item: Item) -> NDArray[np.uint8]:
    picture = item[1]
    if isinstance(picture, CocoImage):
        return read_coco_image(picture)
    return read_image(*picture.source())


def _open(item: Item) -> Jpeg | NDArray[np.uint8]:
    picture = item[1]
    if isinstance(picture, CocoImage):
        return open_coco_image(picture)
    return open_image(*picture.source())
