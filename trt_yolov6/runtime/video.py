"""Videos out: H.264, which browsers play, where there is an encoder; frames at their times."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.images import opencv_path, quiet_opencv
from trt_yolov6.errors import UserError

_ENCODERS = ("libx264", "libopenh264", "h264_nvenc")
"""FFmpeg's names, the likeliest to work first."""

LONGEST_PAUSE = 60.0
"""Seconds of stillness that a pause in a recording becomes at most."""


class VideoWriter:
    """Writes an MP4 without sound. Use it in a `with` block; `close` says whether all went well.

    Its rate is constant: a frame is repeated until the next one's time.
    """

    def __init__(self, path: Path, rate: float) -> None:
        """Prepare to write; the file is opened with the first frame.

        Args:
            path: of the file, ending in `.mp4`.
            rate: frames a second.
        """
        self.path = path
        self.rate = rate
        self.frames = 0
        """Written so far, repeated ones counted."""
        self.is_h264 = False
        self._encoder: subprocess.Popen[bytes] | None = None
        self._writer: cv2.VideoWriter | None = None
        self._size: tuple[int, int] | None = None
        self._last: NDArray[np.uint8] | None = None
        self._shift = 0.0

    def add(self, image: NDArray[np.uint8], seconds: float) -> None:
        """Append a frame.

        Args:
            image: uint8 (height, width, 3) RGB; one of another size than the first is scaled.
            seconds: when it is shown, since the first frame.

        Raises:
            UserError: no encoder takes such frames.
        """
        height, width = image.shape[:2]
        if self._size is None:
            self._size = width, height
            self._open(width, height)
        elif self._size != (width, height):
            image = cv2.resize(image, self._size).astype(np.uint8, copy=False)
        pause = seconds - self._shift - self.frames / self.rate
        self._shift += max(0.0, pause - LONGEST_PAUSE)
        place = round((seconds - self._shift) * self.rate)
        while self._last is not None and self.frames < place:
            self._write(self._last)
        self._write(image)
        self._last = image

    def close(self) -> bool:
        """Finish the file; return whether the encoder wrote all of it."""
        ended_well = True
        if self._encoder is not None:
            assert self._encoder.stdin is not None
            with contextlib.suppress(OSError):
                self._encoder.stdin.close()
            ended_well = self._encoder.wait() == 0
            self._encoder = None
        if self._writer is not None:
            self._writer.release()
            self._writer = None
        return ended_well

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._encoder is not None:
            self._encoder.kill()
        self.close()

    def _open(self, width: int, height: int) -> None:
        found = h264_encoder()
        if found is not None:
            program, encoder = found
            self.is_h264 = True
            self._encoder = subprocess.Popen(
                [
                    *(program, "-y", "-nostdin", "-loglevel", "quiet"),
                    *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"),
                    *("-r", f"{self.rate:.6g}", "-i", "-", "-c:v", encoder),
                    # Subsampled chroma needs even sides: add a line rather than cut one off.
                    *("-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p"),
                    *("-movflags", "+faststart", "-f", "mp4", str(self.path)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            return
        quiet_opencv()
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        self._writer = cv2.VideoWriter()
        code = cv2.VideoWriter.fourcc(*"mp4v")
        if not self._writer.open(opencv_path(self.path), code, self.rate, (width, height)):
            raise UserError(
                f"{self.path} cannot be encoded by this OpenCV; install opencv-python-headless "
                "with its FFmpeg."
            )

    def _write(self, image: NDArray[np.uint8]) -> None:
        self.frames += 1
        if self._encoder is not None:
            assert self._encoder.stdin is not None
            # An encoder that has ended is noticed when the file is closed.
            with contextlib.suppress(OSError):
                self._encoder.stdin.write(np.ascontiguousarray(image).tobytes())
        elif self._writer is not None:
            self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


@functools.cache
def h264_encoder() -> tuple[str, str] | None:
    """Return the `ffmpeg` on the path and an H.264 encoder of it that works; None without."""
    program = shutil.which("ffmpeg")
    if program is None:
        return None
    for name in _ENCODERS:
        trial = [
            *(program, "-nostdin", "-loglevel", "quiet", "-f", "lavfi", "-i"),
            *("color=size=256x256:rate=1:duration=1", "-c:v", name, "-f", "null", "-"),
        ]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run(trial, capture_output=True, timeout=20, check=False).returncode == 0:
                return program, name
    return None
