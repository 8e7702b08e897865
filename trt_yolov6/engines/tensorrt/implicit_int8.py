"""The paper's own route to INT8, for TensorRT up to 10: a graph without Q/DQ, and its scales.

TensorRT then chooses which layers run in INT8 (implicit quantization). Each tensor's scale comes
from a calibration cache, or from TensorRT's own calibrator, which runs the network on images.
Deprecated in 10.1 and removed in 11.
"""

# API: tensorrt<11 (`check_calibration` refuses later ones)

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.files import write_bytes
from trt_yolov6.engines.base import ImplicitCalibration
from trt_yolov6.engines.cuda.device import DeviceMemory, Stream
from trt_yolov6.engines.tensorrt.flavour import Flavour, instance_of
from trt_yolov6.errors import UserError
from trt_yolov6.quantization.tensorrt_cache import read_cache

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from trt_yolov6.engines.tensorrt import api as trt
    from trt_yolov6.engines.tensorrt.api import IInt8Calibrator
else:
    IInt8Calibrator = object  # one of the module, see `instance_of`

LAST_WITH_CALIBRATORS = 10


def check_calibration(flavour: Flavour, calibration: ImplicitCalibration) -> None:
    """Raise UserError where this TensorRT has no calibrators, or the cache file is not one."""
    if flavour.release[0] > LAST_WITH_CALIBRATORS:
        raise UserError(
            f"TensorRT's own calibration ends with version {LAST_WITH_CALIBRATORS}, and this is "
            f"{flavour}; build from the graph with Q/DQ nodes (int8) instead."
        )
    if calibration.cache is not None:
        read_cache(calibration.cache)


class Feed(IInt8Calibrator):
    """Data for a calibrator: a cache to read, or batches on the GPU.

    TensorRT reads as many images as the network's batch holds, whatever `get_batch_size` says; with
    fewer in the buffer it ends in an illegal memory access (seen in 8.5.3 and 8.6.0). So a last
    batch that is short is filled up with the first images.

    Args:
        calibration: the cache, or where the images come from.
        batch: images that the network takes at a time.
    """

    def __init__(self, calibration: ImplicitCalibration, batch: int) -> None:
        self._calibration = calibration
        self._batch = batch
        self._batches = self._read()
        self._stream = Stream()
        self._memory: DeviceMemory | None = None
        self.error: Exception | None = None
        """Exception of a callback: TensorRT drops it."""

    def get_batch_size(self) -> int:
        return self._batch

    def get_batch(self, names: list[str]) -> list[int] | None:
        try:
            images = next(self._batches, None)
            if images is None:
                return None
            if self._memory is None:
                self._memory = DeviceMemory(images.nbytes)
            self._stream.copy_in(self._memory, images.ctypes.data, images.nbytes)
            self._stream.wait()
        except Exception as error:
            self.error = error
            return None
        return [self._memory.address]

    def read_calibration_cache(self) -> bytes | None:
        cache = self._calibration.cache
        return None if cache is None else cache.read_bytes()

    def write_calibration_cache(self, content: Buffer) -> None:
        if self._calibration.new_cache is not None:
            try:
                write_bytes(self._calibration.new_cache, bytes(content))
            except UserError as error:
                self.error = error

    def finish(self) -> None:
        """Free the memory; raise what went wrong in a callback."""
        if self._memory is not None:
            self._memory.free()
        self._stream.free()
        if self.error is not None:
            raise self.error

    def _read(self) -> Iterator[NDArray[Any]]:
        """Yield whole batches."""
        if self._calibration.images is None:
            return
        images = self._calibration.images()
        head: list[NDArray[Any]] = []
        while batch := list(islice(images, self._batch)):
            head = head or list(batch)
            while len(batch) < self._batch:
                batch += head[: self._batch - len(batch)]
            yield np.ascontiguousarray(np.concatenate(batch))


def calibrate(
    api: trt.Api,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    calibration: ImplicitCalibration,
    batch: int,
) -> Feed:
    """Have a builder take scales from a cache or from images.

    Args:
        api: the `tensorrt` module, up to version 10.
        network: not strongly typed.
        config: with the INT8 flag and the optimization profile set.
        calibration: where scales come from.
        batch: the optimization profile's best batch size, where the network's is free.

    Returns:
        The calibrator, which has to outlive the build and be finished.
    """
    fixed = int(network.get_input(0).shape[0])
    batch = batch if fixed < 0 else fixed

    minmax = calibration.cache is None and calibration.algorithm == "minmax"
    base = api.IInt8MinMaxCalibrator if minmax else api.IInt8EntropyCalibrator2
    feed = instance_of(Feed, base, calibration, batch)
    config.int8_calibrator = feed
    return feed
