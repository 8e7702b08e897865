"""Detection on arrays, pictures, folders and videos with any engine."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from trt_yolov6.common.files import atomic_path, write_bytes
from trt_yolov6.data.images import IMAGE_SUFFIXES
from trt_yolov6.data.loader import Batch, default_workers, fill_row, load_batches
from trt_yolov6.data.media import Clip, Frame, Picture, Pictures, Video, find_media, open_video
from trt_yolov6.detectors.candidates import Candidates
from trt_yolov6.detectors.detections import Detections, postprocess
from trt_yolov6.engines.base import Engine, FinishedRun, Run, check_batch
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.detection_files import Format, open_detection_files
from trt_yolov6.runtime.draw import draw_detections
from trt_yolov6.runtime.plausibility import check_outputs, has_non_finite
from trt_yolov6.runtime.video import VideoWriter
from trt_yolov6.spec import NmsSettings

Item = TypeVar("Item")
Result = TypeVar("Result")

DEFAULT_BATCH = 8

SHOWN_CONFIDENCE = 0.4
"""Threshold of what is shown or handed out; evaluation takes all that COCO's measure asks for."""


@dataclass(frozen=True)
class Processed(Generic[Item, Result]):
    """One batch after the engine and the post-processing."""

    batch: Batch[Item]
    """As loaded, but its input is freed (empty): it is by far the largest part."""
    result: Result
    """What `finish` made of it."""
    inference_seconds: float
    inference_end: float
    """When the engine was done with it, by `time.perf_counter`."""
    postprocess_seconds: float
    finish_seconds: float
    """Time `finish` took."""


def detect(
    engine: Engine,
    images: Sequence[NDArray[np.uint8]],
    *,
    nms: NmsSettings | None = None,
    border: int = 0,
    batch: int | None = None,
) -> list[Detections]:
    """Find objects in images that are already in memory.

    Args:
        engine: any loaded engine.
        images: each uint8 (height, width, 3) RGB, of any size.
        nms: thresholds; default: `default_nms(engine)`, confidence 0.4.
        border: gray pixels around the image, see `letterbox.fit`.
        batch: images the engine is given at a time; default: see `choose_batch`.

    Returns:
        One `Detections` an image, in pixels of that image.

    Raises:
        UserError: an array is no such image, or the engine cannot do what is asked.
    """

    def read(index: int) -> NDArray[np.uint8]:
        image = np.asarray(images[index])
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise UserError(
                f"image {index} is {image.dtype} {image.shape}; give uint8 arrays of shape "
                "(height, width, 3), RGB."
            )
        return np.ascontiguousarray(image)

    nms = nms or default_nms(engine)
    found: list[Detections] = []
    if len(images) <= choose_batch(engine, batch) and engine.batch.min <= len(images):
        check_thresholds(engine, nms)
        return _detect_at_once(engine, [read(index) for index in range(len(images))], nms, border)
    for step in process(
        engine,
        range(len(images)),
        read,
        lambda _, detections: detections,
        nms=nms,
        border=border,
        batch=batch,
    ):
        found.extend(step.result)
    return found


def _detect_at_once(
    engine: Engine, images: Sequence[NDArray[np.uint8]], nms: NmsSettings, border: int
) -> list[Detections]:
    """Find objects in one batch, in this thread: for a few images others only cost time."""
    if not images:
        return []
    array = engine.empty_input(len(images))
    placed = [
        fill_row(row, image, engine.input, border, engine.preprocessing)
        for row, image in zip(array, images, strict=True)
    ]
    if engine.is_checked:
        outputs = engine.start(array, nms.confidence).wait()
    else:
        outputs = _checked_outputs(engine, array, len(images), nms, _warn)
    return postprocess(outputs, engine.output_layout, nms, placed)


def _checked_outputs(
    engine: Engine,
    array: NDArray[Any],
    images: int,
    nms: NmsSettings,
    tell: Callable[[str], None],
) -> dict[str, NDArray[Any]]:
    """Run an engine's first batch and look whether what it gives can be a detector's."""
    outputs = engine.infer(array)
    for warning in check_outputs(engine, outputs, images, nms.confidence, array):
        tell(warning)
    engine.is_checked = True
    return outputs


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


@dataclass(frozen=True)
class InferenceSummary:
    """What `infer_source` did."""

    files: tuple[Path, ...]
    """What holds the detections: files, and for YOLO's format their folder."""
    outputs: tuple[Path, ...]
    """The annotated pictures, or the one annotated video."""
    images: int
    """Pictures or frames that were processed."""
    objects: int
    failures: tuple[tuple[str, str], ...]
    """Pictures that were left out because they could not be read, each with why, as one
    sentence."""
    warnings: tuple[str, ...]
    """What is odd about those that were processed, such as a video that ends early: sentences."""
    inference_seconds: float
    wall_seconds: float


