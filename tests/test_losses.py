"""The losses against closed forms, SciPy, finite differences and one plain computation of all."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.plain_assigners import plain_atss, plain_simota, plain_task_aligned
from support.training_data import pad_targets
from torch import Tensor

import trt_yolov6.training.losses as module
from trt_yolov6.detectors.box_similarity import iou, similarity
from trt_yolov6.errors import UserError
from trt_yolov6.models.decode import decode
from trt_yolov6.models.variants import STRIDES, VARIANTS, Architecture, architecture
from trt_yolov6.training.assigners import Assignment
from trt_yolov6.training.losses import (
    Assigner,
    BoxLoss,
    ClassLoss,
    DistillationSettings,
    Losses,
    LossSettings,
    box_divergence,
    check_losses,
    class_divergence,
    default_losses,
    detection_loss,
    distillation_weight,
    distilled_share,
    distribution_focal_loss,
    poly_loss,
    quality_focal_loss,
    varifocal_loss,
)
from trt_yolov6.training.targets import Targets

Floats = NDArray[np.float64]
Levels = list[tuple[Tensor, ...]]

PIXELS = 64
CLASSES = 3
PLAIN = architecture("yolov6n", CLASSES)
WITH_DFL = architecture("yolov6m", CLASSES)
OFFSET = dataclasses.replace(PLAIN, head="offset")
ARCHITECTURES = pytest.mark.parametrize(
    "arch", [PLAIN, WITH_DFL, OFFSET], ids=["distance", "dfl", "offset"]
)

pytestmark = pytest.mark.usefixtures("one_thread")


def _levels(
    arch: Architecture, batch: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Levels:
    """Raw outputs such as an untrained head gives, for images of 64 x 64."""
    generator = torch.Generator().manual_seed(seed)
    channels = [CLASSES, 4 * (arch.reg_max + 1), 1][: 3 if arch.head == "offset" else 2]
    return [
        tuple(
            (torch.randn(batch, count, cells, cells, generator=generator) + shift)
            .to(dtype)
            .requires_grad_()
            for count, shift in zip(channels, (-2.0, 1.0, -2.0), strict=False)
        )
        for cells in (PIXELS // stride for stride in STRIDES)
    ]


def _targets() -> Targets:
    """Three images: two objects, none, one."""
    boxes = [
        torch.tensor([[6.0, 8.0, 40.0, 50.0], [30.0, 20.0, 62.0, 44.0]]),
        torch.zeros(0, 4),
        torch.tensor([[12.0, 33.0, 28.0, 49.0]]),
    ]
    return pad_targets(boxes, [torch.tensor([2, 0]), torch.tensor([]), torch.tensor([1])])


def _some(targets: Targets, rows: slice) -> Targets:
    return Targets(targets.boxes[rows], targets.classes[rows], targets.present[rows])


def _hold_labels(monkeypatch: pytest.MonkeyPatch) -> list[Assignment]:
    """Assign once and keep to it; returns the list that the labels come to stand in."""
    original = module.assigned
    kept: list[Assignment] = []

    def assign(*args: Any) -> Assignment:
        if not kept:
            kept.append(original(*args))
        return kept[0]

    monkeypatch.setattr(module, "assigned", assign)
    return kept


def _gradients(loss: Losses, levels: Levels) -> list[Tensor]:
    leaves = [part for level in levels for part in level]
    return list(torch.autograd.grad(loss.total, leaves, allow_unused=False))


def expit(values: Floats) -> Floats:
    """The logistic function."""
    return np.asarray(1 / (1 + np.exp(-values)))


def softmax(values: Floats) -> Floats:
    """Over all of the values."""
    return np.asarray(np.exp(values) / np.exp(values).sum())


# --- elementwise losses -------------------------------------------------------------------------


def _logits_and_truth() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, generator=generator, dtype=torch.float64) * 3
    positive = torch.rand(40, generator=generator) < 0.4
    quality = torch.rand(40, generator=generator, dtype=torch.float64) * positive
    return logits, quality, positive


def test_classification_losses_are_their_closed_forms() -> None:
    logits, quality, positive = _logits_and_truth()
    p, q, y = expit(logits.numpy()), quality.numpy(), positive.numpy()
    entropy_of = -(q * np.log(p) + (1 - q) * np.log(1 - p))
    expected = np.where(y, q * entropy_of, -0.75 * p**2 * np.log(1 - p))
    assert varifocal_loss(logits, quality, positive).numpy() == pytest.approx(expected)
    pt, weight = np.where(y, p, 1 - p), np.where(y, 0.25, 0.75)
    focal = -weight * (1 - pt) ** 2 * np.log(pt)
    assert poly_loss(logits, positive, epsilon=0.0).numpy() == pytest.approx(focal)
    poly = focal + 0.4 * weight * (1 - pt) ** 3
    assert poly_loss(logits, positive, epsilon=0.4).numpy() == pytest.approx(poly)
    expected = np.abs(q - p) ** 2 * entropy_of
    assert quality_focal_loss(logits, quality).numpy() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["varifocal", "focal", "quality_focal", "poly"])
def test_classification_gradients_are_those_of_finite_differences(kind: str) -> None:
    logits, quality, positive = _logits_and_truth()

    def loss(values: Tensor) -> Tensor:
        if kind == "varifocal":
            return varifocal_loss(values, quality, positive)
        if kind == "quality_focal":
            return quality_focal_loss(values, quality)
        return poly_loss(values, positive, epsilon=0.0 if kind == "focal" else 1.0)

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))
    extreme = torch.tensor([-300.0, -60.0, 60.0, 300.0] * 10, requires_grad=True)
    quality, positive = quality.float(), torch.arange(40) % 3 == 0
    value = loss(extreme).sum()
    (gradient,) = torch.autograd.grad(value, extreme)
    assert math.isfinite(float(value.detach()))
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("quality", [0.1, 0.5, 0.93])
def test_quality_losses_are_least_at_the_quality(quality: float) -> None:
    minimize_scalar = pytest.importorskip("scipy.optimize").minimize_scalar
    target, positive = torch.tensor(quality), torch.tensor(True)
    for loss in (
        lambda x: float(varifocal_loss(torch.tensor(x), target, positive)),
        lambda x: float(quality_focal_loss(torch.tensor(x), target)),
    ):
        best = minimize_scalar(loss, bounds=(-6, 6), method="bounded").x
        assert expit(best) == pytest.approx(quality, abs=0.01)


def test_distribution_focal_loss_is_cross_entropy_of_two_bins() -> None:
    generator = torch.Generator().manual_seed(1)
    regression = torch.randn(2, 4 * 17, 5, generator=generator, dtype=torch.float64)
    distances = torch.rand(2, 4, 5, generator=generator, dtype=torch.float64) * 20 - 2
    value = distribution_focal_loss(regression, distances, 16)
    for index in np.ndindex(2, 4, 5):
        image, side, anchor = index
        p = softmax(regression[image, side * 17 : side * 17 + 17, anchor].numpy())
        distance = min(max(float(distances[index]), 0), 16)
        left = min(int(distance), 15)
        share = distance - left
        expected = -(1 - share) * math.log(p[left]) - share * math.log(p[left + 1])
        assert float(value[index]) == pytest.approx(expected)
    assert torch.autograd.gradcheck(
        lambda r: distribution_focal_loss(r, distances, 16), (regression.requires_grad_(),)
    )


def test_divergences_are_scipys_entropies() -> None:
    entropy = pytest.importorskip("scipy.stats").entropy
    softmax = pytest.importorskip("scipy.special").softmax
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(3, 4 * 9, 7, generator=generator, dtype=torch.float64) * 2
    teacher = torch.randn(3, 4 * 9, 7, generator=generator, dtype=torch.float64) * 2
    for temperature in (1.0, 5.0):
        p = expit(teacher.numpy() / temperature)
        q = expit(student.numpy() / temperature)
        expected = temperature**2 * entropy(np.stack((p, 1 - p)), np.stack((q, 1 - q)))
        assert class_divergence(student, teacher, temperature).numpy() == pytest.approx(expected)
        p, q = (
            softmax(x.view(3, 4, 9, 7).numpy() / temperature, axis=2) for x in (teacher, student)
        )
        expected = temperature**2 * entropy(p, q, axis=2)
        value = box_divergence(student, teacher, 8, temperature)
        assert value.numpy() == pytest.approx(expected)
        same = class_divergence(teacher, teacher, temperature).sum()
        same = same + box_divergence(teacher, teacher, 8, temperature).sum()
        assert float(same) == pytest.approx(0, abs=1e-9)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: class_divergence(s, teacher, 3.0), (student,))
    assert torch.autograd.gradcheck(lambda s: box_divergence(s, teacher, 8, 3.0), (student,))


@given(st.floats(-12, 12), st.floats(-12, 12))
def test_a_teacher_pulls_no_harder_than_varifocal_loss(own: float, told: float) -> None:
    """Than its label of the same quality where there is an object, than none where there is not."""
    teacher = torch.tensor(told, dtype=torch.float64)
    pulls = []
    for guide in (teacher, torch.full_like(teacher, -100)):
        student = torch.tensor(own, dtype=torch.float64, requires_grad=True)
        pull = distilled_share(student, guide) * class_divergence(student, guide, 1.0)
        pull.backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        pulls.append(student.grad.abs())
    student = torch.tensor(own, dtype=torch.float64, requires_grad=True)
    quality, chance = torch.sigmoid(teacher), torch.sigmoid(student.detach())
    positive = quality * (chance - quality).abs()
    loss = varifocal_loss(student, torch.zeros_like(student), torch.tensor(False))
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert pulls[0] <= torch.maximum(positive, student.grad) + 1e-12
    assert pulls[1] <= student.grad + 1e-12


def test_distillation_weight_is_the_papers_cosine() -> None:
    assert distillation_weight(0, 300) == 1
    assert distillation_weight(150, 300) == pytest.approx(0.505)
    assert distillation_weight(300, 300) == pytest.approx(0.01)
    assert distillation_weight(400, 300) == pytest.approx(0.01)
    values = [distillation_weight(epoch, 50) for epoch in range(51)]
    assert values == sorted(values, reverse=True)
    expected = [((1 - math.cos(e * math.pi / 50)) / 2) * (0.01 - 1) + 1 for e in range(51)]
    assert values == pytest.approx(expected)


# --- the whole ----------------------------------------------------------------------------------


def _plain_parts(
    levels: Levels, arch: Architecture, targets: Targets, options: LossSettings, epoch: int
) -> dict[str, float]:
    """All parts, anchor by anchor, in NumPy (except for decoding and the kind of IoU)."""
    numbers = [tuple(part.detach().double() for part in level) for level in levels]
    decoded, decoded_scores = decode(numbers, arch)
    points, strides = [], []
    for stride in STRIDES:
        for row in range(PIXELS // stride):
            for column in range(PIXELS // stride):
                points.append([(column + 0.5) * stride, (row + 0.5) * stride])
                strides.append(stride)
    where, pitch = np.array(points), np.array(strides, float)

    def joined(part: int) -> Floats:
        maps = [level[part].flatten(2).numpy() for level in numbers]
        return np.asarray(np.concatenate(maps, 2).transpose(0, 2, 1))

    logits, regression = joined(0), joined(1)
    parts = dict.fromkeys(("class", "box", "dfl", "objectness"), 0.0)
    total, found = 0.0, 0
    for image in range(len(logits)):
        present = targets.present[image]
        boxes = targets.boxes[image][present].double().numpy()
        classes = targets.classes[image][present].numpy()
        predicted = decoded[image].T.numpy()
        scores = decoded_scores[image].T.numpy()
        name = options.warmup_assigner if epoch < options.warmup_epochs else options.assigner
        if name == "tal":
            owner, quality = plain_task_aligned(scores, predicted, where, boxes, classes)
        elif name == "atss":
            owner, quality = plain_atss(where, pitch, predicted, boxes)
        else:
            if arch.head == "offset":
                scores = np.sqrt(scores)
            owner, quality = plain_simota(scores, predicted, where, pitch, boxes, classes)
        total += quality.sum()
        found += (owner >= 0).sum()
        for anchor, thing in enumerate(owner):
            for name_of in range(CLASSES):
                score = float(expit(logits[image, anchor, name_of]))
                true = thing >= 0 and classes[thing] == name_of
                q = quality[anchor] if true else 0.0
                parts["class"] += _plain_class_loss(score, q, true, options)
            if options.objectness:
                p = expit(joined(2)[image, anchor, 0])
                parts["objectness"] -= math.log(p if thing >= 0 else 1 - p)
            if thing < 0:
                continue
            pair = (torch.from_numpy(predicted[anchor]), torch.from_numpy(boxes[thing]))
            parts["box"] += quality[anchor] * (1 - float(similarity(*pair, options.box)))
            if options.use_dfl:
                bins = regression[image, anchor].reshape(4, -1)
                corners = boxes[thing] / pitch[anchor]
                point = where[anchor] / pitch[anchor]
                distances = np.concatenate((point - corners[:2], corners[2:] - point))
                for side in range(4):
                    p = softmax(bins[side])
                    left = min(int(np.clip(distances[side], 0, 16)), 15)
                    share = np.clip(distances[side], 0, 16) - left
                    value = -(1 - share) * np.log(p[left]) - share * np.log(p[left + 1])
                    parts["dfl"] += quality[anchor] * value / 4
    floor = len(logits) / 4
    return {
        "class": options.class_weight * parts["class"] / max(total, floor),
        "box": options.box_weight * parts["box"] / max(total, floor),
        "dfl": options.dfl_weight * parts["dfl"] / max(total, floor),
        "objectness": options.objectness_weight * parts["objectness"] / max(found, floor),
    }


def _plain_class_loss(p: float, q: float, true: bool, options: LossSettings) -> float:
    crossed = -(q * math.log(p) + (1 - q) * math.log(1 - p))
    if options.classification == "varifocal":
        return q * crossed if true else -0.75 * p**2 * math.log(1 - p)
    if options.classification == "quality_focal":
        return (q - p) ** 2 * crossed
    pt, weight = (p, 0.25) if true else (1 - p, 0.75)
    extra = options.poly_epsilon * (1 - pt) if options.classification == "poly" else 0.0
    return weight * (1 - pt) ** 2 * (extra - math.log(pt))


CHOICES: list[tuple[ClassLoss, BoxLoss, Assigner]] = [
    ("varifocal", "siou", "tal"),
    ("focal", "giou", "atss"),
    ("quality_focal", "ciou", "simota"),
    ("poly", "giou", "tal"),
]


@ARCHITECTURES
@pytest.mark.parametrize("choice", CHOICES)
def test_every_part_is_that_of_the_plain_computation(
    arch: Architecture, choice: tuple[ClassLoss, BoxLoss, Assigner]
) -> None:
    options = dataclasses.replace(
        default_losses(arch),
        classification=choice[0],
        box=choice[1],
        assigner=choice[2],
        class_weight=0.8,
        objectness_weight=0.7,
    )
    levels, targets = _levels(arch, 3), _targets()
    for epoch in (0, 4):
        loss = detection_loss(levels, arch, targets, options, epoch=epoch)
        expected = _plain_parts(levels, arch, targets, options, epoch)
        assert {"class", "box"} <= set(loss.parts) <= set(expected)
        assert ("dfl" in loss.parts) == options.use_dfl
        assert ("objectness" in loss.parts) == options.objectness
        for name, value in loss.parts.items():
            assert value.dtype == torch.float32
            assert not value.requires_grad
            assert float(value) == pytest.approx(expected[name], rel=1e-4)
            assert float(value) > 0
        assert float(loss.total.detach()) == pytest.approx(sum(map(float, loss.parts.values())))


@ARCHITECTURES
def test_gradient_of_the_whole_is_that_of_finite_differences(
    arch: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the labels held still, as they pass no gradient."""
    levels = _levels(arch, 3, dtype=torch.float64)
    teacher = _levels(arch, 3, seed=9, dtype=torch.float64)
    targets, options = _targets(), default_losses(arch)
    kept = _hold_labels(monkeypatch)

    def total(*leaves: Tensor) -> Tensor:
        step = len(levels[0])
        given_levels = [leaves[i : i + step] for i in range(0, len(leaves), step)]
        return detection_loss(
            given_levels,
            arch,
            targets,
            options,
            epoch=10,
            teacher_levels=teacher,
            distillation=DistillationSettings(epochs=50),
        ).total

    leaves = tuple(part for level in levels for part in level)
    assert torch.autograd.gradcheck(total, leaves, fast_mode=True)
    assert len(kept) == 1


