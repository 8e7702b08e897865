"""Task alignment learning, ATSS and SimOTA against plain NumPy versions, and at their edges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.plain_assigners import Labels, plain_atss, plain_simota, plain_task_aligned
from support.training_data import pad_targets
from torch import Tensor

import trt_yolov6.training.assigners as assigners
from trt_yolov6.detectors.box_similarity import iou
from trt_yolov6.models.decode import anchor_points
from trt_yolov6.training.assigners import Assignment, atss, simota, task_aligned
from trt_yolov6.training.targets import Targets

NAMES = ("tal", "atss", "simota")
CLASSES = 3
SIZES = [(12, 12), (6, 6), (3, 3)]
PIXELS = 96

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Scene:
    """Predictions of a 96 x 96 image's 189 anchors, batched, and what the images hold."""

    scores: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor
    targets: Targets

    @property
    def per_level(self) -> list[int]:
        return [height * width for height, width in SIZES]

    def assign(self, name: str) -> Assignment:
        if name == "tal":
            return task_aligned(self.scores, self.boxes, self.points, self.targets)
        if name == "simota":
            return simota(self.scores, self.boxes, self.points, self.strides, self.targets)
        return atss(
            self.points,
            self.strides,
            self.per_level,
            self.targets,
            self.boxes,
            num_classes=CLASSES,
        )


def _scene(objects: list[Tensor], classes: list[Tensor], seed: int = 0) -> Scene:
    """Predictions that waver about boxes of a few strides."""
    generator = torch.Generator().manual_seed(seed)
    points, strides = anchor_points(SIZES, 0.5, torch.zeros(()))
    centres, side = (points * strides).T, strides[0]
    batch, anchors = len(objects), len(side)
    reach = (torch.rand(batch, anchors, 4, generator=generator) * 3 + 0.2) * side[:, None]
    boxes = torch.cat((centres - reach[..., :2], centres + reach[..., 2:]), dim=-1)
    scores = torch.rand(batch, anchors, CLASSES, generator=generator) * 0.98 + 0.01
    return Scene(scores, boxes, centres, side, pad_targets(objects, classes))


