"""The network family: its sizes are the paper's, its outputs decode by the written formulas."""

from __future__ import annotations

import dataclasses
import functools
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
    count_flops,
    count_parameters,
    fuse,
)
from trt_yolov6.models.decode import decode
from trt_yolov6.models.head import HeadLevel
from trt_yolov6.models.lite import DepthwisePair

# Table 1 of the paper: millions of parameters and GFLOPs at 640 of the deploy form. It prints 36.7
# for T; the authors' code counts 36.6, as here. The row after L-ReLU is the T of their v0.2
# configuration, as counted on their models. From there on it is their README for 0.3 and 0.4, at
# 1280 for P6.
DEPLOY_SIZES = {
    "yolov6n": (4.3, 11.1),
    "yolov6t": (15.0, 36.6),
    "yolov6s": (17.2, 44.2),
    "yolov6m": (34.3, 82.2),
    "yolov6l": (58.5, 144.0),
    "yolov6l_relu": (58.5, 144.0),
    "yolov6t_released": (9.7, 24.9),
    "yolov6n_v3": (4.7, 11.4),
    "yolov6s_v3": (18.5, 45.3),
    "yolov6m_v3": (34.9, 85.8),
    "yolov6l_v3": (59.6, 150.7),
    "yolov6n6": (10.4, 49.8),
    "yolov6s6": (41.4, 198.0),
    "yolov6m6": (79.6, 379.5),
    "yolov6l6": (140.4, 673.4),
    "yolov6n_qa": (4.7, 11.4),
    "yolov6s_qa": (18.5, 45.3),
    "yolov6m_qa": (34.9, 85.8),
    "yolov6s_mbla": (11.6, 29.8),
    "yolov6m_mbla": (26.1, 66.7),
    "yolov6l_mbla": (46.3, 118.2),
    "yolov6x_mbla": (78.8, 199.0),
}
# Millions of parameters and GFLOPs done (transposed convolutions counted once) of the authors'
# models after their own fusing, as counted on them; at 640, P6 at 1280, Lite at 320.
COUNTED_SIZES = {
    "yolov6n_v3": (4.65, 11.32),
    "yolov6s_v3": (18.54, 44.97),
    "yolov6m_v3": (34.86, 85.09),
    "yolov6l_v3": (59.61, 149.47),
    "yolov6n6": (10.37, 49.33),
    "yolov6s6": (41.39, 196.10),
    "yolov6m6": (79.64, 375.28),
    "yolov6l6": (140.36, 665.83),
    "yolov6s_mbla": (11.61, 29.44),
    "yolov6m_mbla": (26.06, 65.94),
    "yolov6l_mbla": (46.27, 116.96),
    "yolov6x_mbla": (78.83, 197.70),
    "yolov6n_base": (4.66, 11.36),
    "yolov6s_base": (13.17, 30.17),
    "yolov6m_base": (28.33, 71.48),
    "yolov6l_base": (59.61, 149.47),
}
LITE_SIZES = {
    # README's millions of parameters, those counted on the authors' models, and GFLOPs.
    "yolov6lite_s": (0.55, 0.554, 0.544),
    "yolov6lite_m": (0.79, 0.786, 0.645),
    "yolov6lite_l": (1.09, 1.091, 0.843),
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


def test_the_tables_cover_every_variant() -> None:
    assert {*DEPLOY_SIZES, *COUNTED_SIZES, *LITE_SIZES} == VARIANTS.keys()


@functools.cache
def deployed(name: str) -> YOLOv6:
    return fuse(shapes_only(name))


def flops_done(model: YOLOv6) -> int:
    """Count as PyTorch does, and the expectations over distance bins."""
    size = model.arch.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        levels = model.raw(torch.empty(1, 3, size, size, device="meta"))
    bins = sum(level[1].numel() for level in levels) if model.arch.reg_max else 0
    return int(counter.get_total_flops()) + 2 * bins


def published(number: float) -> float:
    """Round as the authors' README does: to one digit what their code prints with two."""
    return round(round(number, 2), 1)


@pytest.mark.parametrize("name", DEPLOY_SIZES)
def test_deploy_form_has_the_published_size(name: str) -> None:
    model = deployed(name)
    flops = count_flops(model, model.arch.image_size)
    sizes = (published(count_parameters(model) / 1e6), published(flops / 1e9))
    assert sizes == DEPLOY_SIZES[name]


@pytest.mark.parametrize("name", COUNTED_SIZES)
def test_deploy_form_has_the_size_counted_on_the_authors_models(name: str) -> None:
    model = deployed(name)
    sizes = (count_parameters(model) / 1e6, flops_done(model) / 1e9)
    assert tuple(round(size, 2) for size in sizes) == COUNTED_SIZES[name]


@pytest.mark.parametrize("name", LITE_SIZES)
def test_lite_has_the_published_size(name: str) -> None:
    readme, counted, flops = LITE_SIZES[name]
    training, model = shapes_only(name), deployed(name)
    # Weight and shift of the normalizations that are folded here, and not by the authors.
    pairs = [module for module in training.modules() if isinstance(module, DepthwisePair)]
    left = sum(4 * pair.pointwise.conv.out_channels for pair in pairs)
    parameters = (count_parameters(model) + left) / 1e6
    assert round(parameters, 2) == readme
    assert round(parameters, 3) == counted
    # Counted on theirs, which have normalizations left.
    assert flops_done(model) / 1e9 == pytest.approx(flops, abs=0.0015)


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
    model = YOLOv6(architecture("yolov6n")).train()
    count_flops(model, 64)
    assert model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not any(module._forward_hooks for module in model.modules())


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no variant 'yolov6x'.*yolov6n"):
        architecture("yolov6x")


def test_random_weights_start_from_the_prior_probability() -> None:
    model = YOLOv6(architecture("yolov6n", num_classes=7))
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
        for module in YOLOv6(architecture("yolov6n")).modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    ]
    assert norms
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}


def test_outputs_are_ordered_level_by_level_on_images_that_are_not_square() -> None:
    arch = architecture("yolov6n", num_classes=5)
    model = YOLOv6(arch).eval()
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
