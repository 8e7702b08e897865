"""Sources for `infer`: images, folders, globs, videos, streams, cameras and image URLs.

A file's content decides, not its name: what OpenCV reads as a picture is one, and what it
opens as a video is one.
"""

from __future__ import annotations

import glob
import http.client
import math
import os
import re
import string
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.files import read_bytes
from trt_yolov6.data.images import list_images, opencv_path, quiet_opencv, read_image
from trt_yolov6.data.jpeg import Jpeg, open_image
from trt_yolov6.errors import UserError, first_line

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_HTTP = ("http", "https")
_STREAMS = ("rtsp", "rtsps", "rtmp", "rtp", "udp", "tcp", "srt", *_HTTP)
_LONGEST_PICTURE = 64 * 2**20
"""Bytes that are fetched of an address at most."""
_PATIENCE = 20
"""Seconds to wait for an address."""


@dataclass(frozen=True)
class Picture:
    """One encoded image, on disk or fetched."""

    name: str
    """Path below the source, with slashes: the name of the files written for it."""
    where: str
    """Address for messages."""
    source: Path | bytes
    """File, or content that was fetched."""

    @property
    def path(self) -> Path | None:
        """File of the image; None if it was fetched."""
        return self.source if isinstance(self.source, Path) else None

    def read(self) -> NDArray[np.uint8]:
        """Decode it, see `images.read_image`."""
        return read_image(self.source, self.where)

    def open(self) -> Jpeg | NDArray[np.uint8]:
        """Decode it unless a GPU can, see `jpeg.open_image`."""
        return open_image(self.source, self.where)


@dataclass(frozen=True)
class Pictures:
    """Encoded images that are read one after the other."""

    items: tuple[Picture, ...]
    is_single: bool
    """True where one was named, which then has to be readable."""


@dataclass(frozen=True)
class Video:
    """A video file, a stream or a camera."""

    address: str
    """Path, address, or a camera's number."""
    name: str
    """Stem of the names of its files."""
    is_live: bool
    """True for what has no end of its own."""


def is_address(text: str) -> bool:
    """Return whether a text is an address such as `s3://bucket/folder`, not a path."""
    return _ADDRESS.match(text) is not None


def split_address(address: str) -> SplitResult:
    """Return the parts of an address.

    Raises:
        UserError: it has none, such as `http://[`.
    """
    try:
        return urlsplit(address)
    except ValueError as error:
        raise UserError(f"{address} is not an address ({error}); correct it.") from error


def find_media(source: str | Path) -> Pictures | Video:
    """Find out what a source is.

    Args:
        source: an image, a video or a folder of images (sub-folders are searched); a glob such
            as `shots/**/*.jpg`; `rtsp://` and other addresses of streams; `http://` addresses of
            images and videos; the number of a camera.

    Raises:
        UserError: nothing is there, an address does not answer, or it is neither image nor video.
    """
    text = str(source)
    if not text or not isinstance(source, (str, os.PathLike, int)):
        what = "an empty string" if not text else f"a {type(source).__name__}"
        raise UserError(f"{what} is not the path of images or of a video; give one.")
    if is_address(text):
        return _from_address(text)
    path = Path(text)
    if os.path.isdir(path):
        pictures = tuple(
            Picture(one.relative_to(path).as_posix(), str(one), one) for one in list_images(path)
        )
        return Pictures(pictures, is_single=False)
    if os.path.isfile(path):
        return _from_file(path)
    if text.isascii() and text.isdigit():
        return Video(text, f"camera{text}", is_live=True)
    if glob.has_magic(text):
        return _from_glob(text)
    raise UserError(f"{text} does not exist; check the path.")


def _from_file(path: Path) -> Pictures | Video:
    if _is_video(path):
        return Video(str(path), path.stem, is_live=False)
    if path.suffix.lower() == ".txt" and not _is_picture(read_bytes(path)):
        raise UserError(
            f"{path} is a text file; give images, a folder or a glob (only Ray reads lists of "
            "images)."
        )
    return Pictures((Picture(path.name, str(path), path),), is_single=True)


def _from_glob(pattern: str) -> Pictures | Video:
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in found if path.is_file()]
    if not files:
        raise UserError(f"{pattern} matches no file; check the pattern.")
    if len(files) == 1:
        return _from_file(files[0])
    shared = Path(os.path.commonpath([path.parent for path in files]))
    videos = [path for path in files if _is_video(path)]
    if videos:
        raise UserError(
            f"{pattern} matches {len(files)} files, with the video {videos[0]} among them; give "
            "videos one at a time."
        )
    pictures = (Picture(path.relative_to(shared).as_posix(), str(path), path) for path in files)
    return Pictures(tuple(pictures), is_single=False)


