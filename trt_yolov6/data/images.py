"""Image files in, RGB pixels out: the one place that knows bit depths, colour spaces and EXIF."""

from __future__ import annotations

import functools
import io
import logging
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.files import in_utf8, is_utf8, path_of, read_bytes, sha256_bytes
from trt_yolov6.errors import UserError

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""The files of a folder that count as images, in lower case."""

_OTHER_PICTURES = {".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl"}
"""Pictures that a folder may hold, too, and that do not count."""

ORIENTATION = 0x0112
"""EXIF's tag; 5 to 8 are turned by a quarter."""

EXIF = b"Exif\0\0"
"""Beginning of EXIF in a JPEG; a TIFF structure follows."""

_AVIF = (b"ftypavif", b"ftypavis")
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\x00", b"MM\x00*")


def list_images(path: str | Path) -> list[Path]:
    """Return the images a path stands for: the file itself, or a folder's, sorted by path.

    Sub-folders are searched as well, except hidden ones.

    Raises:
        UserError: the path is missing, or the folder holds no image.
    """
    path = Path(path)
    # `Path.is_file` raises OSError where a name is longer than the system allows.
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise UserError(f"{path} does not exist; check the path.")
    images = images_below(path)
    if not images:
        raise UserError(
            f"{path} and its sub-folders hold no image ({', '.join(IMAGE_SUFFIXES)}); give the "
            "folder the images lie in."
        )
    return images


def images_below(folder: Path) -> list[Path]:
    """Return the images in a folder and its sub-folders, hidden ones aside, sorted by path.

    Links to folders are followed, to each folder once. Pictures of other formats are left out with
    a warning.

    Raises:
        UserError: nearly all that is found is something else, as below `/`.
    """
    found: list[Path] = []
    others: Counter[str] = Counter()
    looked_at = 0
    for place, folders, files in _folders(folder):
        looked_at += len(folders) + len(files)
        for name in files:
            if name.startswith("."):
                continue
            path = Path(place, name)
            ending = path.suffix.lower()
            if ending in IMAGE_SUFFIXES:
                found.append(path)
            elif ending in _OTHER_PICTURES:
                others[ending] += 1
        if looked_at > _MOST_OTHERS + 20 * len(found):
            raise UserError(
                f"{folder} and its sub-folders hold {len(found)} images among {looked_at} other "
                "things so far; give the folder the images lie in."
            )
    if others:
        _warn_of_others(folder, ", ".join(f"{n} {end}" for end, n in sorted(others.items())))
    return sorted(path for path in found if path.is_file())


def _folders(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield what `os.walk` does of folders that are not hidden, each once.

    What lies in `top` itself is not named by a link, whatever the order of a folder's entries.
    """
    walked: set[str] = set()
    tops = [str(top)]
    for start in tops:  # which grows by the links that are found
        for place, folders, files in os.walk(start):
            real = os.path.realpath(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if real in walked:
                folders.clear()
                continue
            walked.add(real)
            paths = (os.path.join(place, name) for name in folders)
            tops += filter(os.path.islink, paths)
            yield place, folders, files


@functools.cache  # once for each folder, however often it is listed
def _warn_of_others(folder: Path, others: str) -> None:
    _log.warning("%s: %s are left out; convert them to JPEG or PNG", folder, others)


_MOST_OTHERS = 20_000
"""Files and folders that are looked at for images, before twenty for each that was found."""


def same_files(some: Iterable[Path], others: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Return each file of `some` whose bytes one of `others` has, too, and that one.

    Only files of a size that occurs in both are read.

    Raises:
        UserError: one of them cannot be read.
    """
    sized = [(path, path.stat().st_size) for path in some]
    of_size: dict[int, list[Path]] = {}
    for path in others:
        of_size.setdefault(path.stat().st_size, []).append(path)
    shared = {size for _, size in sized} & of_size.keys()
    known = {sha256_bytes(read_bytes(path)): path for size in shared for path in of_size[size]}
    found = [
        (path, known.get(sha256_bytes(read_bytes(path)))) for path, size in sized if size in shared
    ]
    return [(path, other) for path, other in found if other is not None]


def upright_size(path: Path) -> tuple[int, int]:
    """Return the width and height of what `read_image` makes of a file; no pixels are decoded.

    Raises:
        UserError: the file is missing or not an image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            (width, height), exif = image.size, image.info.get("exif", b"")
            # Not `getexif`: it takes an orientation from XMP, which OpenCV does not.
            if image.format == "PNG" and not exif:  # it may follow the pixels
                exif = read_bytes(path).rpartition(b"eXIf")[2]
            # A TIFF's `size` is turned already.
            is_tiff = image.format == "TIFF"
            orientation = 1 if is_tiff else exif_orientation(exif.removeprefix(EXIF))
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} is damaged or not an image; replace or remove it.") from error
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def size_or_zero(path: Path) -> tuple[int, int]:
    """Return `upright_size`; 0, 0 for what cannot be read, which its reader will name."""
    try:
        return upright_size(path)
    except UserError:
        return 0, 0


def exif_orientation(tiff: bytes) -> int:
    """Return the orientation in EXIF's TIFF structure, 1 to 8; 1 where it says none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for index in range(count):
        place = start + 2 + 12 * index
        if place + 12 > len(tiff):
            break
        tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, place)
        if tag == ORIENTATION:
            return int(value) if 1 <= value <= 8 else 1
    return 1


