"""Channel-wise distillation: what SciPy makes of the same definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trt_yolov6.training.qat.distillation import channel_divergence


def features(seed: int, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (2, 3, 4, 5)).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_is_the_divergence_of_spatial_softmaxes(temperature: float) -> None:
    softmax = pytest.importorskip("scipy.special").softmax
    entropy = pytest.importorskip("scipy.stats").entropy
    student, teacher = features(1), features(2)
    values = []
    for image in range(2):
        for channel in range(3):
            own = softmax(student[image, channel].ravel() / temperature)
            guide = softmax(teacher[image, channel].ravel() / temperature)
            values.append(entropy(guide, own))  # KL(teacher || student)
    found = channel_divergence(torch.tensor(student), torch.tensor(teacher), temperature)
    assert found.item() == pytest.approx(temperature**2 * np.mean(values), rel=1e-5)


def test_a_network_learns_nothing_from_itself() -> None:
    own = torch.tensor(features(3), requires_grad=True)
    loss = channel_divergence(own, own.detach())
    loss.backward()  # type: ignore[no-untyped-call]
    assert abs(loss.item()) < 1e-6
    assert own.grad is not None
    assert own.grad.abs().max() < 1e-7


def test_a_constant_added_to_a_channel_changes_nothing() -> None:
    own, guide = torch.tensor(features(4)), torch.tensor(features(5))
    shifted = own + torch.tensor([3.0, -2.0, 0.5]).reshape(1, 3, 1, 1)
    assert channel_divergence(shifted, guide) == pytest.approx(
        channel_divergence(own, guide).item(), rel=1e-5
    )


def test_relative_to_the_teachers_spread_rescaled_channels_are_the_same() -> None:
    own, guide = torch.tensor(features(4)), torch.tensor(features(5))
    factors = torch.tensor([1.0, 256.0, 0.01]).reshape(1, 3, 1, 1)
    plain = channel_divergence(own, guide, 2.0, relative=True)
    rescaled = channel_divergence(own * factors, guide * factors, 2.0, relative=True)
    assert rescaled.item() == pytest.approx(plain.item(), rel=1e-5)
    absolute = channel_divergence(own * factors, guide * factors, 2.0)
    assert absolute.item() > 10 * plain.item()
    # It is the divergence of activations divided by the teacher's standard deviations.
    spread = torch.from_numpy(guide.numpy().std((0, 2, 3), keepdims=True))
    expected = channel_divergence(own / spread, guide / spread, 2.0)
    assert plain.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_channel_without_spread_blows_nothing_up() -> None:
    guide = torch.tensor(features(5))
    guide[:, 0] = 3.0 + 1e-4 * guide[:, 0]
    guide[:, 1] = 0.0
    own = guide + 1e-3 * torch.tensor(features(6))
    loss = channel_divergence(own, guide, relative=True)
    assert 0 <= loss.item() < 1e-2


def test_the_teacher_gets_no_gradient() -> None:
    own, guide = (torch.tensor(features(seed), requires_grad=True) for seed in (6, 8))
    channel_divergence(own, guide, 2.0).backward()  # type: ignore[no-untyped-call]
    assert guide.grad is None
    assert own.grad is not None
