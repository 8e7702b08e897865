"""Greedy non-maximum suppression within each class."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK = 192
"""Boxes that are compared with the kept ones, and with each other, at a time."""

_PRODUCT = 96
"""Boxes in a matrix product. For 300 boxes kept, it is then small enough for OpenBLAS to compute it
in one thread, which is faster."""

_FIRST = 192
"""Boxes made ready at first; then twice as many, and so on."""

_SLACK = 4e-6
"""Relative error of a squared distance in float32: ten roundings, each at most 6e-8 of twice the
boxes' squares, and as much again."""

_MANY = 1024
"""Boxes wanted from which on it is faster to take one class after the other: there are then as many
kept ones of other classes, with which a box would be compared in vain."""

_CELLS = 32
"""Rows and columns of `_Grid`."""

_LOOKED_UP = 1024
"""Boxes made ready at a time from which on a grid pays."""

_WIDE = _CELLS + 4
"""Rows and columns with two more on each side, so that all cells have others around them."""

_AROUND = np.array(
    [
        row * _WIDE + column
        for row, column in sorted(
            itertools.product(range(-2, 3), repeat=2), key=lambda way: -(way[0] ** 2 + way[1] ** 2)
        )
    ]
)
"""Ways from a cell to those around it and to itself, the farthest first."""

_NOT_EARLIER = ~np.tri(_BLOCK, k=-1, dtype=np.bool_)


def suppress(
    boxes: NDArray[np.floating], classes: NDArray[np.integer], iou: float, limit: int
) -> NDArray[np.intp]:
    """Keep the best of boxes that overlap, within each class.

    From the best down, a box is kept unless its IoU with a kept box of its class exceeds `iou`, as
    `overlap.iou` computes it, in float64. A box without area overlaps nothing, so it is kept, as
    torchvision and ONNX's NonMaxSuppression keep it.

    Boxes go through it in blocks, no further than until enough are kept. One matrix product finds
    the few pairs that are near enough (see `_Boxes`); only theirs is the IoU computed. Before that,
    boxes are compared with the nearest of those kept so far, which suppresses most of them; where
    there are many, first with the one that a grid says is nearest.

    Args:
        boxes: (n, 4), x1, y1, x2, y2, the best first; finite in float32, to which they are rounded,
            however far off the image.
        classes: (n,), 0 or more.
        iou: threshold in 0..1.
        limit: how many boxes are wanted.

    Returns:
        intp (k,), indices of the kept boxes from the best down, at most `limit`.
    """
    if limit > _MANY and len(boxes) > _MANY:
        each = [np.flatnonzero(classes == label) for label in np.unique(classes)]
        found = [mine[_suppress(boxes[mine], classes[mine], iou, limit)] for mine in each]
        return np.sort(np.concatenate(found))[:limit]
    return _suppress(boxes, classes, iou, limit)


def _suppress(
    boxes: NDArray[np.floating], classes: NDArray[np.integer], iou: float, limit: int
) -> NDArray[np.intp]:
    """Go through boxes of all classes at once, see `suppress`."""
    most = min(limit, len(boxes))
    kept = np.empty(most + _BLOCK, np.intp)
    chosen = _Boxes.empty(len(kept))  # the boxes kept, and after them those of the block
    count = in_grid = 0
    grid: _Grid | None = None
    # Where boxes explode, products overflow to what counts as near, and empty ones have no IoU.
    with np.errstate(over="ignore", invalid="ignore"):
        for window in _windows(len(boxes)):
            values = _values(boxes[window], classes[window])
            indices = np.arange(window.start, window.stop)
            if len(indices) >= _LOOKED_UP and count > 1.1 * in_grid:
                in_grid = count
                grid = _Grid.of(chosen.values[:, :count])
            if grid is not None:
                guess = chosen.values.take(grid.boxes.take(grid.cells(values)), axis=1)
                unlike = np.flatnonzero(~_overlap(values, guess, iou))
                values, indices = values.take(unlike, axis=1), indices[unlike]
            ready = _Boxes.of(values, iou)
            left = _unlike_the_nearest(ready, chosen.part(slice(count)), iou)
            for start in range(0, len(left), _BLOCK):
                mine = left[start : start + _BLOCK]
                block = ready.part(mine)
                added = _kept_of(block, chosen, count, iou)
                kept[count : count + len(added)] = indices[mine[added]]
                chosen.put(count, block.part(added))
                count += len(added)
                if count >= most:
                    return kept[:most]
    return kept[:count]


