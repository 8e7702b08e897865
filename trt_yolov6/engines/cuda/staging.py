"""Images on their way to the GPU, as they are: packed into page-locked memory, and copied.

What travels is the raw uint8 image, a quarter of the letterboxed float input and less.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.machine import usable_cpus
from trt_yolov6.engines.cuda.device import DeviceMemory, PinnedMemory, PinnedPool, Stream

_ALIGNMENT = 256
"""Bytes that the place of an image sent by itself, and of a group, is a multiple of."""

PACKERS = min(8, max(1, len(usable_cpus()) // 2))
"""Threads that pack a batch: what one of them copies keeps up with no fast engine."""

_LEAST = 2 * 2**20
"""Bytes that are worth a thread."""


class Staging:
    """Growing buffers for the images of one batch, in page-locked memory and on the GPU."""

    def __init__(self, locked: PinnedPool) -> None:
        """Take the pool whose arrays the GPU reads without a detour."""
        self._locked = locked
        self._host: PinnedMemory | None = None
        self._whole: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._one: NDArray[np.uint8] = np.empty(0, np.uint8)
        """The part of it that a single image was placed in last, of that image's shape."""
        self._device: DeviceMemory | None = None
        self._packers: ThreadPoolExecutor | None = None
        self._in_use: Any = None

    def place(self, images: Sequence[NDArray[np.uint8]], stream: Stream) -> tuple[list[int], int]:
        """Start the copy of images; the last batch must have been read.

        Args:
            images: uint8 (height, width, 3), C-contiguous; not to be changed until what reads them
                is done.
            stream: what comes next on it sees them.

        Returns:
            Where the red value of each image's first pixel will lie for the GPU, and the bytes from
            red to green and from green to blue.

        Raises:
            CudaError: there is no room for them.
        """
        self._in_use = images
        if not images:
            return [], 1
        if len(images) == 1:
            address, step = self.place_one(images[0], stream, stay=False)
            return [address], step
        holds = self._locked.holds
        rest = [index for index, one in enumerate(images) if not holds(one)]
        sizes = [image.nbytes for image in images]
        groups = _groups([sizes[index] for index in rest])
        places, end = [0] * len(images), 0
        for group in groups:  # one after the other, so that a group is packed by one call
            for index in rest[group]:
                places[index] = end
                end += sizes[index]
            end = _aligned(end)
        packed = end
        locked = sorted(set(range(len(images))).difference(rest))
        for index in locked:
            places[index] = end
            end = _aligned(end + sizes[index])
        self._make_room(packed, end)
        assert self._device is not None
        for index in locked:
            stream.copy_in(self._device, images[index].ctypes.data, sizes[index], places[index])
        self._pack_and_send(images, places, [rest[group] for group in groups], stream)
        base = self._device.address
        return [base + place for place in places], 1

    def free(self) -> None:
        """Free the memory."""
        if self._packers is not None:
            self._packers.shutdown()
            self._packers = None
        for memory in (self._host, self._device):
            if memory is not None:
                memory.free()
        self._host = self._device = None

    def _make_room(self, packed: int, end: int) -> None:
        """Have room for that number of bytes in page-locked memory, and on the GPU."""
        if end and (self._device is None or self._device.nbytes < end):
            if self._device is not None:
                self._device.free()
                self._device = None
            self._device = DeviceMemory(end + end // 4)
        if packed and (self._host is None or self._host.nbytes < packed):
            if self._host is not None:
                self._one = np.empty(0, np.uint8)  # first: there may be no other memory
                self._host.free()
                self._host = None
            self._host = PinnedMemory(packed + packed // 4)
            self._whole = self._host.array((self._host.nbytes,), np.dtype(np.uint8))

    def place_one(self, image: NDArray[np.uint8], stream: Stream, *, stay: bool) -> tuple[int, int]:
        """Do what `place` does for a single image, which may `stay` in page-locked memory.

        It goes as blue, green, red unless it lies in page-locked memory already.

        OpenCV exchanges channels with several threads at once, the shortest way to have several
        copy a megabyte: 0.9 MB took 28 to 37 us on a machine with an H100, NumPy's copy 39 to 85,
        and four threads of Python's 260.
        """
        self._in_use = image
        is_locked = self._locked.holds(image)
        if is_locked:
            nbytes = image.nbytes
            self._make_room(0, 0 if stay else nbytes)
            address = int(image.__array_interface__["data"][0])
        else:
            target = self._one
            if target.shape != image.shape or not stay:
                nbytes = image.nbytes
                self._make_room(nbytes, 0 if stay else nbytes)
                target = self._one = self._whole[:nbytes].reshape(image.shape)
            cv2.cvtColor(image, cv2.COLOR_RGB2BGR, target)
            assert self._host is not None
            address = self._host.address
        if not stay:
            assert self._device is not None
            stream.copy_in(self._device, address, nbytes)
            address = self._device.address
        return (address, 1) if is_locked else (address + 2, -1)

    def _pack_and_send(
        self,
        images: Sequence[NDArray[np.uint8]],
        places: Sequence[int],
        groups: Sequence[Sequence[int]],
        stream: Stream,
    ) -> None:
        """Copy groups of images into page-locked memory, several at a time, and send each."""

        def pack(group: Sequence[int]) -> tuple[int, int]:
            first, last = group[0], group[-1]
            start, end = places[first], places[last] + images[last].nbytes
            _join([images[index] for index in group], self._whole[start:end])
            return start, end - start

        if len(groups) > 1 and self._packers is None:
            self._packers = ThreadPoolExecutor(PACKERS, thread_name_prefix="to-gpu")
        work = map if len(groups) < 2 or self._packers is None else self._packers.map
        for start, nbytes in work(pack, groups):
            assert self._host is not None
            assert self._device is not None
            stream.copy_in(self._device, self._host.address + start, nbytes, start)


def _groups(sizes: Sequence[int]) -> list[slice]:
    """Return the neighbours that a thread packs together, of images of some bytes."""
    if not sizes:
        return []
    number = max(1, min(PACKERS, len(sizes), sum(sizes) // _LEAST))
    each = -(-len(sizes) // number)
    return [slice(first, first + each) for first in range(0, len(sizes), each)]


def _join(images: Sequence[NDArray[np.uint8]], target: NDArray[np.uint8]) -> None:
    """Copy images one after the other into as many bytes.

    By one call of OpenCV, which leaves the interpreter to other threads meanwhile; NumPy would ask
    for it back after every image.
    """
    column = target.reshape(-1, 1)
    joined = cv2.vconcat([image.reshape(-1, 1) for image in images], column)
    assert joined is column or np.shares_memory(joined, column)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
