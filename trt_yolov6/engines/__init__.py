"""Inference engines: one package per backend with one interface (`base`), and the manifest."""

from __future__ import annotations

import glob
import importlib
import os
from pathlib import Path
from typing import Protocol

from trt_yolov6.backends import BACKENDS, PLAN_SUFFIXES
from trt_yolov6.checkpoints import is_named_as_checkpoint
from trt_yolov6.common.ranges import of_class
from trt_yolov6.engines.base import Availability, BuildSettings, Engine, LoadOptions
from trt_yolov6.engines.manifest import Manifest, check_plan, read_manifest
from trt_yolov6.errors import MissingDependencyError, UserError

__all__ = [
    "BACKENDS",
    "Backend",
    "Engine",
    "LoadOptions",
    "backend",
    "best_backend",
    "find_engine",
    "load_engine",
    "runs_here",
]


class Backend(Protocol):
    """Interface of a backend module."""

    NAME: str
    """Name of the backend, as in `--backend`."""

    def availability(self) -> Availability:
        """Say what works on this machine; never raises."""

    def check(self, settings: BuildSettings) -> None:
        """Raise UserError for settings it cannot honour here; quick, so ask before any work."""

    def build(self, model: bytes, settings: BuildSettings) -> bytes:
        """Turn an ONNX model into a plan."""

    def load(self, path: Path, manifest: Manifest | None, options: LoadOptions) -> Engine:
        """Load a plan."""


def backend(name: str) -> Backend:
    """Return a backend's module by its name.

    Raises:
        UserError: there is no backend of that name.
    """
    if name not in BACKENDS:
        raise UserError(
            f"`backend` {name} is not known; choose one of auto, {', '.join(BACKENDS)}."
        )
    return importlib.import_module(BACKENDS[name].module)


def best_backend() -> str:
    """Return the first backend that both builds and runs on this machine."""
    for name in BACKENDS:
        state = backend(name).availability()
        if state.can_build and state.can_run:
            return name
    raise MissingDependencyError(
        "no backend works on this machine; `pip install onnxruntime` gives the one for CPUs."
    )


def find_engine(path: str | Path) -> Path:
    """Return an engine file: the one named, or the newest build that a short name stands for.

    `engines/yolov6s.trt` stands for what was built of `yolov6s.pt`, or of a network of that name,
    in whichever precision and size: `engines/yolov6s-fp16.trt`, `engines/yolov6s-int8-320.trt`.

    Raises:
        UserError: there is neither the file nor such a build.
    """
    path = Path(path)
    if not os.path.exists(path):
        builds = [
            other
            for other in path.parent.glob(f"[!.]*{path.suffix}")
            if path.suffix and other.is_file() and _is_build_of(other, path.stem)
        ]
        if builds:
            return max(builds, key=lambda build: build.stat().st_mtime_ns)
    _check_exists(path)
    return path


def _is_build_of(path: Path, stem: str) -> bool:
    try:
        manifest = read_manifest(path)
    except UserError:  # that of another engine, which is not asked for
        return False
    return manifest is not None and stem in (manifest.model, Path(manifest.source).stem)


def runs_here(path: Path) -> bool:
    """Return True where an engine file's backend runs on this machine; the file is not loaded."""
    manifest = read_manifest(path)
    if manifest is None:
        return path.suffix.lower() == ".onnx"
    return backend(manifest.backend).availability().can_run


def load_engine(
    path: str | Path, backend_name: str = "auto", options: LoadOptions | None = None
) -> Engine:
    """Load an engine file for inference.

    Args:
        path: a plan that `build` wrote, with its manifest next to it, or any detector's ONNX file.
        backend_name: a name of `BACKENDS`; `auto` takes the one in the manifest, ONNX Runtime for
            an `.onnx` file, else the first TensorRT that runs here.
        options: see `LoadOptions`.

    Raises:
        UserError: the file is missing, cut short, replaced, of another version, or needs a backend
            that does not run here.
    """
    path = Path(path)
    _check_exists(path)
    if is_named_as_checkpoint(path):
        raise UserError(
            f"{path} is a checkpoint, not an engine; build one with `trt-yolov6 build --weights "
            f"{path}`."
        )
    manifest = read_manifest(path)
    if manifest:
        check_plan(path, manifest)
    if backend_name == "auto":
        backend_name = manifest.backend if manifest else _backend_for(path)
    elif manifest and manifest.backend != backend_name and path.suffix != ".onnx":
        raise UserError(
            f"{path} was built for {manifest.backend}, not {backend_name}; leave `backend` out.",
        )
    options = of_class(options, LoadOptions, "options")
    engine = backend(backend_name).load(path, manifest, options)
    engine.load_options = options
    return engine


def _check_exists(path: Path) -> None:
    if os.path.isfile(path):
        return
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not an engine; name the file inside it.")
    others = [
        other
        for suffix in (".onnx", ".trt")
        if suffix != path.suffix and os.path.isfile(other := path.with_suffix(suffix))
    ]
    if others:
        raise UserError(
            f"{path} does not exist, but {others[0]} does; load that, or build "
            f"{path.name} with `trt-yolov6 build` on a machine that has TensorRT."
        )
    alike = path.parent.glob(f"{glob.escape(path.stem)}-*")
    if names := sorted(other.name for other in alike if other.suffix in (".onnx", *PLAN_SUFFIXES)):
        raise UserError(
            f"{path} does not exist, but its folder has {', '.join(names)}; name the file in full."
        )
    raise UserError(f"{path} does not exist; build it with `trt-yolov6 build`, or check the path.")


def _backend_for(path: Path) -> str:
    if path.suffix.lower() == ".onnx":
        return "onnxruntime"
    if path.suffix.lower() not in PLAN_SUFFIXES:
        raise UserError(
            f"{path} is not an engine; give an .onnx file, a plan ({', '.join(PLAN_SUFFIXES)}), or "
            "what `trt-yolov6 build` wrote, with its manifest."
        )
    for name, row in BACKENDS.items():
        if row.tensorrt and backend(name).availability().can_run:
            return name
    raise MissingDependencyError(
        f"{path} needs TensorRT and a GPU, and neither TensorRT nor TensorRT-RTX runs here; "
        "`trt-yolov6 doctor` says what is missing, and an .onnx engine runs on any machine."
    )
