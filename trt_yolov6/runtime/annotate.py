"""Annotate images and videos: detections drawn, and written as JSON, CSV or YOLO labels."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import cv2

from trt_yolov6.common.files import atomic_path, path_of, write_bytes
from trt_yolov6.common.progress import progress_bar
from trt_yolov6.common.ranges import Count, fitting, of_class
from trt_yolov6.data.images import IMAGE_SUFFIXES, opencv_path
from trt_yolov6.data.loader import Batch
from trt_yolov6.data.media import Clip, Frame, Picture, Pictures, Video, find_media, open_video
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines.base import Engine
from trt_yolov6.errors import UserError
from trt_yolov6.runtime.detection_files import DetectionFiles, Format, open_detection_files
from trt_yolov6.runtime.draw import draw_detections
from trt_yolov6.runtime.predict import Processed, default_nms, process
from trt_yolov6.runtime.several_gpus import check_gpus, process_on_gpus
from trt_yolov6.runtime.video import VideoWriter
from trt_yolov6.spec import PredictOptions


@dataclass(frozen=True)
class InferenceSummary:
    """Summary of an `infer_source` run."""

    files: tuple[Path, ...]
    """Files with the detections; for YOLO's format their folder."""
    outputs: tuple[Path, ...]
    """The annotated images, or the one annotated video."""
    images: int
    """Images or frames that were processed."""
    objects: int
    failures: tuple[tuple[str, str], ...]
    """Images that could not be read, each with the reason, a sentence."""
    warnings: tuple[str, ...]
    """Notes on processed inputs, such as a video that ends early."""
    inference_seconds: float
    wall_seconds: float


