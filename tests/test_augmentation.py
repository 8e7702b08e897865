"""Augmented pictures and boxes move together, as independent computations say they should."""

from __future__ import annotations

import colorsys
import dataclasses
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.training_data import NO_AUGMENTATION, unaugmented
from torch import Tensor

from trt_yolov6.data.coco import DataReport
from trt_yolov6.data.letterbox import GRAY
from trt_yolov6.errors import UserError
from trt_yolov6.training import dataset as dataset_module
from trt_yolov6.training.augmentation import (
    AugmentationSettings,
    BatchPlan,
    Layers,
    adjust_colours_,
    augmentation_for,
    draw,
    make_pictures,
    plan_batch,
    worth_keeping,
)
from trt_yolov6.training.dataset import TrainingSet

SIZE = 64
CPU = torch.device("cpu")
GEOMETRY = dataclasses.replace(NO_AUGMENTATION, mosaic=1, flip_lr=0.5, flip_ud=0.5)
pytestmark = pytest.mark.usefixtures("one_thread")


def training_set(
    images: list[NDArray[np.uint8]], boxes: list[list[list[float]]], size: int = SIZE
) -> TrainingSet:
    """Hold images, (height, width, 3), whose objects are of class 0, 1, 2... in their order."""
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    # Neither gray nor a colour of the images: it must never be seen.
    store = torch.full((len(images), 3, height, width), 255, dtype=torch.uint8)
    for row, image in zip(store, images, strict=True):
        row[:, : image.shape[0], : image.shape[1]] = torch.from_numpy(image).permute(2, 0, 1)
    counts = [len(items) for items in boxes]
    return TrainingSet(
        image_size=size,
        device=CPU,
        class_names=("a", "b", "c"),
        files=tuple(Path(f"{index}.png") for index in range(len(images))),
        images=store,
        sizes=torch.tensor([image.shape[:2] for image in images]),
        boxes=torch.tensor([box for items in boxes for box in items]).reshape(-1, 4).float(),
        classes=torch.tensor([place for count in counts for place in range(count)]).long(),
        first=torch.tensor([0, *np.cumsum(counts)]),
        report=DataReport(Path("a.json"), len(images), sum(counts), (), (), 0, 0),
    )


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_images(seed: int, sizes: list[tuple[int, int]]) -> list[NDArray[np.uint8]]:
    """Make images without detail finer than some pixels, never brighter than 230."""
    rng = np.random.default_rng(seed)
    return [
        cv2.resize(rng.integers(0, 230, (4, 4, 3), np.uint8), (width, height)).astype(np.uint8)
        for height, width in sizes
    ]


def plan(
    data: TrainingSet, options: AugmentationSettings, seed: int, count: int, strong: bool = True
) -> BatchPlan:
    indices = np.arange(count) % len(data)
    numbers = draw(count, generator(seed))
    return plan_batch(
        indices, data.sizes.numpy(), numbers, options, size=data.image_size, strong=strong
    )


def pictures_of(data: TrainingSet, planned: BatchPlan) -> Tensor:
    return make_pictures(planned, lambda index: data.images[torch.from_numpy(index)], CPU, 4)


def test_the_settings_are_the_authors() -> None:
    assert augmentation_for("yolov6n") == augmentation_for("yolov6s") == AugmentationSettings()
    assert augmentation_for("yolov6m") == augmentation_for("yolov6l_relu")
    assert (augmentation_for("yolov6m").scale, augmentation_for("yolov6m").mixup) == (0.9, 0.1)
    assert augmentation_for("yolov6lite_m") == augmentation_for("yolov6-custom")
    assert augmentation_for("yolov6-custom") == AugmentationSettings()


@pytest.mark.parametrize(
    ("field", "value"),
    [("mosaic", 1.5), ("mixup", -0.1), ("scale", 1), ("shear", 45), ("hsv_h", math.nan)],
)
def test_a_setting_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"`{field}` must be .*, got {value}"):
        AugmentationSettings(**{field: value})


