"""The schedule: learning rates, accumulation, order of images, the average of the weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trt_yolov6.models import YOLOv6, architecture
from trt_yolov6.training.ema import WeightAverage, average_for, floating_state
from trt_yolov6.training.optimizer import (
    OptimizerSettings,
    largest_norm,
    make_optimizer,
    parameter_groups,
    set_rates,
)
from trt_yolov6.training.schedule import (
    Plan,
    cosine,
    derived_seed,
    epoch_order,
    evaluation_epochs,
    is_last_phase,
    learning_rate,
    make_plan,
    momentum,
)


def plan_of(images: int = 292, batch: int = 32, epochs: int = 125) -> Plan:
    return make_plan(images, batch=batch, epochs=epochs, warmup_epochs=3)


def test_an_epoch_has_full_batches_only() -> None:
    assert plan_of(292, 32).steps_per_epoch == 9
    assert plan_of(300, 32).steps_per_epoch == 9
    assert plan_of(310, 32).steps_per_epoch == 10
    assert plan_of(8, 32).steps_per_epoch == 1


def test_the_warm_up_is_the_authors_but_for_short_trainings() -> None:
    coco = make_plan(118287, batch=256, epochs=300, warmup_epochs=3)
    assert coco.warmup_steps == 3 * coco.steps_per_epoch
    assert make_plan(20000, batch=256, epochs=300, warmup_epochs=3).warmup_steps == 1000
    assert plan_of().warmup_steps == round(125 * 9 / 10)
    assert make_plan(292, batch=32, epochs=125, warmup_epochs=0).warmup_steps == 0
    # Its first step, at a learning rate of 0, would be a training's only one.
    assert make_plan(3, batch=32, epochs=1, warmup_epochs=3).warmup_steps == 0


@given(
    images=st.integers(1, 500),
    batch=st.integers(1, 80),
    epochs=st.integers(1, 12),
    warmup=st.floats(0, 3),
)
def test_no_gradient_is_carried_over_an_epoch(
    images: int, batch: int, epochs: int, warmup: float
) -> None:
    plan = make_plan(images, batch=batch, epochs=epochs, warmup_epochs=warmup)
    assert len(plan.updates) == plan.total_steps
    assert all(plan.updates[plan.steps_per_epoch - 1 :: plan.steps_per_epoch])
    longest = max(1, round(64 / batch))
    gap = 0
    for update in plan.updates:
        gap += 1
        assert gap <= longest
        gap = 0 if update else gap


def test_accumulation_grows_while_warming_up() -> None:
    plan = make_plan(1600, batch=16, epochs=20, warmup_epochs=1)
    lengths = []
    gathered = 0
    for update in plan.updates:
        gathered += 1
        if update:
            lengths.append(gathered)
            gathered = 0
    assert lengths[0] == 1
    assert lengths[-1] == 4
    assert sorted(lengths[: plan.warmup_steps // 4]) == lengths[: plan.warmup_steps // 4]
    assert all(make_plan(64, batch=16, epochs=2, warmup_epochs=0, accumulate=1).updates)


def test_rates_follow_the_closed_forms() -> None:
    plan = plan_of()
    peak, final = 0.02, 0.01
    assert learning_rate(plan, 0, start=0, peak=peak, final=final) == 0
    assert learning_rate(plan, 0, start=0.1, peak=peak, final=final) == 0.1
    for step in (plan.warmup_steps, 500, plan.total_steps - 1):
        x = step / plan.total_steps
        # As the authors write it.
        expected = peak * (((1 - math.cos(x * math.pi)) / 2) * (final - 1) + 1)
        assert learning_rate(plan, step, start=0, peak=peak, final=final) == pytest.approx(expected)
    assert cosine(1, 0.01) == pytest.approx(0.01)
    assert momentum(plan, 0, start=0.8, final=0.937) == 0.8
    assert momentum(plan, plan.warmup_steps, start=0.8, final=0.937) == 0.937


@given(images=st.integers(1, 60), batch=st.integers(1, 50), epoch=st.integers(0, 5))
def test_an_epoch_shows_every_image_as_often_as_it_can(images: int, batch: int, epoch: int) -> None:
    plan = plan_of(images, batch, 6)
    order = epoch_order(plan, epoch, seed=3)
    assert len(order) == plan.steps_per_epoch * batch
    counts = torch.bincount(order, minlength=images)
    assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(order, epoch_order(plan, epoch, seed=3))


def test_orders_and_seeds_differ() -> None:
    plan = plan_of()
    assert not torch.equal(epoch_order(plan, 0, 0), epoch_order(plan, 1, 0))
    assert not torch.equal(epoch_order(plan, 0, 0), epoch_order(plan, 0, 1))
    seeds = {derived_seed(s, "batch", i) for s in range(20) for i in range(200)}
    assert len(seeds) == 20 * 200


def test_when_the_last_epochs_begin_and_when_it_is_evaluated() -> None:
    assert [is_last_phase(epoch, 20, 15) for epoch in (0, 4, 5, 19)] == [False, False, True, True]
    assert not is_last_phase(19, 20, 0)
    assert list(evaluation_epochs(20, 8, 5)) == [7, 15, 17, 19]
    assert list(evaluation_epochs(7, 0, 2)) == [6]


def test_only_kernels_decay() -> None:
    model = YOLOv6(architecture("yolov6m", 3))
    scales, kernels, biases = parameter_groups(model)
    together = [*scales, *kernels, *biases]
    assert {id(p) for p in together} == {id(p) for p in model.parameters()}
    assert len(together) == len(list(model.parameters()))
    convolutions = [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d)
    ]
    for module in convolutions:
        wanted = scales if isinstance(module, nn.BatchNorm2d) else kernels
        assert any(module.weight is parameter for parameter in wanted)
    optimizer = make_optimizer(model, OptimizerSettings(), 32, fused=False)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 5e-4, 0.0]
    large = make_optimizer(model, OptimizerSettings(), 256, fused=False)
    assert large.param_groups[1]["weight_decay"] == pytest.approx(2e-3)
    set_rates(optimizer, OptimizerSettings(), plan_of(), 0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0, 0.1]
    assert {group["momentum"] for group in optimizer.param_groups} == {0.8}


def test_the_largest_norm_grows_with_the_images_whose_gradients_are_summed() -> None:
    clipped = OptimizerSettings(clip_norm=10)
    assert [largest_norm(clipped, batch) for batch in (8, 32, 64, 256)] == [10, 10, 10, 40]
    assert largest_norm(OptimizerSettings(clip_norm=10, accumulate=1), 32) == 5
    assert largest_norm(OptimizerSettings(), 32) is None


def test_the_average_is_that_of_its_definition() -> None:
    torch.manual_seed(0)
    model = YOLOv6(architecture("yolov6n", 2))
    average = WeightAverage(model, decay=0.9, ramp=4)
    expected = {name: value.clone() for name, value in floating_state(copy.deepcopy(model)).items()}
    for update in range(1, 4):
        with torch.no_grad():
            for value in floating_state(model).values():
                value.add_(torch.randn_like(value))
        average.update()
        decay = 0.9 * (1 - math.exp(-update / 4))
        for name, value in floating_state(model).items():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
    found = floating_state(average.model)
    assert any("running_var" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_the_average_is_the_authors_for_long_trainings_and_shorter_for_short_ones() -> None:
    decay, ramp = average_for(138_600)
    assert decay == pytest.approx(0.9999, abs=1e-5)
    assert ramp == pytest.approx(2000, rel=0.05)
    decay, ramp = average_for(625)
    assert 1 / (1 - decay) == pytest.approx(0.07 * 625)
    assert ramp < 20
    assert average_for(625, 0.5)[0] == 0.5
