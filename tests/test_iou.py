"""IoU, GIoU, CIoU and SIoU against counting cells, the papers' formulas and their own laws."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from trt_yolov6.detectors import overlap
from trt_yolov6.detectors.box_similarity import (
    Similarity,
    ciou,
    giou,
    iou,
    pairwise,
    similarity,
    siou,
)

KINDS = get_args(Similarity)
Box = tuple[float, float, float, float]

pytestmark = pytest.mark.usefixtures("one_thread")


def _box(x: float, y: float, width: float, height: float) -> Box:
    return (x, y, x + width, y + height)


_place = st.floats(-200, 800, width=32)
_side = st.floats(0.5, 600, width=32)
boxes = st.builds(_box, _place, _place, _side, _side)


def _tensors(*values: Box) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.float64) for value in values)


def _random_boxes(count: int, seed: int) -> Tensor:
    corner = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 20
    size = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed + 1)) * 15 + 0.5
    return torch.cat((corner, corner + size), dim=1).double()


def test_the_overlap_of_detections_is_that_of_pycocotools() -> None:
    both = _random_boxes(60, 3).numpy()
    one, other = both[:25], both[25:]
    found = overlap.iou(one[:, None], other[None])
    sides = (np.concatenate([part[:, :2], part[:, 2:] - part[:, :2]], 1) for part in (one, other))
    expected = coco_mask.iou(*sides, [0] * len(other))
    assert found.shape == (25, 35)
    assert (found > 0).mean() > 0.3
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_array_equal(overlap.iou(one, other[:25]), found[:, :25].diagonal())
    # Nor does the unit matter, such as fractions of an image.
    small = overlap.iou(one[:, None] / 4096, other[None] / 4096)
    np.testing.assert_allclose(small, found, atol=1e-12)


def test_detections_that_do_not_meet_or_have_no_area_do_not_overlap() -> None:
    box = np.array([10.0, 10, 20, 20])
    shifts = [[10, 0], [-10, 0], [0, 10], [0, -10], [30, 30], [-30, 5]]
    apart = box + np.array([[x, y, x, y] for x, y in shifts])
    # Points, lines, and boxes turned inside out: in themselves and with what is around them.
    empty = np.array([[12, 12, 12, 12], [12, 11, 12, 19], [11, 12, 19, 12], [18, 18, 12, 12.0]])
    half_turned = np.array([[12, 18, 18, 12], [18, 12, 12, 18.0]])
    for others in (apart, empty, half_turned):
        assert (overlap.iou(box, others) == 0).all()
        assert (overlap.iou(others, box) == 0).all()
    for nothing in (empty, half_turned):
        assert (overlap.iou(nothing, nothing) == 0).all()


def test_iou_counts_cells() -> None:
    """Boxes on whole pixels: the pixels in both over the pixels in either."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 12, (30, 2))
    sides = rng.integers(1, 9, (30, 2))
    masks = np.zeros((30, 24, 24), bool)
    for mask, (x, y), (w, h) in zip(masks, corners, sides, strict=True):
        mask[y : y + h, x : x + w] = True
    both = (masks[:, None] & masks).sum((2, 3))
    either = (masks[:, None] | masks).sum((2, 3))
    values = torch.from_numpy(np.concatenate((corners, corners + sides), 1)).float()
    assert pairwise(values, values).numpy() == pytest.approx(both / either, abs=1e-6)


def test_known_values() -> None:
    first, second, apart = _tensors((0, 0, 2, 2), (1, 1, 3, 3), (4, 0, 6, 2))
    assert float(iou(first, second)) == pytest.approx(1 / 7)
    assert float(giou(first, second)) == pytest.approx(1 / 7 - 2 / 9)
    assert float(ciou(first, second)) == pytest.approx(1 / 7 - 2 / 18)
    # Centres on a diagonal: the angle cost is 1, a side of the enclosing box is 3.
    assert float(siou(first, second)) == pytest.approx(1 / 7 - (1 - math.exp(-1 / 9)))
    assert float(giou(first, apart)) == pytest.approx(-4 / 12)
    # Centres on one row: no angle cost.
    assert float(siou(first, apart)) == pytest.approx(-(1 - math.exp(-2 * (4 / 6) ** 2)) / 2)
    wide, tall = _tensors((0, 0, 4, 2), (1, -1, 3, 3))
    aspect = (math.atan(2) - math.atan(0.5)) ** 2 * 4 / math.pi**2
    overlap = 4 / 12
    weight = aspect / (1 - overlap + aspect)
    assert float(ciou(wide, tall)) == pytest.approx(overlap - weight * aspect)
    assert float(siou(wide, tall)) == pytest.approx(overlap - (1 - math.exp(-0.5)) ** 4)


