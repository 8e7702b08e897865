"""Class names, image size and thresholds in a graph's metadata, and which inputs engines take."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trt_yolov6.common.records import as_record
from trt_yolov6.errors import UserError
from trt_yolov6.spec import NmsSettings, TensorSpec

_MOST_CLASSES = 100_000


def check_input(spec: TensorSpec, path: str | Path) -> None:
    """Raise UserError unless an engine can take this input: float32 NCHW or uint8 NHWC images."""
    if len(spec.shape) == 4:
        channels = spec.shape[3 if spec.dtype == np.uint8 else 1]
        if spec.dtype in (np.uint8, np.float32) and channels == 3 and None not in spec.sides:
            return
    raise UserError(
        f"{path} takes {spec.dtype} {list(spec.shape)}; an engine takes float32 "
        "(batch, 3, height, width) or uint8 (batch, height, width, 3) of a fixed size, which "
        "`trt-yolov6 build --onnx FILE --imgsz N` gives a graph that leaves it free."
    )


def literal(text: str) -> Any:
    """Return the value of a Python literal; None for any other text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def names_in(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the class names in a graph's metadata, or None where it has none.

    This package writes them as a JSON list, Ultralytics as a Python dictionary.
    """
    text = metadata.get("names", "")
    try:
        # Not as Python, which makes two halves of what JSON writes as a surrogate pair.
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = literal(text)
    if isinstance(value, dict):
        # Numbers in YOLOv5 to 26, texts in files that went through JSON.
        by_number = {str(key): name for key, name in value.items()}
        value = [by_number.get(str(index)) for index in range(len(value))]
        if None in value:
            return None
    return tuple(str(item) for item in value) if isinstance(value, list) and value else None


def numbered_classes(count: int | None, path: str | Path) -> tuple[str, ...]:
    """Return names for classes that have none; none where their number is not known.

    Raises:
        UserError: there are more than any detector has, as in a damaged file.
    """
    if count is not None and count > _MOST_CLASSES:
        raise UserError(f"{path} has outputs for {count} classes; a detector is needed.")
    return tuple(f"class_{index}" for index in range(count or 0))


def image_size_in(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the height and width that Ultralytics' exporter notes, or None."""
    match literal(metadata.get("imgsz", "")):
        case (int(height), int(width)) if min(height, width) > 0:
            return height, width
    return None


def nms_in(metadata: Mapping[str, str]) -> NmsSettings | None:
    """Return the thresholds of the suppression inside a graph, as its metadata has them."""
    try:
        return as_record(json.loads(metadata.get("nms", "null")), NmsSettings, "")
    except (ValueError, RecursionError, UserError):
        return None
