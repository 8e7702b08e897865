"""Detection on images with any engine: `detect` for a few or many, `process` for a stream."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.images import ORIENTATION
from trt_yolov6.data.letterbox import fit, resolve_border
from trt_yolov6.data.loader import Batch, default_workers, fill_row, load_batches
from trt_yolov6.data.media import Video, find_media
from trt_yolov6.detectors.candidates import Candidates, Suppressed
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.engines.base import Engine, FinishedRun, Run, check_batch
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.gpu_loading import Opened, decoded_on_gpu, load_images, take_images
from trt_yolov6.runtime.plausibility import check_outputs, has_non_finite
from trt_yolov6.spec import NmsSettings, PredictOptions

if TYPE_CHECKING:
    import PIL.Image

Item = TypeVar("Item")
Result = TypeVar("Result")
_P = ParamSpec("_P")
_Found = TypeVar("_Found")

DEFAULT_BATCH = 8

SHOWN_CONFIDENCE = 0.4
"""Threshold of what is shown or handed out; evaluation takes all that COCO's measure asks for."""


@dataclass(frozen=True)
class Processed(Generic[Item, Result]):
    """One batch after the engine and the post-processing."""

    batch: Batch[Item]
    """The loaded batch, its input (by far the largest part) freed."""
    result: Result
    """Result of `finish`."""
    notes: tuple[str, ...]
    """Sentences on odd outputs (see `plausibility`) of the first batch, and of the first with
    numbers that are not finite."""
    inference_seconds: float
    inference_end: float
    """Time when the engine was done with it, by `time.perf_counter`."""
    postprocess_seconds: float
    finish_seconds: float
    """Time `finish` took."""

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds of each stage up to the detections, by name."""
        return {
            "read": self.batch.read_seconds,
            "preprocess": self.batch.preprocess_seconds,
            "inference": self.inference_seconds,
            "postprocess": self.postprocess_seconds,
        }


Image: TypeAlias = "str | Path | NDArray[np.uint8] | PIL.Image.Image"
"""A file, or uint8 (height, width, 3) RGB pixels."""

Images: TypeAlias = "Image | Iterable[Image]"
"""An image, a folder or glob of them, an array (n, height, width, 3), or several of any kind."""


def detect(
    engine: Engine,
    images: Images,
    options: PredictOptions | None = None,
) -> list[Detections]:
    """Find objects in images.

    Args:
        engine: any loaded engine.
        images: arrays, uint8 (height, width, 3) RGB of any size; paths of files, folders (searched
            with their sub-folders, sorted by path) and globs; or several of these.
        options: thresholds and more; default thresholds: `default_nms(engine)`, confidence 0.4.

    Returns:
        One `Detections` an image, in order and in pixels of that image; a list for one image too.

    Raises:
        UserError: an array is not such an image, a file cannot be read, or the engine cannot do
            what is asked.
    """
    options = options or PredictOptions()
    if options.gpus > 1:
        raise UserError("`gpus` is for `annotate` and `evaluate`; leave it out.")
    items = _items(images)
    if isinstance(images, Sequence):
        items = iter(list(items))  # so that missing files are reported before any work
    default = default_nms(engine)
    batch = choose_batch(engine, options.batch)
    first = list(itertools.islice(items, batch + 1))
    if engine.batch.min <= len(first) <= batch:
        return _named(first, _detect_at_once(engine, first, options, options.nms(default)))
    found: list[Detections] = []
    for step in process(
        engine,
        itertools.chain(first, items),
        lambda item: item.read(),
        lambda loaded, detections: _named(loaded.items, detections),
        options.over(default),
        open_item=lambda item: item.open(),
        in_memory=all(item.path is None for item in first),
    ):
        found.extend(step.result)
        _warn(step.notes, 4)
    return found


@dataclass(frozen=True)
class _Item:
    """An image to be read when it is needed."""

    path: Path | None
    read: Callable[[], NDArray[np.uint8]]
    open: Callable[[], Opened]
    """Reads it too, but may leave a JPEG encoded."""


_BYTES = (bytes, bytearray, memoryview)


def _named(items: Iterable[_Item], found: Iterable[Detections]) -> list[Detections]:
    """Return detections with the paths of the images that they are in."""
    return [
        one if item.path is None else dataclasses.replace(one, path=item.path)
        for one, item in zip(found, items, strict=True)
    ]


def _items(images: Images) -> Iterator[_Item]:
    """Yield one item an image, in order."""
    if isinstance(images, (str, Path)):
        media = find_media(images)
        if isinstance(media, Video):
            raise UserError(
                f"{images} is a video or stream; `annotate` reads those, `predict` reads images."
            )
        yield from (_Item(picture.path, picture.read, picture.open) for picture in media.items)
        return
    several: Any = images
    is_array = hasattr(images, "__array__") or hasattr(images, "__array_interface__")
    is_one = isinstance(several, _BYTES) or not _can_be_iterated(several)
    if is_one or (is_array and np.ndim(several) in (2, 3)):
        several = [several]  # one array or tensor, or a PIL image
    count = 0
    for image in several:
        if isinstance(image, (str, Path)):
            for item in _items(image):
                yield item
                count += 1
        else:
            pixels = functools.partial(_checked_image, image, count)
            yield _Item(None, pixels, pixels)
            count += 1


def _can_be_iterated(value: Any) -> bool:
    try:
        iter(value)  # a PyTorch data set has only `__getitem__`
    except TypeError:
        return False
    return True


def _checked_image(image: Any, index: int) -> NDArray[np.uint8]:
    mode = getattr(image, "mode", None)  # of a PIL image; a tensor has a method of this name
    if isinstance(mode, str) and mode != "RGB":  # HSV, YCbCr and LAB have three channels, too
        raise UserError(f'image {index} is in mode {mode}; give `image.convert("RGB")`.')
    if isinstance(mode, str) and image.getexif().get(ORIENTATION, 1) in range(2, 9):
        # Files are turned when they are read, but boxes in a turned image would not fit this one.
        raise UserError(
            f"image {index} is to be turned by its EXIF orientation, as files are; give "
            "`PIL.ImageOps.exif_transpose(image)`."
        )
    if isinstance(image, _BYTES):
        raise UserError(f"image {index} is bytes; give what `read_image` makes of them.")
    if image is None:  # what OpenCV's imread returns for a missing or damaged file
        raise UserError(f"image {index} is None; check that it could be read.")
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise UserError(
            f"image {index} is {pixels.dtype} {pixels.shape}; give uint8 arrays of shape "
            "(height, width, 3), RGB."
        )
    return np.ascontiguousarray(pixels)


def _detect_at_once(
    engine: Engine, items: Sequence[_Item], options: PredictOptions, nms: NmsSettings
) -> list[Detections]:
    """Find objects in one batch, in this thread: threads do not pay for a few images.

    Thresholds are those of `nms`, not those of `options`.
    """
    check_thresholds(engine.path, engine.nms, nms)
    border = resolve_border(options.resize, options.border, engine.image_size)
    run: Run
    if engine.is_checked and engine.takes_images():
        images, buffers = decoded_on_gpu(engine, [item.open() for item in items])
        size, mode = engine.image_size, engine.preprocessing.fit
        placed = [fit((image.shape[0], image.shape[1]), size, border, mode) for image in images]
        rows = engine.rows_for(len(items))
        run = engine.start_images(
            images, placed, nms, rows=rows, clip=options.clip, after=buffers.ready
        )
    else:
        pixels = [item.read() for item in items]
        array = engine.empty_input(engine.rows_for(len(items)))
        array[len(items) :] = 0
        placed = [
            fill_row(row, image, engine.input, border, engine.preprocessing)
            for row, image in zip(array, pixels, strict=False)
        ]
        if engine.is_checked:
            run = engine.start(array, nms)
        else:
            outputs, notes = _checked_outputs(engine, array, len(items), nms)
            _warn(notes, 5)
            run = FinishedRun(outputs)
    return postprocess(
        run.wait(),
        engine.output_layout,
        nms,
        placed,
        clip=options.clip,
        class_names=engine.class_names,
    )


def _warn(notes: Iterable[str], level: int) -> None:
    """Issue notes as warnings for the caller of `Detector.predict`, `level` frames up."""
    for note in notes:
        warnings.warn(note, stacklevel=level)


def _checked_outputs(
    engine: Engine, array: NDArray[Any], images: int, nms: NmsSettings
) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    """Run an engine's first batch; return its outputs, and notes on what is odd about them.

    Raises:
        UserError: they cannot be a detector's.
    """
    outputs = engine.infer(array)
    notes = tuple(check_outputs(engine, outputs, images, nms.confidence, array))
    engine.is_checked = True
    return outputs, notes


def process(
    engine: Engine,
    items: Iterable[Item],
    read: Callable[[Item], NDArray[np.uint8]],
    finish: Callable[[Batch[Item], list[Detections]], Result],
    options: PredictOptions | None = None,
    *,
    open_item: Callable[[Item], Opened] | None = None,
    keep_images: bool = False,
    skip_unreadable: bool = False,
    in_memory: bool = False,
) -> Generator[Processed[Item, Result], None, None]:
    """Run an engine over a stream of images, everything but the engine in other threads.

    Other threads read and pre-process images ahead of the engine and post-process its outputs, so
    that the engine, which only the calling thread uses, waits as little as possible. On a GPU, one
    batch is copied while another is computed, and with an engine that takes images
    (`Engine.takes_images`) the GPU letterboxes them and, with nvImageCodec, decodes JPEGs. The
    first batch, whose outputs are checked, is letterboxed on the CPU.

    Args:
        engine: any loaded engine.
        items: what to read, in order.
        read: turns an item into uint8 (height, width, 3) RGB; called from several threads.
        finish: makes a result of a batch and its detections; called in one other thread, in order.
        options: thresholds and more; default thresholds: those of evaluation, see `resolve`.
        open_item: like `read`, but may leave a JPEG encoded, see `data.jpeg.open_image`; default:
            `read`.
        keep_images, skip_unreadable: as in `load_batches`.
        in_memory: `read` only returns what is in memory. With an engine that takes images, the
            calling thread then does everything, `finish` too, since other threads would have
            nothing to wait for; outputs that were checked before are not checked again.

    Raises:
        UserError: the engine cannot do what is asked, or its outputs cannot be a detector's.
        Whatever `read` and `finish` raise.
    """
    options = options or PredictOptions()
    nms, border = resolve(engine, options)
    loading: dict[str, Any] = {
        "batch": choose_batch(engine, options.batch),
        "border": border,
        "workers": options.workers,
        "keep_images": keep_images,
        "skip_unreadable": skip_unreadable,
    }
    source = iter(items)
    in_memory = in_memory and engine.takes_images()
    opened = None if in_memory else open_item or read
    is_checked = engine.is_trusted or (in_memory and engine.is_checked)
    steps = _steps(engine, source, read, opened, nms, options.clip, is_checked, loading)
    pipeline = _Pipeline(engine, nms, options.clip, finish, in_memory, is_checked)
    try:
        for step in steps:
            pipeline.start(step)
            del step  # the loop would keep the input alive while the next is waited for
            if pipeline.is_full:
                pipeline.collect()
            if len(pipeline.pending) > 1:
                yield pipeline.oldest()
        while pipeline.running:
            pipeline.collect()
        while pipeline.pending:
            yield pipeline.oldest()
    finally:
        pipeline.close()
        steps.close()


@dataclass(frozen=True)
class _Running(Generic[Item]):
    """A batch in the engine."""

    step: _Step[Item]
    run: Run
    start: float
    """Time when it was given to the engine, by `time.perf_counter`."""
    notes: tuple[str, ...]


class _ThisThread(Executor):
    """An executor that runs each call at once, in the calling thread."""

    def submit(
        self, fn: Callable[_P, _Found], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> Future[_Found]:
        future: Future[_Found] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class _Pipeline(Generic[Item, Result]):
    """Batches in the engine (`running`) and in post-processing (`pending`)."""

    def __init__(
        self,
        engine: Engine,
        nms: NmsSettings,
        clip: bool,
        finish: Callable[[Batch[Item], list[Detections]], Result],
        in_memory: bool,
        is_checked: bool,
    ) -> None:
        self.running: deque[_Running[Item]] = deque()
        self.pending: deque[Future[Processed[Item, Result]]] = deque()
        self._engine, self._nms, self._clip, self._finish = engine, nms, clip, finish
        # Packing images takes about as long as a fast engine: one more batch keeps it busy.
        self._most = engine.in_flight + in_memory
        self._is_first = not is_checked
        self._engine_free = 0.0
        self._gave_non_finite = False
        self._pool: Executor = (
            _ThisThread() if in_memory else ThreadPoolExecutor(1, thread_name_prefix="postprocess")
        )
        self._helpers = ThreadPoolExecutor(default_workers(), thread_name_prefix="boxes")

    @property
    def is_full(self) -> bool:
        """The engine takes no further batch before the oldest has ended."""
        return len(self.running) >= self._most

    def start(self, step: _Step[Item]) -> None:
        """Give a batch to the engine; the first is run here, and its outputs are checked."""
        start = time.perf_counter()
        notes: tuple[str, ...] = ()
        run: Run
        count = len(step.batch.items)
        if not count:
            run = FinishedRun({})
        elif self._is_first:
            outputs, notes = _checked_outputs(self._engine, step.batch.input, count, self._nms)
            run = FinishedRun(outputs)
            self._is_first = False
        else:
            run = step.start()
        self.running.append(_Running(step, run, start, notes))

    def collect(self) -> None:
        """Wait for the engine's oldest batch, and have its boxes found."""
        batch = self.running.popleft()
        outputs = batch.run.wait()
        end = time.perf_counter()
        batch.step.end()
        notes = batch.notes
        if isinstance(outputs, dict) and not self._gave_non_finite:
            broken = [name for name, array in outputs.items() if has_non_finite(array)]
            if broken:
                self._gave_non_finite = True
                where = ", ".join(broken)
                notes += (f"{self._engine.path} gives NaN or infinity in {where} of some images",)
        # Where batches overlap in the engine, its time is shared among them.
        seconds = end - max(batch.start, self._engine_free)
        self._engine_free = end
        loaded = batch.step.batch
        loaded = dataclasses.replace(loaded, input=np.empty(0, loaded.input.dtype))
        self.pending.append(self._pool.submit(self._conclude, loaded, outputs, seconds, end, notes))

    def oldest(self) -> Processed[Item, Result]:
        """Wait for the oldest batch after the engine, and return it."""
        return self.pending.popleft().result()

    def close(self) -> None:
        """End the threads; the engine is idle then, also when an error ends the work."""
        while self.running:
            with contextlib.suppress(UserError):
                self.running.popleft().run.wait()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._helpers.shutdown()

    def _conclude(
        self,
        loaded: Batch[Item],
        outputs: dict[str, NDArray[np.generic]] | Candidates | Suppressed,
        inference_seconds: float,
        inference_end: float,
        notes: tuple[str, ...],
    ) -> Processed[Item, Result]:
        start = time.perf_counter()
        found: list[Detections] = []
        if loaded.items:  # none when all of a batch were unreadable
            found = postprocess(
                outputs,
                self._engine.output_layout,
                self._nms,
                loaded.letterboxes,
                clip=self._clip,
                class_names=self._engine.class_names,
                executor=self._helpers,
            )
        middle = time.perf_counter()
        result = self._finish(loaded, found)
        end = time.perf_counter()
        return Processed(
            loaded, result, notes, inference_seconds, inference_end, middle - start, end - middle
        )