def _objects(count: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    centre = rng.uniform(0, PIXELS, (count, 2))
    side = np.exp(rng.uniform(np.log(3), np.log(90), (count, 2)))
    boxes = np.concatenate((centre - side / 2, centre + side / 2), 1).clip(0, PIXELS)
    return torch.from_numpy(boxes).float(), torch.from_numpy(rng.integers(0, CLASSES, count))


def _plain(scene: Scene, image: int, name: str) -> Labels:
    present = scene.targets.present[image]
    boxes = scene.targets.boxes[image][present].double().numpy()
    classes = scene.targets.classes[image][present].numpy()
    scores, predicted = scene.scores[image].double().numpy(), scene.boxes[image].double().numpy()
    points, strides = scene.points.double().numpy(), scene.strides.double().numpy()
    if name == "tal":
        return plain_task_aligned(scores, predicted, points, boxes, classes)
    if name == "atss":
        return plain_atss(points, strides, predicted, boxes)
    return plain_simota(scores, predicted, points, strides, boxes, classes)


def assert_consistent(scene: Scene, name: str, labels: Assignment) -> None:
    """Compare with the plain version, and every field with what the others say it should be."""
    batch, anchors = scene.boxes.shape[:2]
    assert labels.foreground.shape == labels.matched.shape == (batch, anchors)
    assert labels.foreground.dtype == torch.bool
    assert labels.matched.dtype == labels.classes.dtype == torch.int64
    assert labels.boxes.dtype == labels.scores.dtype == torch.float32
    for image in range(batch):
        owner, quality = _plain(scene, image, name)
        found = owner >= 0
        assert labels.foreground[image].numpy().tolist() == found.tolist()
        assert labels.matched[image].numpy().tolist() == np.where(found, owner, 0).tolist()
        names = scene.targets.classes[image].numpy()[labels.matched[image].numpy()]
        assert labels.classes[image].numpy().tolist() == np.where(found, names, CLASSES).tolist()
        corners = scene.targets.boxes[image].numpy()[labels.matched[image].numpy()]
        assert np.array_equal(labels.boxes[image].numpy(), np.where(found[:, None], corners, 0))
        expected = np.zeros((anchors, CLASSES))
        expected[np.flatnonzero(found), names[found]] = quality[found]
        assert labels.scores[image].numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_plain_version_agrees(name: str, seed: int) -> None:
    """Images of no, one, several and many objects in one batch, crowded enough for conflicts."""
    boxes, classes = zip(
        *(_objects(n, seed * 10 + i) for i, n in enumerate((0, 1, 4, 25))), strict=True
    )
    scene = _scene(list(boxes), list(classes), seed)
    labels = scene.assign(name)
    assert_consistent(scene, name, labels)
    assert int(labels.foreground[0].sum()) == 0
    assert int(labels.foreground[3].sum()) > 10
    assert bool(labels.scores.isfinite().all())
    assert 0 < float(labels.scores.max()) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_memory_bound_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, classes = zip(*(_objects(n, n) for n in (2, 0, 5)), strict=True)
    scene = _scene(list(boxes), list(classes))
    whole = scene.assign(name)
    monkeypatch.setattr(assigners, "_PAIRS_AT_ONCE", 1)
    parts = scene.assign(name)
    for field in ("foreground", "matched", "boxes", "classes", "scores"):
        assert torch.equal(getattr(whole, field), getattr(parts, field))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_no_objects_at_all(name: str, rows: int) -> None:
    scene = _scene([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    padding = Targets(
        torch.zeros(2, rows, 4),
        torch.zeros(2, rows, dtype=torch.int64),
        torch.zeros(2, rows, dtype=torch.bool),
    )
    labels = Scene(scene.scores, scene.boxes, scene.points, scene.strides, padding).assign(name)
    assert not bool(labels.foreground.any())
    assert not bool(labels.scores.any())
    assert not bool(labels.boxes.any())
    assert bool((labels.classes == CLASSES).all())


@pytest.mark.parametrize("name", NAMES)
def test_more_objects_than_anchors(name: str) -> None:
    boxes, classes = _objects(250, 3)
    scene = _scene([boxes], [classes])
    labels = scene.assign(name)
    assert_consistent(scene, name, labels)


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_order_of_objects_do_not_matter(name: str) -> None:
    boxes, classes = _objects(6, 8)
    scene = _scene([boxes], [classes])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = pad_targets(
        [boxes[order], _objects(9, 1)[0]], [classes[order], torch.zeros(9, dtype=torch.int64)]
    )
    twice = Scene(
        scene.scores.repeat(2, 1, 1),
        scene.boxes.repeat(2, 1, 1),
        scene.points,
        scene.strides,
        shuffled,
    )
    first, second = scene.assign(name), twice.assign(name)
    for field in ("foreground", "boxes", "classes", "scores"):
        assert torch.equal(getattr(first, field)[0], getattr(second, field)[0])


def _one_object(box: list[float], name: str) -> tuple[Scene, Assignment]:
    scene = _scene([torch.tensor([box])], [torch.tensor([1])])
    return scene, scene.assign(name)


@pytest.mark.parametrize("name", NAMES)
def test_an_object_smaller_than_a_cell(name: str) -> None:
    """About the point of a cell all three find it; between points only SimOTA does."""
    scene, labels = _one_object([10.5, 18.5, 13.0, 21.0], name)
    assert_consistent(scene, name, labels)
    assert int(labels.foreground.sum()) >= 1
    scene, labels = _one_object([13.0, 13.0, 15.0, 15.5], name)
    assert_consistent(scene, name, labels)
    assert bool(labels.foreground.any()) == (name == "simota")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("box", [[-60.0, -60.0, -30.0, -30.0], [300.0, 10.0, 350.0, 60.0]])
def test_an_object_outside_the_image_gets_nothing(name: str, box: list[float]) -> None:
    scene, labels = _one_object(box, name)
    if name == "simota":
        # Within 2.5 strides of the coarsest level, SimOTA still reaches it.
        near = (scene.points - (torch.tensor(box[:2]) + torch.tensor(box[2:])) / 2).abs()
        reached = bool((near < 2.5 * scene.strides[:, None]).all(-1).any())
        assert bool(labels.foreground.any()) == reached
    else:
        assert not bool(labels.foreground.any())
    assert not bool((labels.scores < 0).any())
    assert bool(labels.scores.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("box", [[20.0, 20.0, 20.0, 20.0], [20.0, 20.0, 20.0, 60.0]])
def test_an_object_without_area_weighs_nothing(name: str, box: list[float]) -> None:
    _, labels = _one_object(box, name)
    assert not bool(labels.scores.any())
    assert bool(labels.boxes.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_identical_objects_go_to_the_first(name: str) -> None:
    box = torch.tensor([[20.0, 20.0, 60.0, 70.0]])
    scene = _scene([box.repeat(3, 1)], [torch.tensor([1, 1, 1])])
    labels = scene.assign(name)
    alone = _scene([box], [torch.tensor([1])]).assign(name)
    assert bool(labels.foreground.any())
    assert not bool(labels.matched.any())
    assert torch.equal(labels.foreground, alone.foreground)
    assert torch.equal(labels.scores, alone.scores)


def test_ties_go_to_the_lower_index() -> None:
    """Every anchor predicts the same: those of the lowest index inside the object are taken."""
    scene, _ = _one_object([8.0, 8.0, 80.0, 80.0], "tal")
    same = scene.boxes.new_tensor([8.0, 8.0, 80.0, 70.0]).expand_as(scene.boxes)
    labels = task_aligned(torch.full_like(scene.scores, 0.5), same, scene.points, scene.targets)
    inside = ((scene.points > 8) & (scene.points < 80)).all(-1).nonzero().flatten()
    assert labels.foreground[0].nonzero().flatten().tolist() == inside[:13].tolist()
    labels = simota(
        torch.full_like(scene.scores, 0.5), same, scene.points, scene.strides, scene.targets
    )
    central = ((scene.points - 44).abs() < 2.5 * scene.strides[:, None]).all(-1)
    preferred = (central & ((scene.points > 8) & (scene.points < 80)).all(-1)).nonzero().flatten()
    count = int(10 * 62 / 72)
    assert labels.foreground[0].nonzero().flatten().tolist() == preferred[:count].tolist()


def test_of_equal_anchors_as_many_are_taken_as_better_ones_leave_room_for() -> None:
    scene, _ = _one_object([8.0, 8.0, 80.0, 80.0], "tal")
    same = scene.boxes.new_tensor([8.0, 8.0, 80.0, 70.0]).expand_as(scene.boxes)
    inside = ((scene.points > 8) & (scene.points < 80)).all(-1).nonzero().flatten()
    scores = torch.full_like(scene.scores, 0.5)
    scores[:, inside[-2:]] = 0.9
    labels = task_aligned(scores, same, scene.points, scene.targets)
    wanted = [*inside[:11].tolist(), *inside[-2:].tolist()]  # thirteen in all
    assert labels.foreground[0].nonzero().flatten().tolist() == wanted


def test_an_anchor_on_the_edge_of_an_object_is_outside() -> None:
    scene, _ = _one_object([8.0, 8.0, 80.0, 80.0], "tal")
    left, top = scene.points[len(scene.points) // 2].tolist()
    box = torch.tensor([[left - 8, top - 8, left + 8, top + 8]])  # a point on every edge
    alone = pad_targets([box], [torch.tensor([0])])
    predicted = box.expand_as(scene.boxes)
    labels = task_aligned(torch.full_like(scene.scores, 0.5), predicted, scene.points, alone)
    taken = scene.points[labels.foreground[0]]
    assert len(taken) > 0
    assert bool((taken > box[0, :2]).all())
    assert bool((taken < box[0, 2:]).all())


def test_an_anchor_at_the_end_of_simota_s_radius_is_too_far() -> None:
    box = torch.tensor([[23.0, 23.0, 25.0, 25.0]])  # 20 pixels from the points at 4
    scene, _ = _one_object(box[0].tolist(), "simota")
    assert bool(((scene.points - 24).abs() == 2.5 * scene.strides[:, None]).any())
    predicted = box.expand_as(scene.boxes)  # every anchor costs the same: the lowest index wins
    labels = simota(
        torch.full_like(scene.scores, 0.5), predicted, scene.points, scene.strides, scene.targets
    )
    taken = labels.foreground[0]
    assert int(taken.sum()) == 10
    assert bool(((scene.points[taken] - 24).abs() < 2.5 * scene.strides[taken][:, None]).all())


def test_the_best_aligned_anchor_scores_its_objects_best_overlap() -> None:
    """TOOD's normalization: the highest target of an object is its anchors' highest IoU."""
    boxes, classes = _objects(5, 2)
    scene = _scene([boxes], [classes])
    labels = scene.assign("tal")
    for thing in set(labels.matched[labels.foreground].tolist()):
        mine = labels.foreground[0] & (labels.matched[0] == thing)
        best = iou(scene.boxes[0][mine], boxes[thing]).max()
        assert float(labels.scores[0][mine].max()) == pytest.approx(float(best))


def test_hardly_touched_objects_still_get_targets() -> None:
    """IoU^6 of 0.01 is 1e-12: far below what an added constant would leave alive."""
    scene, _ = _one_object([0.0, 0.0, 96.0, 96.0], "tal")
    reach = torch.full_like(scene.boxes[0, :, :2], 4.0)
    tiny = torch.cat((scene.points - reach, scene.points + reach), dim=-1)[None]
    labels = task_aligned(torch.full_like(scene.scores, 1e-3), tiny, scene.points, scene.targets)
    assert int(labels.foreground.sum()) == 13
    assert float(labels.scores.max()) == pytest.approx((8 / 96) ** 2)


def test_anchors_that_miss_their_object_are_background() -> None:
    scene, _ = _one_object([0.0, 0.0, 90.0, 90.0], "tal")
    labels = task_aligned(scene.scores, scene.boxes + 500, scene.points, scene.targets)
    assert not bool(labels.foreground.any())
    assert bool(labels.scores.isfinite().all())


def test_atss_without_predictions_asks_for_certainty() -> None:
    boxes, classes = _objects(4, 5)
    scene = _scene([boxes], [classes])
    labels = atss(scene.points, scene.strides, scene.per_level, scene.targets, num_classes=CLASSES)
    expected = scene.assign("atss")
    assert torch.equal(labels.foreground, expected.foreground)
    assert torch.equal(labels.scores.sum(-1), labels.foreground.float())


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_gradients_stay_outside(name: str) -> None:
    boxes, classes = _objects(4, 5)
    scene = _scene([boxes], [classes])
    halves = Scene(
        scene.scores.half().requires_grad_(),
        scene.boxes.bfloat16().requires_grad_(),
        scene.points,
        scene.strides,
        scene.targets,
    )
    rounded = Scene(
        scene.scores.half().float(),
        scene.boxes.bfloat16().float(),
        scene.points,
        scene.strides,
        scene.targets,
    )
    labels, expected = halves.assign(name), rounded.assign(name)
    assert not labels.scores.requires_grad
    assert torch.equal(labels.scores, expected.scores)