def infer_source(
    engine: Engine,
    source: str | Path,
    output: str | Path,
    *,
    formats: Sequence[Format] = ("json",),
    frames: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    nms: NmsSettings | None = None,
    border: int = 0,
    batch: int | None = None,
    progress: bool = True,
) -> InferenceSummary:
    """Find objects in pictures or a video, and draw them.

    Writes annotated pictures under their own names, below `output` as below `source`, or
    `<stem>.mp4` of a video, without sound: H.264 where `ffmpeg` is on the path. A picture of a type
    that is not written, such as PPM, becomes `<name>.jpg`.

    What was found goes into `detections.json`, a list with `file`, `width`, `height` and
    `detections` of each picture, or of each frame with `frame` (from 0) and `seconds` (its own time
    in the video) besides. A detection has `box` ([x1, y1, x2, y2] in pixels of the original),
    `score`, `class` and `name`. `detections.csv` has a row a detection; `labels/<stem>.txt`, or
    `labels/<stem>_<frame>.txt`, YOLO's format with the score after the box.

    Args:
        engine: any loaded engine.
        source: see `media.find_media`.
        output: the folder to write to; made if missing, not the one the source lies in.
        formats: of `detection_files.FORMATS`.
        frames: end a video or stream after so many.
        stop: asked before each frame of a video or stream: whether to end here.
        nms, border, batch: as in `detect`.
        progress: show a progress bar on stderr.

    Raises:
        UserError: the source is missing or unreadable, or the engine cannot do what is asked. An
            unreadable picture among others is listed in the summary instead.
    """
    output = Path(output)
    media = find_media(source)
    if isinstance(media, Video):
        places = [] if media.is_live else [Path(media.address).parent]
    else:
        places = [item.path.parent for item in media.items if item.path is not None]
    if any(output.resolve() == place.resolve() for place in places):
        raise UserError(f"{output} is where the source lies; give another folder as --output.")
    options = {"nms": nms or default_nms(engine), "border": border, "batch": batch}
    if isinstance(media, Video):
        clip = open_video(media, frames, stop)
        return _infer_video(engine, media, clip, output, formats, progress, **options)
    return _infer_pictures(engine, media, str(source), output, formats, progress, **options)


def _infer_pictures(
    engine: Engine,
    pictures: Pictures,
    source: str,
    output: Path,
    formats: Sequence[Format],
    progress: bool,
    **options: Any,
) -> InferenceSummary:
    start = time.perf_counter()
    outputs: list[Path] = []
    failures: list[tuple[str, str]] = []
    odd: list[str] = []
    seconds = 0.0

    def finish(batch: Batch[Picture], found: list[Detections]) -> list[Path]:
        written = []
        for picture, image, detections in zip(batch.items, batch.images, found, strict=True):
            drawn = draw_detections(image, detections, engine.class_names)
            known = Path(picture.name).suffix.lower() in IMAGE_SUFFIXES
            written.append(output / (picture.name if known else picture.name + ".jpg"))
            _, encoded = cv2.imencode(
                written[-1].suffix.lower(), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)
            )
            write_bytes(written[-1], encoded.tobytes())
            height, width = image.shape[:2]
            files.add({"file": picture.name, "width": width, "height": height}, detections)
        return written

    with (
        open_detection_files(output, formats, engine.class_names) as files,
        tqdm(
            total=len(pictures.items),
            desc="infer",
            unit="image",
            disable=None if progress else True,
        ) as bar,
    ):
        for step in process(
            engine,
            pictures.items,
            Picture.read,
            finish,
            keep_images=True,
            skip_unreadable=not pictures.is_single,
            tell=odd.append,
            **options,
        ):
            outputs.extend(step.result)
            failures.extend((item.where, str(error)) for item, error in step.batch.failures)
            seconds += step.inference_seconds
            bar.update(len(step.batch.items) + len(step.batch.failures))
        if not outputs:
            raise UserError(
                f"no image in {source} could be read; the first problem: {failures[0][1]}"
            )
    return InferenceSummary(
        files=files.paths,
        outputs=tuple(outputs),
        images=files.images,
        objects=files.objects,
        failures=tuple(failures),
        warnings=tuple(odd),
        inference_seconds=seconds,
        wall_seconds=time.perf_counter() - start,
    )


