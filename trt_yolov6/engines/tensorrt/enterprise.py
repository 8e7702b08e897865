"""TensorRT 8.5 to 11: the fastest engines, built on the GPU that runs them.

From version 10 on, the public index has the Python package, which fetches its library from NVIDIA's
index. Of TensorRT 8, it has 8.5.1 to 8.6.0 as a whole, for Python 3.10 and older; cuBLAS and cuDNN
are separate packages.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trt_yolov6.common.machine import nvidia_folders
from trt_yolov6.engines.base import Availability, BuildSettings, Engine, LoadOptions
from trt_yolov6.engines.cuda import device as cuda_device
from trt_yolov6.engines.manifest import Manifest
from trt_yolov6.engines.tensorrt.flavour import Flavour, check_fp8
from trt_yolov6.engines.tensorrt.implicit_int8 import check_calibration
from trt_yolov6.errors import MissingDependencyError, UserError, install_command

if TYPE_CHECKING:
    from trt_yolov6.engines.tensorrt import api as trt

NAME = "tensorrt"

_OLDEST = (8, 5)

_LIBRARIES = {
    "cublas": ("libcublasLt.so.11", "libcublas.so.11", "libcublasLt.so.12", "libcublas.so.12"),
    "cudnn": ("libcudnn.so.8",),
}
"""Libraries that TensorRT 8 links and does not find by itself, by package, in loading order."""


def availability() -> Availability:
    """Say whether TensorRT is here, which version, and on which GPU it would build and run."""
    version = None
    try:
        flavour = _flavour()
        version = flavour.version
        device = cuda_device.current_device()
    except Exception as error:  # a broken installation raises more than ImportError
        return Availability(NAME, False, False, version, str(error).rstrip("."))
    return Availability(NAME, True, True, version, str(device))


def check(settings: BuildSettings) -> None:
    """Raise UserError where TensorRT or a GPU is missing, or for a setting it cannot honour.

    That is a target, from TensorRT 11 on a calibration cache, before 8.6 an optimization level, and
    FP8 in TensorRT 8 or on a GPU that has none.
    """
    flavour = _flavour()
    if settings.calibration is not None:
        check_calibration(flavour, settings.calibration)
    if settings.target is not None:
        raise UserError(
            f"`target` {settings.target} needs `backend` tensorrt-rtx: TensorRT times its layers "
            "on the GPU in the machine and builds for that one only.",
        )
    if settings.optimization_level is not None and flavour.release < (8, 6):
        raise UserError(f"{flavour} has no `optimization_level` (8.6 is the first); leave it out.")
    if settings.fp8 and flavour.release < (9, 0):
        raise UserError(
            f"{flavour} has no FP8 (10 is the first that builds it); build with int8 or fp16."
        )
    try:
        device = cuda_device.current_device()
    except MissingDependencyError as error:
        raise MissingDependencyError(
            f"TensorRT builds on the GPU it builds for, and {error}; build on the machine that "
            "has the GPU, or use `backend` tensorrt-rtx with `target`.",
        ) from error
    if settings.fp8:
        check_fp8(device)


def build(model: bytes, settings: BuildSettings) -> bytes:
    """Build a plan for the GPU in this machine; the layers are timed on it.

    Raises:
        UserError: see `check` and `builder.build_plan`.
    """
    check(settings)
    from trt_yolov6.engines.tensorrt.builder import build_plan

    return build_plan(_flavour(), model, settings)


def load(path: Path, manifest: Manifest | None, options: LoadOptions) -> Engine:
    """Load a plan; of the options, threads and provider do not concern it.

    Raises:
        UserError: see `TensorRTEngine`.
    """
    flavour = _flavour()
    from trt_yolov6.engines.tensorrt.engine import ContextSettings, TensorRTEngine

    contexts = ContextSettings(record_graph=options.cuda_graph, launches_graphs=options.cuda_graph)
    return TensorRTEngine(flavour, path, manifest, contexts, options)


def has_int8_depthwise() -> bool:
    """Return False for TensorRT 8, which computes depthwise convolutions in half precision.

    Seen in 8.6.0 on an H200; 10 and 11 are untried.

    Raises:
        MissingDependencyError: TensorRT is missing.
    """
    return _flavour().release >= (9, 0)


def _flavour() -> Flavour:
    _load_libraries()
    try:
        import tensorrt
    except Exception as error:  # a missing library raises more than ImportError
        raise MissingDependencyError(
            f"TensorRT does not import ({error}); install it with {_install()}."
        ) from error
    flavour = Flavour(NAME, "TensorRT", cast("trt.Api", tensorrt))
    if flavour.release < _OLDEST:
        raise MissingDependencyError(
            f"{flavour} is too old; install version 8.5 or later with {_install()}."
        )
    return flavour


def _install() -> str:
    """Return the command that installs a TensorRT for this Python."""
    newest = f"`{install_command(NAME)}`"
    if sys.version_info >= (3, 11):
        return f"{newest} (10 or 11; TensorRT 8 needs Python 3.10)"
    return f"{newest} (10 or 11) or `{install_command('tensorrt8')}` (8.6)"


def _load_libraries() -> None:
    """Load what TensorRT 8 links from NVIDIA's packages, where they are installed."""
    if "tensorrt" in sys.modules:
        return
    for folder in nvidia_folders():
        for package, names in _LIBRARIES.items():
            for path in (folder / package / "lib" / name for name in names):
                if path.is_file():
                    with contextlib.suppress(OSError):
                        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
