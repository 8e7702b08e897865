"""Detections of an image: the `Detections` value, and post-processing of raw outputs into it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.letterbox import Letterbox, to_sources
from trt_yolov6.detectors.candidates import MAX_CANDIDATES, Candidates, Suppressed
from trt_yolov6.detectors.layouts import Found, ReadImage, reader
from trt_yolov6.detectors.suppression import suppress
from trt_yolov6.errors import MissingDependencyError
from trt_yolov6.spec import NmsSettings, OutputLayout

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True)
class Detection:
    """One object in an image."""

    xyxy: tuple[float, float, float, float]
    """Left, top, right and bottom edge in pixels of the original image."""
    confidence: float
    """Score in 0..1."""
    class_id: int
    """Index into the detector's class names."""
    class_name: str
    """Name of the class, `class_<id>` where the detector has no names."""


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The objects found in one image, highest confidence first.

    Fields are named as in supervision. Iterating yields `Detection` values; indexing by a number
    gives one, indexing by a slice, a boolean mask or indices (an array or a list) gives a smaller
    `Detections`.

    Examples:
        >>> import numpy as np
        >>> found = Detections(
        ...     xyxy=np.array([[10, 20, 60, 80], [30, 30, 40, 50]], np.float32),
        ...     confidence=np.array([0.75, 0.5], np.float32),
        ...     class_id=np.array([1, 0]),
        ...     class_names=("cat", "dog"),
        ... )
        >>> [(one.class_name, one.confidence) for one in found]
        [('dog', 0.75), ('cat', 0.5)]
        >>> found[found.confidence > 0.6].xyxy.tolist()
        [[10.0, 20.0, 60.0, 80.0]]
        >>> found
        <Detections: 1 dog, 1 cat>
    """

    xyxy: NDArray[np.float32]
    """float32 (n, 4): left, top, right, bottom in pixels of the original image, inside its borders
    unless `postprocess` was asked not to clip."""
    confidence: NDArray[np.float32]
    """float32 (n,), scores in 0..1."""
    class_id: NDArray[np.int64]
    """int64 (n,), indices into `class_names`."""
    class_names: tuple[str, ...] = ()
    """Names of the detector's classes; empty where they are unknown."""
    path: Path | None = None
    """File of the image; None where it was an array."""

    def __repr__(self) -> str:
        """Return the number of objects by class, the most frequent first."""
        counts = Counter(self.class_name(number) for number in self.class_id.tolist())
        listed = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        return f"<Detections{f' in {self.path.name}' if self.path else ''}: {listed or 'none'}>"

    def __len__(self) -> int:
        return len(self.confidence)

    def __iter__(self) -> Iterator[Detection]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickle the bytes of the arrays: processes that send each other detections do little else.

        It takes a third of the time that three arrays take.
        """
        arrays: tuple[NDArray[Any], ...] = self.xyxy, self.confidence, self.class_id
        if tuple(array.dtype for array in arrays) != _DTYPES:
            return super().__reduce__()
        return _unpickled, (*map(_bytes_of, arrays), self.class_names, self.path)

    def as_tuples(self) -> Iterator[tuple[list[float], float, int]]:
        """Yield box, score and class id of each, as Python's own numbers."""
        arrays = self.xyxy, self.confidence, self.class_id
        yield from zip(*(array.tolist() for array in arrays), strict=True)

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Detection: ...
    @overload
    def __getitem__(self, index: slice | NDArray[Any] | Sequence[int]) -> Detections: ...
    def __getitem__(
        self, index: int | np.integer[Any] | slice | NDArray[Any] | Sequence[int]
    ) -> Detection | Detections:
        if isinstance(index, (int, np.integer)):
            left, top, right, bottom = self.xyxy[index].tolist()
            number = int(self.class_id[index])
            return Detection(
                (left, top, right, bottom),
                float(self.confidence[index]),
                number,
                self.class_name(number),
            )
        chosen: Any = index
        if not isinstance(index, (slice, np.ndarray)):
            # A list of booleans stays a mask; NumPy would make floats of an empty one.
            chosen = np.asarray(index) if len(index) else np.empty(0, np.intp)
        return dataclasses.replace(
            self,
            xyxy=self.xyxy[chosen],
            confidence=self.confidence[chosen],
            class_id=self.class_id[chosen],
        )

    def class_name(self, class_id: int) -> str:
        """Return the name of a class, `class_<id>` where it has none."""
        known = 0 <= class_id < len(self.class_names)
        return self.class_names[class_id] if known else f"class_{class_id}"

    def to_supervision(self) -> supervision.Detections:
        """Return these detections as `supervision.Detections`, class names under `class_name`.

        Raises:
            MissingDependencyError: supervision is not installed.
        """
        try:
            import supervision
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "to_supervision needs the package supervision; `pip install supervision`."
            ) from error
        return supervision.Detections(
            xyxy=self.xyxy,
            confidence=self.confidence,
            class_id=self.class_id,
            data={"class_name": np.array([self.class_name(int(c)) for c in self.class_id])},
        )