@ARCHITECTURES
@pytest.mark.parametrize("assigner", ["tal", "atss", "simota"])
def test_two_processes_give_the_gradients_of_one(arch: Architecture, assigner: Assigner) -> None:
    """Averaged over processes, as DistributedDataParallel does, and not equally many objects."""
    options = dataclasses.replace(default_losses(arch), assigner=assigner, warmup_epochs=0)
    distillation = DistillationSettings(epochs=10)
    levels, teacher, targets = _levels(arch, 4), _levels(arch, 4, seed=5), _targets()
    targets = Targets(
        *(torch.cat((x, x[:1])) for x in (targets.boxes, targets.classes, targets.present))
    )

    def run(rows: slice, counts: list[Tensor] | None) -> tuple[Losses, Tensor, Levels]:
        part = [tuple(x[rows].detach().requires_grad_() for x in level) for level in levels]
        seen: list[Tensor] = []

        def reduce_mean(value: Tensor) -> Tensor:
            seen.append(value)
            return value if counts is None else torch.stack(counts).mean(0)

        loss = detection_loss(
            part,
            arch,
            _some(targets, rows),
            options,
            epoch=2,
            teacher_levels=[tuple(x[rows] for x in level) for level in teacher],
            distillation=distillation,
            reduce_mean=reduce_mean,
        )
        assert len(seen) == 1
        return loss, seen[0], part

    whole, _, parts = run(slice(0, 4), None)
    expected = _gradients(whole, parts)
    halves = (slice(0, 2), slice(2, 4))
    counts = [run(rows, None)[1] for rows in halves]
    results = [run(rows, counts) for rows in halves]
    mean_total = sum(float(loss.total.detach()) for loss, _, _ in results) / 2
    assert mean_total == pytest.approx(float(whole.total.detach()), rel=1e-5)
    pieces = [_gradients(loss, part) for loss, _, part in results]
    for one, two, both in zip(*pieces, expected, strict=True):
        assert torch.allclose(torch.cat((one, two)) / 2, both, rtol=1e-4, atol=1e-7)


