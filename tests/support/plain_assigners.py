"""The three assigners once more, written plainly in NumPy, for the tests to compare with.

One image at a time, one object at a time, in float64 and in the words of the papers, sharing no
code with the package. An anchor's label is the index of its object, or -1; next to it is its score.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = tuple[NDArray[np.int64], Floats]


def overlap(a: Floats, b: Floats) -> float:
    """IoU of two xyxy boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return float(both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both))


def holds(box: Floats, point: Floats) -> bool:
    """Return whether the point lies strictly inside the box."""
    return bool(box[0] < point[0] < box[2] and box[1] < point[1] < box[3])


def _resolve(
    claims: list[list[int]], anchors: int, worth: Callable[[int, int], float]
) -> NDArray[np.int64]:
    """Give every anchor to the claimant to whom it is worth most, to the first of equals."""
    owner = np.full(anchors, -1)
    for thing, claimed in enumerate(claims):
        for anchor in claimed:
            if owner[anchor] < 0 or worth(thing, anchor) > worth(int(owner[anchor]), anchor):
                owner[anchor] = thing
    return owner


def plain_task_aligned(
    scores: Floats,
    predicted: Floats,
    points: Floats,
    boxes: Floats,
    classes: NDArray[np.int64],
    topk: int = 13,
    alpha: float = 1.0,
    beta: float = 6.0,
) -> Labels:
    """TOOD: the anchors best aligned inside each object."""

    def metric(thing: int, anchor: int) -> float:
        aligned = overlap(boxes[thing], predicted[anchor]) ** beta
        return float(scores[anchor, classes[thing]] ** alpha * aligned)

    def worth(thing: int, anchor: int) -> float:
        return overlap(boxes[thing], predicted[anchor])

    claims = []
    for thing, box in enumerate(boxes):
        inside = [a for a, point in enumerate(points) if holds(box, point) and metric(thing, a) > 0]
        claims.append(sorted(inside, key=lambda a: -metric(thing, a))[:topk])
    owner = _resolve(claims, len(points), worth)
    quality = np.zeros(len(points))
    for thing in range(len(boxes)):
        mine = np.flatnonzero(owner == thing).tolist()
        if mine:
            highest = max(metric(thing, a) for a in mine)
            best = max(worth(thing, a) for a in mine)
            quality[mine] = [metric(thing, a) / highest * best for a in mine]
    return owner, quality


def plain_atss(
    points: Floats,
    strides: Floats,
    predicted: Floats,
    boxes: Floats,
    topk: int = 9,
) -> Labels:
    """ATSS: the nearest anchors of every stride, thresholded by mean plus deviation."""
    half = 2.5 * strides[:, None]
    squares = np.concatenate((points - half, points + half), 1)

    def worth(thing: int, anchor: int) -> float:
        return overlap(boxes[thing], squares[anchor])

    claims = []
    for thing, box in enumerate(boxes):
        centre = (box[:2] + box[2:]) / 2
        distance = np.hypot(*(points - centre).T)
        candidates: list[int] = []
        for stride in np.unique(strides):
            level = np.flatnonzero(strides == stride)
            candidates += level[np.argsort(distance[level], kind="stable")[:topk]].tolist()
        values = [worth(thing, a) for a in candidates]
        spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
        threshold = np.mean(values) + spread
        claims.append(
            [
                anchor
                for anchor, value in zip(candidates, values, strict=True)
                if value >= threshold and holds(box, points[anchor])
            ]
        )
    owner = _resolve(claims, len(points), worth)
    quality = [overlap(boxes[o], predicted[a]) if o >= 0 else 0.0 for a, o in enumerate(owner)]
    return owner, np.array(quality)


def plain_simota(
    scores: Floats,
    predicted: Floats,
    points: Floats,
    strides: Floats,
    boxes: Floats,
    classes: NDArray[np.int64],
) -> Labels:
    """SimOTA: as many of the cheapest anchors as the best overlaps sum up to."""

    def cost(thing: int, anchor: int) -> float:
        truth = np.arange(scores.shape[1]) == classes[thing]
        p = np.where(truth, scores[anchor], 1 - scores[anchor])
        aligned = overlap(boxes[thing], predicted[anchor])
        return float(-np.log(p).sum() - 3 * np.log(aligned + 1e-8))

    claims = []
    for thing, box in enumerate(boxes):
        centre = (box[:2] + box[2:]) / 2
        near = (np.abs(points - centre) < 2.5 * strides[:, None]).all(1)
        inside = np.array([holds(box, point) for point in points])
        allowed = np.flatnonzero(near | inside)
        best = sorted((overlap(box, predicted[a]) for a in allowed), reverse=True)[:10]
        count = max(1, int(sum(best)))
        order = sorted(
            allowed.tolist(),
            key=lambda a: (not (near[a] and inside[a]), cost(thing, a)),
        )
        claims.append(order[:count])

    def worth(thing: int, anchor: int) -> float:
        centre = (boxes[thing, :2] + boxes[thing, 2:]) / 2
        central = bool((np.abs(points[anchor] - centre) < 2.5 * strides[anchor]).all())
        preferred = central and holds(boxes[thing], points[anchor])
        return -cost(thing, anchor) - (0 if preferred else 1e5)

    owner = _resolve(claims, len(points), worth)
    quality = [overlap(boxes[o], predicted[a]) if o >= 0 else 0.0 for a, o in enumerate(owner)]
    return owner, np.array(quality)