def read_encoded(source: str | Path | bytes, name: str | None = None) -> tuple[bytes, str]:
    """Return an image's bytes, still encoded, and its name for messages; see `read_image`.

    Raises:
        UserError: the file cannot be read.
    """
    if isinstance(source, bytes):
        return source, name or "the image"
    return read_bytes(path_of(source, "source")), name or str(source)


def read_image(
    source: str | Path | bytes, name: str | None = None, *, as_stored: bool = False
) -> NDArray[np.uint8]:
    """Decode an image to RGB.

    Gray becomes three equal channels, CMYK is converted, palettes are resolved, transparency is
    dropped, 16-bit samples are scaled by 255/65535, and the image is turned upright as its EXIF
    orientation says.

    Args:
        source: a path, or the content of an image file.
        name: what to call the image in an error; default: the path.
        as_stored: ignore the EXIF orientation.

    Returns:
        uint8 (height, width, 3), RGB, C-contiguous.

    Raises:
        UserError: the file is missing, empty, cut short or not an image.

    Examples:
        >>> from trt_yolov6 import read_image
        >>> read_image("images/BloodImage_00007.jpg").shape
        (480, 640, 3)
    """
    data, name = read_encoded(source, name)
    if not data:
        raise UserError(f"{name} is empty (0 bytes); replace or remove it.")
    if _is_cut_short(data):
        raise UserError(f"{name} is cut short; copy it again or remove it.")

    flags = cv2.IMREAD_COLOR
    if data.startswith((_PNG, *_TIFF)):
        # Left to itself OpenCV drops the low byte, which darkens by up to one level.
        flags |= cv2.IMREAD_ANYDEPTH
    if as_stored:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
    quiet_opencv()
    encoded = np.frombuffer(data, np.uint8)
    try:
        image = cv2.imdecode(encoded, flags)
        if image is None and data.startswith(_TIFF):
            # OpenCV makes no colours of gray in 32 bits; what samples it has is said below.
            gray = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
            image = gray if gray is not None and gray.itemsize > 2 else None
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in str(error):
            raise _too_large(name) from error
        image = None
    if image is None:
        raise UserError(f"{name} is damaged, cut short or not an image; replace or remove it.")
    if image.dtype == np.uint16:
        image = cv2.convertScaleAbs(image, alpha=1 / 257)
    elif image.dtype != np.uint8:
        raise UserError(
            f"{name} has {image.dtype} samples, whose range is unknown; convert it to 8 or 16 bits."
        )
    if data[4:12] in _AVIF and not as_stored:
        image = _upright(image, _avif_orientation(data, name))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def _too_large(name: str | Path) -> UserError:
    return UserError(f"{name} has more pixels than are decoded; make it smaller.")


def _avif_orientation(data: bytes, name: str) -> int:
    """Return the orientation of an AVIF, 1 to 8, which OpenCV does not look for."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            exif: bytes = image.info.get("exif", b"")
    except OSError:  # a Pillow that was built without AVIF
        return 1
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    return exif_orientation(exif.removeprefix(EXIF))


def _upright(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    rows, columns = (-1 if orientation in those else 1 for those in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return np.ascontiguousarray(image[::rows, ::columns])


def _is_cut_short(data: bytes) -> bool:
    """Return whether a JPEG or PNG lacks its end.

    OpenCV 4 paints the missing part of a JPEG gray and calls it read.
    """
    if data.startswith(_PNG):
        return b"IEND" not in data[-4096:] and b"IEND" not in data
    if not data.startswith(b"\xff\xd8"):
        return False
    # Walk the segments up to the first scan: a thumbnail among them has an end marker of its own.
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == 0xDA:  # start of scan: its data never holds FF D9
            return data.find(b"\xff\xd9", position) < 0
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position + 4 > len(data)


def opencv_path(path: str | Path) -> str:
    """Return a path as OpenCV takes it, which crashes over a name that is not UTF-8.

    A relative one begins with a dot: FFmpeg would take one with a colon for a stream's address.

    Raises:
        UserError: it is such a name.
    """
    text = in_utf8(os.path.join(".", path))
    if not is_utf8(text):
        raise UserError(f"{path} is not a name in UTF-8, which OpenCV needs for videos; rename it.")
    return text


@functools.cache
def quiet_opencv() -> None:
    """Keep OpenCV's own messages off stderr: a damaged image gets one sentence, ours."""
    if "OPENCV_LOG_LEVEL" not in os.environ:
        # OpenCV 4.10 has the first name, OpenCV 5 the second.
        set_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel
        set_level(0)