def infer_source(
    engine: Engine,
    source: str | Path,
    output: str | Path,
    options: PredictOptions | None = None,
    *,
    formats: Format | Sequence[Format] = ("json",),
    frames: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> InferenceSummary:
    """Find objects in images or a video, and draw them.

    Writes annotated images under their own names, below `output` as below `source`, or
    `<stem>.mp4` of a video, without sound: H.264 where `ffmpeg` is on the path. An image of a type
    that is not written, such as PPM, becomes `<name>.jpg`.

    `detections.json` is a list with `file`, `width`, `height` and `detections` of each image; a
    video's frames also have `frame` (from 0) and `seconds` (their time in the video). A detection
    has `box` ([x1, y1, x2, y2] in pixels of the original), `score`, `class` and `name`.
    `detections.csv` has a row a detection; `labels/<stem>.txt`, or `labels/<stem>_<frame>.txt`,
    YOLO's format with the score after the box.

    The arguments are those of `Detector.annotate`.

    Raises:
        UserError: the source is missing or unreadable, or the engine cannot do what is asked. An
            unreadable image among others is listed in the summary instead.
    """
    formats = (formats,) if isinstance(formats, str) else tuple(dict.fromkeys(formats))
    for form in formats:
        if form not in get_args(Format):
            known = ", ".join(get_args(Format))
            raise UserError(f"format {form!r} is not known; give `formats` of {known}.")
    fitting(frames, Count | None, "`frames`")
    output = path_of(output, "output")
    media = find_media(source)
    if isinstance(media, Video):
        places = [] if media.is_live else [Path(media.address).parent]
    else:
        places = [item.path.parent for item in media.items if item.path is not None]
    check_outside(output, places)
    if output.resolve() in {place.resolve() for place in set(places)}:
        raise UserError(f"{output} is the folder of the source; give another folder as `output`.")
    options = of_class(options, PredictOptions, "options").over(default_nms(engine))
    if isinstance(media, Pictures) and frames is not None:
        raise UserError("`frames` is for videos and streams; leave it out.")
    if isinstance(media, Pictures) and "yolo" in formats:
        _check_stems(media)
    if isinstance(media, Video):
        if options.gpus > 1:
            raise UserError("the frames of a video go through one GPU; leave `gpus` out.")
        clip = open_video(media, frames, stop)
        return _infer_video(engine, media, clip, output, formats, options, stop, progress)
    return _infer_pictures(engine, media, str(source), output, formats, options, progress)


def check_outside(output: Path, folders: Iterable[Path]) -> None:
    """Refuse an output within the source that has images, probably drawn by an earlier run.

    Args:
        output: the folder to write to.
        folders: folders of the source's images.

    Raises:
        UserError: some of them, but not all, are within `output`.
    """
    target = output.resolve()
    within = {folder.resolve().is_relative_to(target) for folder in set(folders)}
    if len(within) == 2:
        raise UserError(
            f"{output} lies within the source and holds images, of an earlier run perhaps; give a "
            "folder outside as `output`."
        )


def _check_stems(pictures: Pictures) -> None:
    """Refuse images that would share a text file of YOLO's, such as a.jpg and a.png."""
    names: dict[Path, str] = {}
    for item in pictures.items:
        other = names.setdefault(Path(item.name).with_suffix(""), item.name)
        if other != item.name:
            raise UserError(
                f"{other} and {item.name} would have one file of labels; rename one of them, or "
                "leave yolo out of `formats`."
            )


@dataclass(frozen=True)
class _Drawn:
    """An image that was drawn and written."""

    path: Path
    record: dict[str, Any]
    """Record for `DetectionFiles.add`."""
    detections: Detections


@dataclass(frozen=True)
class _Draw:
    """Draws and writes the images of a batch; can be pickled."""

    output: Path
    class_names: tuple[str, ...]

    def __call__(self, batch: Batch[Picture], found: list[Detections]) -> list[_Drawn]:
        written = []
        for picture, image, detections in zip(batch.items, batch.images, found, strict=True):
            drawn = draw_detections(image, detections, self.class_names)
            suffix = Path(picture.name).suffix.lower()
            can_write = suffix in IMAGE_SUFFIXES and cv2.haveImageWriter(suffix)
            path = self.output / (picture.name if can_write else picture.name + ".jpg")
            _, encoded = cv2.imencode(path.suffix.lower(), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
            write_bytes(path, encoded.tobytes())
            height, width = image.shape[:2]
            record = {"file": picture.name, "width": width, "height": height}
            written.append(_Drawn(path, record, detections))
        return written


def _infer_pictures(
    engine: Engine,
    pictures: Pictures,
    source: str,
    output: Path,
    formats: Sequence[Format],
    options: PredictOptions,
    progress: bool,
) -> InferenceSummary:
    start = time.perf_counter()
    outputs: list[Path] = []
    failures: list[tuple[str, str]] = []
    warnings: list[str] = []
    seconds = 0.0
    run: Callable[..., Iterator[Processed[Picture, list[_Drawn]]]] = process
    if options.gpus > 1:
        run = functools.partial(process_on_gpus, check_gpus(options.gpus))
    with (
        open_detection_files(output, formats, engine.class_names) as files,
        progress_bar(len(pictures.items), desc="infer", unit="image", shown=progress) as bar,
    ):
        for step in run(
            engine,
            pictures.items,
            Picture.read,
            _Draw(output, engine.class_names),
            options,
            keep_images=True,
            skip_unreadable=not pictures.is_single,
        ):
            for drawn in step.result:
                outputs.append(drawn.path)
                stem = str(Path(drawn.record["file"]).with_suffix(""))
                files.add(drawn.record, stem, drawn.detections)
            warnings += step.notes
            failures.extend((item.where, str(error)) for item, error in step.batch.failures)
            seconds += step.inference_seconds
            bar.update(len(step.batch.items) + len(step.batch.failures))
        if not outputs:
            raise UserError(
                f"no image in {source} could be read; the first problem: {failures[0][1]}"
            )
    return _summary(files, outputs, warnings, seconds, start, failures)


def _infer_video(
    engine: Engine,
    video: Video,
    clip: Clip,
    output: Path,
    formats: Sequence[Format],
    options: PredictOptions,
    stop: Callable[[], bool],
    progress: bool,
) -> InferenceSummary:
    start = time.perf_counter()
    target = output / f"{video.name}.mp4"
    name = video.address if video.is_live else Path(video.address).name
    warnings: list[str] = []
    seconds = 0.0

    def finish(batch: Batch[Frame], found: list[Detections]) -> None:
        for frame, detections in zip(batch.items, found, strict=True):
            height, width = frame.image.shape[:2]
            drawn = draw_detections(frame.image, detections, engine.class_names)
            writer.add(drawn, frame.seconds)
            number = files.images
            record = {"file": name, "frame": number, "seconds": round(frame.seconds, 3)}
            record |= {"width": width, "height": height}
            files.add(record, f"{video.name}_{number:06d}", detections)

    with (
        contextlib.closing(clip),
        atomic_path(target) as temporary,
        open_detection_files(output, formats, engine.class_names) as files,
        VideoWriter(temporary, clip.rate) as writer,
    ):
        frames = clip.announced or None
        with progress_bar(frames, desc="infer", unit="frame", shown=progress) as bar:
            # Frames can only be decoded in order, in the calling thread; the loader's threads
            # resize.
            for step in process(engine, clip.frames, lambda frame: frame.image, finish, options):
                warnings += step.notes
                seconds += step.inference_seconds
                bar.update(len(step.batch.items))
        if not files.images and stop():
            raise UserError(f"{name} was stopped before its first frame; nothing is written.")
        if not files.images:
            raise UserError(f"{name} holds no frame that can be decoded; replace it.")
        if not writer.close() or not _is_whole(temporary, writer.frames):
            raise UserError(
                f"{target} could not be written in full; free disk space or give another `output`.",
            )
    # The count in the header is an estimate in some formats, though a close one.
    if files.images < 0.9 * clip.announced and not stop():
        warnings.append(
            f"{name} ends after {files.images} of the {clip.announced} frames it announces; they "
            "were processed, the rest is missing or damaged."
        )
    if not writer.is_h264:
        warnings.append(
            f"{target} is MPEG-4, which browsers do not play: `ffmpeg` with an H.264 encoder is "
            "not on the path."
        )
    return _summary(files, [target], warnings, seconds, start)


def _summary(
    files: DetectionFiles,
    outputs: Sequence[Path],
    warnings: Sequence[str],
    seconds: float,
    start: float,
    failures: Sequence[tuple[str, str]] = (),
) -> InferenceSummary:
    return InferenceSummary(
        files=files.paths,
        outputs=tuple(outputs),
        images=files.images,
        objects=files.objects,
        failures=tuple(failures),
        warnings=tuple(warnings),
        inference_seconds=seconds,
        wall_seconds=time.perf_counter() - start,
    )


def _is_whole(video: Path, frames: int) -> bool:
    """Return whether a written video has all its frames.

    OpenCV's writer reports no error. A full disk is seen here: an MP4's table of frames comes last,
    and FFmpeg writes nothing more after a first failure.
    """
    capture = cv2.VideoCapture(opencv_path(video))
    try:
        return (
            capture.isOpened()
            and round(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == frames
            and capture.set(cv2.CAP_PROP_POS_FRAMES, frames - 1)
            and capture.read()[0]
        )
    finally:
        capture.release()
