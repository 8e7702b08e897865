"""Inspect a file: ONNX graph, built engine, checkpoint or TensorRT plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trt_yolov6.backends import PLAN_SUFFIXES
from trt_yolov6.checkpoints import SUFFIXES as CHECKPOINT_SUFFIXES
from trt_yolov6.checkpoints.inspect import CheckpointDetails, inspect_checkpoint
from trt_yolov6.common.files import sha256_file
from trt_yolov6.engines import find_engine
from trt_yolov6.engines.manifest import Manifest, read_manifest
from trt_yolov6.engines.tensorrt.plan import PlanDetails, inspect_plan
from trt_yolov6.errors import UserError
from trt_yolov6.graph.files import read_onnx
from trt_yolov6.graph.inspect import OnnxDetails, inspect_onnx

ONNX_SUFFIXES = (".onnx",)

Kind = Literal["onnx", "checkpoint", "plan"]


@dataclass(frozen=True)
class Inspection:
    """A file's kind, size and content."""

    path: Path
    kind: Kind
    size: int
    """In bytes."""
    sha256: str
    manifest: Manifest | None
    details: OnnxDetails | CheckpointDetails | PlanDetails

    @property
    def matches_manifest(self) -> bool | None:
        """True if the file is the one its manifest describes; None without a manifest."""
        return None if self.manifest is None else self.manifest.plan_sha256 == self.sha256

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON-ready dict, the details merged into the rest."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "bytes": self.size,
            "sha256": self.sha256,
            **dataclasses.asdict(self.details),
            "manifest": self.manifest.to_json() if self.manifest else None,
            "matches_manifest": self.matches_manifest,
        }


def inspect_file(path: str | Path) -> Inspection:
    """Inspect a file, or an engine by a short name: its suffix gives the kind.

    Raises:
        UserError: the file is missing, damaged or of no kind this package knows.
    """
    path = find_engine(path)
    suffix = path.suffix.lower()
    kind: Kind
    details: OnnxDetails | CheckpointDetails | PlanDetails
    try:
        if suffix in ONNX_SUFFIXES:
            kind, details = "onnx", inspect_onnx(read_onnx(path))
        elif suffix in CHECKPOINT_SUFFIXES:
            kind, details = "checkpoint", inspect_checkpoint(path)
        elif suffix in PLAN_SUFFIXES:
            kind, details = "plan", inspect_plan(path)
        else:
            known = ", ".join((*ONNX_SUFFIXES, *CHECKPOINT_SUFFIXES, *PLAN_SUFFIXES))
            raise UserError(f"{path} cannot be inspected; give a file that ends in {known}.")
        return Inspection(
            path=path,
            kind=kind,
            size=path.stat().st_size,
            sha256=sha256_file(path),
            manifest=None if kind == "checkpoint" else read_manifest(path),
            details=details,
        )
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from error
