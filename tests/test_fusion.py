"""Fusing changes the form of a network and nothing that it computes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from trt_yolov6.models import (
    VARIANTS,
    Architecture,
    YOLOv6,
    architecture,
    fold_shortcuts,
    fuse,
    is_fused,
)
from trt_yolov6.models.blocks import BottleRep, ConvBN, CSPStack, QARepConv, RepConv
from trt_yolov6.models.fusion import fuse_normalization, fuse_qarep_conv, fuse_rep_conv

pytestmark = pytest.mark.usefixtures("one_thread")


def randomize_statistics(model: nn.Module) -> None:
    """Give every batch normalization, and every shortcut weight, random values of their own."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.3, 0.3, generator=generator)
            module.running_mean.uniform_(-0.3, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2.0, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            parameter.data.uniform_(0.3, 1.2, generator=generator)


def narrowed(arch: Architecture) -> Architecture:
    """The same kinds of layers, at most two in a row, with an eighth of the channels."""
    if arch.neck == "lite":
        return arch
    return dataclasses.replace(
        arch,
        stage_repeats=tuple(min(count, 2) for count in arch.stage_repeats),
        neck_repeats=tuple(min(count, 2) for count in arch.neck_repeats),
        stage_channels=tuple(channels // 8 for channels in arch.stage_channels),
        neck_channels=tuple(channels // 8 for channels in arch.neck_channels),
    )


# Of the later ones, one for each kind of block, stack, neck and pooling.
LATER = ("yolov6n_v3", "yolov6l6", "yolov6n_qa", "yolov6m_qa", "yolov6s_mbla", "yolov6lite_s")
FUSED = (*(name for name in VARIANTS if VARIANTS[name].neck == "pan"), *LATER)


def largest_difference(model: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    """Largest difference of boxes or scores, each relative to its largest value."""
    with torch.no_grad():
        pairs = zip(model(images), other(images), strict=True)
        return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.fixture(scope="module", params=FUSED)
def double_model(request: pytest.FixtureRequest) -> YOLOv6:
    """A variant, narrowed, with random weights and statistics in double precision."""
    torch.manual_seed(0)
    model = YOLOv6(narrowed(architecture(request.param, num_classes=4))).double().eval()
    randomize_statistics(model)
    return model


def test_fused_network_computes_the_same(double_model: YOLOv6) -> None:
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    assert largest_difference(double_model, fuse(double_model), images) < 1e-9


def test_in_single_precision_fusing_adds_no_more_than_rounding(double_model: YOLOv6) -> None:
    # Random weights amplify rounding layer after layer, so the yardstick is the error that single
    # precision makes without fusing.
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    single = copy.deepcopy(double_model).float()
    with torch.no_grad():
        exact = double_model.raw(images)
        plain = single.raw(images.float())
        fused = fuse(single).raw(images.float())
    for exact_level, plain_level, fused_level in zip(exact, plain, fused, strict=True):
        for truth, a, b in zip(exact_level, plain_level, fused_level, strict=True):
            rounding = (a - truth).abs().max()
            assert (b - truth).abs().max() <= 5 * rounding + 1e-6 * truth.abs().max()


def test_the_offset_head_is_fused_too() -> None:
    torch.manual_seed(0)
    arch = dataclasses.replace(architecture("yolov6n"), head="offset")
    model = YOLOv6(arch).double().eval()
    randomize_statistics(model)
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    assert largest_difference(model, fuse(model), images) < 1e-9


def test_the_result_is_in_deploy_form_and_the_original_untouched() -> None:
    model = YOLOv6(architecture("yolov6n")).train()
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    assert is_fused(fused)
    assert not fused.training
    assert not is_fused(model)
    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fused.parameters()}
    assert not shared


def test_fusing_twice_changes_nothing() -> None:
    model = fuse(YOLOv6(architecture("yolov6n")))
    once, twice = model.state_dict(), fuse(model).state_dict()
    assert once.keys() == twice.keys()
    assert all(torch.equal(value, once[key]) for key, value in twice.items())


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_folds_as_pytorch_folds_it(bias: bool) -> None:
    block = ConvBN(6, 5, 3, stride=2, act="silu", bias=bias).double().eval()
    randomize_statistics(block)
    expected = fuse_conv_bn_eval(block.conv, block.bn)
    folded = fuse_normalization(block.conv, block.bn, block.act).conv
    assert folded.bias is not None
    assert expected.bias is not None
    torch.testing.assert_close(folded.weight, expected.weight)
    torch.testing.assert_close(folded.bias, expected.bias)


@pytest.mark.parametrize(("out_channels", "stride"), [(8, 1), (8, 2), (12, 1)])
def test_a_block_folds_with_and_without_its_identity_branch(out_channels: int, stride: int) -> None:
    block = RepConv(8, out_channels, stride).double().eval()
    assert (block.identity is not None) == (out_channels == 8 and stride == 1)
    randomize_statistics(block)
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(fuse_rep_conv(block)(x), block(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("out_channels", "stride"), [(8, 1), (8, 2), (12, 1)])
def test_a_qarepvgg_block_folds_into_one_convolution(out_channels: int, stride: int) -> None:
    block = QARepConv(8, out_channels, stride).double().eval()
    assert (block.average is not None) == (out_channels == 8 and stride == 1)
    randomize_statistics(block)
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(fuse_qarep_conv(block)(x), block(x), rtol=1e-12, atol=1e-12)


def test_branches_that_are_folded_already_fold_into_one_convolution() -> None:
    block = RepConv(8, 8).double().eval()
    randomize_statistics(block)
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
    expected = block(x)
    for name in ("dense", "pointwise"):
        branch = getattr(block, name)
        setattr(block, name, fuse_normalization(branch.conv, branch.bn, branch.act))
    torch.testing.assert_close(fuse_rep_conv(block)(x), expected, rtol=1e-12, atol=1e-12)


def random_stacks(variant: str) -> YOLOv6:
    """Return a fused network with random shortcut weights, in double precision."""
    torch.manual_seed(0)
    model = YOLOv6(narrowed(architecture(variant, 3))).double().eval()
    randomize_statistics(model)
    for block in model.modules():
        if isinstance(block, BottleRep) and block.alpha is not None:
            block.alpha.data.uniform_(0.8, 1.25)
    return fuse(model)


def weights_of_shortcuts(model: YOLOv6) -> list[float | None]:
    return [
        None if block.alpha is None else float(block.alpha.detach())
        for block in model.modules()
        if isinstance(block, BottleRep)
    ]


@pytest.mark.parametrize("variant", ["yolov6m", "yolov6l_relu"])
def test_shortcuts_after_relu_lose_their_weights_and_nothing_else(variant: str) -> None:
    model = random_stacks(variant)
    folded = copy.deepcopy(model)
    fold_shortcuts(folded)
    assert None not in weights_of_shortcuts(model)
    assert set(weights_of_shortcuts(folded)) == {None}
    images = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    assert largest_difference(model, folded, images) < 1e-9


@pytest.mark.parametrize("weight", [-0.5, 0.0, 1e-9, 1e9, float("nan")])
def test_a_weight_that_cannot_be_divided_by_stays(weight: float) -> None:
    model = random_stacks("yolov6m")
    stack = next(module for module in model.modules() if isinstance(module, CSPStack))
    block = stack.bottlenecks[-1]
    assert isinstance(block, BottleRep)
    assert block.alpha is not None
    block.alpha.data.fill_(weight)
    before = copy.deepcopy(stack.state_dict())
    fold_shortcuts(model)
    after = stack.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) or key.endswith("alpha") for key in before)
    assert None in weights_of_shortcuts(model), "other stacks are folded"


def test_shortcuts_after_another_activation_keep_their_weights() -> None:
    model = random_stacks("yolov6l")
    before = weights_of_shortcuts(model)
    fold_shortcuts(model)
    assert weights_of_shortcuts(model) == before
