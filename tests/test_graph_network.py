"""The exported graph as a PyTorch network: what ONNX Runtime computes, node by node."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from support.networks import ARCHITECTURES, FOUR_LEVELS, SMALL, moved, random_network, tiny_graph
from support.pictures import noise_folder
from support.quantized import prepared_sample
from support.training_data import tiny_architecture

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.errors import UserError
from trt_yolov6.graph.export import ExportSettings, export_onnx, graph_from_checkpoint
from trt_yolov6.graph.reference import reference_session
from trt_yolov6.models.decode import decode
from trt_yolov6.quantization.equalization.channel_graph import trace_channels
from trt_yolov6.quantization.equalization.rescaling import rescale
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.training.qat.export import trained_graph
from trt_yolov6.training.qat.onnx_module import GraphNetwork, feature_tensors, weight_scale
from trt_yolov6.training.qat.preparation import Start, prepare_graph

MINMAX = QuantizationSettings(calibrator="minmax", equalize=False, bias_correction=False)


def outputs_of(
    model: onnx.ModelProto, images: NDArray[Any], names: tuple[str, ...]
) -> dict[str, NDArray[Any]]:
    """Return any tensors of a graph, computed exactly."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name in names:
        copy.graph.output.add(name=name)
    session = reference_session(copy)
    found = session.run(list(names), {session.get_inputs()[0].name: images})
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unquantized_it_is_the_network_that_was_exported(name: str) -> None:
    model, graph = tiny_graph(name)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        ours, expected = GraphNetwork(graph.model, model.arch).raw(images), model.raw(images)
    for level, other in zip(ours, expected, strict=True):
        assert len(level) == len(other)
        for part, wanted in zip(level, other, strict=True):
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-4)


def test_four_levels_with_bifusion_are_the_network_that_was_exported() -> None:
    model = random_network(FOUR_LEVELS)
    graph = export_onnx(model, SMALL, verify=False)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        ours, expected = GraphNetwork(graph, model.arch).raw(images), model.raw(images)
    assert len(ours) == 4
    for level, other in zip(ours, expected, strict=True):
        for part, wanted in zip(level, other, strict=True):
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantized_it_computes_what_the_exported_graph_computes(name: str, tmp_path: Path) -> None:
    """Every quantized tensor is the same, up to one step here and there by rounding of sums."""
    arch = ARCHITECTURES[name]
    _, graph = tiny_graph(name)
    start = prepare_graph(graph, arch, noise_folder(tmp_path / "calib"), quantization=MINMAX)
    assert_as_onnx_runtime(start, np.random.default_rng(7).random((2, 3, 64, 64), np.float32))


def test_channels_moved_to_the_middle_of_their_range_are_computed_as_exported(
    tmp_path: Path,
) -> None:
    arch = ARCHITECTURES["csp and dfl"]
    _, graph = tiny_graph("csp and dfl")
    channels = trace_channels(graph.model, through_activations=True)
    rng = np.random.default_rng(5)
    shifts = {
        name: rng.normal(scale=0.1, size=len(channels.sources[name])) for name in channels.shiftable
    }
    ones = np.ones(channels.count, np.float32)
    shifted = dataclasses.replace(graph, model=rescale(graph.model, channels, ones, shifts))
    assert "Sub" in {node.op_type for node in shifted.model.graph.node}
    start = prepare_graph(shifted, arch, noise_folder(tmp_path / "calib"), quantization=MINMAX)
    assert_as_onnx_runtime(start, rng.random((2, 3, 64, 64), np.float32))


def test_after_training_too_the_sample_computes_what_its_exported_graph_computes(
    root: Path, one_thread: None
) -> None:
    start = prepared_sample(root, 128, dataclasses.replace(MINMAX, image_limit=3))
    network = moved(start.student(), seed=0)
    images = np.random.default_rng(3).random((1, 3, 128, 128), np.float32)
    assert_as_onnx_runtime(start, images, network)


class Forced(GraphNetwork):
    """Hands on the quantized tensors it is given; keeps what it would have made of each itself."""

    def force(self, tensors: dict[str, NDArray[Any]]) -> None:
        self.given = {name: torch.from_numpy(value) for name, value in tensors.items()}
        self.made: dict[str, torch.Tensor] = {}

    def _quantize_into(self, found: dict[str, Any], exact: Any, name: str) -> None:
        super()._quantize_into(found, exact, name)
        if name in self.given:
            self.made[name] = found[name]
            found[name] = self.given[name]


