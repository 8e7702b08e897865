"""Images of any size to boxes on the GPU: letterbox, engine and suppression as one CUDA graph.

Everything that differs from batch to batch lies in memory that the graph reads: the images' places
and sizes in a small table, the pixels wherever the table says. So one graph serves all images of a
batch size. What comes back is at most `max_detections` boxes an image.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.letterbox import Letterbox
from trt_yolov6.data.preprocessing import Interpolation, Preprocessing
from trt_yolov6.detectors.candidates import Suppressed
from trt_yolov6.engines.base import Run, StartedRun
from trt_yolov6.engines.cuda.device import (
    CudaGraph,
    DeviceMemory,
    Event,
    PinnedMemory,
    Stopwatch,
    recorded,
)
from trt_yolov6.engines.cuda.letterbox import (
    RECORD_BYTES,
    ImageView,
    LetterboxKernel,
    interleaved,
    write_alike,
    write_record,
)
from trt_yolov6.engines.cuda.staging import Staging
from trt_yolov6.engines.cuda.suppression import Suppression
from trt_yolov6.engines.tensorrt.execution import ExecutionSlot, SharedState
from trt_yolov6.spec import NmsSettings

_STAGE_RUNS = 30
"""Times that each stage is timed."""

Image = NDArray[np.uint8] | ImageView
"""uint8 (height, width, 3) RGB in the host's memory, or a view of one on the GPU."""

_Key: TypeAlias = "tuple[int, NmsSettings, bool | None]"
"""Rows, thresholds and `clip` of a recorded run."""


class ImageSlots:
    """The slots of an engine that take images as they are.

    Args:
        shared: the engine's, with contexts whose runs can be recorded.
        preprocessing: the engine's.

    Raises:
        CudaError: there is no NVRTC, it cannot compile for this GPU, or memory is short.
    """

    def __init__(self, shared: SharedState, preprocessing: Preprocessing) -> None:
        self._shared = shared
        self._preprocessing = preprocessing
        self._kernel = LetterboxKernel(shared.input, preprocessing)
        self._slots: list[ImageSlot] = []
        self._idle: deque[ImageSlot] = deque()
        try:
            self._idle.append(self._new_slot())
        except BaseException:
            self.close()
            raise

    def start(
        self,
        images: Sequence[Image],
        placed: Sequence[Letterbox],
        rows: int,
        nms: NmsSettings,
        *,
        clip: bool | None = None,
        after: Event | None = None,
        patient: bool = False,
        done: Callable[[int], None] = lambda rows: None,
    ) -> Run:
        """Start a batch.

        Args:
            images: at most `rows`; not to be changed or freed before the run has been waited for.
            placed: where each goes in the input.
            rows: of the engine's batch; those without an image are zero.
            nms: thresholds.
            clip: see `Engine.start_images`.
            after: an event on the GPU that the images are there after.
            patient: wait for the run without using a core, a few microseconds longer.
            done: called with `rows` when the run has been waited for.
        """
        slot = self._idle.popleft() if self._idle else self._new_slot()
        try:
            slot.start(images, placed, (rows, nms, clip), after, patient)
        except BaseException:
            self._idle.append(slot)
            raise

        def give_back() -> None:
            self._idle.append(slot)
            done(rows)

        return StartedRun(functools.partial(slot.finish, patient), give_back)

    def stage_seconds(
        self, images: Sequence[Image], placed: Sequence[Letterbox], nms: NmsSettings
    ) -> dict[str, float]:
        """Return the median seconds of each stage alone, in order, by name."""
        slot = self._idle.popleft() if self._idle else self._new_slot()
        try:
            return slot.stage_seconds(images, placed, nms)
        finally:
            self._idle.append(slot)

    def close(self) -> None:
        """Free what the slots hold."""
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        self._idle.clear()

    def _new_slot(self) -> ImageSlot:
        slot = ImageSlot(self._shared, self._kernel, self._preprocessing.interpolation)
        self._slots.append(slot)
        return slot


