"""The backends, one row each: the module that implements it and the suffix of its plans.

`engines.base` describes what the module has to offer. No backend is imported here, so that the
command line can list the names at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class BackendRow(NamedTuple):
    """Module of a backend, and the names of its plans."""

    module: str
    """Imported when needed."""
    suffix: str
    """File name extension of its plans, such as `.onnx`."""
    tensorrt: bool = False
    """Graphs are adapted to TensorRT's rules, and plans are for one kind of GPU."""


BACKENDS: dict[str, BackendRow] = {
    "tensorrt": BackendRow("trt_yolov6.engines.tensorrt.enterprise", ".trt", tensorrt=True),
    "tensorrt-rtx": BackendRow("trt_yolov6.engines.tensorrt.rtx", ".trt", tensorrt=True),
    "onnxruntime": BackendRow("trt_yolov6.engines.onnxruntime.backend", ".onnx"),
}
"""Backends by name, the fastest first: `auto` takes the first that works."""

ENGINES = Path("engines")
"""Default folder of engines."""

PLAN_SUFFIXES = (".trt", ".plan", ".engine")
"""Usual file name extensions of TensorRT's plans."""