@ARCHITECTURES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_outputs_change_nothing(arch: Architecture, dtype: torch.dtype) -> None:
    halves = _levels(arch, 3, dtype=dtype)
    floats = [tuple(part.detach().float() for part in level) for level in halves]
    targets, options = _targets(), default_losses(arch)
    with torch.autocast("cpu", torch.bfloat16):
        value = detection_loss(halves, arch, targets, options, epoch=9)
    expected = detection_loss(floats, arch, targets, options, epoch=9)
    assert value.total.dtype == torch.float32
    assert float(value.total.detach()) == float(expected.total)
    assert all(bool(each.isfinite().all()) for each in _gradients(value, halves))


@ARCHITECTURES
@pytest.mark.parametrize("epoch", [0, 9])
def test_images_without_objects_only_teach_that_nothing_is_there(
    arch: Architecture, epoch: int
) -> None:
    targets = pad_targets([torch.zeros(0, 4)] * 2, [torch.tensor([])] * 2)
    levels = _levels(arch, 2)
    loss = detection_loss(levels, arch, targets, default_losses(arch), epoch=epoch)
    assert float(loss.parts["class"]) > 0
    assert float(loss.parts["box"]) == 0
    gradients = iter(_gradients(loss, levels))
    for level in levels:
        for part, _ in enumerate(level):
            gradient = next(gradients)
            assert bool(gradient.isfinite().all())
            if part == 1:
                assert not bool(gradient.any())
            else:
                assert bool((gradient >= 0).all())