def _windows(count: int) -> Iterator[slice]:
    """Yield the boxes that are made ready at a time, more and more."""
    start, length = 0, _FIRST
    while start < count:
        yield slice(start, min(start + length, count))
        start += length
        length = min(2 * length, 16 * _FIRST)


def _unlike_the_nearest(boxes: _Boxes, chosen: _Boxes, iou: float) -> NDArray[np.intp]:
    """Return the boxes, by index, that the nearest of the kept boxes does not suppress.

    It suppresses most of those that any does.
    """
    nearest = np.empty(len(boxes), np.intp)
    if not len(chosen):
        return np.arange(len(boxes))
    for start in range(0, len(boxes), _PRODUCT):
        part = slice(start, start + _PRODUCT)
        product = boxes.firsts[:, part].T @ chosen.seconds
        product.argmin(axis=1, out=nearest[part])
    return np.flatnonzero(~_overlap(boxes.values, chosen.values.take(nearest, axis=1), iou))


def _kept_of(block: _Boxes, chosen: _Boxes, count: int, iou: float) -> NDArray[np.intp]:
    """Return the boxes of a block, by index, that neither kept ones suppress nor better ones of it.

    Args:
        block: the best first.
        chosen: the boxes kept, with room for the block after them.
        count: how many are kept.
        iou: threshold.
    """
    length = len(block)
    end = count + length
    chosen.put(count, block)
    product = np.empty((length, end), np.float32)
    for start in range(0, length, _PRODUCT):
        part = slice(start, start + _PRODUCT)
        np.matmul(block.firsts[:, part].T, chosen.seconds[:, :end], out=product[part])
    distant = product > 0  # NaN is near
    distant[:, count:] |= _NOT_EARLIER[:length, :length]
    one, better = np.divmod(np.flatnonzero(~distant), end)
    exceeds = _overlap(block.values.take(one, axis=1), chosen.values.take(better, axis=1), iou)
    one, better = one[exceeds], better[exceeds] - count
    is_kept = np.ones(length, np.bool_)
    is_kept[one[better < 0]] = False
    rivals = is_kept.take(one)
    # In order of the worse box: which of the better ones are kept is then certain.
    for worse, other in zip(one[rivals].tolist(), better[rivals].tolist(), strict=True):
        if is_kept[other]:
            is_kept[worse] = False
    return np.flatnonzero(is_kept)


@dataclass(frozen=True)
class _Boxes:
    """Boxes, and vectors of them whose product says which pairs may have an IoU above a threshold.

    Let two boxes a and b share the part c of b's width and the part d of its height. On the axis of
    x, their starts and their ends together are u of b's width apart, on the other v of its height.
    What only one of them covers is then u d + v c of b's area, or more, and what both cover is c d.
    An IoU above t means that the former is less than (1 - t) / t of the latter, and so that u + v
    is, too, as c and d are at most 1. Hence the squared distance of the corners, |a|^2 + |b|^2 -
    2 a b, is at most r^2 = ((1 - t) / t)^2 max(w_b, h_b)^2. It exceeds that where the product of
    the vectors (a, |a|^2, 1) and (-2 b, 1, |b|^2 - r^2) is positive, the squares taken a little
    smaller for the rounding.
    """

    values: NDArray[np.float64]
    """(6, n): x1, y1, x2, y2, rounded to float32; area, 0 or less where there is none; class."""
    vectors: NDArray[np.float32]
    """(12, n): the six numbers of each box as a, and as b."""

    @classmethod
    def empty(cls, count: int) -> _Boxes:
        """Return room for a number of boxes."""
        return cls(np.empty((6, count)), np.empty((12, count), np.float32))

    @classmethod
    def of(cls, values: NDArray[np.float64], iou: float) -> _Boxes:
        """Return boxes, as `_values` gives them, for a threshold of the IoU."""
        made = cls(values, np.empty((12, values.shape[1]), np.float32))
        firsts, seconds = made.firsts, made.seconds
        corners = firsts[:4]
        corners[:] = values[:4]
        square = np.einsum("ij,ij->j", corners, corners) * np.float32(1 - _SLACK)
        longer = np.maximum(corners[2] - corners[0], corners[3] - corners[1])
        reach = np.float32((1 + _SLACK) * ((1 - iou) / iou) ** 2)
        firsts[4], firsts[5] = square, 1
        np.multiply(corners, np.float32(-2), out=seconds[:4])
        seconds[4], seconds[5] = 1, square - reach * longer**2
        return made

    @property
    def firsts(self) -> NDArray[np.float32]:
        """(6, n), the vectors of the boxes as a."""
        return self.vectors[:6]

    @property
    def seconds(self) -> NDArray[np.float32]:
        """(6, n), the vectors of the boxes as b."""
        return self.vectors[6:]

    def __len__(self) -> int:
        return int(self.values.shape[1])

    def part(self, chosen: slice | NDArray[np.intp]) -> _Boxes:
        """Return some of them; by a slice, without a copy."""
        if isinstance(chosen, slice):
            return _Boxes(self.values[:, chosen], self.vectors[:, chosen])
        # Several times as fast as an index.
        return _Boxes(self.values.take(chosen, axis=1), self.vectors.take(chosen, axis=1))

    def put(self, start: int, boxes: _Boxes) -> None:
        """Write others over these from an index on."""
        part = slice(start, start + len(boxes))
        self.values[:, part] = boxes.values
        self.vectors[:, part] = boxes.vectors