def _infer_video(
    engine: Engine,
    video: Video,
    clip: Clip,
    output: Path,
    formats: Sequence[Format],
    progress: bool,
    **options: Any,
) -> InferenceSummary:
    start = time.perf_counter()
    target = output / f"{video.name}.mp4"
    name = video.address if video.is_live else Path(video.address).name
    odd: list[str] = []
    seconds = 0.0

    def finish(batch: Batch[Frame], found: list[Detections]) -> None:
        for frame, detections in zip(batch.items, found, strict=True):
            height, width = frame.image.shape[:2]
            drawn = draw_detections(frame.image, detections, engine.class_names)
            writer.add(drawn, frame.seconds)
            record = {"file": name, "frame": files.images, "seconds": round(frame.seconds, 3)}
            files.add({**record, "width": width, "height": height}, detections)

    try:
        with (
            atomic_path(target) as temporary,
            open_detection_files(output, formats, engine.class_names) as files,
            VideoWriter(temporary, clip.rate) as writer,
        ):
            with tqdm(
                total=clip.announced or None,
                desc="infer",
                unit="frame",
                disable=None if progress else True,
            ) as bar:
                # Frames can only be decoded in order, so the caller's thread does it and the
                # loader's threads just resize them.
                for step in process(
                    engine, clip.frames, _pixels, finish, tell=odd.append, **options
                ):
                    seconds += step.inference_seconds
                    bar.update(len(step.batch.items))
            if not files.images:
                raise UserError(f"{name} holds no frame that can be decoded; replace it.")
            if not writer.close() or not _is_whole(temporary, writer.frames):
                raise UserError(
                    f"{target} could not be written in whole; free the disk or give another "
                    "--output."
                )
    finally:
        clip.close()
    # The count in the header is an estimate in some formats, though a close one.
    if files.images < 0.9 * clip.announced:
        odd.append(
            f"{name} ends after {files.images} of the {clip.announced} frames it announces; they "
            "were processed, the rest is missing or damaged."
        )
    if not writer.is_h264:
        odd.append(
            f"{target} is MPEG-4, which browsers do not play: `ffmpeg` with an H.264 encoder is "
            "not on the path."
        )
    return InferenceSummary(
        files=files.paths,
        outputs=(target,),
        images=files.images,
        objects=files.objects,
        failures=(),
        warnings=tuple(odd),
        inference_seconds=seconds,
        wall_seconds=time.perf_counter() - start,
    )