def _siou_of_the_paper(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """SIoU as Gevorgyan writes it, with sines and arc sines, one pair at a time."""
    (ax, ay), (bx, by) = (a[:2] + a[2:]) / 2, (b[:2] + b[2:]) / 2
    (aw, ah), (bw, bh) = a[2:] - a[:2], b[2:] - b[:2]
    height, sigma = abs(by - ay), math.hypot(bx - ax, by - ay)
    angle = 1 - 2 * math.sin(math.asin(height / sigma) - math.pi / 4) ** 2
    enclosing = np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])
    rho = ((np.array([bx, by]) - [ax, ay]) / enclosing) ** 2
    distance = sum(1 - math.exp(-(2 - angle) * r) for r in rho)
    shape = (1 - math.exp(-abs(aw - bw) / max(aw, bw))) ** 4
    shape += (1 - math.exp(-abs(ah - bh) / max(ah, bh))) ** 4
    w, h = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    return float(w * h / (aw * ah + bw * bh - w * h) - (distance + shape) / 2)


def test_siou_is_that_of_its_paper() -> None:
    first, second = _random_boxes(40, 2), _random_boxes(40, 5)
    expected = [
        _siou_of_the_paper(a, b) for a, b in zip(first.numpy(), second.numpy(), strict=True)
    ]
    assert siou(first, second).numpy() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: Similarity) -> None:
    first, second = _random_boxes(12, 0), _random_boxes(12, 7)
    if kind == "ciou":
        # The weight of the aspect term counts as a constant, which finite differences do not know:
        # boxes of one shape, moved, leave it at nought.
        second = first + torch.tensor([3.0, -2.0, 3.0, -2.0])
    assert torch.autograd.gradcheck(
        lambda a: similarity(a, second, kind), (first.requires_grad_(),), atol=1e-5
    )


def test_the_aspect_term_of_ciou_has_a_constant_weight() -> None:
    first, second = _random_boxes(12, 0).requires_grad_(), _random_boxes(12, 7)
    with torch.no_grad():
        size, other = first[:, 2:] - first[:, :2], second[:, 2:] - second[:, :2]
        aspect = _aspect(size, other)
        weight = aspect / (1 - iou(first, second) + aspect)

    def with_that_weight(boxes: Tensor) -> Tensor:
        rest = ciou(boxes, second) - ciou(boxes, second).detach()
        return rest + weight * _aspect(boxes[:, 2:] - boxes[:, :2], other)

    def expected(boxes: Tensor) -> Tensor:
        low, high = torch.minimum(boxes, second), torch.maximum(boxes, second)
        diagonal = (high[:, 2:] - low[:, :2]).square().sum(1)
        offset = (boxes[:, :2] + boxes[:, 2:] - second[:, :2] - second[:, 2:]) / 2
        return iou(boxes, second) - offset.square().sum(1) / diagonal

    given_by, wanted = (
        torch.autograd.grad(function(first).sum(), first)[0]
        for function in (with_that_weight, expected)
    )
    assert given_by.numpy() == pytest.approx(wanted.numpy())


def test_a_box_without_sides_counts_as_square_for_ciou() -> None:
    point, square = torch.tensor([3.0, 3, 3, 3]), torch.tensor([1.0, 1, 5, 5])
    assert float(ciou(point, square)) == 0  # one centre, no overlap, one aspect ratio
    assert float(ciou(point, torch.tensor([1.0, 2, 5, 4]))) < 0


def _aspect(size: Tensor, other: Tensor) -> Tensor:
    angles = [torch.atan(value[:, 0] / value[:, 1]) for value in (size, other)]
    return (angles[0] - angles[1]).square() * 4 / math.pi**2


