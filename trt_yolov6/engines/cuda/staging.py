"""Images on their way to the GPU, as they are: packed into page-locked memory, and copied.

What travels is the raw uint8 image, a quarter of the letterboxed float input and less.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_yolov6.engines.cuda.device import DeviceMemory, PinnedMemory, PinnedPool, Stream
from trt_yolov6.engines.cuda.letterbox import ImageView, interleaved

COPY_THREADS = min(16, os.cpu_count() or 1)

_ALIGNMENT = 256
"""Bytes that an image's place is a multiple of."""


class Staging:
    """Growing room for the images of one batch, in page-locked memory and on the GPU."""

    def __init__(self, executor: Executor, locked: PinnedPool) -> None:
        """Take threads that copy, and the pool whose arrays the GPU reads without a detour."""
        self._executor = executor
        self._locked = locked
        self._host: PinnedMemory | None = None
        self._device: DeviceMemory | None = None
        self._in_use: Any = None

    def send(self, images: Sequence[NDArray[np.uint8]], stream: Stream) -> list[ImageView]:
        """Start the copy of images; the last batch must have been read.

        Args:
            images: uint8 (height, width, 3), C-contiguous; not to be changed until the stream is
                past the copy.
            stream: what comes next on it sees them.

        Returns:
            Where each will lie on the GPU.

        Raises:
            CudaError: there is no room for them.
        """
        places, end = [], 0
        for image in images:
            places.append(end)
            end += -(-image.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._device is None or self._device.nbytes < end:
            if self._device is not None:
                self._device.free()
                self._device = None
            self._device = DeviceMemory(end + end // 4)
        self._in_use = images
        direct = [self._locked.holds(image) for image in images]
        if len(images) == 1 and not direct[0]:
            return [self._send_one(images[0], stream)]
        for image, place, is_direct in zip(images, places, direct, strict=True):
            if is_direct:
                self._copy(stream, image.ctypes.data, place, image.nbytes)
        if not all(direct):
            rest = [index for index, is_direct in enumerate(direct) if not is_direct]
            self._pack(images, places, rest, end, stream)
        base = self._device.address
        return [
            interleaved(base + place, image.shape[0], image.shape[1])
            for image, place in zip(images, places, strict=True)
        ]

    def _send_one(self, image: NDArray[np.uint8], stream: Stream) -> ImageView:
        """Send one image as blue, green, red.

        OpenCV exchanges channels with several threads at once and without the interpreter's lock,
        the shortest way to have several threads copy a megabyte: on a machine with an H100 it took
        112 us to the GPU, the driver's own copy 127 to 260, `np.copyto` and a copy 210 to 280.
        """
        assert self._device is not None
        height, width = image.shape[:2]
        host = self._host_memory(image.nbytes)
        cv2.cvtColor(image, cv2.COLOR_RGB2BGR, dst=host.array(image.shape, np.dtype(np.uint8)))
        self._copy(stream, host.address, 0, image.nbytes)
        view = interleaved(self._device.address + 2, height, width)
        return dataclasses.replace(view, channel_step=-1)

    def _host_memory(self, nbytes: int) -> PinnedMemory:
        if self._host is None or self._host.nbytes < nbytes:
            if self._host is not None:
                self._host.free()
                self._host = None
            self._host = PinnedMemory(nbytes + nbytes // 4)
        return self._host

    def free(self) -> None:
        """Free the memory."""
        for memory in (self._host, self._device):
            if memory is not None:
                memory.free()
        self._host = self._device = None

    def _pack(
        self,
        images: Sequence[NDArray[np.uint8]],
        places: Sequence[int],
        indices: Sequence[int],
        end: int,
        stream: Stream,
    ) -> None:
        """Copy some of the images into page-locked memory and from there, run by run."""
        memory = self._host_memory(end)
        host = memory.array((memory.nbytes,), np.dtype(np.uint8))
        address = memory.address

        def stage(part: Sequence[int]) -> Sequence[int]:
            for index in part:
                place, image = places[index], images[index]
                np.copyto(host[place : place + image.nbytes].reshape(image.shape), image)
            return part

        size = -(-len(indices) // COPY_THREADS)
        parts = [indices[first : first + size] for first in range(0, len(indices), size)]
        for part in self._executor.map(stage, parts):
            for index in part:
                self._copy(stream, address + places[index], places[index], images[index].nbytes)

    def _copy(self, stream: Stream, source: int, place: int, nbytes: int) -> None:
        assert self._device is not None
        # `copy_in` takes the address that offset 0 would have.
        stream.copy_in(self._device, source - place, nbytes, place)