@dataclass(frozen=True)
class _Step(Generic[Item]):
    """A batch that is ready for the engine."""

    batch: Batch[Item]
    start: Callable[[], Run]
    """Gives it to the engine."""
    end: Callable[[], None] = lambda: None
    """Function to call once the engine is done with it."""


def _steps(
    engine: Engine,
    source: Iterator[Item],
    read: Callable[[Item], NDArray[np.uint8]],
    open_item: Callable[[Item], Opened] | None,
    nms: NmsSettings,
    clip: bool,
    is_checked: bool,
    loading: dict[str, Any],
) -> Generator[_Step[Item], None, None]:
    """Yield batches ready for the engine; without `open_item`, images are read in this thread.

    On an engine that takes images, only the first batch, which is checked, is letterboxed here.
    """
    if not engine.takes_images():
        yield from _prepared_here(engine, source, read, nms, loading)
        return
    while not is_checked:
        chunk = list(itertools.islice(source, loading["batch"]))
        if not chunk:
            return
        for step in _prepared_here(engine, chunk, read, nms, loading):
            is_checked = bool(step.batch.items)
            yield step
    if open_item is None:
        del loading["workers"]
        loaded = take_images(engine, source, read, **loading)
    else:
        loaded = load_images(engine, source, open_item, **loading)
    with contextlib.closing(loaded) as batches:
        for ready in batches:
            start = functools.partial(
                engine.start_images,
                ready.images,
                ready.batch.letterboxes,
                nms,
                clip=clip,
                rows=loading["batch"],
                after=ready.ready,
                patient=True,
            )
            yield _Step(ready.batch, start, ready.give_back)


