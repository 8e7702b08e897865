"""The network family: its sizes are the paper's, its outputs decode by the written formulas."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trt_yolov6.errors import UserError
from trt_yolov6.models import (
    VARIANTS,
    YOLOv6,
    architecture,
    build_model,
    count_flops,
    count_parameters,
    fuse,
)
from trt_yolov6.models.decode import decode
from trt_yolov6.models.head import HeadLevel

# Table 1 of the paper: millions of parameters and GFLOPs at 640 of the deploy form. It prints 36.7
# for T; the authors' code counts 36.6, as here. The last row is the T of
# their v0.2 configuration, as counted on their models.
DEPLOY_SIZES = {
    "yolov6n": (4.3, 11.1),
    "yolov6t": (15.0, 36.6),
    "yolov6s": (17.2, 44.2),
    "yolov6m": (34.3, 82.2),
    "yolov6l": (58.5, 144.0),
    "yolov6l_relu": (58.5, 144.0),
    "yolov6t_released": (9.7, 24.9),
}

# Millions of parameters of the authors' models in training form.
TRAINING_SIZES = {
    "yolov6n": 4.74,
    "yolov6s": 18.87,
    "yolov6m": 37.17,
    "yolov6l": 58.59,
    "yolov6l_relu": 63.54,
}


def shapes_only(name: str) -> YOLOv6:
    with torch.device("meta"):
        return YOLOv6(architecture(name))


def test_the_table_covers_every_variant() -> None:
    assert DEPLOY_SIZES.keys() == VARIANTS.keys()


@pytest.mark.parametrize("name", DEPLOY_SIZES)
def test_deploy_form_has_the_papers_size(name: str) -> None:
    deployed = fuse(shapes_only(name))
    sizes = (count_parameters(deployed) / 1e6, count_flops(deployed, 640) / 1e9)
    assert tuple(round(size, 1) for size in sizes) == DEPLOY_SIZES[name]


@pytest.mark.parametrize("name", TRAINING_SIZES)
def test_training_form_has_the_authors_size(name: str) -> None:
    assert round(count_parameters(shapes_only(name)) / 1e6, 2) == TRAINING_SIZES[name]


def test_flops_exceed_pytorchs_count_by_the_transposed_convolutions_alone() -> None:
    model = fuse(shapes_only("yolov6n"))
    with FlopCounterMode(display=False) as counter:
        model.raw(torch.empty(1, 3, 96, 160, device="meta"))
    # up5 doubles a map of 3x5 with 64 channels, up4 one of 6x10 with 32; each weight is used once
    # an input position, and the paper counts it once an output position, of which there are four.
    done = 2 * 4 * (64 * 64 * 3 * 5 + 32 * 32 * 6 * 10)
    assert count_flops(model, (96, 160)) == counter.get_total_flops() + 3 * done


def test_flops_grow_with_the_area() -> None:
    model = shapes_only("yolov6n")
    assert count_flops(model, 640) == 100 * count_flops(model, 64)


def test_counting_leaves_the_model_alone() -> None:
    model = build_model(architecture("yolov6n")).train()
    count_flops(model, 64)
    assert model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not any(module._forward_hooks for module in model.modules())


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no variant 'yolov6x'.*yolov6n"):
        architecture("yolov6x")


def test_random_weights_start_from_the_prior_probability() -> None:
    model = build_model(architecture("yolov6n", num_classes=7))
    for level in model.head.levels:
        assert isinstance(level, HeadLevel)
        assert level.cls_pred.bias is not None
        assert level.reg_pred.bias is not None
        scores = torch.sigmoid(level.cls_pred.bias)
        torch.testing.assert_close(scores, torch.full((7,), 0.01))
        assert (level.reg_pred.bias == 1).all()


def test_batch_normalizations_have_the_papers_constants() -> None:
    norms = [
        module
        for module in build_model(architecture("yolov6n")).modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    ]
    assert norms
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}


def test_outputs_are_ordered_level_by_level_on_images_that_are_not_square() -> None:
    arch = architecture("yolov6n", num_classes=5)
    model = build_model(arch).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        levels = model.raw(images)
        boxes, scores = model(images)
    assert [tuple(cls.shape) for cls, _ in levels] == [(2, 5, 8, 12), (2, 5, 4, 6), (2, 5, 2, 3)]
    assert boxes.shape == (2, 4, 126)
    assert scores.shape == (2, 5, 126)
    torch.testing.assert_close(scores[:, :, 96 + 7], torch.sigmoid(levels[1][0][:, :, 1, 1]))


def random_levels(channels: tuple[int, ...]) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(2, c, *size, generator=generator, dtype=torch.float64) for c in channels)
        for size in ((8, 12), (4, 6), (2, 3))
    ]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_distance_head_decodes_by_its_formula() -> None:
    arch = architecture("yolov6n", num_classes=2)
    levels = random_levels((2, 4))
    boxes, scores = decode(levels, arch)
    anchor = 0
    for (cls, reg), stride in zip(levels, (8, 16, 32), strict=True):
        for y in range(cls.shape[2]):
            for x in range(cls.shape[3]):
                left, top, right, bottom = reg[1, :, y, x].tolist()
                cx, cy = x + 0.5, y + 0.5
                expected = np.array([cx - left, cy - top, cx + right, cy + bottom]) * stride
                np.testing.assert_allclose(boxes[1, :, anchor], expected, rtol=1e-12)
                assert scores[1, 1, anchor].item() == pytest.approx(sigmoid(cls[1, 1, y, x].item()))
                anchor += 1
    assert anchor == boxes.shape[2]


def test_distribution_head_decodes_to_expected_distances() -> None:
    arch = architecture("yolov6m", num_classes=2)
    levels = random_levels((2, 68))
    boxes, _ = decode(levels, arch)
    reg = levels[1][1].numpy()
    bins = np.exp(reg[0, :, 2, 3]).reshape(4, 17)
    left, top, right, bottom = (bins * np.arange(17)).sum(1) / bins.sum(1)
    expected = np.array([3.5 - left, 2.5 - top, 3.5 + right, 2.5 + bottom]) * 16
    np.testing.assert_allclose(boxes[0, :, 96 + 2 * 6 + 3], expected, rtol=1e-12)


def test_offset_head_of_v01_decodes_by_its_formula() -> None:
    arch = dataclasses.replace(architecture("yolov6n", num_classes=2), head="offset")
    levels = random_levels((2, 4, 1))
    boxes, scores = decode(levels, arch)
    cls, reg, obj = levels[2]
    dx, dy, log_w, log_h = reg[0, :, 1, 2].tolist()
    cx, cy, w, h = (2 + dx) * 32, (1 + dy) * 32, math.exp(log_w) * 32, math.exp(log_h) * 32
    anchor = 96 + 24 + 1 * 3 + 2
    expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    np.testing.assert_allclose(boxes[0, :, anchor], expected, rtol=1e-12)
    expected_score = sigmoid(cls[0, 0, 1, 2].item()) * sigmoid(obj[0, 0, 1, 2].item())
    assert scores[0, 0, anchor].item() == pytest.approx(expected_score)