def _is_whole(video: Path, frames: int) -> bool:
    """Tell whether a written video has all its frames.

    OpenCV's writer reports no error. A full disk is seen here: an MP4's table of frames comes last,
    and FFmpeg writes nothing more after a first failure.
    """
    capture = cv2.VideoCapture(str(video))
    try:
        return (
            capture.isOpened()
            and round(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == frames
            and capture.set(cv2.CAP_PROP_POS_FRAMES, frames - 1)
            and capture.read()[0]
        )
    finally:
        capture.release()


def _pixels(frame: Frame) -> NDArray[np.uint8]:
    return frame.image


def process(
    engine: Engine,
    items: Iterable[Item],
    read: Callable[[Item], NDArray[np.uint8]],
    finish: Callable[[Batch[Item], list[Detections]], Result],
    *,
    nms: NmsSettings | None = None,
    border: int = 0,
    batch: int | None = None,
    workers: int | None = None,
    keep_images: bool = False,
    skip_unreadable: bool = False,
    clip: bool = True,
    tell: Callable[[str], None] = _warn,
) -> Iterator[Processed[Item, Result]]:
    """Run an engine over a stream of images, everything but the engine in other threads.

    Images are read and pre-processed ahead of the engine and its outputs post-processed behind
    it, so that the engine, which only the calling thread uses, waits as little as possible. On a
    GPU one batch is copied while another is computed, each on a stream of its own.

    Args:
        engine: any loaded engine.
        items: what to read, in order.
        read: turns an item into uint8 (height, width, 3) RGB; called from several threads.
        finish: makes a result of a batch and its detections; called in one other thread, in order.
        nms: thresholds; default: `NmsSettings()`, as for evaluation.
        border, batch: as in `detect`.
        workers, keep_images, skip_unreadable: as in `load_batches`.
        clip: as in `postprocess`.
        tell: takes what is odd about the outputs, a sentence each (see `plausibility`), and numbers
            in later batches that are not finite; default: `warnings.warn`.

    Raises:
        UserError: the engine cannot do what is asked, its outputs cannot be a detector's, or what
            `read` and `finish` raise.
    """
    nms = nms or NmsSettings()
    check_thresholds(engine, nms)
    size = choose_batch(engine, batch)
    batches = load_batches(
        items,
        read,
        engine.input,
        batch=size,
        pad_to=engine.batch.min,
        border=border,
        preprocessing=engine.preprocessing,
        workers=workers,
        keep_images=keep_images,
        skip_unreadable=skip_unreadable,
        allocate=engine.empty_input,
    )

    def conclude(
        loaded: Batch[Item], outputs: dict[str, NDArray[np.generic]] | Candidates
    ) -> tuple[Result, float, float]:
        start = time.perf_counter()
        found: list[Detections] = []
        if loaded.items:  # none when all of a batch were unreadable
            found = postprocess(
                outputs,
                engine.output_layout,
                nms,
                loaded.letterboxes,
                clip=clip,
                executor=helpers,
            )
        middle = time.perf_counter()
        result = finish(loaded, found)
        return result, middle - start, time.perf_counter() - middle

    pending: deque[tuple[Batch[Item], float, float, Future[tuple[Result, float, float]]]] = deque()

    def oldest() -> Processed[Item, Result]:
        loaded, seconds, end, future = pending.popleft()
        result, postprocess_seconds, finish_seconds = future.result()
        return Processed(loaded, result, seconds, end, postprocess_seconds, finish_seconds)

    running: deque[tuple[Batch[Item], Run, float]] = deque()
    engine_free = 0.0
    told: list[str] = []

    def collect() -> None:
        """Wait for the engine's oldest batch, and hand it on."""
        nonlocal engine_free
        loaded, run, start = running.popleft()
        outputs = run.wait()
        end = time.perf_counter()
        if isinstance(outputs, dict) and not told:
            broken = [name for name, array in outputs.items() if has_non_finite(array)]
            if broken:
                told.append(
                    f"{engine.path} gives NaN or infinity in {', '.join(broken)} of some images"
                )
                tell(told[0])
        # Where batches overlap in the engine, its time is shared among them.
        seconds = end - max(start, engine_free)
        engine_free = end
        loaded = dataclasses.replace(loaded, input=np.empty(0, loaded.input.dtype))
        pending.append((loaded, seconds, end, pool.submit(conclude, loaded, outputs)))

    pool = ThreadPoolExecutor(1, thread_name_prefix="postprocess")
    helpers = ThreadPoolExecutor(default_workers(), thread_name_prefix="boxes")
    try:
        is_first = True
        for loaded in batches:
            start = time.perf_counter()
            run: Run
            if not loaded.items:
                run = FinishedRun({})
            elif is_first:
                count = len(loaded.items)
                run = FinishedRun(_checked_outputs(engine, loaded.input, count, nms, tell))
                is_first = False
            else:
                run = engine.start(loaded.input, nms.confidence)
            running.append((loaded, run, start))
            del loaded, run  # the loop would keep the input alive while the next is waited for
            if len(running) >= engine.in_flight:
                collect()
            if len(pending) > 1:
                yield oldest()
        while running:
            collect()
        while pending:
            yield oldest()
    finally:
        while running:  # the engine must be idle when an error leaves this
            with contextlib.suppress(UserError):
                running.popleft()[1].wait()
        pool.shutdown(wait=True, cancel_futures=True)
        helpers.shutdown()
        batches.close()  # type: ignore[attr-defined]


def default_nms(engine: Engine) -> NmsSettings:
    """Return the thresholds of `detect` and `infer`: those inside the graph where it has some."""
    return shown_nms(engine.nms)


def shown_nms(inside: NmsSettings | None) -> NmsSettings:
    """Return the thresholds of what is shown; `inside` are those of a graph that has some."""
    inside = inside or NmsSettings()
    return dataclasses.replace(inside, confidence=max(SHOWN_CONFIDENCE, inside.confidence))


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


def check_thresholds(engine: Engine, nms: NmsSettings) -> None:
    """Refuse thresholds that an `end2end` engine has already decided otherwise.

    Raises:
        UserError: the engine's built-in suppression dropped what is asked for, used another IoU, or
            keeps fewer boxes.
    """
    inside = engine.nms
    if inside is None:
        return
    if nms.confidence < inside.confidence:
        raise UserError(
            f"{engine.path} drops scores below {inside.confidence} itself; give --conf "
            f"{inside.confidence} or more, or build it with another threshold."
        )
    if nms.iou != inside.iou:
        raise UserError(
            f"{engine.path} suppresses at IoU {inside.iou} itself; give --iou {inside.iou} or "
            "build it with another threshold."
        )
    if nms.max_detections > inside.max_detections:
        raise UserError(
            f"{engine.path} keeps at most {inside.max_detections} boxes itself; give "
            f"--max-detections {inside.max_detections} or fewer, or build it without --end2end."
        )