def _prepared_here(
    engine: Engine,
    items: Iterable[Item],
    read: Callable[[Item], NDArray[np.uint8]],
    nms: NmsSettings,
    loading: dict[str, Any],
) -> Generator[_Step[Item], None, None]:
    """Yield batches that are letterboxed on the CPU.

    Where kernels are compiled for each batch size, the last one is filled up like the others.
    """
    batches = load_batches(
        items,
        read,
        engine.input,
        pad_to=loading["batch"] if engine.batch_steps else engine.batch.min,
        preprocessing=engine.preprocessing,
        allocate=engine.empty_input,
        **loading,
    )
    with contextlib.closing(batches):
        for loaded in batches:
            yield _Step(loaded, functools.partial(engine.start, loaded.input, nms))
            del loaded  # not kept alive while the next one is waited for


def resolve(engine: Engine, options: PredictOptions) -> tuple[NmsSettings, int]:
    """Return the thresholds and the gray border in pixels that options give an engine.

    Default thresholds are those of evaluation, see `measured_nms`.

    Raises:
        UserError: see `check_thresholds` and `letterbox.resolve_border`.
    """
    nms = options.nms(measured_nms(engine.nms))
    check_thresholds(engine.path, engine.nms, nms)
    return nms, resolve_border(options.resize, options.border, engine.image_size)


