"""Fake quantization: ONNX's levels forwards, the gradients of LSQ backwards."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from trt_yolov6.quantization.fake_quantize import (
    FakeQuantizer,
    Levels,
    activation_levels,
    fake_quantize,
    weight_levels,
)

INT8 = Levels(-128, 127)


def quantize_and_back(values: np.ndarray, scale: np.float32) -> np.ndarray:
    """Return values after ONNX Runtime's Q/DQ pair."""
    constants = [
        numpy_helper.from_array(np.array(scale, np.float32), "scale"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "pair", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"x": values})
    return np.asarray(result)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e3))
def test_values_are_those_of_a_pair_in_onnx_runtime(seed: int, step: float) -> None:
    rng = np.random.default_rng(seed)
    scale = np.float32(step)
    # A third are halfway between two levels, where the even one has to win.
    ties = (rng.integers(-140, 140, 300) + 0.5).astype(np.float32) * scale
    values = np.concatenate([rng.normal(0, 60, 600).astype(np.float32) * scale, ties])
    ours = fake_quantize(torch.from_numpy(values), torch.tensor(scale), INT8)
    np.testing.assert_array_equal(ours.numpy(), quantize_and_back(values, scale))


def test_the_gradient_of_values_is_passed_on_within_the_range_only() -> None:
    values = torch.tensor([-130.0, -128.0, -3.4, 0.0, 126.6, 127.0, 127.2], requires_grad=True)
    fake_quantize(values, torch.tensor(1.0), INT8).backward(torch.arange(1.0, 8.0))  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]


def test_the_gradient_of_a_scale_is_that_of_finite_differences() -> None:
    """With the rounding error of each value held still, which is what straight-through means."""
    rng = np.random.default_rng(1)
    values, weights = rng.normal(0, 3, (4, 50)), rng.normal(size=(4, 50))
    levels = Levels(-8, 7)
    scale = np.array([[0.3], [0.5], [0.71], [2.0]])

    def surrogate(step: np.ndarray) -> np.ndarray:
        held = np.clip(values / scale, levels.low, levels.high)
        left_over = np.rint(held) - held
        clipped = np.clip(values / step, levels.low, levels.high)
        total: np.ndarray = ((clipped + left_over) * step * weights).sum(axis=1)
        return total

    expected = (surrogate(scale + 1e-6) - surrogate(scale - 1e-6)) / 2e-6
    step = torch.tensor(scale, requires_grad=True)
    result = fake_quantize(torch.tensor(values), step, levels)
    (result * torch.tensor(weights)).sum().backward()  # type: ignore[no-untyped-call]
    assert step.grad is not None
    np.testing.assert_allclose(step.grad.numpy()[:, 0], expected, rtol=1e-6, atol=1e-7)


def test_the_gradient_of_a_scale_is_lsq_s_closed_form() -> None:
    values = torch.tensor([0.4, 2.6, 100.0, -100.0], dtype=torch.float64)
    for index, expected in enumerate([0 - 0.2, 1 - 1.3, 7, -8]):
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        fake_quantize(values[index], scale, Levels(-8, 7)).backward()  # type: ignore[no-untyped-call]
        assert scale.grad is not None
        assert scale.grad.item() == pytest.approx(expected)


def test_under_autocast_it_rounds_in_float32() -> None:
    values = torch.linspace(-3, 3, 999)
    scale = torch.tensor(3 / 127)
    with torch.autocast("cpu", torch.bfloat16):
        within = fake_quantize(values, scale, INT8)
        half = fake_quantize(values.bfloat16(), scale, INT8)
    assert within.dtype == torch.float32
    assert torch.equal(within, fake_quantize(values, scale, INT8))
    # What comes in half precision is divided in full, and leaves rounded to its own type.
    expected = fake_quantize(values.bfloat16().float(), scale, INT8).bfloat16()
    assert torch.equal(half, expected)


def test_a_learned_scale_starts_exactly_from_the_calibrated_one_and_a_fixed_one_stays() -> None:
    scale = torch.tensor([[0.1], [0.7]])
    for learn in (True, False):
        quantizer = FakeQuantizer(scale, INT8, learn=learn)
        assert torch.equal(quantizer.scale, scale)
        assert len(list(quantizer.parameters())) == learn
        values = torch.randn(2, 30, requires_grad=True)
        quantizer(values).square().sum().backward()
        optimizer = torch.optim.Adam([values, *quantizer.parameters()], lr=0.1)
        optimizer.step()
        assert torch.equal(quantizer.scale, scale) == (not learn)
        quantizer.settle(scale * 2)
        assert torch.equal(quantizer.scale, scale * 2)


def test_levels_are_those_of_the_exported_types() -> None:
    assert activation_levels(8) == activation_levels(8, negative=False) == INT8
    assert weight_levels(8) == Levels(-127, 127)
    assert weight_levels(4) == Levels(-7, 7)
    assert activation_levels(4) == Levels(-8, 7)
    assert activation_levels(4, negative=False) == Levels(0, 15)
