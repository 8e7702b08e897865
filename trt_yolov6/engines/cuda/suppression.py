"""Non-maximum suppression on the GPU: from an engine's raw outputs to the few boxes that are kept.

A batch of 32 images with 80 classes has 86 MB of scores. Copying them to the host, searching and
suppressing them there takes many times what the network does. Two kernels (`suppression.cu`) do it
where the outputs lie, for all images of a batch at once, and only the boxes kept are copied.

The boxes are those of `detections.suppress`, to the last bit. For YOLOX, v5 and v7, whose boxes or
scores go through an exponential, they are so within the rounding of that.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.detectors.candidates import MAX_CANDIDATES, Suppressed
from trt_yolov6.detectors.layouts import YOLOV5_ANCHORS, YOLOV7_ANCHORS, levels_of
from trt_yolov6.engines.cuda.device import DeviceMemory, PinnedMemory, Stream
from trt_yolov6.engines.cuda.kernels import Kernels, compiled
from trt_yolov6.spec import NmsSettings, OutputLayout, TensorSpec

SOURCE = "suppression.cu"

MAX_KEPT = 512
"""Boxes an image keeps at most here; they lie in the GPU's shared memory."""

_THREADS = 1024
"""`THREADS` of the kernels."""
DIRECT_ROWS = 1
"""Images of a batch whose boxes the kernel writes into the host's memory itself: for a few, that is
shorter than a copy."""

RANKED_ROWS = 4
"""Images of a batch whose best candidates many blocks compare, not one each."""

_CHUNK = 2 * _THREADS
_RANK_BLOCKS, _COMPARE_THREADS = 16, 128
"""`RANK_BLOCKS` and `COMPARE_THREADS` of the kernels."""
_RANKED_BYTES = 16 + (16 + 8 + 8) * _CHUNK + 4 * _CHUNK * (_CHUNK // 32)
"""Bytes of a `Ranked` of the kernels."""

_FOUND_BY_BLOCK = 256 * 8
"""Scores that a block of `find` looks at."""

_HEADER_BYTES = 16

_FIND_TYPES = (
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_float),
    *(ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
)
_SUPPRESS_TYPES = (
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_double),
    *(ctypes.c_float, ctypes.c_float, ctypes.c_float, ctypes.c_uint, ctypes.c_uint),
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
    ctypes.c_void_p,
)
_RANK_TYPES = (
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_uint),
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
)
_COMPARE_TYPES = (
    *(ctypes.c_double, ctypes.c_float, ctypes.c_float, ctypes.c_float, ctypes.c_void_p),
)


@dataclass(frozen=True)
class Reading:
    """Places of scores and boxes in a detector's outputs, and the macros that read them."""

    anchors: int
    classes: int
    tensors: tuple[str, str, str]
    """Names of the outputs that the kernels are given: scores, boxes and nothing; or three levels,
    the finest first."""
    defines: tuple[str, ...]
    """Macros of `suppression.cu`."""

    @property
    def capacity(self) -> int:
        """Candidates an image has room for."""
        return min(MAX_CANDIDATES, self.anchors * self.classes)


def reading_of(
    layout: OutputLayout, outputs: Sequence[TensorSpec], image_size: tuple[int, int]
) -> Reading | None:
    """Return how the kernels read outputs; None where they cannot, or suppression is in the graph.

    Args:
        layout: of the outputs, see `OutputLayout`.
        outputs: with all lengths but the batch.
        image_size: the input's height and width in pixels.
    """
    reader = _READERS.get(layout)
    if reader is None or any(out.dtype not in (np.float32, np.float16) for out in outputs):
        return None
    if any(length is None for out in outputs for length in out.shape[1:]):
        return None
    found = reader(outputs, image_size)
    if found is None or not 0 < found.anchors * found.classes < 2**31:
        return None
    size = (f"HEIGHT={image_size[0]}.0f", f"WIDTH={image_size[1]}.0f")
    return dataclasses.replace(found, defines=(*found.defines, *size))