def default_nms(engine: Engine) -> NmsSettings:
    """Return the thresholds of `detect` and `infer`: those inside the graph where it has some."""
    return shown_nms(engine.nms)


def shown_nms(inside: NmsSettings | None) -> NmsSettings:
    """Return the thresholds of `predict` and `infer`; `inside` are those of NMS in the graph."""
    return _at_least(SHOWN_CONFIDENCE, inside)


def measured_nms(inside: NmsSettings | None) -> NmsSettings:
    """Return the thresholds of evaluation and timing; `inside` as for `shown_nms`."""
    return _at_least(NmsSettings.confidence, inside)


@functools.lru_cache(maxsize=64)
def _at_least(confidence: float, inside: NmsSettings | None) -> NmsSettings:
    inside = inside or NmsSettings()
    return dataclasses.replace(inside, confidence=max(confidence, inside.confidence))


def choose_batch(engine: Engine, batch: int | None) -> int:
    """Return how many images to give the engine at a time.

    Default: the only batch size of a static engine; on others eight, or the nearest they take.

    Raises:
        UserError: the engine does not take that many.
    """
    profile = engine.batch
    if batch is None:
        return min(max(DEFAULT_BATCH, profile.min), profile.max)
    check_batch(engine, batch)
    return batch


def check_thresholds(path: Path, inside: NmsSettings | None, nms: NmsSettings) -> None:
    """Refuse thresholds that an engine with NMS inside cannot honour.

    Raises:
        UserError: its NMS drops lower scores, uses another IoU, or keeps fewer boxes.
    """
    if inside is None:
        return
    if nms.confidence < inside.confidence:
        raise UserError(
            f"{path} drops scores below {inside.confidence} itself; give `confidence` "
            f"{inside.confidence} or more, or build it with another threshold.",
        )
    if nms.iou != inside.iou:
        raise UserError(
            f"{path} suppresses at IoU {inside.iou} itself; give `iou` {inside.iou} or "
            "build it with another threshold.",
        )
    if nms.max_detections > inside.max_detections:
        raise UserError(
            f"{path} keeps at most {inside.max_detections} boxes itself; give "
            f"`max_detections` {inside.max_detections} or fewer, or build it without NMS inside.",
        )
