"""Small YOLOv6 networks with random weights, and graphs made of them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch
from torch import nn

from support.training_data import tiny_architecture
from trt_yolov6.detectors.spec import DetectorSpec
from trt_yolov6.graph.export import ExportSettings, export_onnx
from trt_yolov6.graph.model import Graph
from trt_yolov6.models import Architecture, YOLOv6, architecture
from trt_yolov6.models.head import HeadLevel
from trt_yolov6.spec import BatchProfile
from trt_yolov6.training.qat.onnx_module import GraphNetwork

ONE = BatchProfile(1, 1, 1)


TINY = dataclasses.replace(
    architecture("yolov6n", num_classes=5),
    stage_channels=(8, 8, 16, 16, 24),
    neck_channels=(16, 8, 8, 16, 16, 24),
    stage_repeats=(1, 2, 2, 2),
    neck_repeats=(1, 1, 1, 2),
)
"""N with fewer and narrower layers: tracing takes a second."""


KINDS = {
    "plain": TINY,
    "csp, dfl": dataclasses.replace(TINY, csp_ratio=0.5, reg_max=16),
    "silu, dfl": dataclasses.replace(
        TINY, block="conv", activation="silu", csp_ratio=0.5, reg_max=7
    ),
    "v0.1": dataclasses.replace(TINY, head="offset"),
    "leaky": dataclasses.replace(TINY, activation="leaky_relu", neck_activation="leaky_relu"),
}


def random_model(arch: Architecture = TINY) -> YOLOv6:
    """A network whose weights and statistics are random, so that an error anywhere shows."""
    torch.manual_seed(0)
    model = YOLOv6(arch).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for level in model.head.levels:
        assert isinstance(level, HeadLevel)
        assert level.cls_pred.bias is not None
        nn.init.normal_(level.cls_pred.weight, 0, 0.5)
        nn.init.zeros_(level.cls_pred.bias)
        if level.obj_pred is not None:
            assert level.obj_pred.bias is not None
            nn.init.constant_(level.obj_pred.bias, 2)
    return model


FOUR_LEVELS = dataclasses.replace(
    TINY,
    neck="bifusion",
    activation="leaky_relu",
    pooling="cspsppf",
    stage_channels=(8, 8, 16, 16, 24, 24),
    neck_channels=(24, 16, 8, 8, 16, 16, 16, 8, 24),
    stage_repeats=(1,) * 5,
    neck_repeats=(1,) * 6,
)
ARCHITECTURES = {
    "repvgg": tiny_architecture(),
    "csp and dfl": KINDS["csp, dfl"],
    "offset head": KINDS["v0.1"],
}
SMALL = ExportSettings((64, 64))


def random_network(arch: Architecture) -> YOLOv6:
    """A network whose every weight is random, biases and shortcut factors as well."""
    torch.manual_seed(0)
    model = YOLOv6(arch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@functools.cache
def tiny_graph(name: str, settings: ExportSettings = SMALL) -> tuple[YOLOv6, Graph]:
    """Return a network and its export, which is what takes time; not to be changed."""
    model = random_network(ARCHITECTURES[name])
    proto = export_onnx(model, settings, ("square", "disc"), verify=False)
    graph = Graph(
        model=proto,
        name="tiny",
        detector=DetectorSpec(("square", "disc"), (64, 64)),
        batch=settings.batch,
        precision="fp32",
        source=Path("tiny"),
    )
    return model, graph


def moved(network: GraphNetwork, seed: int) -> GraphNetwork:
    """Leave a network as training might: every weight and every scale moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.weight_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * parameter.abs().mean() * noise)
        for parameter in network.scale_parameters():
            parameter.add_(5 * torch.randn(parameter.shape, generator=generator))
    return network