def _from_address(address: str) -> Pictures | Video:
    parts = split_address(address)
    scheme = parts.scheme.lower()
    if scheme not in _STREAMS:
        raise UserError(
            f"{address} begins with {scheme}://, which is not supported; give http, https, rtsp, "
            "rtmp, udp, tcp or srt, or a file."
        )
    stem = re.sub(r"[^\w.-]+", "_", Path(unquote(parts.path)).name or parts.hostname or "stream")
    if scheme not in _HTTP:
        return Video(address, Path(stem).stem, is_live=True)
    try:
        # Blanks and umlauts as browsers send them.
        encoded = quote(address, safe=string.punctuation)
        request = urllib.request.Request(encoded, headers={"User-Agent": "trt-yolov6"})
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            kind = answer.headers.get_content_type()
            if kind.startswith(("video/", "multipart/")) or kind.endswith("mpegurl"):
                return Video(address, Path(stem).stem, is_live=kind.startswith("multipart/"))
            content = answer.read(_LONGEST_PICTURE + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or first_line(error)
        raise UserError(f"{address} does not answer ({reason}); check the address.") from error
    if len(content) > _LONGEST_PICTURE or not _is_picture(content):
        return Video(address, Path(stem).stem, is_live=False)
    return Pictures((Picture(stem, address, content),), is_single=True)


def _is_video(path: Path) -> bool:
    """Return whether a file is one, by its content; of neither kind, it counts as an image."""
    quiet_opencv()
    try:
        name = opencv_path(path)
    except UserError:
        return not _is_picture(read_bytes(path))
    try:
        if cv2.haveImageReader(name) and path.suffix.lower() != ".gif":
            return False
    except cv2.error:
        return False
    capture = _opened(str(path))
    try:
        # FFmpeg opens plain text as subtitles and single images as videos of one frame.
        return capture.isOpened() and capture.grab() and capture.grab()
    finally:
        capture.release()


def _is_picture(content: bytes) -> bool:
    try:
        read_image(content)
    except UserError:
        return False
    return True


# --- frames -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """One frame of a video."""

    image: NDArray[np.uint8]
    """uint8 (height, width, 3) RGB."""
    seconds: float
    """Seconds since the first frame."""


@dataclass(frozen=True)
class Clip:
    """An open video; close it, or read it to its end."""

    frames: Iterator[Frame]
    rate: float
    """Frames a second: of those that follow one another without a pause."""
    announced: int
    """Frames that the file says it has; 0 where it does not."""
    close: Callable[[], None]


def open_video(video: Video, limit: int | None, stop: Callable[[], bool]) -> Clip:
    """Open a video.

    Args:
        video: from `find_media`.
        limit: frames to read at most.
        stop: asked before each frame: whether to end here.

    Raises:
        UserError: it cannot be opened.
    """
    rate = None if video.is_live else _usual_rate(video.address)
    capture = _opened(video.address)
    if not capture.isOpened():
        if video.is_live:
            what = "the camera" if video.address.isdigit() else "the stream"
            raise UserError(
                f"{what} {video.address} cannot be opened; check its number or address, and that "
                "it is running."
            )
        raise UserError(f"{video.address} is damaged or not a video; replace it.")
    stated = capture.get(cv2.CAP_PROP_FPS)
    if rate is None:
        rate = stated if math.isfinite(stated) and 0 < stated <= 1000 else 25.0
    announced = 0 if video.is_live else max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    if limit is not None and announced:
        announced = min(announced, limit)
    frames = _frames(capture, rate, video.is_live, limit, stop)
    return Clip(frames, rate, announced, capture.release)


def _frames(
    capture: cv2.VideoCapture,
    rate: float,
    is_live: bool,
    limit: int | None,
    stop: Callable[[], bool],
) -> Iterator[Frame]:
    first: float | None = None
    last = -1.0
    count = 0
    while (limit is None or count < limit) and not stop():
        there, frame = capture.read()
        if not there:
            return
        at = time.monotonic() if is_live else capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        first = at if first is None else first
        seconds = at - first
        # Some files have no times: all are 0 then, or not a number.
        if not (math.isfinite(seconds) and seconds > last):
            seconds = 0.0 if count == 0 else last + 1 / rate
        last = seconds
        count += 1
        yield Frame(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False), seconds)


_LOOKED_AT = 32
"""Frames by whose times a file's rate is judged."""


def _usual_rate(address: str) -> float | None:
    """Return a file's frames a second where it does not pause; None for what it says itself.

    A camera that records on motion writes the average over its pauses, which is not a rate
    that anything happens at.
    """
    capture = _opened(address)
    try:
        times: list[float] = []
        while len(times) < _LOOKED_AT and capture.grab():
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
        stated = capture.get(cv2.CAP_PROP_FPS)
    finally:
        capture.release()
    steps = np.diff(times)
    steps = steps[np.isfinite(steps) & (steps > 0)]
    if not len(steps):
        return None
    usual = 1 / float(np.median(steps))
    even = np.abs(steps - np.median(steps)).max() < 0.0015  # times in whole milliseconds
    is_right = math.isfinite(stated) and stated > 0 and abs(usual / stated - 1) < 0.1
    return None if even and is_right else min(usual, 120.0)


def _opened(address: str) -> cv2.VideoCapture:
    quiet_opencv()
    # FFmpeg prints by itself; a damaged file gets one sentence, ours.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if address.isascii() and address.isdigit() and not Path(address).exists():
        return cv2.VideoCapture(int(address))
    if is_address(address):
        patience = [
            *(cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _PATIENCE * 1000),
            *(cv2.CAP_PROP_READ_TIMEOUT_MSEC, _PATIENCE * 1000),
        ]
        return cv2.VideoCapture(address, cv2.CAP_FFMPEG, patience)
    return cv2.VideoCapture(opencv_path(address))
