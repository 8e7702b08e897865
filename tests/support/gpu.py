"""A mark for tests that run only where there is an NVIDIA GPU."""

from __future__ import annotations

import pytest

from trt_yolov6.engines.cuda import device
from trt_yolov6.errors import MissingDependencyError


def has_gpu() -> bool:
    """Return whether CUDA finds a GPU."""
    try:
        device.current_device()
    except MissingDependencyError:
        return False
    return True


needs_gpu = pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU and cuda-python")
