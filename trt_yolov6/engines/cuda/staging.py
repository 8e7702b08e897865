"""Images on their way to the GPU, as they are: packed into page-locked memory, and copied.

What travels is the raw uint8 image, a quarter of the letterboxed float input and less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_yolov6.engines.cuda.device import DeviceMemory, PinnedMemory, PinnedPool, Stream
from trt_yolov6.engines.cuda.letterbox import ImageView, interleaved

_ALIGNMENT = 256
"""Bytes that an image's place is a multiple of."""
_TOGETHER = 4 * 2**20
"""Bytes that are packed before they are sent."""


class Staging:
    """Growing room for the images of one batch, in page-locked memory and on the GPU."""

    def __init__(self, locked: PinnedPool) -> None:
        """Take the pool whose arrays the GPU reads without a detour."""
        self._locked = locked
        self._host: PinnedMemory | None = None
        self._device: DeviceMemory | None = None
        self._in_use: Any = None

    def send(self, images: Sequence[NDArray[np.uint8]], stream: Stream) -> list[ImageView]:
        """Start the copy of images; the last batch must have been read.

        Args:
            images: uint8 (height, width, 3), C-contiguous; not to be changed until what reads them
                is done.
            stream: what comes next on it sees them.

        Returns:
            Where each will lie for the GPU.

        Raises:
            CudaError: there is no room for them.
        """
        self._in_use = images
        places, end = [], 0
        for image in images:
            places.append(end)
            end += -(-image.nbytes // _ALIGNMENT) * _ALIGNMENT
        is_locked = [self._locked.holds(image) for image in images]
        if self._device is None or self._device.nbytes < end:
            if self._device is not None:
                self._device.free()
                self._device = None
            self._device = DeviceMemory(end + end // 4)
        rest: list[int] = []
        for index, (image, place) in enumerate(zip(images, places, strict=True)):
            if is_locked[index]:
                self._copy(stream, image.ctypes.data, place, image.nbytes)
            else:
                rest.append(index)
        self._pack_and_send(images, places, rest, end, stream)
        base = self._device.address
        return [
            _view(image, base + place, locked)
            for image, place, locked in zip(images, places, is_locked, strict=True)
        ]

    def free(self) -> None:
        """Free the memory."""
        for memory in (self._host, self._device):
            if memory is not None:
                memory.free()
        self._host = self._device = None

    def _pack_and_send(
        self,
        images: Sequence[NDArray[np.uint8]],
        places: Sequence[int],
        indices: Sequence[int],
        end: int,
        stream: Stream,
    ) -> None:
        """Copy some of the images into page-locked memory, and send neighbours together."""
        first = until = 0
        last = -1
        for index in indices:
            if until and (index != last + 1 or until - first > _TOGETHER):
                assert self._host is not None
                self._copy(stream, self._host.address + first, first, until - first)
                until = 0
            self._pack(images[index], places[index], end)
            if not until:
                first = places[index]
            until, last = places[index] + images[index].nbytes, index
        if until:
            assert self._host is not None
            self._copy(stream, self._host.address + first, first, until - first)

    def _pack(self, image: NDArray[np.uint8], place: int, end: int) -> None:
        """Copy an image to its place in page-locked memory, as blue, green, red.

        OpenCV exchanges channels with several threads at once and without the interpreter's lock,
        the shortest way to have several threads copy a megabyte: 0.9 MB took 28 to 37 us on a
        machine with an H100, NumPy's copy 39 to 85, and four threads of Python's 260.
        """
        if self._host is None or self._host.nbytes < end:
            if self._host is not None:
                self._host.free()
                self._host = None
            self._host = PinnedMemory(end + end // 4)
        whole = self._host.array((self._host.nbytes,), np.dtype(np.uint8))
        target = whole[place : place + image.nbytes].reshape(image.shape)
        cv2.cvtColor(image, cv2.COLOR_RGB2BGR, dst=target)

    def _copy(self, stream: Stream, source: int, place: int, nbytes: int) -> None:
        assert self._device is not None
        # `copy_in` takes the address that offset 0 would have.
        stream.copy_in(self._device, source - place, nbytes, place)


def _view(image: NDArray[np.uint8], address: int, is_rgb: bool) -> ImageView:
    """Return the view of an image that lies as red, green, blue, or the other way round."""
    height, width = image.shape[:2]
    if is_rgb:
        return interleaved(address, height, width)
    return dataclasses.replace(interleaved(address + 2, height, width), channel_step=-1)
