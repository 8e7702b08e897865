"""The manifest next to an engine: its source, its target, and how to read its outputs.

The plan itself stays pure, so that `trtexec --loadEngine` reads it. `engines/yolov6n.onnx` and
`engines/yolov6n.trt` may lie side by side: the first built takes `yolov6n.json`, another gets
`yolov6n.trt.json` (or `yolov6n.onnx.json`); the field `engine` says which file it describes, so
an engine that is renamed has to be built again or its manifest's field changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_yolov6.backends import BACKENDS
from trt_yolov6.common.files import (
    atomic_path,
    check_writable,
    file_name,
    native_name,
    one_writer,
    read_json,
    sha256_file,
    write_json,
)
from trt_yolov6.common.records import as_record
from trt_yolov6.detectors.spec import Described, DetectorSpec
from trt_yolov6.errors import UserError
from trt_yolov6.spec import BatchProfile, PrecisionName, TensorSpec

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Manifest(Described):
    """Description of an engine, written as JSON: the detector's fields among the others."""

    engine: str
    """File name of the engine this describes."""
    model: str
    """Name of the network, such as `yolov6n`."""
    detector: DetectorSpec
    batch: BatchProfile
    precision: PrecisionName
    backend: str
    backend_version: str
    target: str
    """Device it runs on: `cpu`, a GPU's name, or a cross-build target such as `t4`."""
    plan_sha256: str
    source: str
    """File name of the checkpoint or ONNX file it was built from."""
    source_sha256: str
    checkpoint_sha256: str = ""
    """Hash of the checkpoint that the source was exported from, or is; empty if not known."""
    calibration: dict[str, Any] | None = None
    float_layers: tuple[str, ...] = ()
    """Layers of an INT8 or FP8 graph that stay in float, as asked or chosen."""
    int8_layers: int | None = None
    """Convolutions that the engine computes in INT8; None where its builder does not say."""
    fp8_layers: int | None = None
    """Convolutions that the engine computes in FP8; None where its builder does not say."""
    tensors: tuple[TensorSpec, ...] = ()
    """Input and outputs of the engine, in this order; empty in manifests of early versions."""
    schema: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return the content of the manifest's file."""
        value = dataclasses.asdict(self)
        tensors = [spec.to_json() for spec in self.tensors]
        return {**value, **value.pop("detector"), "tensors": tensors}

    @property
    def quantized_layers(self) -> int | None:
        """Convolutions that the engine computes in its precision, where that is INT8 or FP8."""
        return self.fp8_layers if self.precision == "fp8" else self.int8_layers


def manifest_paths(engine_path: str | Path) -> tuple[Path, Path]:
    """Return where an engine's manifest may lie: `x.json`, or `x.onnx.json` when that is taken."""
    path = Path(engine_path)
    return path.with_suffix(".json"), path.with_name(path.name + ".json")


def manifest_of(engine_path: str | Path) -> Path | None:
    """Return the path of an engine's manifest, a link's as `read_manifest`; None without one."""
    name = file_name(engine_path)
    for path in manifest_paths(engine_path):
        if manifest_owner(path) == name:
            return path
    return manifest_of(Path(engine_path).resolve()) if Path(engine_path).is_symlink() else None


def choose_manifest_path(engine_path: str | Path) -> Path:
    """Return where an engine's manifest is to be written.

    That is `x.json` where it is free, describes this engine, or describes one that is gone; else
    `x.onnx.json`. Only a manifest is ever replaced.

    Raises:
        UserError: both names are taken by other files.
    """
    name = file_name(engine_path)
    for path in manifest_paths(engine_path):
        if not path.exists():
            return path
        owner = manifest_owner(path)
        if owner == name or (owner is not None and not path.with_name(native_name(owner)).exists()):
            return path
    raise UserError(
        f"{path} is in the way of the manifest of {engine_path}; choose another `output`."
    )