@dataclass(frozen=True)
class _Grid:
    """Representatives of some boxes: one near each cell of a grid over them, if there is any."""

    start: NDArray[np.float64]
    """(2, 1), the least x and y of a centre."""
    step: NDArray[np.float64]
    """(2, 1), sides of a cell."""
    boxes: NDArray[np.intp]
    """(cells,), row by row."""

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> _Grid:
        """Return the grid of boxes (6, n), at least one, as `_values` gives them."""
        centres = values[:2] + values[2:4]
        centres *= 0.5
        start = centres.min(axis=1, keepdims=True)
        step = (centres.max(axis=1, keepdims=True) - start) / _CELLS
        step[step == 0] = 1
        grid = cls(start, step, np.zeros(_WIDE**2, np.intp))
        own = grid.cells(values[:, ::-1])
        # Of boxes for one cell the last stays: the nearest, and of these the best.
        grid.boxes[(_AROUND[:, None] + own).reshape(-1)] = np.tile(
            np.arange(values.shape[1])[::-1], len(_AROUND)
        )
        return grid

    def cells(self, values: NDArray[np.float64]) -> NDArray[np.intp]:
        """Return the cells where boxes (6, n) have their centres, or the last ones on that side."""
        cells = values[:2] + values[2:4]
        cells *= 0.5
        cells -= self.start
        cells /= self.step
        # NaN becomes some cell: the IoU decides anyway.
        column, row = cells.astype(np.intp).clip(0, _CELLS - 1)
        found: NDArray[np.intp] = row * _WIDE
        found += column
        found += 2 * _WIDE + 2
        return found


def _values(boxes: NDArray[np.floating], classes: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return boxes (n, 4) and their classes as `_Boxes.values`."""
    values = np.empty((6, len(boxes)))
    left, top, right, bottom, area, label = values
    values[:4] = boxes.T.astype(np.float32)
    np.multiply(np.maximum(right - left, 0), bottom - top, out=area)
    label[:] = classes
    return values


def _overlap(one: NDArray[np.float64], other: NDArray[np.float64], iou: float) -> NDArray[np.bool_]:
    """Return whether the IoU of n pairs of boxes exceeds a threshold, and both are of one class.

    It is that of `overlap.iou`, bit by bit.

    Args:
        one: (6, n), as in `_Boxes.values`.
        other: the same.
        iou: threshold.
    """
    low = np.maximum(one[:2], other[:2])
    sides = np.minimum(one[2:4], other[2:4])
    sides -= low
    np.maximum(sides, 0, out=sides)
    shared = sides[0] * sides[1]
    united = one[4] + other[4]
    united -= shared
    shared /= united
    exceeds: NDArray[np.bool_] = shared > iou
    exceeds &= one[5] == other[5]
    return exceeds
