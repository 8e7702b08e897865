"""Training runs: what they leave, and what they complain of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trt_yolov6.cli import main
from trt_yolov6.training.state import STATE_FILE


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return everything that was learned, in full precision."""
    state = torch.load(folder / STATE_FILE, weights_only=True)
    momenta = {
        f"momentum {index}": value["momentum_buffer"]
        for index, value in state["optimizer"]["state"].items()
    }
    averages = {f"average {name}": value for name, value in state["average"].items()}
    return {**state["model"], **averages, **momenta}


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing
    assert (one / "last.pt").read_bytes() == (other / "last.pt").read_bytes()


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["train", *arguments]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


TRAINING = """
import json, sys, torch
torch.set_num_threads(1)
from trt_yolov6.training.recipe import settings_from_json
from trt_yolov6.training.trainer import train
settings = settings_from_json(json.loads(sys.argv[1]), "test")
train(settings, sys.argv[2], resume=sys.argv[3] == "resume", progress=False, state_seconds=0)
"""
"""A training in a process of its own: its arguments are the settings, the folder, `start` or
`resume`. A state is written after every step."""
