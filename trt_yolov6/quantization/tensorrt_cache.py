"""TensorRT's calibration cache: a text file with one scale a tensor, for TensorRT up to 10.

    TRT-8601-EntropyCalibration2
    images: 3c008912
    conv2d: 3c88edfc

The first line names TensorRT's version (8.6.1 is 8601, 10.3.0 is 100300) and its calibrator. The
eight hexadecimal digits of a line are the bits of a float32, most significant first: the tensor's
scale, amax / 127. (Format: NVIDIA's sampleINT8, section "Calibration file".)
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from trt_yolov6.common.files import read_bytes, write_bytes
from trt_yolov6.errors import UserError

ALGORITHM = "EntropyCalibration2"

ALGORITHMS = (ALGORITHM, "EntropyCalibration", "MinMaxCalibration", "LegacyCalibration")
"""Calibrators whose caches are read; they differ in this word only."""

_HEADER = re.compile(r"TRT-\d+-(\w+)")
# A tensor's name may contain colons (`input:0`), and even ": ".
_LINE = re.compile(r"(?P<name>.+): (?P<bits>[0-9a-fA-F]{1,8})")


def header_version(version: str) -> str:
    """Return a TensorRT version as cache headers write it: `8.6.1` gives `8601`.

    Major x 1000 + minor x 100 + patch below version 10, major x 10000 from there on, as in
    NV_TENSORRT_VERSION.

    Raises:
        UserError: it is not of the form 8.6.1, or from version 11 on, which reads no cache.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\..*)?", version)
    if match is None:
        raise UserError(f"{version!r} is not a TensorRT version; write it like 8.6.1.")
    major, minor, patch = (int(part or 0) for part in match.groups())
    if major > 10:
        raise UserError(
            f"TensorRT {version} no longer has calibrators or reads calibration caches; build "
            "from the graph with Q/DQ nodes instead."
        )
    return str(major * (10000 if major == 10 else 1000) + minor * 100 + patch)


def write_cache(path: str | Path, amax: Mapping[str, float], version: str) -> None:
    """Write a calibration cache for `IInt8EntropyCalibrator2`.

    Args:
        path: the file to write.
        amax: range by tensor, above 0 and finite; `CalibrationTable.amax` is such a mapping.
        version: of the TensorRT that is to read it, such as `8.6.1`.

    Raises:
        UserError: TensorRT of that version reads no cache, the path cannot be written to, or a
            tensor's name or range cannot be in a cache.
    """
    lines = [f"TRT-{header_version(version)}-{ALGORITHM}"]
    for name, value in amax.items():
        if not name or "\n" in name or "\r" in name:
            raise UserError(
                f"tensor {name!r} cannot be named in a calibration cache; rename it in the graph."
            )
        lines.append(f"{name}: {_to_bits(name, value / 127)}")
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def read_cache(path: str | Path) -> dict[str, float]:
    """Read a calibration cache.

    Returns:
        Scale by tensor, in the file's order: a float32 above 0, finite.

    Raises:
        UserError: the file is missing, is not such text, names an unknown calibrator, or has a
            scale that is not a finite number above 0.
    """
    content = read_bytes(path)
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        lines = []
    header = _HEADER.fullmatch(lines[0].strip()) if lines else None
    if header is None:
        raise UserError(
            f"{path} is not a TensorRT calibration cache, whose first line is like "
            f"TRT-8601-{ALGORITHM}; give the text file that TensorRT's calibrator wrote."
        )
    algorithm = header[1]
    if algorithm not in ALGORITHMS:
        raise UserError(
            f"{path} was made by the calibrator {algorithm}, not one of {', '.join(ALGORITHMS)}; "
            f"calibrate again with {ALGORITHM}."
        )
    scales: dict[str, float] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(
                f"{path}, line {number}, is not a tensor's name, a colon and up to eight "
                f"hexadecimal digits ({line[:60]!r}); correct it or calibrate again."
            )
        name = match["name"]
        (scale,) = struct.unpack(">f", bytes.fromhex(match["bits"].zfill(8)))
        if not (math.isfinite(scale) and scale > 0):
            raise UserError(
                f"{path}, line {number}, gives tensor {name!r} the scale {scale}, which quantizes "
                "nothing; correct it or calibrate again."
            )
        if scales.get(name, scale) != scale:
            raise UserError(
                f"{path}, line {number}, gives tensor {name!r} a second scale; keep one of them."
            )
        scales[name] = scale
    if not scales:
        raise UserError(f"{path} holds no scale of any tensor; calibrate again.")
    return scales


def _to_bits(name: str, scale: float) -> str:
    try:
        bits = struct.pack(">f", scale)
    except OverflowError:
        bits = struct.pack(">f", math.inf)
    (rounded,) = struct.unpack(">f", bits)
    if not (math.isfinite(rounded) and rounded > 0):
        raise UserError(
            f"tensor {name!r} has the scale {scale}, which no float32 above 0 can hold; calibrate "
            "again with other images."
        )
    return bits.hex()