class ImageSlot:
    """One batch of images in flight."""

    def __init__(
        self, shared: SharedState, kernel: LetterboxKernel, interpolation: Interpolation
    ) -> None:
        self._slot = slot = ExecutionSlot(shared)
        self._kernel = kernel
        self._staging = Staging(shared.pinned)
        self._interpolation = interpolation
        self._largest = largest = shared.batch.max
        nbytes = RECORD_BYTES * largest
        self._records = DeviceMemory(nbytes)
        self._written = PinnedMemory(nbytes)
        self._table = self._written.array((nbytes,), np.dtype(np.uint8))
        self._sent_alike: tuple[list[int], int, Letterbox] | None = None
        self._graphs: dict[_Key, CudaGraph] = {}
        self._warm: set[_Key] = set()
        self._generation = slot.prepare(largest)
        self._records_graphs = shared.record_graph and slot.can_be_recorded
        self._suppression: Suppression | None = None
        if shared.reading is not None and slot.output_memory.keys() >= set(shared.reading.tensors):
            self._suppression = Suppression(shared.reading, largest)
        self._end = Event()
        self._in_use: Any = None
        self._key: _Key = (largest, NmsSettings(), None)
        self._is_suppressed = False
        self._graph: CudaGraph | None = None
        """The recorded run of `_key`, where boxes are suppressed."""

    def start(
        self,
        images: Sequence[Image],
        placed: Sequence[Letterbox],
        key: _Key,
        after: Event | None,
        patient: bool,
    ) -> None:
        """Put a batch on the slot's stream."""
        stream = self._slot.stream
        self._in_use = images
        if len(images) == 1 and not isinstance(images[0], ImageView):
            address, step = self._staging.place_one(images[0], stream, stay=_stays(placed))
            self._send_alike([address], step, placed[0])
        else:
            self._send_several(images, placed)
        if after is not None:
            stream.wait_for(after)
        if self._graph is not None and key == self._key:
            self._graph.launch(stream)
        else:
            self._key = key
            self._is_suppressed = self._suppression is not None and Suppression.fits(key[1])
            self._launch(key)
        if patient:
            self._end.record(stream)

    def _send_several(self, images: Sequence[Image], placed: Sequence[Letterbox]) -> None:
        """Send images, and a table of where each goes in the input, to the GPU."""
        here = [image for image in images if not isinstance(image, ImageView)]
        addresses, step = self._staging.place(here, self._slot.stream)
        if here and len(here) == len(placed) and _are_alike(images, placed):
            self._send_alike(addresses, step, placed[0])
        else:
            sent = iter(addresses)
            for row, (image, place) in enumerate(zip(images, placed, strict=True)):
                if not isinstance(image, ImageView):
                    image = interleaved(next(sent), *place.source, step)
                write_record(self._table, row, image, place, self._interpolation)
            self._send_records(len(images))

    def finish(self, patient: bool) -> dict[str, NDArray[Any]] | Suppressed:
        """Wait for the batch and return its boxes, or the outputs where they are not suppressed."""
        slot = self._slot
        try:
            if patient:
                self._end.wait()
            else:
                slot.stream.wait()
            if self._is_suppressed:
                assert self._suppression is not None
                found = self._suppression.fetch(*self._key)
                if found is not None:
                    return found
                self._prepare(self._key[0])
                slot.copy_outputs()
                slot.stream.wait()
            return slot.results()
        finally:
            self._in_use = None

    def stage_seconds(
        self, images: Sequence[Image], placed: Sequence[Letterbox], nms: NmsSettings
    ) -> dict[str, float]:
        """Return the median seconds of each stage alone; the images are placed first."""
        rows, slot = len(images), self._slot
        stream = slot.stream
        self.start(images, placed, (rows, nms, True), None, False)
        self.finish(patient=False)
        here = [image for image in images if not isinstance(image, ImageView)]

        def copy() -> None:
            self._staging.place(here, stream)

        def letterbox() -> None:
            target = slot.input_memory.address
            self._kernel.enqueue(stream, self._records.address, target, rows)

        def suppression() -> None:
            self._take_boxes(self._key)

        last = "suppression and copy back" if self._is_suppressed else "copy of all outputs"
        stages: dict[str, Callable[[], None]] = {
            **({} if not here or _stays(placed) else {"copy to the GPU": copy}),
            "letterbox": self._recorded(letterbox),
            "engine": self._recorded(slot.run),
            last: self._recorded(suppression),
        }
        stopwatch = Stopwatch(stream)
        found = {}
        for name, work in stages.items():
            times = []
            for _ in range(_STAGE_RUNS):
                times.append(stopwatch.time(work))
            found[name] = float(np.median(times))
        return found

    def _send_alike(self, addresses: list[int], step: int, place: Letterbox) -> None:
        """Send the table of images of one size to the GPU.

        That of the last batch still lies there, and often is the same.
        """
        alike = (addresses, step, place)
        if alike != self._sent_alike:
            write_alike(self._table, addresses, step, place, self._interpolation)
            self._send_records(len(addresses))
            self._sent_alike = alike

    def _send_records(self, images: int) -> None:
        """Send the table of a number of images, with zeros in its other rows."""
        self._sent_alike = None
        if images < self._largest:
            self._table[RECORD_BYTES * images :] = 0
        self._slot.stream.copy_in(self._records, self._written.address, len(self._table))

    def _recorded(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return a function that launches some work as a CUDA graph, or does it where none can."""
        if not self._records_graphs:
            return work
        with self._slot.stream.capture() as graph:
            work()
        return functools.partial(graph.launch, self._slot.stream)

    def close(self) -> None:
        """Free what the slot holds."""
        self._slot.stream.wait()
        self._forget_graphs()
        if self._suppression is not None:
            self._suppression.free()
        self._staging.free()
        self._records.free()
        self._written.free()
        self._slot.close()

    def _launch(self, key: _Key) -> None:
        """Put everything after the images' copy on the stream, as one graph from the second time.

        The first time is for what TensorRT does only once.
        """
        graph = self._graphs.get(key) if self._is_suppressed else None
        if graph is None:  # what is recorded needs the slot again only for whole outputs
            self._prepare(key[0])
            graph = self._graphs.get(key)
        if graph is None and key in self._warm and self._records_graphs:
            graph = recorded(functools.partial(self._enqueue, key), self._slot.stream)
            if graph is None:  # nothing is lost but speed
                self._records_graphs = False
            else:
                self._graphs[key] = graph
        self._graph = graph if self._is_suppressed else None
        if graph is not None:
            graph.launch(self._slot.stream)
        else:
            self._enqueue(key)
            self._warm.add(key)

    def _prepare(self, rows: int) -> None:
        """Have the slot know the batch's size; forget what it says is not valid any more."""
        generation = self._slot.prepare(rows)
        if generation != self._generation:
            self._forget_graphs()
            self._generation = generation

    def _enqueue(self, key: _Key) -> None:
        rows = key[0]
        slot = self._slot
        self._kernel.enqueue(slot.stream, self._records.address, slot.input_memory.address, rows)
        slot.run()
        self._take_boxes(key)

    def _take_boxes(self, key: _Key) -> None:
        slot = self._slot
        if self._is_suppressed:
            assert self._suppression is not None
            rows, nms, clip = key
            outputs, records = slot.output_memory, self._records.address
            self._suppression.enqueue(slot.stream, outputs, rows, nms, records=records, clip=clip)
        else:
            slot.copy_outputs()

    def _forget_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.free()
        self._graphs.clear()
        self._graph = None
        self._warm.clear()


def _are_alike(images: Sequence[Image], placed: Sequence[Letterbox]) -> bool:
    """Return whether images, none of them a view, are of one size and go to the same place."""
    same_place = placed.count(placed[0]) == len(images)
    return same_place and len({image.shape for image in images}) == 1


def _stays(placed: Sequence[Letterbox]) -> bool:
    """Return whether a batch's pixels stay in the host's memory, where the kernel reads them.

    A single image that is not resized is read once. That takes no longer than the copy, and a call
    less.
    """
    return len(placed) == 1 and placed[0].resized == placed[0].source