@settings(max_examples=60, deadline=None)
@given(boxes, boxes)
def test_laws(first: Box, second: Box) -> None:
    a, b = _tensors(first, second)
    values = {kind: float(similarity(a, b, kind)) for kind in KINDS}
    assert 0 <= values["iou"] <= 1
    assert -1 <= values["giou"] <= values["iou"] + 1e-12
    assert -2 < values["ciou"] <= values["iou"] + 1e-12
    assert -2 < values["siou"] <= values["iou"] + 1e-12
    for kind in KINDS:
        assert float(similarity(b, a, kind)) == pytest.approx(values[kind], abs=1e-9)
        assert float(similarity(a, a, kind)) == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(boxes, boxes, st.floats(-300, 300), st.floats(-300, 300), st.floats(0.05, 20))
def test_place_and_scale_do_not_matter(
    first: Box, second: Box, right: float, down: float, scale: float
) -> None:
    a, b = _tensors(first, second)
    offset = torch.tensor([right, down, right, down], dtype=torch.float64)
    for kind in KINDS:
        expected = pytest.approx(float(similarity(a, b, kind)), abs=1e-7)
        assert float(similarity(a + offset, b + offset, kind)) == expected
        assert float(similarity(a * scale, b * scale, kind)) == expected


@settings(max_examples=60, deadline=None)
@given(
    boxes, st.floats(-300, 300), st.floats(-300, 300), st.floats(0.05, 0.95), st.sampled_from(KINDS)
)
def test_a_box_that_nears_its_target_gains(
    target: Box, right: float, down: float, part: float, kind: Similarity
) -> None:
    (goal,) = _tensors(target)
    offset = torch.tensor([right, down, right, down], dtype=torch.float64)
    far, near = (float(similarity(goal + offset * k, goal, kind)) for k in (1.0, part))
    assert near >= far - 1e-9
    if kind != "iou" and math.hypot(right, down) > 1:
        assert near > far


@pytest.mark.parametrize("kind", ["giou", "ciou", "siou"])
def test_descent_finds_the_target_from_afar(kind: Similarity) -> None:
    target = torch.tensor([30.0, 40.0, 50.0, 90.0])
    box = torch.tensor([100.0, 5.0, 180.0, 35.0], requires_grad=True)
    optimizer = torch.optim.Adam([box], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        (1 - similarity(box, target, kind)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    assert float(iou(box.detach(), target)) > 0.95


DEGENERATE = torch.tensor(
    [
        [5.0, 5.0, 5.0, 5.0],  # a point
        [5.0, 5.0, 5.0, 9.0],  # a line
        [3.0, 5.0, 9.0, 5.0],
        [9.0, 9.0, 2.0, 3.0],  # inverted
        [0.0, 0.0, 0.0, 0.0],
        [2.0, 2.0, 8.0, 8.0],
        [2.0, 2.0, 2.0 + 1e-7, 8.0],
        [-1e8, -1e8, 1e8, 1e8],
    ]
)


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_boxes_give_numbers(kind: Similarity) -> None:
    first = DEGENERATE.clone().requires_grad_()
    second = DEGENERATE.clone().requires_grad_()
    values = similarity(first.unsqueeze(-2), second.unsqueeze(-3), kind)
    assert values.dtype == torch.float32
    assert bool(values.isfinite().all())
    values.sum().backward()  # type: ignore[no-untyped-call]
    for leaf in (first, second):
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
    assert float(iou(DEGENERATE[0], DEGENERATE[0])) == 0
    assert bool((values <= 1).all())


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_float32(kind: Similarity) -> None:
    """Areas of some hundred thousand square pixels are beyond float16."""
    first = torch.tensor([[0.0, 0.0, 640.0, 640.0]])
    second = torch.tensor([[64.0, 32.0, 600.0, 624.0]])
    expected = similarity(first, second, kind)
    with torch.autocast("cpu", torch.bfloat16):
        value = similarity(first.half(), second.bfloat16(), kind)
    assert value.dtype == torch.float32
    assert float(value) == float(expected)


def test_pairwise_is_every_pair() -> None:
    first, second = _random_boxes(6, 0).view(2, 3, 4), _random_boxes(8, 3).view(2, 4, 4)
    values = siou(first.unsqueeze(-2), second.unsqueeze(-3))
    assert values.shape == (2, 3, 4)
    for image in range(2):
        for i in range(3):
            for j in range(4):
                expected = siou(first[image, i], second[image, j])
                assert float(values[image, i, j]) == pytest.approx(float(expected))
