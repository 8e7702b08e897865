"""TensorRT 10 and 11: the fastest engines, built on the GPU that runs them.

Its Python package is on the public index; the library that the package needs comes from NVIDIA's
own, which pip finds by itself where it may.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trt_yolov6.engines import cuda_device
from trt_yolov6.engines.base import Availability, BuildSettings, Engine, LoadOptions
from trt_yolov6.engines.manifest import Manifest
from trt_yolov6.engines.tensorrt_calibration import check_cache
from trt_yolov6.engines.tensorrt_common import Flavour, check_fp8
from trt_yolov6.errors import MissingDependencyError, UserError

NAME = "tensorrt"

_INSTALL = "pip install '.[tensorrt]'"
_OLDEST = 10


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

    That is a target, from TensorRT 11 on a calibration cache, or FP8 on a GPU that has none.
    """
    flavour = _flavour()
    if settings.calibration_cache is not None:
        check_cache(flavour, settings.calibration_cache)
    if settings.target is not None:
        raise UserError(
            f"--target {settings.target} needs --backend tensorrt-rtx: TensorRT times its layers "
            "on the GPU in the machine and builds for that one only."
        )
    try:
        device = cuda_device.current_device()
    except MissingDependencyError as error:
        raise MissingDependencyError(
            f"TensorRT builds on the GPU it builds for, and {error}; build on the machine that "
            "has the GPU, or use --backend tensorrt-rtx with --target."
        ) from error
    if settings.fp8:
        check_fp8(device)


def build(model: bytes, settings: BuildSettings) -> bytes:
    """Build a plan for the GPU in this machine; the layers are timed on it.

    Raises:
        UserError: see `check` and `tensorrt_build.build_plan`.
    """
    check(settings)
    from trt_yolov6.engines.tensorrt_build import build_plan

    return build_plan(_flavour(), model, settings)


def load(path: Path, manifest: Manifest | None, options: LoadOptions) -> Engine:
    """Load a plan; of the options, threads and provider do not concern it.

    Raises:
        UserError: see `TensorRTEngine`.
    """
    flavour = _flavour()
    from trt_yolov6.engines.tensorrt_engine import ContextSettings, TensorRTEngine

    contexts = ContextSettings(record_graph=options.cuda_graph, launches_graphs=options.cuda_graph)
    return TensorRTEngine(flavour, path, manifest, contexts, options)


def _flavour() -> Flavour:
    try:
        import tensorrt
    except Exception as error:  # a missing library raises more than ImportError
        raise MissingDependencyError(
            f"TensorRT does not import ({error}); install it with `{_INSTALL}` "
            "in the folder of trt-yolov6."
        ) from error
    api: Any = tensorrt
    if int(api.__version__.split(".")[0]) < _OLDEST:
        raise MissingDependencyError(
            f"TensorRT {api.__version__} is too old; install version {_OLDEST} or later with "
            f"`{_INSTALL}` in the folder of trt-yolov6."
        )
    return Flavour(NAME, "TensorRT", api)
