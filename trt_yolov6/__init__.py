"""trt-yolov6: YOLOv6 from a trained checkpoint to a measured, validated engine.

    from trt_yolov6 import build, load

    detector = load(build("yolov6n.pt", precision="int8", calibration="calib/"))
    for detections in detector.predict(["a.jpg", "b.jpg"], confidence=0.4):
        for one in detections:
            print(one.class_name, one.confidence, one.xyxy)

Names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trt_yolov6.api import benchmark, compare, evaluate, inspect, load, train
    from trt_yolov6.bench.latency import BenchmarkResult
    from trt_yolov6.comparison.plan import Plan
    from trt_yolov6.comparison.results import Results
    from trt_yolov6.data.images import read_image
    from trt_yolov6.data.preprocessing import Preprocessing
    from trt_yolov6.detectors.detections import Detection, Detections
    from trt_yolov6.detectors.spec import DetectorSpec
    from trt_yolov6.diagnostics.inspection import Inspection
    from trt_yolov6.engines.base import BuildSettings, LoadOptions
    from trt_yolov6.engines.build import BuiltEngine
    from trt_yolov6.engines.manifest import Manifest
    from trt_yolov6.errors import MissingDependencyError, UserError
    from trt_yolov6.graph.model import Graph
    from trt_yolov6.pipeline import build, export, quantize
    from trt_yolov6.quantization.settings import QuantizationSettings
    from trt_yolov6.runtime.detector import Detector
    from trt_yolov6.runtime.evaluate import Evaluation
    from trt_yolov6.spec import BatchProfile, NmsSettings, Precision, PredictOptions
    from trt_yolov6.training.recipe import TrainSettings
    from trt_yolov6.training.trainer import TrainResult

# ONNX Runtime for Linux, from 1.29 on, reports sessions (names of files and graphs, hashes) to
# Microsoft and keeps an id in the home folder, unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

__all__ = [
    "BatchProfile",
    "BenchmarkResult",
    "BuildSettings",
    "BuiltEngine",
    "Detection",
    "Detections",
    "Detector",
    "DetectorSpec",
    "Evaluation",
    "Graph",
    "Inspection",
    "LoadOptions",
    "Manifest",
    "MissingDependencyError",
    "NmsSettings",
    "Plan",
    "Precision",
    "PredictOptions",
    "Preprocessing",
    "QuantizationSettings",
    "Results",
    "TrainResult",
    "TrainSettings",
    "UserError",
    "benchmark",
    "build",
    "compare",
    "evaluate",
    "export",
    "inspect",
    "load",
    "quantize",
    "read_image",
    "train",
]

_MODULES = {
    "api": ("benchmark", "compare", "evaluate", "inspect", "load", "train"),
    "bench.latency": ("BenchmarkResult",),
    "comparison.plan": ("Plan",),
    "comparison.results": ("Results",),
    "data.images": ("read_image",),
    "data.preprocessing": ("Preprocessing",),
    "detectors.detections": ("Detection", "Detections"),
    "detectors.spec": ("DetectorSpec",),
    "diagnostics.inspection": ("Inspection",),
    "engines.base": ("BuildSettings", "LoadOptions"),
    "engines.build": ("BuiltEngine",),
    "engines.manifest": ("Manifest",),
    "errors": ("MissingDependencyError", "UserError"),
    "graph.model": ("Graph",),
    "pipeline": ("build", "export", "quantize"),
    "quantization.settings": ("QuantizationSettings",),
    "runtime.detector": ("Detector",),
    "runtime.evaluate": ("Evaluation",),
    "spec": ("BatchProfile", "NmsSettings", "Precision", "PredictOptions"),
    "training.recipe": ("TrainSettings",),
    "training.trainer": ("TrainResult",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
