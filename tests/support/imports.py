"""Import what commands import while they run: else each of many forked processes does."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

import trt_yolov6

LIBRARIES = ("cv2", "onnx", "onnxruntime", "PIL.Image", "pycocotools.cocoeval", "torch", "yaml")


def import_everything() -> None:
    """Import the whole package and its libraries, as far as they are installed."""
    modules = pkgutil.walk_packages(trt_yolov6.__path__, f"{trt_yolov6.__name__}.")
    for name in (*LIBRARIES, *(module.name for module in modules)):
        with contextlib.suppress(ImportError):
            if not name.endswith("__main__"):
                importlib.import_module(name)
