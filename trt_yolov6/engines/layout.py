"""What a detector's graph tells of itself: its layout by names and shapes, and its metadata."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trt_yolov6.engines.base import TensorSpec
from trt_yolov6.engines.manifest import Manifest, NmsSettings, OutputLayout
from trt_yolov6.errors import UserError


def guess_output_layout(outputs: Sequence[TensorSpec], path: str | Path) -> OutputLayout:
    """Recognize the output layout (see `OutputLayout`) of a graph that has no manifest.

    Raises:
        UserError: the outputs are of no layout this package decodes.
    """
    ranks = {output.name: len(output.shape) for output in outputs}
    if ranks == {"boxes": 3, "scores": 3}:
        return "split"
    if len(outputs) == 1:
        shape = outputs[0].shape
        anchors, columns = (shape[1], shape[2]) if len(shape) == 3 else (None, 0)
        # More columns than rows: anchors come last, as in YOLOv8's exports, which are not read.
        if columns is None or (columns >= 6 and (anchors is None or anchors >= columns)):
            return "rows"
        if len(shape) == 2 and shape[1] == 7:
            return "end2end"
    listed = ", ".join(f"{output.name} {list(output.shape)}" for output in outputs)
    raise UserError(
        f"{path} has outputs of no known layout ({listed}); export it with `trt-yolov6 export`, or "
        "with one output of rows (batch, anchors, 5 + classes)."
    )


def check_input(spec: TensorSpec, path: str | Path) -> None:
    """Raise UserError unless an engine can take this input: float32 NCHW or uint8 NHWC images."""
    if len(spec.shape) == 4:
        channels_last = spec.dtype == np.uint8
        channels = spec.shape[3] if channels_last else spec.shape[1]
        size = spec.shape[1:3] if channels_last else spec.shape[2:4]
        if spec.dtype in (np.uint8, np.float32) and channels == 3 and None not in size:
            return
    raise UserError(
        f"{path} takes {spec.dtype} {list(spec.shape)}; an engine takes float32 "
        "(batch, 3, height, width) or uint8 (batch, height, width, 3) of a fixed size."
    )


def names_in(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the class names in a graph's metadata, or None where it has none.

    This package writes them as a JSON list, Ultralytics as a Python dictionary.
    """
    try:
        value = ast.literal_eval(metadata.get("names", ""))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return tuple(str(item) for item in value) if isinstance(value, list) and value else None


def nms_in(metadata: Mapping[str, str]) -> NmsSettings | None:
    """Return the thresholds of the suppression inside a graph, as its metadata has them."""
    try:
        value = json.loads(metadata.get("nms", "null"))
        return NmsSettings(**value) if value else None
    except (ValueError, TypeError, UserError):
        return None


def class_count(outputs: Sequence[TensorSpec], layout: OutputLayout) -> int | None:
    """Return how many classes the outputs tell of, or None where they do not say."""
    if layout == "split":
        return next(output.shape[2] for output in outputs if output.name == "scores")
    if layout == "rows":
        columns = outputs[0].shape[2]
        return None if columns is None else columns - 5
    return None


def class_names_of(
    outputs: Sequence[TensorSpec],
    layout: OutputLayout,
    manifest: Manifest | None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Return the class names of the manifest, else of the metadata, else `class_0`, `class_1` …"""
    if manifest:
        return manifest.class_names
    count = class_count(outputs, layout)
    names = names_in(metadata or {})
    if names is not None and count in (None, len(names)):
        return names
    return tuple(f"class_{index}" for index in range(count or 0))
