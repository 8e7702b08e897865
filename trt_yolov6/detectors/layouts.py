"""Output layouts of detectors: how to recognize and decode each.

`OutputLayout` describes them. Boxes are in pixels of the network's input; `detections.postprocess`
applies thresholds and suppression and maps them to the original image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.errors import UserError
from trt_yolov6.spec import OutputLayout, TensorSpec

Outputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Anchors:
    """Predictions for one image before suppression, one row per anchor."""

    scores: NDArray[Any]
    """(anchors, classes) in 0..1."""
    corners: Callable[[NDArray[np.intp]], NDArray[np.float64]]
    """Returns float64 (n, 4), x1, y1, x2, y2 in input pixels, of the given anchors."""


@dataclass(frozen=True)
class Found:
    """Detections of a graph with NMS inside for one image, in any order."""

    boxes: NDArray[np.float32]
    """(n, 4), x1, y1, x2, y2 in input pixels."""
    scores: NDArray[np.float32]
    """(n,) in 0..1."""
    classes: NDArray[np.int64]
    """(n,); below 0 for padding."""


ReadImage = Callable[[int], "Anchors | Found"]
"""Reads an image by its index in the batch."""


@dataclass(frozen=True)
class Layout:
    """One way to lay out detections."""

    read: Callable[[Outputs, tuple[int, int]], ReadImage]
    """Takes a batch's outputs, and the input's height and width in pixels.

    Raises UserError where the outputs are not laid out so.
    """
    classes: Callable[[Sequence[TensorSpec]], int | None] = lambda _: None
    """Returns the number of classes that the outputs' shapes give, or None."""
    nms_inside: bool = False
    shared: bool = False
    """The outputs hold the boxes of all images together."""
    fits: Callable[[Sequence[TensorSpec]], bool] | None = None
    """Returns whether outputs are laid out so by their names and shapes alone; None where
    `recognition` decides, for layouts that several families share."""


# --- every anchor -------------------------------------------------------------------------------


def _read_split(outputs: Outputs, size: tuple[int, int]) -> ReadImage:
    boxes, scores = _named(outputs, "boxes", 3), _named(outputs, "scores", 3)
    if boxes.shape[2] != 4 or boxes.shape[1] != scores.shape[1]:
        raise _unlike(outputs, "boxes (batch, anchors, 4) and scores (batch, anchors, classes)")
    return lambda index: Anchors(_float32(scores[index]), _corners(boxes[index]))


def _read_split_by_class(outputs: Outputs, size: tuple[int, int]) -> ReadImage:
    boxes = _only(outputs, "boxes (batch, anchors, 4)", lambda a: a.ndim == 3 and a.shape[2] == 4)
    scores = _only(
        outputs,
        "scores (batch, classes, anchors)",
        lambda a: a.ndim == 3 and a is not boxes and a.shape[2] == boxes.shape[1],
    )
    return lambda index: Anchors(_float32(scores[index].T), _corners(boxes[index]))


def _read_rows(outputs: Outputs, size: tuple[int, int]) -> ReadImage:
    rows = _of_rank(outputs, 3)

    def read(index: int) -> Anchors:
        row = _float32(rows[index])
        return Anchors(row[:, 5:] * row[:, 4:5], _around_centres(row[:, :4]))

    return read


def _read_corner_rows(outputs: Outputs, size: tuple[int, int]) -> ReadImage:
    rows = _of_rank(outputs, 3)
    return lambda index: Anchors(_float32(rows[index, :, 4:]), _corners(rows[index, :, :4]))


def _read_columns(outputs: Outputs, size: tuple[int, int]) -> ReadImage:
    columns = _of_rank(outputs, 3)
    return lambda index: Anchors(
        _float32(columns[index, 4:].T), _around_centres(columns[index, :4].T)
    )


def _read_grid_rows(outputs: Outputs, size: tuple[int, int]) -> ReadImage:
    """YOLOX: the centre is (cell + offset) * stride, a side exp(logarithm) * stride."""
    rows = _of_rank(outputs, 3)
    cells, strides = grid(size, rows.shape[1])

    def read(index: int) -> Anchors:
        row = _float32(rows[index])

        def corners(chosen: NDArray[np.intp]) -> NDArray[np.float64]:
            raw, stride = row[chosen, :4].astype(np.float64), strides[chosen, None]
            centre = (raw[:, :2] + cells[chosen]) * stride
            with np.errstate(over="ignore"):  # a side that overflows is dropped later on
                half = np.exp(raw[:, 2:]) * stride / 2
            return np.concatenate([centre - half, centre + half], axis=1)

        return Anchors(row[:, 5:] * row[:, 4:5], corners)

    return read