def write_manifest(engine_path: str | Path, manifest: Manifest) -> Path:
    """Write the manifest next to its engine and return the path it was given."""
    path = choose_manifest_path(engine_path)
    write_json(path, manifest.to_json())
    plain, full = manifest_paths(engine_path)
    if path == plain and manifest_owner(full) == manifest.engine:
        full.unlink()
    return path


def write_pair(engine_path: str | Path, plan: bytes, manifest: Manifest) -> Path:
    """Write a plan and its manifest, and return the manifest's path.

    If several processes write one engine at once, the last one's pair remains. A process that is
    killed leaves the old pair or the new one: the new manifest is first written next to the plan as
    pending, and put in place by the next reader.
    """
    path = Path(engine_path)
    pending = _pending(path)
    with one_writer(path.parent):
        target = choose_manifest_path(path)
        check_writable(target)
        with atomic_path(path) as temporary:
            temporary.write_bytes(plan)
            write_json(pending, manifest.to_json())
        written = write_manifest(path, manifest)
        pending.unlink(missing_ok=True)
    return written


def _pending(engine_path: str | Path) -> Path:
    path = Path(engine_path)
    return path.with_name(f".{path.name}.pending.json")


def _settle(engine_path: str | Path) -> None:
    """Finish the work of a process that was killed in `write_pair`."""
    pending = _pending(engine_path)
    if not pending.is_file():
        return
    with one_writer(pending.parent), contextlib.suppress(UserError, OSError):
        if not pending.is_file():  # another process was writing, and is done
            return
        manifest = _from_json(pending, read_json(pending))
        if sha256_file(engine_path) == manifest.plan_sha256:
            write_manifest(engine_path, manifest)
        pending.unlink(missing_ok=True)


def read_manifest(engine_path: str | Path) -> Manifest | None:
    """Return the manifest of an engine, or None where none describes it.

    A symbolic link without a manifest has that of its target.

    Raises:
        UserError: the manifest is damaged or of a newer schema.
    """
    _settle(engine_path)
    name = file_name(engine_path)
    there = [path for path in manifest_paths(engine_path) if path.is_file()]
    # One that is whole comes first: `x.json` may be a file of another kind.
    for path in sorted(there, key=lambda path: manifest_owner(path) != name):
        value = read_json(path)
        if isinstance(value, dict) and value.get("engine") == name:
            return _from_json(path, value)
    return read_manifest(Path(engine_path).resolve()) if Path(engine_path).is_symlink() else None


def check_plan(engine_path: str | Path, manifest: Manifest) -> None:
    """Raise UserError when the engine file is not the one its manifest describes."""
    if sha256_file(engine_path) != manifest.plan_sha256:
        raise UserError(
            f"{engine_path} is not the file its manifest describes (cut short, or replaced); "
            "build it again with `trt-yolov6 build`."
        )


def manifest_owner(path: Path) -> str | None:
    """Return the engine that a file is the manifest of, or None where it is not a manifest."""
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except UserError:
        return None
    owner = value.get("engine") if isinstance(value, dict) and "plan_sha256" in value else None
    return owner if isinstance(owner, str) else None


def _from_json(path: Path, value: dict[str, Any]) -> Manifest:
    if value.get("schema") != SCHEMA_VERSION:
        raise UserError(
            f"{path} has manifest schema {value.get('schema')!r}, this version reads "
            f"{SCHEMA_VERSION}; build the engine again."
        )
    remedy = "build the engine again with `trt-yolov6 build`."
    # The detector's fields are among the others; each class takes its own.
    detector = as_record(value, DetectorSpec, f"{path} is damaged", remedy)
    manifest = as_record({**value, "detector": detector}, Manifest, f"{path} is damaged", remedy)
    if manifest.backend not in BACKENDS:
        raise UserError(f"{path} is damaged: backend: {manifest.backend!r}; {remedy}")
    return manifest