@ARCHITECTURES
def test_odd_objects_give_numbers(arch: Architecture) -> None:
    """Identical ones, one outside, one without area, one that fills the image."""
    boxes = torch.tensor(
        [
            [8.0, 8.0, 30.0, 30.0],
            [8.0, 8.0, 30.0, 30.0],
            [-90.0, -90.0, -50.0, -50.0],
            [20.0, 20.0, 20.0, 20.0],
            [0.0, 0.0, 64.0, 64.0],
            [33.0, 33.0, 34.0, 34.5],
        ]
    )
    targets = pad_targets([boxes], [torch.tensor([0, 1, 2, 0, 1, 2])])
    levels = _levels(arch, 1)
    for assigner in ("tal", "atss", "simota"):
        options = dataclasses.replace(
            default_losses(arch), assigner=assigner, warmup_assigner=assigner
        )
        loss = detection_loss(levels, arch, targets, options)
        assert math.isfinite(float(loss.total.detach()))
        assert all(bool(each.isfinite().all()) for each in _gradients(loss, levels))


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.1, 0.9), st.sampled_from(["siou", "giou", "ciou"]), st.integers(0, 2), st.booleans()
)
def test_boxes_that_near_their_objects_lose_less(
    part: float, box: BoxLoss, seed: int, dfl: bool
) -> None:
    """Every anchor predicts the one object except for an error, which shrinks."""
    arch = WITH_DFL if dfl else PLAIN
    goal = torch.tensor([10.0, 12.0, 44.0, 50.0])
    targets = pad_targets([goal[None]], [torch.tensor([1])])
    shift = torch.randn(2, generator=torch.Generator().manual_seed(seed)).repeat(2) * 8
    options = LossSettings(box=box, use_dfl=False, warmup_epochs=9)
    values = []
    for scale in (1.0, part):
        levels = []
        for stride in STRIDES:
            cells = PIXELS // stride
            centre = (torch.arange(cells) + 0.5) * stride
            y, x = torch.meshgrid(centre, centre, indexing="ij")
            x1, y1, x2, y2 = (goal + shift * scale)[:, None, None]
            distances = torch.stack((x - x1, y - y1, x2 - x, y2 - y))[None] / stride
            if dfl:
                distances = _sharp_bins(distances, arch.reg_max)
            levels.append((torch.zeros(1, CLASSES, cells, cells), distances))
        loss = detection_loss(levels, arch, targets, options)
        # Weights are the overlaps, but the sum of them divides the loss.
        values.append(float(loss.parts["box"]))
    assert values[1] <= values[0] + 1e-6