def grid(size: tuple[int, int], anchors: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the cells of an anchor-free head, stride after stride, row by row.

    Args:
        size, anchors: see `levels_of`.

    Returns:
        (anchors, 2) column and row of each cell, and (anchors,) its stride in pixels.

    Raises:
        UserError: neither has that number.
    """
    levels = levels_of(size, anchors)
    if levels is None:
        raise UserError(
            f"{anchors} anchors are not those of an input of {size[0]}x{size[1]} with strides 8, "
            "16, 32 (and 64); name another `decoder`.",
        )
    cells = [
        np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
        for _, (rows, columns) in levels
    ]
    strides = np.array([stride for stride, _ in levels], np.float64)
    counts = [len(part) for part in cells]
    return np.concatenate(cells).astype(np.float64), np.repeat(strides, counts)


def levels_of(
    size: tuple[int, int], anchors: int
) -> tuple[tuple[int, tuple[int, int]], ...] | None:
    """Return stride, and rows and columns, of each level of an anchor-free head.

    Args:
        size: height and width of the input in pixels.
        anchors: how many there have to be, with strides 8, 16, 32 or 8, 16, 32, 64.

    Returns:
        The finest level first; None if neither has that number.
    """
    for strides in STRIDES:
        levels = tuple((stride, (size[0] // stride, size[1] // stride)) for stride in strides)
        if sum(rows * columns for _, (rows, columns) in levels) == anchors:
            return levels
    return None


STRIDES = ((8, 16, 32), (8, 16, 32, 64))
"""Pixels between the anchors of each level, in the families of this table."""

YOLOV5_ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
"""Width and height in pixels, by stride 8, 16, 32; YOLOv7-tiny has the same."""

YOLOV7_ANCHORS = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)


def _read_grids(anchors: Any) -> Callable[[Outputs, tuple[int, int]], ReadImage]:
    """Return the reader of YOLOv5 or v7's grids, by their anchors.

    With s = sigmoid(output), the centre is (2 s - 0.5 + cell) * stride, a side (2 s) ** 2 * anchor.
    """

    def reader(outputs: Outputs, size: tuple[int, int]) -> ReadImage:
        levels = sorted((a for a in outputs.values() if a.ndim == 5), key=lambda a: -a.shape[2])
        if [level.shape[1] for level in levels] != [3, 3, 3]:
            raise _unlike(outputs, "three outputs (batch, 3, rows, columns, 5 + classes)")
        places: list[NDArray[np.float64]] = []
        for level, of_level in zip(levels, anchors, strict=True):
            _, _, rows, columns, _ = level.shape
            row, column = np.mgrid[:rows, :columns]
            stride = np.array([size[1] / columns, size[0] / rows])
            for width, height in of_level:
                cells = np.stack([column, row], axis=-1).reshape(-1, 2)
                constant = np.broadcast_to([*stride, width, height], (rows * columns, 4))
                places.append(np.concatenate([cells, constant], axis=1))
        # Of each anchor: column, row, stride in x and y, width and height.
        place = np.concatenate(places)

        def read(index: int) -> Anchors:
            row = np.concatenate([level[index].reshape(-1, level.shape[4]) for level in levels])
            sure = _sigmoid(_float32(row[:, 4:]))

            def corners(chosen: NDArray[np.intp]) -> NDArray[np.float64]:
                doubled, at = 2 * _sigmoid(row[chosen, :4].astype(np.float64)), place[chosen]
                centre = (doubled[:, :2] - 0.5 + at[:, :2]) * at[:, 2:4]
                half = doubled[:, 2:] ** 2 * at[:, 4:] / 2
                return np.concatenate([centre - half, centre + half], axis=1)

            return Anchors(sure[:, 1:] * sure[:, :1], corners)

        return read

    return reader


# --- NMS done -----------------------------------------------------------------------------------


def _read_end2end(score: int, label: int) -> Callable[[Outputs, tuple[int, int]], ReadImage]:
    def reader(outputs: Outputs, size: tuple[int, int]) -> ReadImage:
        rows = _of_rank(outputs, 2)

        def read(index: int) -> Found:
            mine = rows[rows[:, 0] == index]
            return _found(mine[:, 1:5], mine[:, score], mine[:, label])

        return read

    return reader


def _read_end2end_ppyoloe(outputs: Outputs, size: tuple[int, int]) -> ReadImage:
    rows = _of_rank(outputs, 2)
    counts = _of_rank(outputs, 1)
    ends = np.concatenate([[0], np.cumsum(counts)])

    def read(index: int) -> Found:
        mine = rows[ends[index] : ends[index + 1]]
        return _found(mine[:, 2:], mine[:, 1], mine[:, 0])

    return read


def _read_best(outputs: Outputs, size: tuple[int, int]) -> ReadImage:
    rows = _of_rank(outputs, 3)
    return lambda index: _found(rows[index, :, :4], rows[index, :, 4], rows[index, :, 5])


EFFICIENT_NMS_WORDS = ("num", "box", "score", "class")
"""Words in the names of TensorRT's EfficientNMS outputs, in every exporter's graphs."""


def _read_efficient_nms(outputs: Outputs, size: tuple[int, int]) -> ReadImage:
    arrays = []
    for word in EFFICIENT_NMS_WORDS:
        named = [array for name, array in outputs.items() if word in name.lower()]
        if len(named) != 1:
            raise _unlike(outputs, f"one output with {word!r} in its name")
        arrays.append(named[0])
    counts, boxes, scores, classes = arrays

    def read(index: int) -> Found:
        count = int(counts[index].reshape(-1)[0])
        return _found(boxes[index, :count], scores[index, :count], classes[index, :count])

    return read


# --- shared -------------------------------------------------------------------------------------


def _corners(boxes: NDArray[Any]) -> Callable[[NDArray[np.intp]], NDArray[np.float64]]:
    return lambda chosen: boxes[chosen].astype(np.float64)


def _around_centres(boxes: NDArray[Any]) -> Callable[[NDArray[np.intp]], NDArray[np.float64]]:
    def corners(chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        centre, half = np.split(boxes[chosen].astype(np.float64), 2, axis=1)
        half = half / 2
        return np.concatenate([centre - half, centre + half], axis=1)

    return corners


def _found(boxes: NDArray[Any], scores: NDArray[Any], classes: NDArray[Any]) -> Found:
    with np.errstate(invalid="ignore"):  # a class that is NaN goes with its score
        labels = classes.astype(np.int64)
    return Found(_float32(boxes), _float32(scores), labels)


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    return values.astype(np.float32, copy=False)


def _sigmoid(values: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        result: NDArray[Any] = 1 / (1 + np.exp(-values))
    return result


def _named(outputs: Outputs, name: str, rank: int) -> NDArray[Any]:
    array = outputs.get(name)
    if array is None or array.ndim != rank:
        raise _unlike(outputs, f"{name} of rank {rank}")
    return array


def _of_rank(outputs: Outputs, rank: int) -> NDArray[Any]:
    return _only(outputs, f"one of rank {rank}", lambda array: array.ndim == rank)


def _only(outputs: Outputs, what: str, fits: Callable[[NDArray[Any]], bool]) -> NDArray[Any]:
    fitting = [array for array in outputs.values() if fits(array)]
    if len(fitting) != 1:
        raise _unlike(outputs, what)
    return fitting[0]


def _unlike(outputs: Outputs, expected: str) -> UserError:
    return UserError(
        f"the engine's outputs ({_shapes(outputs)}) do not have {expected}, which its output "
        "layout promises; build it again with `trt-yolov6 build`, or name its `decoder`.",
    )


def _shapes(outputs: Outputs) -> str:
    return ", ".join(f"{key} {value.shape}" for key, value in outputs.items())


def _classes(rank: int, axis: int, others: int) -> Callable[[Sequence[TensorSpec]], int | None]:
    """Return a function that reads the classes off the last output of a rank."""

    def count(outputs: Sequence[TensorSpec]) -> int | None:
        lengths = [spec.shape[axis] for spec in outputs if len(spec.shape) == rank]
        length = lengths[-1] if lengths else None
        return None if length is None else length - others

    return count


def _classes_of_scores(outputs: Sequence[TensorSpec]) -> int | None:
    return next(spec.shape[2] for spec in outputs if spec.name == "scores")


def _classes_by_class(outputs: Sequence[TensorSpec]) -> int | None:
    return next((spec.shape[1] for spec in outputs if spec.shape[2] != 4), None)


LAYOUTS: dict[OutputLayout, Layout] = {
    "split": Layout(_read_split, _classes_of_scores),
    "split_by_class": Layout(_read_split_by_class, _classes_by_class),
    "rows": Layout(_read_rows, _classes(3, 2, 5)),
    "corner_rows": Layout(_read_corner_rows, _classes(3, 2, 4)),
    "grid_rows": Layout(_read_grid_rows, _classes(3, 2, 5)),
    "columns": Layout(_read_columns, _classes(3, 1, 4)),
    "grids_yolov5": Layout(_read_grids(YOLOV5_ANCHORS), _classes(5, 4, 5)),
    "grids_yolov7": Layout(_read_grids(YOLOV7_ANCHORS), _classes(5, 4, 5)),
    "end2end": Layout(_read_end2end(5, 6), nms_inside=True, shared=True),
    "end2end_yolov7": Layout(_read_end2end(6, 5), nms_inside=True, shared=True),
    "end2end_ppyoloe": Layout(_read_end2end_ppyoloe, nms_inside=True, shared=True),
    "best": Layout(_read_best, nms_inside=True),
    "efficient_nms": Layout(_read_efficient_nms, nms_inside=True),
}


def reader(layout: OutputLayout, outputs: Outputs, size: tuple[int, int], images: int) -> ReadImage:
    """Return the reader of the images of a batch.

    Args:
        layout: of the outputs.
        outputs: arrays by name.
        size: the input's height and width in pixels.
        images: how many the batch has.

    Raises:
        UserError: the outputs are not laid out so, or are for fewer images.
    """
    # Lists of detections, which have fewer axes, may have any length.
    if any(array.ndim >= 3 and len(array) < images for array in outputs.values()):
        raise UserError(
            f"the engine's outputs ({_shapes(outputs)}) are not for the {images} images of a batch:"
            " the axis is free at its input only; give `batch` 1, or export it again."
        )
    return LAYOUTS[layout].read(outputs, size)
