"""An ONNX detector ready to be quantized or built, with what its manifest will say."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from trt_yolov6.detectors.spec import Described, DetectorSpec
from trt_yolov6.spec import BatchProfile, PrecisionName

CHECKPOINT = "checkpoint_sha256"
"""Key of a graph's metadata with the hash of the checkpoint that it was exported from."""


@dataclass(frozen=True)
class Graph(Described):
    """An ONNX model ready to be built, with what the manifest has to say about it."""

    model: onnx.ModelProto = field(repr=False)
    name: str
    detector: DetectorSpec
    batch: BatchProfile
    precision: PrecisionName
    source: Path
    calibration: dict[str, Any] | None = None
    """Calibration of an INT8 or FP8 graph; None for others."""
    float_layers: tuple[str, ...] = ()
    """Layers of such a graph that were asked to stay in float."""
    notes: tuple[str, ...] = ()
    """Notes on changes to a file's graph, on reading or for TensorRT."""
    source_sha256: str = ""
    """SHA-256 of the source when the graph was made, in hexadecimal; empty if it was gone."""
    checkpoint_sha256: str = ""
    """That of the checkpoint whose network it is, also where the source is a graph that was
    exported from it; empty where it is not known."""