class Suppression:
    """The kernels with their buffers, for the outputs of one engine; one batch at a time.

    Args:
        reading: how to read the outputs.
        max_batch: images of the largest batch.

    Raises:
        CudaError: there is no NVRTC, or it cannot compile for this GPU.
    """

    def __init__(self, reading: Reading, max_batch: int) -> None:
        defines = (f"MAX_KEPT={MAX_KEPT}", *reading.defines)
        self._kernels: Kernels = compiled(SOURCE, defines)
        self._reading = reading
        self._capacity = reading.capacity
        self._counts = DeviceMemory(4 * max_batch)
        stream = Stream()
        stream.clear(self._counts, 4 * max_batch)  # the kernels leave zeros
        stream.wait()
        stream.free()
        self._keys = DeviceMemory(8 * reading.capacity * max_batch)
        nbytes = result_bytes(MAX_KEPT) * max_batch
        self._results = DeviceMemory(nbytes)
        self._ranked = DeviceMemory(_RANKED_BYTES * min(max_batch, RANKED_ROWS))
        self._copy = PinnedMemory(nbytes)
        self._views: dict[tuple[int, int], Results] = {}

    @staticmethod
    def fits(nms: NmsSettings) -> bool:
        """Return whether there is room for the boxes that thresholds let an image keep."""
        return nms.max_detections <= MAX_KEPT

    def enqueue(
        self,
        stream: Stream,
        outputs: Mapping[str, DeviceMemory],
        batch: int,
        nms: NmsSettings,
        *,
        records: int = 0,
        clip: bool | None = None,
    ) -> None:
        """Put the suppression of a batch on a stream, and the copy of what is kept to the host.

        Nothing is waited for or allocated: it can be recorded as a CUDA graph, which then belongs
        to this object, the outputs' addresses, the batch and the thresholds.

        Args:
            stream: with the run that writes the outputs already on it.
            outputs: where the engine writes them, by name.
            batch: images in them.
            nms: thresholds that `fits` has accepted.
            records: address on the GPU of what `letterbox.write_record` wrote of each image.
            clip: map boxes to those images, cut off at their borders or not (see
                `Letterbox.to_source`), and leave out those with nothing inside; None: boxes stay in
                input pixels.
        """
        reading = self._reading
        addresses = [outputs[name].address for name in reading.tensors]
        confidence = float(np.float32(nms.confidence))
        overlap = float32_thresholds(nms.iou)
        results = self._copy if batch <= DIRECT_ROWS else self._results
        ranked = self._ranked.address if batch <= RANKED_ROWS else 0
        found = self._capacity, self._counts.address, self._keys.address
        launch = functools.partial(self._kernels.launch, stream)
        block = (_THREADS, 1, 1)

        grid = (-(-reading.anchors * reading.classes // _FOUND_BY_BLOCK), batch, 1)
        values: tuple[Any, ...] = (*addresses, confidence, least_logit(nms.confidence), *found)
        launch("find", grid, (256, 1, 1), _FIND_TYPES, values)
        if ranked:
            values = (*addresses, confidence, *found, ranked)
            launch("rank", (_RANK_BLOCKS, batch, 1), block, _RANK_TYPES, values, early=True)
            columns, rows = (_CHUNK + _COMPARE_THREADS) // 32, _CHUNK // _COMPARE_THREADS // 2
            grid, small_block = (columns, rows, batch), (_COMPARE_THREADS, 1, 1)
            values = (nms.iou, *overlap, ranked)
            launch("compare", grid, small_block, _COMPARE_TYPES, values, early=True)
        limits = confidence, nms.iou, *overlap, nms.max_detections
        mapping = 0 if clip is None else records, bool(clip)
        values = (*addresses, *limits, *found, ranked, *mapping, results.address)
        launch("suppress", (batch, 1, 1), block, _SUPPRESS_TYPES, values, early=True)
        if results is self._results:
            nbytes = result_bytes(nms.max_detections) * batch
            stream.copy_out(self._copy.address, self._results, nbytes)

    def fetch(self, batch: int, nms: NmsSettings, clip: bool | None = None) -> Suppressed | None:
        """Return the boxes kept by a run whose stream has been waited for; None without room.

        There is none if an image had more candidates than `Reading.capacity`. Arguments are those
        of `enqueue`.
        """
        key = batch, nms.max_detections
        results = self._views.get(key)
        if results is None:
            shape = batch, result_bytes(nms.max_detections)
            content = self._copy.array(shape, np.dtype(np.uint8))
            results = self._views[key] = results_in(content, nms.max_detections)
        return suppressed_of(results, self._capacity, nms, clip)

    def free(self) -> None:
        """Free the buffers."""
        self._views.clear()
        for memory in (self._counts, self._keys, self._results, self._ranked, self._copy):
            memory.free()


def result_bytes(limit: int) -> int:
    """Return the bytes of an image's results, with room for `limit` boxes."""
    return -(-(_HEADER_BYTES + 28 * limit) // 16) * 16


@dataclass(frozen=True)
class Results:
    """A batch's results where the kernels write them."""

    numbers: NDArray[np.uint32]
    """(batch, 2), how many boxes are kept, and how many candidates there were."""
    boxes: NDArray[np.float32]
    """(batch, limit, 4)"""
    scores: NDArray[np.float32]
    """(batch, limit)"""
    classes: NDArray[np.int64]
    """(batch, limit)"""


def results_in(content: NDArray[np.uint8], limit: int) -> Results:
    """Return the results in memory, uint8 (batch, `result_bytes(limit)`)."""
    ends = [_HEADER_BYTES + size * limit for size in (0, 16, 24, 28)]
    parts = [content[:, start:end] for start, end in itertools.pairwise((0, *ends))]
    return Results(
        parts[0].view(np.uint32)[:, :2],
        parts[1].view(np.float32).reshape(-1, limit, 4),
        parts[3].view(np.float32),
        parts[2].view(np.int64),
    )


def suppressed_of(
    results: Results, capacity: int, nms: NmsSettings, clip: bool | None
) -> Suppressed | None:
    """Return a copy of the kernels' results; None if an image's candidates did not fit.

    Args:
        results: for the thresholds' `max_detections`.
        capacity: candidates an image had room for.
        nms, clip: as they were given to `Suppression.enqueue`.
    """
    numbers = results.numbers.tolist()
    most = 0
    for kept, found in numbers:
        if found > capacity:
            return None
        most = max(most, kept)
    return Suppressed(
        [kept for kept, _ in numbers],
        results.boxes[:, :most].copy(),
        results.scores[:, :most].copy(),
        results.classes[:, :most].copy(),
        nms,
        clip,
    )


def float32_thresholds(iou: float) -> tuple[float, float, float]:
    """Return bounds within which float32 cannot tell whether an IoU exceeds the threshold.

    The third number is, in sides of a box, how far at most the centre of one is that it overlaps by
    more.
    """
    reach = min((1 - iou) / (2 * iou) * (1 + 1e-5), 3e38)
    if iou < 1e-6:
        return -1.0, math.inf, reach  # it never can
    return iou * (1 - 1e-5), iou * (1 + 1e-5), reach


def least_logit(confidence: float) -> float:
    """Return a number that logits exceed whose sigmoid exceeds a confidence."""
    return math.log(confidence / (1 - confidence)) - 1 if confidence > 0 else -math.inf


# --- layouts ------------------------------------------------------------------------------------

_Reader = Callable[[Sequence[TensorSpec], tuple[int, int]], "Reading | None"]
"""Returns how to read outputs of a layout, given the input's height and width; None if they lack
what it has."""


def _split(outputs: Sequence[TensorSpec], size: tuple[int, int]) -> Reading | None:
    by_name = {out.name: out for out in outputs if len(out.shape) == 3}
    if not {"boxes", "scores"} <= by_name.keys():
        return None
    boxes, scores = by_name["boxes"], by_name["scores"]
    anchors, classes = scores.row_shape
    if boxes.row_shape != (anchors, 4):
        return None
    return _reading(
        (scores, boxes), anchors, classes, score=(classes, 1, 0), box=(4, 1, 0), flags=()
    )


def _split_by_class(outputs: Sequence[TensorSpec], size: tuple[int, int]) -> Reading | None:
    boxes = [out for out in outputs if len(out.shape) == 3 and out.shape[2] == 4]
    others = [out for out in outputs if len(out.shape) == 3 and out.shape[2] != 4]
    if len(boxes) != 1 or len(others) != 1:
        return None
    classes, anchors = others[0].row_shape
    return _reading(
        (others[0], boxes[0]),
        anchors,
        classes,
        score=(1, anchors, 0),
        box=(4, 1, 0),
        flags=("CLASS_BY_CLASS",),
    )


def _grid_rows(outputs: Sequence[TensorSpec], size: tuple[int, int]) -> Reading | None:
    found = _of_rows(outputs, 5, ())
    levels = None if found is None else levels_of(size, found.anchors)
    if found is None or levels is None:
        return None
    first, cells = 0, []
    for stride, (rows, columns) in levels:
        cells.append(f"{{{first},{columns},{stride}}}")
        first += rows * columns
    return _of_rows(outputs, 5, ("OBJECTNESS=4", f"CELLS={{{','.join(cells)}}}"))


def _of_rows(outputs: Sequence[TensorSpec], first: int, flags: tuple[str, ...]) -> Reading | None:
    rows = [out for out in outputs if len(out.shape) == 3]
    if len(rows) != 1:
        return None
    anchors, length = rows[0].row_shape
    return _reading(
        (rows[0], rows[0]),
        anchors,
        length - first,
        score=(length, 1, first),
        box=(length, 1, 0),
        flags=flags,
    )


def _columns(outputs: Sequence[TensorSpec], size: tuple[int, int]) -> Reading | None:
    columns = [out for out in outputs if len(out.shape) == 3]
    if len(columns) != 1:
        return None
    length, anchors = columns[0].row_shape
    return _reading(
        (columns[0], columns[0]),
        anchors,
        length - 4,
        score=(1, anchors, 4 * anchors),
        box=(1, anchors, 0),
        flags=("CLASS_BY_CLASS", "CENTRES"),
    )


def _grids(anchors: Any) -> _Reader:
    def reader(outputs: Sequence[TensorSpec], size: tuple[int, int]) -> Reading | None:
        levels = sorted(
            (out for out in outputs if len(out.shape) == 5), key=lambda out: -out.row_shape[1]
        )
        if [out.row_shape[0] for out in levels] != [3, 3, 3]:
            return None
        rows, total = [], 0
        for out, pairs in zip(levels, anchors, strict=True):
            _, height, width, _ = out.row_shape
            sides = ",".join(f"{{{one[0]},{one[1]}}}" for one in pairs)
            rows.append(f"{{{height},{width},{size[0] / height},{size[1] / width},{{{sides}}}}}")
            total += 3 * height * width
        classes = levels[0].row_shape[3] - 5
        flags = [f"LEVELS={{{','.join(rows)}}}", f"ANCHORS={total}", f"CLASSES={classes}"]
        if levels[0].dtype == np.float16:
            flags.append("HALF_SCORES")
        first, second, third = (out.name for out in levels)
        return Reading(total, classes, (first, second, third), tuple(flags))

    return reader


def _reading(
    tensors: tuple[TensorSpec, TensorSpec],
    anchors: int,
    classes: int,
    *,
    score: tuple[int, int, int],
    box: tuple[int, int, int],
    flags: tuple[str, ...],
) -> Reading:
    """Return how kernels read scores and boxes.

    `score` and `box` are strides in elements, from anchor to anchor and from class to class or side
    to side, and the first element.
    """
    scores, boxes = tensors
    values = {
        "ANCHORS": anchors,
        "CLASSES": classes,
        "SCORE_IMAGE": math.prod(scores.row_shape),
        **dict(zip(("SCORE_ANCHOR", "SCORE_CLASS", "SCORE_FIRST"), score, strict=True)),
        "BOX_IMAGE": math.prod(boxes.row_shape),
        **dict(zip(("BOX_ANCHOR", "BOX_SIDE", "BOX_FIRST"), box, strict=True)),
    }
    defines = [*flags, *(f"{name}={value}" for name, value in values.items())]
    if scores.dtype == np.float16:
        defines.append("HALF_SCORES")
    if boxes.dtype == np.float16:
        defines.append("HALF_BOXES")
    return Reading(anchors, classes, (scores.name, boxes.name, boxes.name), tuple(defines))


_READERS: dict[OutputLayout, _Reader] = {
    "split": _split,
    "split_by_class": _split_by_class,
    "rows": lambda outputs, size: _of_rows(outputs, 5, ("OBJECTNESS=4", "CENTRES")),
    "corner_rows": lambda outputs, size: _of_rows(outputs, 4, ()),
    "grid_rows": _grid_rows,
    "columns": _columns,
    "grids_yolov5": _grids(YOLOV5_ANCHORS),
    "grids_yolov7": _grids(YOLOV7_ANCHORS),
}