_DTYPES = np.dtype(np.float32), np.dtype(np.float32), np.dtype(np.int64)
"""The usual dtypes of boxes, scores and classes."""


def _bytes_of(array: NDArray[Any]) -> bytearray:
    return bytearray(array.tobytes())


def _unpickled(
    xyxy: bytearray,
    confidence: bytearray,
    class_id: bytearray,
    class_names: tuple[str, ...],
    path: Path | None,
) -> Detections:
    return Detections(
        np.frombuffer(xyxy, np.float32).reshape(-1, 4),
        np.frombuffer(confidence, np.float32),
        np.frombuffer(class_id, np.int64),
        class_names,
        path,
    )


def postprocess(
    outputs: Mapping[str, NDArray[Any]] | Candidates | Suppressed,
    layout: OutputLayout,
    nms: NmsSettings,
    letterboxes: Sequence[Letterbox],
    *,
    clip: bool = True,
    class_names: tuple[str, ...] = (),
    executor: Executor | None = None,
) -> list[Detections]:
    """Turn an engine's outputs for a batch into detections in the original images.

    Candidates are chosen as the authors' evaluation does: every pair of an anchor and a class whose
    score exceeds the confidence threshold is one, so that one anchor may stand for several classes;
    classes do not suppress each other. What becomes of boxes that reach beyond the image is up to
    `clip`: the authors' evaluator clamps them, `runtime.evaluate` does not.

    Args:
        outputs: arrays by name, laid out as `layout` says (see `OutputLayout`); or what an engine
            has made of them already, at the same confidence or a lower one: candidates, or the
            boxes that suppression at the same IoU has kept.
        layout: how to read them.
        nms: thresholds; where NMS is in the graph they only filter further.
        letterboxes: where each image lies in its row, all of one input size; rows beyond them are
            padding and ignored.
        clip: cut boxes off at the image's borders and drop those with nothing inside.
        class_names: the detector's, which the detections carry.
        executor: works on several images at a time; default: one after the other.

    Returns:
        One `Detections` a letterbox.

    Raises:
        UserError: the outputs are not laid out so.
    """
    if isinstance(outputs, Candidates):
        of_image = _from_candidates(outputs, nms, letterboxes, clip=clip)
    elif isinstance(outputs, Suppressed):
        return _from_suppressed(outputs, nms, letterboxes, clip=clip, class_names=class_names)
    elif letterboxes:
        read = reader(layout, outputs, letterboxes[0].size, len(letterboxes))
        of_image = _from_outputs(read, nms, letterboxes, clip=clip)
    else:
        return []

    def named(index: int) -> Detections:
        found = of_image(index)
        return dataclasses.replace(found, class_names=class_names) if class_names else found

    indices = range(len(letterboxes))
    return list(map(named, indices) if executor is None else executor.map(named, indices))


def _candidates(
    scores: NDArray[Any], confidence: float
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Return (column, row, score) of a matrix's entries above the threshold, from the best down."""
    flat = scores.reshape(-1)
    indices = np.flatnonzero(flat > confidence)
    order = _best(flat[indices])
    rows, columns = np.divmod(indices[order], scores.shape[1])
    return columns, rows, flat[indices[order]].astype(np.float32)


def _best(scores: NDArray[Any]) -> NDArray[np.intp]:
    """Return the order of positive scores, the best first, equal ones as they come, up to the cap.

    Positive floats are in the order of their bits. So one integer that holds both the bits and the
    index is sorted, which takes a fraction of a stable `argsort`.
    """
    worse_first = scores.astype(np.float32).view(np.uint32)
    keys = (~worse_first).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(scores), dtype=np.uint64)
    if len(keys) > MAX_CANDIDATES:
        keys = np.partition(keys, MAX_CANDIDATES)[:MAX_CANDIDATES]
    keys.sort()
    order: NDArray[np.intp] = (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)
    return order


