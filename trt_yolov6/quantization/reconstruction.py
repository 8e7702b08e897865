"""Reconstruction without labels: a Q/DQ graph tuned so that it finds what the float network finds.

The deployed graph computes in PyTorch (`torch_graph`), with roundings that let gradients pass. The
scales of its activations (LSQ, Esser et al. 2020), its unrounded weights and its biases learn from
the calibration images that what comes out, and every layer's output, is as in the float network, as
in BRECQ (Li et al. 2021, equation 10), but the whole network at once: layers make up for each
other's errors. Images are mirrored and zoomed, since a few dozen are soon learned by heart; the
float network says what is right for any picture. Whether the result is better is for the held-out
images to say.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from trt_yolov6.detectors.box_similarity import iou
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.quantized import quantized_layers
from trt_yolov6.quantization.torch_anchors import READERS, AnchorTensors
from trt_yolov6.quantization.torch_graph import TorchGraph

_log = logging.getLogger(__name__)

WEIGHT_RATE, SCALE_RATE, BIAS_RATE = 0.02, 0.5, 0.002
"""Learning rates of Adam: of weights, in steps of INT8; of activations' ranges, in levels at their
end; of biases, in standard deviations of what they are added to. They fall to nothing along half a
cosine."""

_BETAS = (0.9, 0.99)

_WARM_UP = 20
"""Steps in which the rates rise."""

WATCHED_SCORE = 0.05
"""Score of the float network from which on an anchor's box and scores have to be met."""

_FEWEST_ANCHORS = 5
"""Anchors that are watched in pictures without such a score, the best ones."""

_NEW_SCORES = 0.1
"""Weight of scores that rise elsewhere."""

_ZOOM = (0.7, 1.3)
"""Factor that half of the pictures are zoomed by."""

_QUIET = 1e-3
"""Least variance that a channel's error is related to, as a part of its layer's mean."""

_VARIANCE_IMAGES = 8

_MANY_PLACES = 1024
"""Height times width of a map from which on a quarter of its places, other ones each time, tells
its error. All of them would take half as much memory again."""


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """With ten bits of mantissa a convolution on a GPU is off by more than INT8's rounding."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@_without_tf32()
def reconstruct(
    graph: Graph,
    float_model: onnx.ModelProto,
    quantized_model: onnx.ModelProto,
    images: Sequence[NDArray[Any]],
    seconds: float,
) -> onnx.ModelProto:
    """Return the Q/DQ graph with the scales, weights and biases that learned.

    Args:
        graph: says how the outputs are to be read.
        float_model: the float32 graph that was quantized, after equalization.
        quantized_model: made from it by `insert_qdq`, its weights tuned already or not; it is not
            changed.
        images: each what the graph's input takes.
        seconds: how long to learn.

    Raises:
        UserError: the graph has an operator that is not known here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = [one.output for one in quantized_layers(quantized_model) if one.has_own_codes]
    teacher = TorchGraph(float_model, layers).to(device).requires_grad_(False)
    student = TorchGraph(quantized_model, layers).to(device)
    pictures = [torch.from_numpy(one).to(device) for one in images]
    loss = _Loss(graph, layers, teacher, pictures[:_VARIANCE_IMAGES])
    student.set_bias_units({name: one.sqrt() for name, one in loss.variances.items()})
    rates = (WEIGHT_RATE, SCALE_RATE, BIAS_RATE)
    parameters = (
        student.weight_parameters(),
        student.scale_parameters(),
        student.bias_parameters(),
    )
    optimizer = torch.optim.Adam(
        [{"params": own, "lr": rate} for own, rate in zip(parameters, rates, strict=True)],
        betas=_BETAS,
    )
    rng = np.random.default_rng(0)
    start, step, queue = time.monotonic(), 0, list[int]()
    shown, count, sums = start, 0, torch.zeros(3)
    while (passed := (time.monotonic() - start) / seconds) < 1:
        rise = min(1.0, (step + 1) / _WARM_UP)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rise * (1 + math.cos(math.pi * passed)) / 2
        queue = queue or rng.permutation(len(pictures)).tolist()
        picture = varied(pictures[queue.pop()], rng)
        part = functools.partial(_quarter, places=tuple(rng.integers(0, 2, 2)))
        with torch.no_grad():
            target = teacher(picture, part)
        parts = loss(student(picture, part), target)
        optimizer.zero_grad()
        parts.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step, count, sums = step + 1, count + 1, sums + parts.detach().cpu()
        if time.monotonic() - shown > max(10.0, seconds / 10):
            boxes, scores, inside = (sums / count).tolist()
            _log.info(
                f"tuning by gradients: {step} pictures, boxes {boxes:.4f}, scores {scores:.4f}, "
                f"layers {inside:.4f}"
            )
            shown, count, sums = time.monotonic(), 0, torch.zeros(3)
    return student.cpu().learned()


