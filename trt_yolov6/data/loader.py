"""Batches for an engine, read and pre-processed ahead of it by a few threads."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.machine import usable_cpus
from trt_yolov6.data.letterbox import Letterbox, fill, fit, letterbox
from trt_yolov6.data.preprocessing import YOLOV6, Preprocessing
from trt_yolov6.errors import UserError
from trt_yolov6.spec import TensorSpec, empty_input, image_size_of

Item = TypeVar("Item")

AHEAD = 2
"""Batches prepared while the engine works on another; bounds the memory the loader takes."""


@dataclass(frozen=True)
class Batch(Generic[Item]):
    """One batch, ready for an engine, and where it came from."""

    input: NDArray[Any]
    """The engine's input; rows after the items, if any, are padding."""
    items: tuple[Item, ...]
    """The source of each row."""
    letterboxes: tuple[Letterbox, ...]
    """Place of each image in its row."""
    images: tuple[NDArray[np.uint8], ...]
    """The original images, if they were asked for; else empty."""
    failures: tuple[tuple[Item, UserError], ...]
    """Items left out because they could not be read, and why."""
    read_seconds: float
    """Time spent reading and decoding, summed over the threads."""
    preprocess_seconds: float
    """Time spent resizing and converting, summed over the threads."""


@dataclass(frozen=True)
class _Row:
    image: NDArray[np.uint8] | None
    letterbox: Letterbox
    read_seconds: float
    preprocess_seconds: float


def default_workers() -> int:
    """Return how many reader threads pay: one a core of this process, at most sixteen."""
    return min(16, len(usable_cpus()))


def load_batches(
    items: Iterable[Item],
    read: Callable[[Item], NDArray[np.uint8]],
    spec: TensorSpec,
    *,
    batch: int,
    pad_to: int = 1,
    border: int = 0,
    preprocessing: Preprocessing = YOLOV6,
    workers: int | None = None,
    keep_images: bool = False,
    skip_unreadable: bool = False,
    allocate: Callable[[int], NDArray[Any]] | None = None,
) -> Generator[Batch[Item], None, None]:
    """Yield batches in the order of `items`, preparing the next ones meanwhile.

    At most `AHEAD` batches beyond the one in use exist at any time. Closing the iterator early
    ends its threads.

    Args:
        items: what to read; taken one batch at a time, in the calling thread.
        read: turns an item into uint8 (height, width, 3) RGB; called from several threads.
        spec: the engine's input.
        batch: images a batch; the last one may have fewer.
        pad_to: rows a batch has at least; rows without an image are zero.
        border: gray pixels on every side, see `letterbox.fit`.
        preprocessing: how images are prepared (`Engine.preprocessing`).
        workers: threads; default: `default_workers()`.
        keep_images: hand the original images on as well.
        skip_unreadable: list items whose reading raises UserError in `Batch.failures`, instead of
            raising it.
        allocate: allocates a batch array by its number of rows (`Engine.empty_input`); default:
            ordinary memory.

    Raises:
        UserError: a batch takes more memory than there is.
        Whatever `read` raises, when its batch's turn comes.
    """
    source = iter(items)
    pending: deque[tuple[NDArray[Any], list[Item], list[Future[_Row]]]] = deque()
    pool = ThreadPoolExecutor(workers or default_workers(), thread_name_prefix="loader")

    def prepare(item: Item, row: NDArray[Any]) -> _Row:
        start = time.perf_counter()
        image = read(item)
        middle = time.perf_counter()
        placed = fill_row(row, image, spec, border, preprocessing)
        end = time.perf_counter()
        return _Row(image if keep_images else None, placed, middle - start, end - middle)

    def submit() -> None:
        chunk = list(itertools.islice(source, batch))
        if not chunk:
            return
        rows = max(len(chunk), pad_to)
        array = empty_input(spec, rows) if allocate is None else allocate(rows)
        array[len(chunk) :] = 0
        futures = [pool.submit(prepare, item, array[i]) for i, item in enumerate(chunk)]
        pending.append((array, chunk, futures))

    try:
        for _ in range(AHEAD):
            submit()
        while pending:
            array, chunk, futures = pending.popleft()
            submit()
            yield _collect(array, chunk, futures, pad_to, skip_unreadable)
            # Not kept alive while the next batch is waited for.
            del array, chunk, futures
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def fill_row(
    row: NDArray[Any],
    image: NDArray[np.uint8],
    spec: TensorSpec,
    border: int,
    preprocessing: Preprocessing,
) -> Letterbox:
    """Pre-process an image, uint8 (height, width, 3) RGB of any size, into its row of a batch.

    `row` is what an engine takes for one image (`Engine.input`, `Engine.preprocessing`).

    Returns:
        Where the image lies in the row.

    Raises:
        UserError: see `letterbox.fit`.
    """
    size, how = image_size_of(spec), preprocessing
    if spec.dtype == np.uint8:
        placed = fit((image.shape[0], image.shape[1]), size, border, how.fit)
        fill(row, image, placed, how.interpolation)
        if how.colour == "bgr":
            row[...] = row[..., ::-1]
        return placed
    boxed, placed = letterbox(image, size, border, how.fit, how.interpolation)
    # Splitting first keeps the conversion to float on contiguous memory: half the time.
    planes = cv2.split(boxed)
    for plane, (channel, mean, std) in zip(row, how.channels, strict=True):
        source = planes[channel]
        if mean:
            np.subtract(source, np.float32(mean), out=plane, casting="same_kind")
            source = plane
        if std != 1:
            np.divide(source, np.float32(std), out=plane, casting="same_kind")
        elif source is not plane:
            plane[...] = source
    return placed


def _collect(
    array: NDArray[Any],
    chunk: list[Item],
    futures: list[Future[_Row]],
    pad_to: int,
    skip_unreadable: bool,
) -> Batch[Item]:
    rows: list[_Row] = []
    good: list[int] = []
    failures: list[tuple[Item, UserError]] = []
    for index, future in enumerate(futures):
        try:
            rows.append(future.result())
            good.append(index)
        except UserError as error:
            if not skip_unreadable:
                raise
            failures.append((chunk[index], error))
    if failures:
        kept = array[good]
        array = np.zeros((max(len(good), pad_to), *array.shape[1:]), array.dtype)
        array[: len(good)] = kept
    return Batch(
        input=array,
        items=tuple(chunk[index] for index in good),
        letterboxes=tuple(row.letterbox for row in rows),
        images=tuple(row.image for row in rows if row.image is not None),
        failures=tuple(failures),
        read_seconds=sum(row.read_seconds for row in rows),
        preprocess_seconds=sum(row.preprocess_seconds for row in rows),
    )