def _finish(
    boxes: NDArray[np.floating],
    scores: NDArray[np.float32],
    classes: NDArray[np.integer],
    nms: NmsSettings,
    placed: Letterbox,
    *,
    clip: bool,
) -> Detections:
    """Suppress candidates, sorted from the best down, and map the rest to the original image."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        corners = boxes.astype(np.float32)
    finite = np.isfinite(corners).all(axis=1)
    if not finite.all():  # a network that overflowed in low precision
        corners, scores, classes = corners[finite], scores[finite], classes[finite]
    kept = suppress(corners, classes, nms.iou, nms.max_detections)
    return _in_source(corners[kept], scores[kept], classes[kept], placed, clip=clip)


def _in_source(
    corners: NDArray[np.floating],
    scores: NDArray[np.float32],
    classes: NDArray[np.integer],
    placed: Letterbox,
    *,
    clip: bool,
    class_names: tuple[str, ...] = (),
) -> Detections:
    boxes = placed.to_source(corners, clip=clip)
    if clip:
        has_sides = boxes[:, 2:] > boxes[:, :2]
        if not has_sides.all():
            visible = has_sides.all(axis=1)
            boxes, scores, classes = boxes[visible], scores[visible], classes[visible]
    numbers = classes.astype(np.int64, copy=False)
    return Detections(boxes, scores.astype(np.float32, copy=False), numbers, class_names)


_OfImage = Callable[[int], Detections]
"""Makes the detections of an image by its index in the batch."""


def _from_outputs(
    read: ReadImage, nms: NmsSettings, letterboxes: Sequence[Letterbox], *, clip: bool
) -> _OfImage:
    def of_image(index: int) -> Detections:
        predictions, placed = read(index), letterboxes[index]
        if isinstance(predictions, Found):
            return _chosen(predictions, nms, placed, clip=clip)
        classes, anchors, scores = _candidates(predictions.scores, nms.confidence)
        return _finish(predictions.corners(anchors), scores, classes, nms, placed, clip=clip)

    return of_image


def _chosen(found: Found, nms: NmsSettings, placed: Letterbox, *, clip: bool) -> Detections:
    """Filter what a graph with NMS inside has found, and map it to the original image."""
    sure = (found.scores > nms.confidence) & (found.classes >= 0)
    sure &= np.isfinite(found.boxes).all(axis=1) & np.isfinite(found.scores)
    order = np.flatnonzero(sure)
    order = order[np.argsort(-found.scores[order], kind="stable")[: nms.max_detections]]
    chosen = found.boxes[order], found.scores[order], found.classes[order]
    return _in_source(*chosen, placed, clip=clip)


def _from_candidates(
    candidates: Candidates, nms: NmsSettings, letterboxes: Sequence[Letterbox], *, clip: bool
) -> _OfImage:
    ends = np.searchsorted(candidates.images, np.arange(len(letterboxes) + 1))

    def of_image(index: int) -> Detections:
        mine = slice(ends[index], ends[index + 1])
        scores = candidates.scores[mine]
        order = _best(scores)
        order = order[scores[order] > nms.confidence]
        boxes, classes = candidates.boxes[mine][order], candidates.classes[mine][order]
        return _finish(boxes, scores[order], classes, nms, letterboxes[index], clip=clip)

    return of_image


def _from_suppressed(
    suppressed: Suppressed,
    nms: NmsSettings,
    letterboxes: Sequence[Letterbox],
    *,
    clip: bool,
    class_names: tuple[str, ...],
) -> list[Detections]:
    """Map the boxes of all images at once: one by one, NumPy's calls would take longest.

    A single image is mapped by itself, which takes half as long.
    """
    done = suppressed.nms
    assert nms.iou == done.iou
    assert nms.confidence >= done.confidence
    assert nms.max_detections <= done.max_detections
    assert suppressed.clip in (None, clip)
    limit, number = nms.max_detections, len(letterboxes)
    boxes, scores, classes = suppressed.boxes, suppressed.scores, suppressed.classes
    counts = [min(count, limit) for count in suppressed.counts[:number]]
    if nms.confidence > done.confidence:
        # A better box is suppressed by none that is worse: the others stay as they are.
        counts = [
            int(np.count_nonzero(row[:count] > nms.confidence))
            for row, count in zip(scores, counts, strict=False)
        ]
    all_visible = [True] * number
    is_visible: Any = None
    if suppressed.clip is None:
        if number == 1:
            (count,) = counts
            kept = boxes[0, :count], scores[0, :count], classes[0, :count]
            return [_in_source(*kept, letterboxes[0], clip=clip, class_names=class_names)]
        with np.errstate(all="ignore"):  # rows that hold no box hold anything
            boxes = to_sources(boxes[:number], letterboxes, clip=clip)
            if clip:
                is_visible = boxes[..., 2] > boxes[..., 0]
                is_visible &= boxes[..., 3] > boxes[..., 1]
                # Rows after an image's boxes do not count.
                is_visible |= np.arange(boxes.shape[1]) >= np.array(counts)[:, None]
                all_visible = list(is_visible.all(axis=1))
    found = []
    for index, count in enumerate(counts):
        chosen: Any = slice(count)
        if not all_visible[index]:
            chosen = np.flatnonzero(is_visible[index, :count])
        found.append(
            Detections(
                boxes[index, chosen], scores[index, chosen], classes[index, chosen], class_names
            )
        )
    return found