class _Loss:
    """Distance of a quantized network from the float one on some pictures.

    Three parts: the boxes of the anchors that the float network gives a score, 1 - IoU weighted by
    it; their scores, and those that rise elsewhere; and the mean squared errors of all layers, each
    channel's by its variance. Of graphs with suppression inside, the last alone.
    """

    def __init__(
        self,
        graph: Graph,
        layers: Sequence[str],
        teacher: TorchGraph,
        pictures: Sequence[Tensor],
    ) -> None:
        self._read = READERS.get(graph.output_layout)
        self._size = graph.image_size
        self._finals = teacher.outputs
        self.variances: dict[str, Tensor] = {}
        """(channels,) of each layer's output."""
        with torch.no_grad():
            for picture in pictures:
                found = teacher(picture)
                for name in layers:
                    own = found[name].var((0, 2, 3), correction=0) / len(pictures)
                    self.variances[name] = self.variances.get(name, 0) + own
        for name, own in self.variances.items():
            self.variances[name] = own + _QUIET * own.mean() + torch.finfo(own.dtype).tiny

    def __call__(self, found: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
        """Return the parts of the loss, (3,)."""
        errors = [
            ((found[name] - target[name]).square().mean((0, 2, 3)) / variance).mean()
            for name, variance in self.variances.items()
        ]
        inside = torch.stack(errors).mean()
        if self._read is None:
            zero = inside.new_zeros(())
            return torch.stack([zero, zero, inside])
        own, guide = (
            self._read({name: one[name] for name in self._finals}, self._size)
            for one in (found, target)
        )
        return torch.stack([*anchor_loss(own, guide), inside])


def anchor_loss(own: AnchorTensors, guide: AnchorTensors) -> tuple[Tensor, Tensor]:
    """Return how far boxes and scores are from the float network's, see `_Loss`."""
    best = guide.scores.amax(dim=2)
    least = min(WATCHED_SCORE, float(best.flatten().topk(_FEWEST_ANCHORS).values[-1]))
    watched = best >= least
    weight = best[watched]
    total = weight.sum()
    boxes = ((1 - iou(own.corners[watched], guide.corners[watched])) * weight).sum() / total
    change = own.scores - guide.scores
    scores = change[watched].abs().sum() + _NEW_SCORES * change[~watched].clamp(min=0).sum()
    return boxes, scores / total


def _quarter(values: Tensor, places: tuple[int, int]) -> Tensor:
    """Return a layer's output (batch, channels, h, w) at every other place of large maps."""
    if values.shape[2] * values.shape[3] < _MANY_PLACES:
        return values
    return values[:, :, places[0] :: 2, places[1] :: 2].contiguous()


def varied(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """Return a picture mirrored or not, zoomed or not, as the graph takes it.

    Args:
        picture: (batch, channels, h, w) float, or (batch, h, w, channels) uint8.
        rng: decides.
    """
    rows = picture if picture.is_floating_point() else picture.permute(0, 3, 1, 2).float()
    if rng.random() < 0.5:
        rows = rows.flip(3)
    if rng.random() < 0.5:
        height, width = rows.shape[2:]
        factor = rng.uniform(*_ZOOM)
        size = max(1, round(height * factor)), max(1, round(width * factor))
        zoomed = F.interpolate(rows, size, mode="bilinear", antialias=True)
        top, left = (
            int(rng.integers(0, abs(one - other) + 1))
            for one, other in zip(size, (height, width), strict=True)
        )
        if factor >= 1:
            canvas = zoomed[:, :, top : top + height, left : left + width]
        else:
            # The mean colour stands around a smaller one.
            canvas = rows.mean(dim=(2, 3), keepdim=True).expand_as(rows).clone()
            canvas[:, :, top : top + size[0], left : left + size[1]] = zoomed
        rows = canvas
    if picture.is_floating_point():
        return rows
    return rows.round().clamp(0, 255).to(picture.dtype).permute(0, 2, 3, 1)
