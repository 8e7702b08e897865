"""Greedy non-maximum suppression within each class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 128
"""Boxes that are compared with the kept ones, and with each other, at a time."""

_SLACK = 4e-6
"""Relative error of a squared distance in float32: ten roundings, each at most 6e-8 of twice the
boxes' squares, and as much again."""

_MANY = 1024
"""Boxes wanted from which on it is faster to take one class after the other: there are then as many
kept ones of other classes, with which a box would be compared in vain."""

_EARLIER = np.tri(_BLOCK, k=-1, dtype=np.bool_)


def suppress(
    boxes: NDArray[np.floating], classes: NDArray[np.integer], iou: float, limit: int
) -> NDArray[np.intp]:
    """Keep the best of boxes that overlap, within each class.

    From the best down, a box is kept unless its IoU with a kept box of its class exceeds `iou`, as
    `overlap.iou` computes it, in float64. A box without area overlaps nothing, so it is kept, as
    torchvision and ONNX's NonMaxSuppression keep it.

    Boxes go through it in blocks, no further than until enough are kept. One matrix product finds
    the few pairs that are near enough to each other (see `_near`); only theirs is the IoU computed.

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
    # Of the boxes kept, and after them those of the block.
    corners = np.empty((len(kept), 4))
    areas = np.empty(len(kept))
    labels = np.empty(len(kept), np.int64)
    vectors = np.empty((6, len(kept)), np.float32)
    count = 0
    # Where boxes explode, products overflow to what counts as near, and empty ones have no IoU.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(boxes), _BLOCK):
            said = boxes[start : start + _BLOCK].astype(np.float32)
            end = count + len(said)
            corners[count:end] = said
            left, top, right, bottom = corners[count:end].T
            np.multiply(np.maximum(right - left, 0), bottom - top, out=areas[count:end])
            labels[count:end] = classes[start : start + _BLOCK]
            near = _near(said, vectors[:, :end], iou)
            near[:, count:] &= _EARLIER[: len(said), : len(said)]
            one, better = np.divmod(np.flatnonzero(near), end)
            one += count
            same = labels.take(one) == labels.take(better)
            one, better = one[same], better[same]
            exceeds = _iou(corners, areas, one, better) > iou
            one, better = one[exceeds], better[exceeds]
            is_kept = np.ones(end, np.bool_)
            is_kept[one[better < count]] = False
            open_ = is_kept.take(one) & is_kept.take(better) & (better >= count)
            # In order of the worse box: which of the better ones are kept is then certain.
            for worse, other in zip(one[open_].tolist(), better[open_].tolist(), strict=True):
                if is_kept[other]:
                    is_kept[worse] = False
            added = np.flatnonzero(is_kept[count:])
            places = slice(count, count + len(added))
            kept[places] = start + added
            added += count
            for values in (corners, areas, labels):
                values[places] = values.take(added, axis=0)
            vectors[:, places] = vectors.take(added, axis=1)
            count = places.stop
            if count >= most:
                break
    return kept[: min(count, most)]


def _near(
    boxes: NDArray[np.float32], vectors: NDArray[np.float32], iou: float
) -> NDArray[np.bool_]:
    """Return of boxes (n, 4) and m others, the last of which they are, which may be above an IoU.

    If two boxes a and b have an IoU above t, so have their projections on each axis, which then
    start and end at most (1 - t) / t of b's side apart, both distances taken together. So the
    squared distance of the corners, |a|^2 + |b|^2 - 2 a b, is at most r^2 = ((1 - t) / t)^2
    (w_b^2 + h_b^2). It exceeds that where the product of the vectors (a, |a|^2, 1) and
    (-2 b, 1, |b|^2 - r^2) is positive, the squares taken a little smaller for the rounding.

    Args:
        boxes: a.
        vectors: float32 (6, m), those of b; the last n of them are written here.
        iou: t.
    """
    square = np.einsum("ij,ij->i", boxes, boxes) * np.float32(1 - _SLACK)
    sides = boxes[:, 2:] - boxes[:, :2]
    reach = np.float32((1 + _SLACK) * ((1 - iou) / iou) ** 2)
    new = vectors[:, vectors.shape[1] - len(boxes) :]
    np.multiply(boxes.T, np.float32(-2), out=new[:4])
    new[4] = 1
    np.subtract(square, reach * np.einsum("ij,ij->i", sides, sides), out=new[5])
    firsts = np.ones((len(boxes), 6), np.float32)
    firsts[:, :4] = boxes
    firsts[:, 4] = square
    return ~(firsts @ vectors > 0)  # where it is NaN, too


def _iou(
    corners: NDArray[np.float64],
    areas: NDArray[np.float64],
    one: NDArray[np.intp],
    other: NDArray[np.intp],
) -> Any:
    """Return float64, the IoU of pairs of boxes, as `overlap.iou` does, to the last bit."""
    left, top, right, bottom = corners.take(one, axis=0).T
    other_left, other_top, other_right, other_bottom = corners.take(other, axis=0).T
    width = np.minimum(right, other_right)
    width -= np.maximum(left, other_left)
    height = np.minimum(bottom, other_bottom)
    height -= np.maximum(top, other_top)
    shared = np.maximum(width, 0, out=width)
    shared *= np.maximum(height, 0, out=height)
    united = areas.take(one)
    united += areas.take(other)
    united -= shared
    shared /= united
    return shared