def assert_as_onnx_runtime(
    start: Start, images: NDArray[np.float32], network: GraphNetwork | None = None
) -> None:
    """Compare tensor by tensor, each from the same tensors before it.

    Sums of floats depend on their order, so a value halfway between two levels may go either way,
    and one such is enough to move all that follows a little: in ONNX Runtime from one version to
    the next as well.
    """
    network = network or start.student()
    trained = network.trained()
    model = trained_graph(start, trained).model
    tensors = start.quantization.placement.tensors
    names = tuple(f"{name}/dequantized" for name in tensors)
    raw = tuple(node.name for node in model.graph.output)
    expected = outputs_of(model, images, (*names, *raw))
    forced = Forced(trained.model, start.arch, start.quantization)
    forced.load_state_dict(network.state_dict())
    forced.force({name: expected[f"{name}/dequantized"] for name in tensors})
    with torch.no_grad():
        levels = forced.raw(torch.from_numpy(images))
    moved = total = 0
    assert forced.made.keys() == set(tensors)
    for name, ours in forced.made.items():
        step = np.float32(trained.amax[name]) / np.float32(127)
        steps = np.rint(np.abs(ours.numpy() - expected[f"{name}/dequantized"]) / step)
        assert steps.max() <= 1, name
        moved += int((steps > 0).sum())
        total += steps.size
    assert moved <= 1e-3 * total
    boxes, scores = decode(levels, start.arch)
    np.testing.assert_allclose(boxes.mT.numpy(), expected["boxes"], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(scores.mT.numpy(), expected["scores"], rtol=1e-4, atol=1e-5)


def test_untrained_it_gives_the_graph_of_ptq_to_the_byte(tmp_path: Path) -> None:
    arch = ARCHITECTURES["csp and dfl"]
    _, graph = tiny_graph("csp and dfl")
    start = prepare_graph(graph, arch, noise_folder(tmp_path / "calib"), quantization=MINMAX)
    ours = trained_graph(start, start.student().trained()).model
    assert ours.SerializeToString() == start.graph.model.SerializeToString()


def test_forms_of_the_graph_do_not_matter(tmp_path: Path) -> None:
    """Pixels of uint8 are normalized before the network, NMS comes after it."""
    from trt_yolov6.spec import NmsSettings

    arch = tiny_architecture()
    settings = ExportSettings((64, 64), nms=NmsSettings(), uint8_input=True)
    model, graph = tiny_graph("repvgg", settings)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours, expected = GraphNetwork(graph.model, arch).raw(images), model.raw(images)
    torch.testing.assert_close(ours[0][1], expected[0][1], rtol=1e-4, atol=1e-4)


def test_the_features_are_those_of_backbone_neck_and_head(root: Path) -> None:
    checkpoint = load_checkpoint(root / "samples" / "yolov6n_bccd.pt")
    model = graph_from_checkpoint(checkpoint, ExportSettings((64, 64))).model
    makers = {node.output[0]: node.name for node in model.graph.node}
    rooms = [makers[name].rsplit("/", 1)[0].removesuffix(".act") for name in feature_tensors(model)]
    assert sorted(rooms) == sorted(
        [
            *("backbone.stages.1.body.3", "backbone.stages.2.body.5", "backbone.sppf.merge"),
            *("neck.topdown3.3", "neck.bottomup4.3", "neck.bottomup5.3"),
            *(f"head.levels.{i}.{part}_conv" for i in range(3) for part in ("cls", "reg")),
        ]
    )


def test_another_graph_is_refused() -> None:
    _, graph = tiny_graph("repvgg")
    other = onnx.ModelProto()
    other.CopyFrom(graph.model)
    for node in other.graph.node:
        node.output[0] = node.output[0].replace("cls_8", "scores_8")
    with pytest.raises(UserError, match=r"no tensor .*exported from a YOLOv6 checkpoint"):
        GraphNetwork(other, tiny_architecture())


def test_weights_of_few_bits_are_clipped_where_that_errs_least() -> None:
    weights = torch.randn(3, 40, 3, 3, generator=torch.Generator().manual_seed(0))
    weights[0, 0, 0, 0] = 30.0
    scale = weight_scale(weights, 0, 4)
    assert scale.shape == (3, 1, 1, 1)

    def error(step: torch.Tensor) -> torch.Tensor:
        rounded = (weights / step).round().clamp(-7, 7) * step
        return (rounded - weights).square().flatten(1).sum(1)

    widest = weights.abs().amax((1, 2, 3), keepdim=True) / 7
    assert (error(scale) <= error(widest)).all()
    assert (error(scale) <= error(scale * 1.1)).all()
    assert (error(scale) <= error(scale * 0.9)).all()
    # 8 bits: the scale that the quantization package takes.
    torch.testing.assert_close(
        weight_scale(weights, 0, 8), weights.abs().amax((1, 2, 3), keepdim=True) / 127
    )


def test_gradients_are_those_of_tensors_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded tensors are kept as bytes for the way back."""
    arch = ARCHITECTURES["csp and dfl"]
    _, graph = tiny_graph("csp and dfl")
    start = prepare_graph(graph, arch, noise_folder(tmp_path / "calib"), quantization=MINMAX)
    images = torch.rand(2, 3, 64, 64)
    gradients = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(
                "trt_yolov6.training.qat.onnx_module._Compact.remember", lambda *_: None
            )
        network = start.student().train()
        parts = [part for level in network.raw(images) for part in level]
        loss = torch.stack([part.square().mean() for part in parts]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert len(gradients[0]) > 100
    for ours, expected in zip(*gradients, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None and expected is not None:
            assert torch.equal(ours, expected)