def _sharp_bins(distances: Tensor, reg_max: int) -> Tensor:
    """Logits whose expected distance is the given one, within 0..reg_max."""
    bins = torch.arange(reg_max + 1).view(1, 1, -1, 1, 1)
    share = (1 - (distances.clamp(0, reg_max).unsqueeze(2) - bins).abs()).clamp(min=0)
    return torch.log(share + 1e-9).flatten(1, 2)


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        (PLAIN, default_losses(PLAIN)),
        (WITH_DFL, default_losses(WITH_DFL)),
        (WITH_DFL, LossSettings(use_dfl=True, box_weight=0.0)),
        (OFFSET, default_losses(OFFSET)),
        (PLAIN, LossSettings("quality_focal", "ciou", assigner="simota", warmup_epochs=0)),
        (PLAIN, LossSettings("focal", "giou", assigner="atss")),
        (PLAIN, LossSettings("poly", "siou", warmup_assigner="simota")),
        (OFFSET, LossSettings("varifocal", "siou", objectness=True, assigner="simota")),
    ],
    ids=[
        "n",
        "m",
        "dfl-alone",
        "offset",
        "qfl-ciou-simota",
        "focal-atss",
        "poly-simota-tal",
        "offset-simota",
    ],
)
def test_descent_on_the_outputs_finds_the_objects(
    arch: Architecture, options: LossSettings
) -> None:
    levels, targets = _levels(arch, 3), _targets()
    leaves = [part for level in levels for part in level]
    optimizer = torch.optim.Adam(leaves, lr=0.1)
    for step in range(150):
        optimizer.zero_grad()
        loss = detection_loss(levels, arch, targets, options, epoch=step // 10)
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        boxes, scores = decode(levels, arch)
    for image in range(3):
        for box, name in zip(targets.boxes[image], targets.classes[image], strict=True):
            if not bool(box.any()):
                continue
            best = int(scores[image, int(name)].argmax())
            assert float(iou(boxes[image, :, best], box)) > 0.75
    wrong = scores[1].max()
    right = min(float(scores[0, 2].max()), float(scores[0, 0].max()), float(scores[2, 1].max()))
    assert float(wrong) < right / 2


@ARCHITECTURES
def test_a_teacher_is_followed(arch: Architecture) -> None:
    levels, teacher, targets = _levels(arch, 3), _levels(arch, 3, seed=4), _targets()
    options, distillation = default_losses(arch), DistillationSettings(epochs=20)

    def loss(student: Levels, epoch: float) -> Losses:
        return detection_loss(
            student,
            arch,
            targets,
            options,
            epoch=epoch,
            teacher_levels=teacher,
            distillation=distillation,
        )

    value = loss(levels, 10)
    assert ("distill_box" in value.parts) == (arch.reg_max > 0)
    same = loss([tuple(x.detach().requires_grad_() for x in level) for level in teacher], 10)
    for name in ("distill_class", "distill_box"):
        if name in value.parts:
            assert float(value.parts[name]) > 0
            assert float(same.parts[name]) == pytest.approx(0, abs=1e-4)
    late = loss(levels, 20)
    ratio = float(late.parts["distill_class"]) / float(value.parts["distill_class"])
    assert ratio == pytest.approx(0.01 / 0.505, rel=1e-5)
    plain = detection_loss(levels, arch, targets, options, epoch=10)
    assert float(plain.parts["class"]) == float(value.parts["class"])
    leaves = [part for level in teacher for part in level]
    assert torch.autograd.grad(value.total, leaves, allow_unused=True) == (None,) * len(leaves)


def test_distilled_parts_are_their_divergences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, normalizer and mask of the distilled parts, by hand."""
    levels, teacher, targets = _levels(WITH_DFL, 3), _levels(WITH_DFL, 3, seed=4), _targets()
    distillation = DistillationSettings(
        epochs=20, class_weight=0.3, box_weight=2.0, class_temperature=2.0, box_temperature=3.0
    )
    options = LossSettings(use_dfl=False, class_weight=0.9, dfl_weight=0.4)
    kept = _hold_labels(monkeypatch)
    loss = detection_loss(
        levels,
        WITH_DFL,
        targets,
        options,
        epoch=5,
        teacher_levels=teacher,
        distillation=distillation,
    )
    weight = kept[0].scores.sum(-1)
    total = max(float(weight.sum()), 0.75)
    decay = distillation_weight(5, 20)

    def joined(maps: Levels, part: int) -> Tensor:
        return torch.cat([level[part].detach().flatten(2) for level in maps], dim=2)

    student, guide = joined(levels, 0), joined(teacher, 0)
    by_class = (distilled_share(student, guide) * class_divergence(student, guide, 2.0)).sum()
    expected = 0.9 * 0.3 * decay * float(by_class) / total
    assert float(loss.parts["distill_class"]) == pytest.approx(expected, rel=1e-5)
    by_side = box_divergence(joined(levels, 1), joined(teacher, 1), 16, 3.0)
    expected = 0.4 * 2.0 * decay * float((by_side.mean(1) * weight).sum()) / total
    assert float(loss.parts["distill_box"]) == pytest.approx(expected, rel=1e-5)


# --- settings and refusals ----------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    chosen = {name: default_losses(architecture(name)) for name in VARIANTS}
    assert {name for name, options in chosen.items() if options.box == "siou"} == {
        *("yolov6n", "yolov6n_v3", "yolov6n6", "yolov6n_qa", "yolov6n_base"),
        *("yolov6t", "yolov6t_released"),
    }
    assert {options.box for options in chosen.values()} == {"siou", "giou"}
    assert {name for name, options in chosen.items() if not options.use_dfl} == {
        *("yolov6n", "yolov6n_v3", "yolov6n6", "yolov6n_qa", "yolov6t", "yolov6t_released"),
        *("yolov6s", "yolov6s_v3", "yolov6s6", "yolov6s_qa"),
        *("yolov6lite_s", "yolov6lite_m", "yolov6lite_l"),
    }
    for options in chosen.values():
        assert options.classification == "varifocal"
        assert (options.assigner, options.warmup_assigner) == ("tal", "atss")
        assert (options.class_weight, options.box_weight, options.dfl_weight) == (1.0, 2.5, 0.5)
        assert not options.objectness
        assert LossSettings(**json.loads(json.dumps(dataclasses.asdict(options)))) == options
    assert default_losses(OFFSET).objectness
    assert default_losses(architecture("yolov6n", 3)).box == "siou"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classification", "hinge"),
        ("box", "iou"),
        ("assigner", "nearest"),
        ("warmup_assigner", ""),
        ("warmup_epochs", -1),
        ("box_weight", -0.1),
        ("class_weight", math.nan),
        ("dfl_weight", math.inf),
        ("poly_epsilon", -1.0),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        dataclasses.replace(LossSettings(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("box_temperature", 0.0), ("class_temperature", -1.0), ("box_weight", -1.0)],
)
def test_bad_distillation_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        dataclasses.replace(DistillationSettings(epochs=10), **{name: value})


def test_a_head_without_the_output_is_refused() -> None:
    with pytest.raises(UserError, match="predicts boxes directly"):
        check_losses(LossSettings(use_dfl=True), PLAIN)
    with pytest.raises(UserError, match="objectness output"):
        check_losses(LossSettings(objectness=True), PLAIN)
    with pytest.raises(UserError, match="cannot be trained without"):
        check_losses(LossSettings(), OFFSET)


def test_rectangular_images() -> None:
    levels = [
        (torch.zeros(1, CLASSES, 96 // s, 64 // s), torch.ones(1, 4, 96 // s, 64 // s))
        for s in STRIDES
    ]
    targets = pad_targets([torch.tensor([[8.0, 70.0, 40.0, 95.0]])], [torch.tensor([0])])
    loss = detection_loss(levels, PLAIN, targets, LossSettings())
    assert float(loss.parts["box"]) > 0
