"""Letterbox on the GPU: images of any size, as they lie there, into the rows of an engine's input.

One kernel resizes, surrounds with gray, orders the channels, normalizes and lays out a whole batch.
Its arithmetic is `cv2.resize`'s, so that pixels are those of `data.loader.fill_row` (cubic
interpolation: within one level of 255).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.letterbox import Letterbox
from trt_yolov6.data.preprocessing import Interpolation, Preprocessing
from trt_yolov6.engines.cuda.device import Stream
from trt_yolov6.engines.cuda.kernels import Kernels, compiled
from trt_yolov6.spec import TensorSpec, image_size_of

SOURCE = "letterbox.cu"

_COPY, _LINEAR, _AREA, _AREA_OF_WHOLE_PIXELS, _ENLARGED_BY_AREA, _CUBIC = range(6)
"""`Method` of the kernel."""

_RECORD = struct.Struct("<Qqq8i")
"""`Picture` of the kernel."""

RECORD_BYTES = _RECORD.size

_TILE = (32, 8)
"""Threads of a block: columns, rows."""

_TYPES = (
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    *(ctypes.c_float,) * 6,
)


@dataclass(frozen=True)
class ImageView:
    """Pixels of an upright image on the GPU, through steps in bytes that may be negative."""

    address: int
    """Where the red value of its first pixel lies."""
    height: int
    width: int
    row_step: int
    column_step: int
    channel_step: int = 1
    owner: Any = dataclasses.field(default=None, compare=False, repr=False)
    """Object whose life is the memory's."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height and width in pixels, and 3 channels."""
        return self.height, self.width, 3


def interleaved(address: int, height: int, width: int, channel_step: int = 1) -> ImageView:
    """Return the view of an image (height, width, 3) without gaps."""
    return ImageView(address, height, width, 3 * width, 3, channel_step)


def upright(stored: ImageView, orientation: int) -> ImageView:
    """Return a stored image's view as its EXIF orientation, 1 to 8, says it is shown."""
    height, width = stored.height, stored.width
    down, right = stored.row_step, stored.column_step
    last_row, last_column = (height - 1) * down, (width - 1) * right
    # Where the shown image's first pixel lies, and the steps to the ones below and on its right.
    first, below, after, turned = {
        2: (last_column, down, -right, False),
        3: (last_row + last_column, -down, -right, False),
        4: (last_row, -down, right, False),
        5: (0, right, down, True),
        6: (last_row, right, -down, True),
        7: (last_row + last_column, -right, -down, True),
        8: (last_column, -right, down, True),
    }.get(orientation, (0, down, right, False))
    if turned:
        height, width = width, height
    return dataclasses.replace(
        stored,
        address=stored.address + first,
        height=height,
        width=width,
        row_step=below,
        column_step=after,
    )


@functools.lru_cache(maxsize=1024)
def method_of(placed: Letterbox, interpolation: Interpolation) -> int:
    """Return the number of the arithmetic that `data.letterbox.fill` has OpenCV use."""
    if placed.resized == placed.source:
        return _COPY
    if interpolation == "cubic":
        return _CUBIC
    scales = [
        1.0 / (now / before) for before, now in zip(placed.source, placed.resized, strict=True)
    ]
    whole = [round(scale) for scale in scales]
    is_whole = all(
        abs(scale - number) < np.finfo(np.float64).eps
        for scale, number in zip(scales, whole, strict=True)
    )
    if interpolation == "linear" or placed.scale >= 1:
        # OpenCV averages where both sides are halved.
        return _AREA_OF_WHOLE_PIXELS if is_whole and whole == [2, 2] else _LINEAR
    if min(scales) < 1:
        return _ENLARGED_BY_AREA
    return _AREA_OF_WHOLE_PIXELS if is_whole else _AREA


def write_record(
    records: Any, row: int, view: ImageView, placed: Letterbox, interpolation: Interpolation
) -> None:
    """Describe an image of a batch to the kernel.

    Args:
        records: a writable buffer of `RECORD_BYTES` a row.
        row: its index in the batch.
        view: where it lies on the GPU.
        placed: where it goes, see `letterbox.fit`.
        interpolation: how it is resized.
    """
    _RECORD.pack_into(
        records,
        row * RECORD_BYTES,
        view.address,
        view.row_step,
        view.column_step,
        view.height,
        view.width,
        placed.top,
        placed.left,
        *placed.resized,
        method_of(placed, interpolation),
        view.channel_step,
    )


def write_alike(
    records: NDArray[np.uint8],
    addresses: Sequence[int],
    channel_step: int,
    placed: Letterbox,
    interpolation: Interpolation,
) -> None:
    """Describe whole images of one size to the kernel, as `write_record` does one by one.

    Args:
        records: uint8, `RECORD_BYTES` a row, C-contiguous.
        addresses: where the red value of each image's first pixel lies; its rows follow each other.
        channel_step: bytes from red to green and from green to blue.
        placed: where each goes.
        interpolation: how each is resized.
    """
    view = interleaved(addresses[0], *placed.source, channel_step)
    write_record(records, 0, view, placed, interpolation)
    table = records.view(np.uint64).reshape(-1, RECORD_BYTES // 8)
    number = len(addresses)
    table[1:number] = table[0]
    table[:number, 0] = addresses


def pixels_of_thread(width: int) -> int:
    """Return how many neighbours a thread of the kernel makes in rows of a width."""
    return 1 if width % 4 else 4


def defines_of(spec: TensorSpec) -> tuple[str, ...]:
    """Return the kernel's macros for an engine's input."""
    kind = ("BYTE_INPUT",) if spec.dtype == np.uint8 else ()
    return (*kind, f"PIXELS={pixels_of_thread(image_size_of(spec)[1])}")


class LetterboxKernel:
    """The kernel for an engine's input.

    Args:
        spec: the engine's input.
        preprocessing: `Engine.preprocessing`.

    Raises:
        CudaError: there is no NVRTC, or it cannot compile for this GPU.
    """

    def __init__(self, spec: TensorSpec, preprocessing: Preprocessing) -> None:
        self._size = image_size_of(spec)
        self._kernels: Kernels = compiled(SOURCE, defines_of(spec))
        self._columns = _TILE[0] * pixels_of_thread(self._size[1])
        self._constants = (
            int(preprocessing.colour == "bgr"),
            *(float(value) for value in (*preprocessing.mean, *preprocessing.std)),
        )

    def enqueue(self, stream: Stream, records: int, target: int, rows: int) -> None:
        """Put the letterbox of a batch on a stream.

        Args:
            stream: what it waits for and what waits for it.
            records: address on the GPU of what `write_record` wrote, for each row; a record of
                zeros makes a row of zeros.
            target: address of the engine's input.
            rows: images of the batch.
        """
        height, width = self._size
        grid = (-(-width // self._columns), -(-height // _TILE[1]), rows)
        values = (records, target, height, width, *self._constants)
        self._kernels.launch(stream, "letterbox", grid, (*_TILE, 1), _TYPES, values)
