"""Serve concurrent requests: one batch for all, an answer for each."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.images import read_image
from trt_yolov6.data.letterbox import Letterbox, fit
from trt_yolov6.data.loader import fill_row
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.detectors.layouts import LAYOUTS, Outputs
from trt_yolov6.engines.base import Engine
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.predict import resolve
from trt_yolov6.spec import PredictOptions


class InputMemory:
    """Memory for an engine's input that one batch after the other uses.

    The first touch of fresh pages takes longer than copying what comes into them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._array = engine.empty_input(engine.batch.min)

    def rows(self, count: int) -> NDArray[Any]:
        """Return an uninitialized array of `count` rows, valid until the next call."""
        if count > len(self._array):
            self._array = self._engine.empty_input(count)
        return self._array[:count]


def make_ready(engine: Engine, memory: InputMemory, options: PredictOptions | None) -> None:
    """Run every batch size that takes seconds of compilation once, before requests wait for it.

    The options are those of `detect_encoded`; None: requests are for `run_tensors`.
    """
    if not engine.batch_steps:
        return
    if options is not None and engine.takes_images():
        black = np.zeros((*engine.image_size, 3), np.uint8)
        placed = fit(engine.image_size, engine.image_size, 0, engine.preprocessing.fit)
        nms, _ = resolve(engine, options)
        for rows in engine.batch_steps:
            engine.start_images([black], [placed], nms, rows=rows).wait()
        return
    array = memory.rows(engine.batch_steps[-1])
    array[:] = 0
    for rows in engine.batch_steps:
        engine.infer(array[:rows])


def run_tensors(
    engine: Engine, requests: Sequence[NDArray[Any]], memory: InputMemory
) -> list[dict[str, NDArray[Any]]]:
    """Run the inputs of several requests as one batch.

    A batch is filled up to `engine.rows_for` with zeros, whose outputs are dropped.

    Args:
        engine: any loaded engine.
        requests: inputs as `engine.input` says, each of one image or more, in all no more than the
            engine takes.
        memory: of the engine; not to be used by another thread meanwhile.

    Returns:
        The engine's outputs for each request, by name: its own images' alone.

    Raises:
        UserError: an input is of the wrong shape or dtype, or there are too many images.
    """
    expected = engine.input
    for request in requests:
        if not expected.fits(request):
            raise UserError(
                f"the input is {request.dtype} {list(request.shape)}, not {expected.dtype} "
                f"{['batch', *expected.shape[1:]]}; send it as the configuration says."
            )
    counts = [len(request) for request in requests]
    total = sum(counts)
    rows = engine.rows_for(total)
    if len(requests) == 1 and total == rows:
        return [engine.infer(np.ascontiguousarray(requests[0]))]
    array = memory.rows(rows)
    np.concatenate(requests, out=array[:total])
    array[total:] = 0
    outputs = engine.infer(array)
    ends = np.cumsum(counts)
    part = shared_outputs if LAYOUTS[engine.output_layout].shared else _outputs
    return [part(outputs, end - count, end) for count, end in zip(counts, ends, strict=True)]


def _outputs(outputs: Outputs, start: int, end: int) -> dict[str, NDArray[Any]]:
    return {name: value[start:end] for name, value in outputs.items()}


def shared_outputs(outputs: Outputs, start: int, end: int) -> dict[str, NDArray[Any]]:
    """Return the outputs of some images of a layout whose images share rows, as of a batch.

    Args:
        outputs: rows that begin with the number of their image; or rows, and how many of them each
            image has.
        start, end: the images.
    """
    counts = next((value for value in outputs.values() if value.ndim == 1), None)
    found = {}
    for name, value in outputs.items():
        if value.ndim == 1:
            found[name] = value[start:end]
        elif counts is not None:
            found[name] = value[counts[:start].sum() : counts[:end].sum()]
        else:
            found[name] = value[(value[:, 0] >= start) & (value[:, 0] < end)]
            found[name][:, 0] -= start
    return found


def detect_encoded(
    engine: Engine,
    pictures: Sequence[bytes],
    options: PredictOptions,
    memory: InputMemory,
    executor: Executor,
) -> list[Detections | UserError]:
    """Find objects in encoded pictures, all in one batch.

    Args:
        engine: any loaded engine.
        pictures: contents of image files, no more than the engine takes at a time.
        options: thresholds (default: as for evaluation) and border.
        memory: see `run_tensors`.
        executor: decodes and post-processes several pictures at a time.

    Returns:
        For each picture what was found, in its pixels, or why it could not be read.

    Raises:
        UserError: the engine cannot do what is asked.
    """
    nms, border = resolve(engine, options)
    on_gpu = engine.takes_images()
    array = memory.rows(0 if on_gpu else engine.rows_for(len(pictures)))
    images: dict[int, NDArray[np.uint8]] = {}

    def prepare(index: int) -> Letterbox | UserError:
        try:
            image = read_image(pictures[index], "the picture")
            if not on_gpu:
                return fill_row(array[index], image, engine.input, border, engine.preprocessing)
            images[index] = image
            height, width = image.shape[:2]
            return fit((height, width), engine.image_size, border, engine.preprocessing.fit)
        except UserError as error:
            return error
        except (MemoryError, cv2.error):
            return UserError("the picture takes more memory than there is; send a smaller one.")

    prepared = list(executor.map(prepare, range(len(pictures))))
    placed = {index: item for index, item in enumerate(prepared) if isinstance(item, Letterbox)}
    if not placed:
        return [item for item in prepared if isinstance(item, UserError)]
    # Pictures that could not be read take no time of the engine's.
    rows = engine.rows_for(len(placed))
    if on_gpu:
        run = engine.start_images(
            [images[index] for index in placed], tuple(placed.values()), nms, rows=rows
        )
    else:
        if len(placed) < len(pictures):
            array[: len(placed)] = array[list(placed)]
        array[len(placed) : rows] = 0
        run = engine.start(array[:rows], nms)
    found = postprocess(
        run.wait(), engine.output_layout, nms, tuple(placed.values()), executor=executor
    )
    by_picture = dict(zip(placed, found, strict=True))
    return [
        item if isinstance(item, UserError) else by_picture[index]
        for index, item in enumerate(prepared)
    ]


def stacked(found: Sequence[Detections]) -> dict[str, NDArray[Any]]:
    """Return the detections of one request's pictures as arrays of one length.

    Args:
        found: of one picture or more.

    Returns:
        `boxes` float32 (pictures, n, 4), `scores` float32 (pictures, n), `classes` int64 (pictures,
        n), where n is that of the picture with most; rows beyond a picture's own `count`, int32
        (pictures, 1), have score 0 and class -1.
    """
    most = max(len(one) for one in found)
    boxes = np.zeros((len(found), most, 4), np.float32)
    scores = np.zeros((len(found), most), np.float32)
    classes = np.full((len(found), most), -1, np.int64)
    for row, one in enumerate(found):
        boxes[row, : len(one)] = one.xyxy
        scores[row, : len(one)] = one.confidence
        classes[row, : len(one)] = one.class_id
    count = np.array([[len(one)] for one in found], np.int32)
    return {"boxes": boxes, "scores": scores, "classes": classes, "count": count}
