"""Batches of images for an engine that letterboxes on its GPU: read ahead, JPEGs decoded there.

Files are read by a few threads, which decode what is not a JPEG; one more thread has each batch's
JPEGs decoded on the GPU, on a stream of its own, while the engine works on the batches before.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.jpeg import Jpeg
from trt_yolov6.data.letterbox import Letterbox, fit
from trt_yolov6.data.loader import AHEAD, Batch, default_workers
from trt_yolov6.engines.base import Engine
from trt_yolov6.engines.cuda.jpeg import DecodedBatch, JpegDecoder
from trt_yolov6.engines.cuda.letterbox import ImageView
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    from trt_yolov6.engines.cuda.device import Event

Item = TypeVar("Item")

Opened = Jpeg | NDArray[np.uint8]
"""A JPEG as it is, or uint8 (height, width, 3) RGB."""

_A_TASK = 8
"""Files that are read one after the other where the GPU decodes most of them."""


@dataclass(frozen=True)
class ImageBatch(Generic[Item]):
    """Images for `Engine.start_images`."""

    batch: Batch[Item]
    """Batch that they come from; its input is empty."""
    images: tuple[ImageView | NDArray[np.uint8], ...]
    ready: Event | None
    """Event after which views can be read; None: at once."""
    give_back: Callable[[], None]
    """Function to call once the engine has read the images."""


def load_images(
    engine: Engine,
    items: Iterable[Item],
    open_item: Callable[[Item], Opened],
    *,
    batch: int,
    border: int = 0,
    workers: int | None = None,
    keep_images: bool = False,
    skip_unreadable: bool = False,
) -> Generator[ImageBatch[Item], None, None]:
    """Yield batches in the order of `items`, preparing the next ones meanwhile.

    At most `AHEAD` + 1 batches beyond those in use exist at any time.

    Args:
        engine: its GPU decodes JPEGs, where it can.
        items: what to read; taken one batch at a time, in the calling thread.
        open_item: reads an item, see `data.jpeg.open_image`; called from several threads.
        batch: images a batch; the last one may have fewer.
        border: see `data.letterbox.fit`.
        workers: threads that read; default: `default_workers()`.
        keep_images: hand the original images on as well; they are then decoded here.
        skip_unreadable: list items whose reading raises UserError in `Batch.failures`.

    Raises:
        Whatever `open_item` raises, when its batch's turn comes.
    """
    source = iter(items)
    count = workers or default_workers()
    readers = ThreadPoolExecutor(count, thread_name_prefix="reader")
    decoding_thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
    decoder = None if keep_images else engine.jpeg_decoder()
    free: deque[DecodedBatch] = deque()  # buffers that nothing reads any more
    place = _placing(engine, border)
    pending: deque[Future[ImageBatch[Item]]] = deque()

    def read(part: Sequence[Item]) -> list[_Read]:
        return [_read(open_item, item, decoder is not None, skip_unreadable) for item in part]

    def prepare(chunk: list[Item], parts: list[Future[list[_Read]]]) -> ImageBatch[Item]:
        opened = [one for part in parts for one in part.result()]
        ready: Event | None = None
        give_back: Callable[[], None] = _nothing
        start = time.perf_counter()
        if decoder is not None and any(isinstance(one.image, Jpeg) for one in opened):
            buffers = free.popleft() if free else DecodedBatch()
            _decode(decoder, buffers, opened, readers, skip_unreadable)
            ready, give_back = buffers.ready, functools.partial(free.append, buffers)
        return _batch_of(
            chunk, opened, place, ready, give_back, keep_images, time.perf_counter() - start
        )

    def submit() -> None:
        chunk = list(itertools.islice(source, batch))
        if chunk:
            # For the GPU a file is only read, which hardly takes longer than starting a task.
            least = 1 if decoder is None else min(_A_TASK, len(chunk) // 4)
            size = max(-(-len(chunk) // count), least)
            parts = [
                readers.submit(read, chunk[first : first + size])
                for first in range(0, len(chunk), size)
            ]
            pending.append(decoding_thread.submit(prepare, chunk, parts))

    try:
        for _ in range(AHEAD):
            submit()
        while pending:
            oldest = pending.popleft()
            submit()
            yield oldest.result()
            del oldest
    finally:
        decoding_thread.shutdown(wait=True, cancel_futures=True)
        readers.shutdown(wait=True, cancel_futures=True)


def take_images(
    engine: Engine,
    items: Iterable[Item],
    read: Callable[[Item], NDArray[np.uint8]],
    *,
    batch: int,
    border: int = 0,
    keep_images: bool = False,
    skip_unreadable: bool = False,
) -> Generator[ImageBatch[Item], None, None]:
    """Yield what `load_images` does, for images in memory, in the calling thread.

    Threads would only take turns at Python's lock, as there is nothing to wait for.
    """
    source = iter(items)
    place = _placing(engine, border)
    while chunk := list(itertools.islice(source, batch)):
        opened = [_read(read, item, False, skip_unreadable) for item in chunk]
        yield _batch_of(chunk, opened, place, None, _nothing, keep_images, 0.0)


def decoded_on_gpu(
    engine: Engine, opened: Sequence[Opened]
) -> tuple[list[ImageView | NDArray[np.uint8]], DecodedBatch]:
    """Return a few images for `Engine.start_images`, JPEGs decoded on its GPU where it can.

    Returns:
        The images, and the buffers of those on the GPU, to be kept until the run is over: the GPU
        may still be reading the files.

    Raises:
        UserError: a JPEG is damaged.
    """
    images: list[Any] = list(opened)
    encoded = {index: one for index, one in enumerate(opened) if isinstance(one, Jpeg)}
    buffers = DecodedBatch()
    decoder = engine.jpeg_decoder() if encoded else None
    if decoder is not None:
        views = decoder.decode(list(encoded.values()), buffers)
        for index, view in zip(encoded, views, strict=True):
            images[index] = view or opened[index]
    return [one.read() if isinstance(one, Jpeg) else one for one in images], buffers


@dataclass(slots=True)
class _Read:
    """One item that was read."""

    image: Opened | ImageView | UserError
    seconds: float
    size: tuple[int, int] = (0, 0)
    """Height and width in pixels, upright."""


def _read(
    open_item: Callable[[Item], Opened], item: Item, leave_encoded: bool, skip_unreadable: bool
) -> _Read:
    start = time.perf_counter()
    try:
        image = open_item(item)
        if isinstance(image, Jpeg) and not leave_encoded:
            image = image.read()
    except UserError as error:
        if not skip_unreadable:
            raise
        return _Read(error, time.perf_counter() - start)
    size = image.size if isinstance(image, Jpeg) else (image.shape[0], image.shape[1])
    return _Read(image, time.perf_counter() - start, size)


def _decode(
    decoder: JpegDecoder,
    buffers: DecodedBatch,
    opened: list[_Read],
    readers: ThreadPoolExecutor,
    skip_unreadable: bool,
) -> None:
    """Replace JPEGs by views; what the GPU cannot decode is decoded on the CPU."""
    encoded = [(one, one.image) for one in opened if isinstance(one.image, Jpeg)]
    views = decoder.decode([image for _, image in encoded], buffers)
    rest = []
    for (one, _), view in zip(encoded, views, strict=True):
        if view is None:
            rest.append(one)
        else:
            one.image = view
    for one, again in zip(rest, readers.map(_read_here, rest), strict=True):
        if isinstance(again, UserError) and not skip_unreadable:
            raise again
        one.image = again


def _read_here(one: _Read) -> NDArray[np.uint8] | UserError:
    assert isinstance(one.image, Jpeg)
    try:
        return one.image.read()
    except UserError as error:
        return error


def _batch_of(
    chunk: list[Item],
    opened: list[_Read],
    place: Callable[[tuple[int, int]], Letterbox],
    ready: Event | None,
    give_back: Callable[[], None],
    keep_images: bool,
    decode_seconds: float,
) -> ImageBatch[Item]:
    items, images, placed, failures = [], [], [], []
    for item, one in zip(chunk, opened, strict=True):
        if isinstance(one.image, UserError):
            failures.append((item, one.image))
            continue
        assert not isinstance(one.image, Jpeg)
        items.append(item)
        images.append(one.image)
        placed.append(place(one.size))
    kept: Any = tuple(images) if keep_images else ()
    batch = Batch(
        input=np.empty(0, np.uint8),
        items=tuple(items),
        letterboxes=tuple(placed),
        images=kept,
        failures=tuple(failures),
        read_seconds=sum(one.seconds for one in opened) + decode_seconds,
        preprocess_seconds=0.0,
    )
    return ImageBatch(batch, tuple(images), ready, give_back)


def _placing(engine: Engine, border: int) -> Callable[[tuple[int, int]], Letterbox]:
    """Return `fit` for an engine."""
    size, mode = engine.image_size, engine.preprocessing.fit
    return functools.partial(fit, size=size, border=border, mode=mode)


def _nothing() -> None:
    """Do nothing: the images are not in buffers."""
