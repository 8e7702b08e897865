"""The paper's own route to INT8, for TensorRT up to 10: a graph without Q/DQ and a cache of scales.

TensorRT then chooses by itself which layers run in INT8 (implicit quantization), reading each
tensor's scale from the cache instead of calibrating. It is deprecated since 10.1 and gone in 11.
"""

# API: tensorrt<11 (`check_cache` refuses later ones)

from __future__ import annotations

from pathlib import Path
from typing import Any

from trt_yolov6.engines.tensorrt_common import Flavour
from trt_yolov6.errors import UserError
from trt_yolov6.quantization.trt_cache import read_cache

LAST_WITH_CALIBRATORS = 10


def check_cache(flavour: Flavour, path: Path) -> None:
    """Raise UserError where this TensorRT reads no cache, or the file is none."""
    if int(flavour.version.split(".")[0]) > LAST_WITH_CALIBRATORS:
        raise UserError(
            f"--calibration-cache needs TensorRT up to {LAST_WITH_CALIBRATORS}, and {flavour} has "
            "no calibrators any more; build from the graph with Q/DQ nodes (--int8) instead."
        )
    read_cache(path)


def use_cache(api: Any, config: Any, path: Path, fp16: bool) -> Any:
    """Set up a builder configuration for INT8 with the scales of a cache.

    Args:
        api: the `tensorrt` module, up to version 10.
        config: its `IBuilderConfig`, of a network that is not strongly typed.
        path: the cache.
        fp16: let layers that do not run in INT8 run in half precision.

    Returns:
        The calibrator, which has to outlive the build.
    """
    content = path.read_bytes()

    class CacheCalibrator(api.IInt8EntropyCalibrator2):  # type: ignore[misc]
        """Hands TensorRT the cache; there are no images to calibrate with."""

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: list[str]) -> list[int] | None:
            return None

        def read_calibration_cache(self) -> bytes:
            return content

        def write_calibration_cache(self, cache: object) -> None:
            pass

    config.set_flag(api.BuilderFlag.INT8)
    if fp16:
        config.set_flag(api.BuilderFlag.FP16)
    calibrator = CacheCalibrator()
    config.int8_calibrator = calibrator
    return calibrator
