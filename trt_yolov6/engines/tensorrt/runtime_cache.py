"""TensorRT-RTX's runtime cache: kernels compiled for this GPU, kept next to the plan.

TensorRT-RTX compiles an engine's kernels on the GPU that runs them, which takes seconds; with the
cache, only once. It checks whether a cache fits its version, the GPU and the driver, and replaces
one that does not. Without a readable and writable cache, an engine only starts more slowly.
"""

# API: tensorrt-rtx (TensorRT's plans hold finished kernels)

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trt_yolov6.common.files import write_bytes
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    from trt_yolov6.engines.tensorrt import api as trt

SUFFIX = ".runtime-cache"


def cache_path(plan: Path) -> Path:
    """Return where the cache of a plan lies: `yolov6n.trt.runtime-cache`."""
    return plan.with_name(plan.name + SUFFIX)


class RuntimeCache:
    """The `IRuntimeCache` of an engine, and the file it is kept in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.used = False
        """The file was there and fits."""
        self._cache: trt.IRuntimeCache | None = None
        self._stored = b""

    def attach(self, config: trt.IRuntimeConfig) -> None:
        """Give an `IRuntimeConfig` the cache, filled from the file where that fits."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            try:
                content = self.path.read_bytes()
            except OSError:
                content = b""
            if content and self._cache.deserialize(content):
                self.used = True
                self._stored = content
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the cache to its file, if it has grown since it was read or written."""
        if self._cache is None:
            return
        content = bytes(self._cache.serialize())
        if len(content) == len(self._stored):
            return
        try:
            write_bytes(self.path, content)
        except UserError:  # a folder that is read-only, say
            return
        self._stored = content
