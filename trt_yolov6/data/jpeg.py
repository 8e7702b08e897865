"""JPEG headers: whether a GPU decodes the file as this package reads it, its size and orientation.

Files are left encoded for a GPU that decodes them itself (`engines.cuda.jpeg`). What it would read
differently, or not at all, goes to `images.read_image`: CMYK, RGB without conversion, 12 bits,
arithmetic coding, odd sampling and files cut short.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.images import EXIF, exif_orientation, read_encoded, read_image

_START = b"\xff\xd8"
_END = b"\xff\xd9"

_FRAMES = (0xC0, 0xC1, 0xC2)
"""Start-of-frame markers of baseline, extended and progressive Huffman coding (ITU T.81, B.2.2)."""
_SAMPLINGS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
"""Columns and rows of luma samples for each chroma sample: 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1."""


@dataclass(frozen=True)
class JpegHeader:
    """Facts about a JPEG that a GPU decodes as OpenCV does."""

    height: int
    """Rows of pixels as stored."""
    width: int
    orientation: int
    """EXIF orientation, 1 to 8; from 5 on it is shown turned by a quarter."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the image as it is shown."""
        is_turned = self.orientation >= 5
        return (self.width, self.height) if is_turned else (self.height, self.width)


@dataclass(frozen=True)
class Jpeg:
    """An encoded image that is left to a GPU."""

    content: bytes
    name: str
    """Name for messages."""
    header: JpegHeader

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the image as it is shown."""
        return self.header.size

    def read(self) -> NDArray[np.uint8]:
        """Decode it here, in the orientation of `header`; see `images.read_image`."""
        return read_image(self.content, self.name, as_stored=self.header.orientation == 1)


def open_image(source: str | Path | bytes, name: str | None = None) -> Jpeg | NDArray[np.uint8]:
    """Read a file and leave it encoded if a GPU can decode it; decode it otherwise.

    Args:
        source, name: as for `images.read_image`.

    Returns:
        A `Jpeg`, or uint8 (height, width, 3), RGB.

    Raises:
        UserError: as `images.read_image`; a file that is damaged further in is found later.
    """
    data, name = read_encoded(source, name)
    header = read_header(data)
    return read_image(data, name) if header is None else Jpeg(data, name, header)


def read_header(data: bytes) -> JpegHeader | None:
    """Return the header of a JPEG file; None for any that OpenCV should decode, and other files."""
    if not data.startswith(_START):
        return None
    frame: bytes | None = None
    orientation: int | None = None
    position, length = 2, len(data)
    while position + 4 <= length and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:  # start of scan: its data never holds the end marker
            if frame is None or data.rfind(_END, end) < 0:  # from the end, where it usually is
                return None
            return _header(frame, orientation or 1)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _FRAMES:
                return None
            frame = data[position + 4 : end]
        elif marker == 0xE1 and orientation is None and data.startswith(EXIF, position + 4, end):
            orientation = exif_orientation(data[position + 4 + len(EXIF) : end])
        elif (
            marker == 0xEE
            and data.startswith(b"Adobe", position + 4, end)
            and data[position + 15 : min(position + 16, end)] != b"\x01"
        ):
            return None  # stored as RGB, CMYK or YCCK
        position = end
    return None


def _header(frame: bytes, orientation: int) -> JpegHeader | None:
    if len(frame) < 6:
        return None
    precision, height, width, components = struct.unpack_from(">BHHB", frame)
    if precision != 8 or not height or not width or len(frame) < 6 + 3 * components:
        return None
    if components == 3:
        numbers = frame[6], frame[9], frame[12]
        columns, rows = frame[7] >> 4, frame[7] & 15
        chroma = frame[10], frame[13]
        # Named R, G and B they are stored as such.
        if numbers == (82, 71, 66) or chroma != (0x11, 0x11) or (columns, rows) not in _SAMPLINGS:
            return None
    elif components != 1:
        return None
    return JpegHeader(height, width, orientation)