def reference_matrix(
    numbers: NDArray[np.float64], options: AugmentationSettings, flips: tuple[bool, bool]
) -> NDArray[np.float64]:
    """Multiply the steps out, one 3 x 3 matrix each: rotation and zoom, shear, shift, flips."""
    angle, zoom, shear_x, shear_y, shift_x, shift_y = 2 * numbers - 1
    turn = np.vstack(
        [
            cv2.getRotationMatrix2D((0, 0), options.degrees * angle, 1 + options.scale * zoom),
            [0, 0, 1],
        ]
    )
    shear = np.eye(3)
    shear[0, 1] = math.tan(math.radians(options.shear * shear_x))
    shear[1, 0] = math.tan(math.radians(options.shear * shear_y))
    shift = np.eye(3)
    shift[:2, 2] = (
        (0.5 + options.translate * shift_x) * SIZE,
        (0.5 + options.translate * shift_y) * SIZE,
    )
    flip = np.eye(3)
    for axis in (0, 1):
        if flips[axis]:
            flip[axis, axis], flip[axis, 2] = -1, SIZE
    result: NDArray[np.float64] = flip @ shift @ shear @ turn
    return result


def warp(canvas: NDArray[np.uint8], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Let OpenCV move a canvas, by a matrix of continuous coordinates."""
    half = np.eye(3)
    half[:2, 2] = 0.5
    shifted = np.linalg.inv(half) @ matrix @ half  # OpenCV counts from pixel centres
    moved = cv2.warpAffine(
        canvas.astype(np.float32),
        shifted[:2],
        (SIZE, SIZE),
        flags=cv2.INTER_LINEAR,
        borderValue=(GRAY, GRAY, GRAY),
    )
    return np.asarray(moved, np.float64)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), degrees=st.sampled_from([0, 30]), scale=st.floats(0, 0.5))
def test_a_mosaic_is_what_opencv_makes_of_its_canvas(
    seed: int, degrees: float, scale: float
) -> None:
    options = dataclasses.replace(
        GEOMETRY, degrees=degrees, shear=degrees / 3, scale=scale, translate=0.2
    )
    sizes = [(SIZE, 48), (40, SIZE), (SIZE, SIZE), (21, SIZE)]
    data = training_set(smooth_images(seed, sizes), [[]] * 4)
    planned = plan(data, options, seed, 1)
    got = pictures_of(data, planned)[0].permute(1, 2, 0).numpy() * 255

    # The canvas around the seam, with room for whole images.
    middle = 2 * SIZE
    canvas = np.full((2 * middle, 2 * middle, 3), GRAY, np.uint8)
    edges = np.zeros(canvas.shape[:2], np.uint8)
    for place, index in enumerate(planned.mosaics.images[0]):
        height, width = data.sizes[index].tolist()
        top = middle - height if place < 2 else middle
        left = middle - width if place % 2 == 0 else middle
        canvas[top : top + height, left : left + width] = (
            data.images[index, :, :height, :width].permute(1, 2, 0).numpy()
        )
        # OpenCV blends neighbouring images over a pixel; ours end sharply.
        cv2.rectangle(edges, (left, top), (left + width, top + height), 255, 4)
    numbers = draw(1, generator(seed))[0]
    flips = bool(numbers[34] < 0.5), bool(numbers[35] < 0.5)
    to_centre = np.eye(3)
    to_centre[:2, 2] = SIZE * (numbers[8:10] - 0.5) - middle
    matrix = reference_matrix(numbers[10:16], options, flips) @ to_centre
    wanted = warp(canvas, matrix)
    sure = warp(np.repeat(edges[:, :, None], 3, 2), matrix).max(2) < 1
    assert sure.mean() > 0.2
    # OpenCV before 5 rounds positions to 1/32 pixel.
    np.testing.assert_allclose(got[sure], wanted[sure], atol=2.5)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6), mosaic=st.booleans(), turn=st.booleans())
def test_a_painted_rectangle_ends_where_its_box_says(
    data: st.DataObject, seed: int, mosaic: bool, turn: bool
) -> None:
    options = dataclasses.replace(
        GEOMETRY,
        translate=0.2,
        scale=0.4,
        degrees=20 if turn else 0,
        shear=5 if turn else 0,
        border=data.draw(st.integers(0, 9)),
    )
    height, width = data.draw(st.sampled_from([(SIZE, SIZE), (48, SIZE), (SIZE, 33)]))
    left, top = data.draw(st.integers(0, width - 12)), data.draw(st.integers(0, height - 12))
    right = data.draw(st.integers(left + 8, width))
    bottom = data.draw(st.integers(top + 8, height))
    painted = np.full((height, width, 3), GRAY, np.uint8)
    painted[top:bottom, left:right] = 0
    # The rectangle is in one image of the mosaic only.
    blank = np.full((40, SIZE, 3), GRAY, np.uint8)
    held = training_set([painted, *[blank] * 30], [[[left, top, right, bottom]], *[[]] * 30])
    if mosaic:  # by chance, the four may have that image among them twice
        assume((plan(held, options, seed, 1).mosaics.images == 0).sum() == 1)
    pictures, targets = held.batch([0], options, generator(seed), strong=mosaic)
    shape = (GRAY / 255 - pictures[0, 0]) / (GRAY / 255)  # 1 inside, 0 outside

    if not targets.present.any():  # what is left is under a tenth of the rectangle, or thin
        assert shape.sum() < max(0.1 * 1.4**2 * (right - left) * (bottom - top) + 40, 3 * SIZE)
        return
    box = targets.boxes[0, 0]
    assert targets.classes[0, 0] == 0
    rows, columns = torch.nonzero(shape > 0.2, as_tuple=True)
    if not len(rows):  # a corner of the box around a turned rectangle, next to it
        assert turn
        assert ((box == 0) | (box == SIZE)).any()
        return
    found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    if turn and ((box == 0) | (box == SIZE)).any():
        # A corner may be outside: its box, cut off, then reaches beyond what is to be seen.
        assert (found[:2] >= box[:2] - 1).all()
        assert (found[2:] <= box[2:] + 1).all()
    else:
        # The very tip of a turned corner is too thin to be seen.
        torch.testing.assert_close(found, box, atol=1.5 if turn else 1.0, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), degrees=st.sampled_from([0.0, 25.0]))
def test_boxes_are_those_of_an_independent_computation(seed: int, degrees: float) -> None:
    """Every corner through plain 3 x 3 matrices, one box at a time."""
    options = dataclasses.replace(
        GEOMETRY, degrees=degrees, shear=degrees / 3, scale=0.5, translate=0.1, mixup=0.5
    )
    rng = np.random.default_rng(seed)
    sizes = [(SIZE, 48), (40, SIZE), (SIZE, SIZE), (21, SIZE)]
    boxes: list[list[list[float]]] = []
    for height, width in sizes:
        x, y = np.sort(rng.uniform(0, width, (3, 2))), np.sort(rng.uniform(0, height, (3, 2)))
        boxes.append(np.float32(np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)).tolist())
    data = training_set(smooth_images(seed, sizes), boxes)
    _, targets = data.batch([0, 1, 2, 3], options, generator(seed), strong=True)

    numbers = draw(4, generator(seed))
    for row, drawn in enumerate(numbers):
        flips = bool(drawn[34] < 0.5), bool(drawn[35] < 0.5)
        wanted = []
        for half in (drawn[:16], drawn[16:32])[: 1 + bool(drawn[33] < 0.5)]:
            first = row if half[0] == drawn[0] else int(half[0] * 4)
            four = np.array([first, *(half[1:4] * 4).astype(int)])[np.argsort(half[4:8])]
            to_centre = np.eye(3)
            to_centre[:2, 2] = SIZE * (half[8:10] - 0.5)
            matrix = reference_matrix(half[10:16], options, flips) @ to_centre
            for place, index in enumerate(four):
                height, width = sizes[index]
                shift = (-width if place % 2 == 0 else 0), (-height if place < 2 else 0)
                for label, (x1, y1, x2, y2) in enumerate(boxes[index]):
                    corners = [
                        matrix @ (x + shift[0], y + shift[1], 1) for x in (x1, x2) for y in (y1, y2)
                    ]
                    xs, ys = [c[0] for c in corners], [c[1] for c in corners]
                    whole = min(xs), min(ys), max(xs), max(ys)
                    inside = [min(max(value, 0), SIZE) for value in whole]
                    wide, high = inside[2] - inside[0], inside[3] - inside[1]
                    area = (whole[2] - whole[0]) * (whole[3] - whole[1])
                    if (
                        min(wide, high) > 2
                        and wide * high > area / 10
                        and max(wide, high) < 20 * min(wide, high)
                    ):
                        wanted.append((*inside, label))
        got = targets.present[row]
        found = torch.cat([targets.boxes[row], targets.classes[row][:, None].float()], dim=1)
        expected = torch.tensor(wanted, dtype=torch.float32).reshape(-1, 5)
        torch.testing.assert_close(found[got], expected, atol=1e-4, rtol=0)
        assert not found[~got].any()


def test_a_box_must_be_large_and_whole_enough() -> None:
    whole = np.array(
        [[0, 0, 9, 9], [0, 0, 2, 9], [-100, 0, 10, 9], [-79, 0, 10, 9], [0, 0, 60, 3.0]]
    )
    inside = whole.clip(0, 64)
    assert worth_keeping(whole, inside).tolist() == [True, False, False, True, False]
    assert worth_keeping(np.empty((0, 4)), np.empty((0, 4))).shape == (0,)


def test_zoom_and_shift_off_the_picture_leave_no_box() -> None:
    data = training_set(smooth_images(0, [(64, 64)]), [[[0, 0, 8, 8]]])
    options = dataclasses.replace(NO_AUGMENTATION, scale=0.99)
    numbers = torch.Generator().manual_seed(0)
    batches = [data.batch([0] * 4, options, numbers, strong=False)[1] for _ in range(10)]
    kept = torch.cat([targets.present[:, 0] for targets in batches])
    assert kept.any()
    assert not kept.all()


def test_mixup_is_a_weighted_sum_with_the_boxes_of_both() -> None:
    sizes = [(64, 64), (40, 64), (64, 48)]
    data = training_set(smooth_images(1, sizes), [[[2, 2, 30, 30]]] * 3)
    options = dataclasses.replace(AugmentationSettings(), mixup=0.5, hsv_h=0, hsv_s=0, hsv_v=0)
    planned = plan(data, options, 5, 12)
    rows = planned.mixed.rows
    assert 0 < len(rows) < 12

    whole = planned.mixed
    nothing = Layers(whole.rows[:0], whole.images[:0], whole.sizes[:0], whole.matrix[:0])
    first_plan = dataclasses.replace(planned, mixed=nothing, mix=planned.mix[:0])
    second_plan = dataclasses.replace(
        planned, mosaics=planned.mixed, mixed=nothing, mix=planned.mix[:0]
    )
    mixed, first, second = (pictures_of(data, p) for p in (planned, first_plan, second_plan))
    part = torch.from_numpy(planned.mix).float()[:, None, None, None]
    torch.testing.assert_close(mixed[rows], part * first[rows] + (1 - part) * second[rows])
    others = np.setdiff1d(np.arange(12), rows)
    torch.testing.assert_close(mixed[others], first[others])

    counts = [data.targets(some).present.sum(1) for some in (planned, first_plan, second_plan)]
    counts[2][others] = 0
    assert torch.equal(counts[0], counts[1] + counts[2])


def test_the_weights_of_mixup_have_the_beta_distribution() -> None:
    stats = pytest.importorskip("scipy.stats")
    data = training_set(smooth_images(1, [(64, 64)]), [[]])
    weights = plan(data, AugmentationSettings(mixup=1), 0, 2000).mix
    assert stats.kstest(weights, stats.beta(32, 32).cdf).pvalue > 0.01


@given(
    colours=st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=8),
    factors=st.tuples(st.floats(0, 2), st.floats(0, 2), st.floats(0, 2)),
)
@settings(max_examples=200, deadline=None)
def test_colours_change_as_colorsys_says(
    colours: list[tuple[int, ...]], factors: tuple[float, float, float]
) -> None:
    pixels = torch.tensor(colours).float().T.reshape(1, 3, 1, -1) / 255
    got = adjust_colours_(pixels.clone(), torch.tensor([factors]))[0, :, 0].T
    for colour, result in zip(colours, got.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(part / 255 for part in colour))
        wanted = colorsys.hsv_to_rgb(
            hue * factors[0] % 1, min(saturation * factors[1], 1), min(value * factors[2], 1)
        )
        assert result == pytest.approx(wanted, abs=2e-5)


def test_colours_change_as_opencv_says() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    factors = np.array([1.4, 0.6, 1.3], np.float32)
    hsv = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV) * factors
    hsv[..., 0] %= 360
    wanted = cv2.cvtColor(hsv.clip(None, (360, 1, 1)).astype(np.float32), cv2.COLOR_HSV2RGB)
    picture = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    got = adjust_colours_(picture, torch.from_numpy(factors)[None])
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), wanted, atol=1e-3)


def test_factors_of_one_change_no_colour() -> None:
    pictures = torch.rand(2, 3, 30, 30, generator=generator(0))
    pictures[0, :, :4] = torch.tensor([0.0, 1.0, 0.5, 0.2]).reshape(4, 1)  # grays
    got = adjust_colours_(pictures.clone(), torch.ones(2, 3))
    torch.testing.assert_close(got, pictures, atol=1e-6, rtol=0)


EVERYTHING = AugmentationSettings(
    mosaic=0.7,
    mixup=0.5,
    degrees=20,
    translate=0.245,
    scale=0.898,
    shear=5,
    hsv_h=0.0138,
    hsv_s=0.664,
    hsv_v=0.464,
    flip_ud=0.5,
    border=3,
)


@pytest.fixture(scope="module")
def data() -> TrainingSet:
    sizes = [(64, 64), (40, 64), (64, 48), (30, 64), (64, 50)]
    return training_set(smooth_images(1, sizes), [[[2, 2, 30, 30], [10, 5, 20, 28]]] * 5)


def same(a: tuple[Tensor, object], b: tuple[Tensor, object]) -> bool:
    return torch.equal(a[0], b[0]) and all(
        torch.equal(getattr(a[1], name), getattr(b[1], name))
        for name in ("boxes", "classes", "present")
    )


def test_the_state_of_the_generator_decides_the_batch(data: TrainingSet) -> None:
    source = generator(3)
    first = data.batch([0, 1, 2, 3], EVERYTHING, source, strong=True)
    state = source.get_state()
    second = data.batch(torch.tensor([0, 1, 2, 3]), EVERYTHING, source, strong=True)
    assert not same(first, second)
    source.set_state(state)
    assert same(second, data.batch([0, 1, 2, 3], EVERYTHING, source, strong=True))
    torch.manual_seed(0)
    np.random.seed(0)
    assert same(first, data.batch([0, 1, 2, 3], EVERYTHING, generator(3), strong=True))


def test_the_generator_advances_alike_whatever_the_settings(data: TrainingSet) -> None:
    sources = generator(3), generator(3)
    data.batch([0, 1], EVERYTHING, sources[0], strong=True)
    data.batch([4, 4], NO_AUGMENTATION, sources[1], strong=False)
    assert torch.equal(sources[0].get_state(), sources[1].get_state())


def test_shares_make_the_whole_batch(data: TrainingSet) -> None:
    indices = [0, 1, 2, 3, 4, 0, 1]
    whole, targets = data.batch(indices, EVERYTHING, generator(8), strong=True)
    parts = [
        data.batch(indices, EVERYTHING, generator(8), strong=True, share=(rank, 3))
        for rank in range(3)
    ]
    assert [len(part[0]) for part in parts] == [2, 2, 3]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole)
    boxes = torch.cat([part[1].boxes[part[1].present] for part in parts])
    assert torch.equal(boxes, targets.boxes[targets.present])


def test_the_working_memory_does_not_change_the_batch(
    data: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = data.batch(range(5), EVERYTHING, generator(4), strong=True)
    monkeypatch.setattr(dataset_module, "_CPU_CHUNK", 2)
    after = data.batch(range(5), EVERYTHING, generator(4), strong=True)
    torch.testing.assert_close(after[0], before[0])


def test_probabilities_of_0_and_weak_batches_switch_things_off(data: TrainingSet) -> None:
    plain = unaugmented(data, [0, 1, 2])
    for strong in (False, True):
        assert same(plain, data.batch([0, 1, 2], NO_AUGMENTATION, generator(0), strong=strong))
    weak = plan(data, EVERYTHING, 0, 40, strong=False)
    assert (len(weak.singles.rows), len(weak.mosaics.rows), len(weak.mixed.rows)) == (40, 0, 0)
    strong_plan = plan(data, dataclasses.replace(EVERYTHING, mosaic=1, mixup=0), 0, 40)
    assert (len(strong_plan.mosaics.rows), len(strong_plan.mixed.rows)) == (40, 0)
    some = plan(data, EVERYTHING, 0, 1000)
    assert len(some.mosaics.rows) == pytest.approx(700, abs=60)
    assert len(some.mixed.rows) == pytest.approx(350, abs=60)


def test_flips_mirror_pictures_and_boxes(data: TrainingSet) -> None:
    plain, objects = unaugmented(data, [2])
    for name, axis in (("flip_lr", 0), ("flip_ud", 1)):
        options = dataclasses.replace(NO_AUGMENTATION, **{name: 1})
        flipped, mirrored = data.batch([2], options, generator(0), strong=True)
        torch.testing.assert_close(flipped, plain.flip(3 - axis), atol=1e-5, rtol=0)
        wanted = objects.boxes.clone()
        wanted[..., axis] = SIZE - objects.boxes[..., axis + 2]
        wanted[..., axis + 2] = SIZE - objects.boxes[..., axis]
        torch.testing.assert_close(mirrored.boxes, wanted)


def test_an_empty_batch_and_images_without_objects(data: TrainingSet) -> None:
    pictures, targets = data.batch([], EVERYTHING, generator(0), strong=True)
    assert pictures.shape == (0, 3, SIZE, SIZE)
    assert targets.boxes.shape == (0, 1, 4)
    bare = training_set(smooth_images(0, [(64, 64)]), [[]])
    pictures, targets = bare.batch([0, 0], EVERYTHING, generator(0), strong=True)
    assert pictures.isfinite().all()
    assert targets.boxes.shape == (2, 1, 4)
    assert not targets.present.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_gpu_makes_the_same_batch(data: TrainingSet, on_gpu: bool) -> None:
    """Held on the GPU or in pinned memory; objects exactly, pixels up to rounding."""
    device = torch.device("cuda:0")
    images = data.images.to(device) if on_gpu else data.images.pin_memory()
    there = dataclasses.replace(data, device=device, images=images)
    wanted, objects = data.batch(range(5), EVERYTHING, generator(4), strong=True)
    got, found = there.batch(range(5), EVERYTHING, generator(4), strong=True)
    assert got.device == found.boxes.device == device
    assert torch.equal(found.boxes.cpu(), objects.boxes)
    assert torch.equal(found.classes.cpu(), objects.classes)
    # A pixel on the very edge of an image may fall on either side.
    different = ((got.cpu() - wanted).abs() > 1e-3).float().mean()
    assert different < 1e-3
