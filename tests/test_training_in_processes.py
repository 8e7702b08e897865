"""Two processes that share a batch do what one does with all of it: gradients, weights, losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.first_steps import first_steps, settings_of
from support.forks import two_that_share
from support.training_data import write_shapes, write_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST_STEPS = "from support.first_steps import main; main()"
LIMITS = {"cpu": 2e-5, "cuda": 1e-3}
"""Largest difference of the first gradient, relative to its size, by device."""
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpus)])
def test_two_processes_take_the_steps_of_one(device: str, tmp_path: Path) -> None:
    data, tiny = write_shapes(tmp_path / "data", images=16), write_tiny(tmp_path / "tiny.pt")
    output = tmp_path / "found.pt"
    with two_that_share(FIRST_STEPS, [str(data), str(tiny), device, str(output)]):
        alone = first_steps(settings_of(data, tiny), device)
    shared = torch.load(output)

    limit = LIMITS[device]
    assert len(alone["gradients"]) == len(shared["gradients"]) > 2
    for step, (one, two) in enumerate(zip(alone["gradients"], shared["gradients"], strict=True)):
        assert (one != 0).float().mean() > 0.9, "else there would be little to compare"
        # Rounding: sums are taken in another order, and each step starts from what that has made.
        assert (two - one).norm() < limit * 5**step * one.norm(), f"step {step}"
    for name in ("weights", "average", "statistics"):
        assert (shared[name] - alone[name]).norm() < 5 * limit * alone[name].norm(), name
    assert shared["losses"] == pytest.approx(alone["losses"], rel=5 * limit)
    # By themselves, NCCL waits ten minutes and Gloo thirty for a first process that evaluates.
    assert shared["longest_wait"] >= 3 * 3600
