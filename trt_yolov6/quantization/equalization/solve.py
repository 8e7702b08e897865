"""Cross-layer equalization: rescale channels so that one INT8 scale suits all of them.

With one scale per tensor, a channel whose values are 100 times smaller than its neighbours' gets
only one or two of the 255 levels. Where the channels' scale is free (see `channel_graph`), the
producing weights are multiplied and the reading weights divided by a factor per channel, as in
Nagel et al. 2019 ("Data-free quantization through weight equalization and bias correction", section
4.1).

Their rule, the geometric mean of two weight ranges, is for weights with one scale per tensor. Here
weights have one scale per output channel, so factors do not affect the producer's; they trade the
resolution of an activation's channel for that of the weights that read it, as in SmoothQuant (Xiao
et al. 2023, equation 4). Its exponent of 1/2 is chosen by hand and undefined for a channel that
several convolutions read, alone or in a concatenation. So the factors here minimize the expected
noise-to-signal ratio, summed over all convolutions. For output
channel o of a convolution with input ranges a_i and mean squares q_i, weights W_o and factors s_i:

    noise(o)  = A² Σ_i |W_oi|² / s_i²  +  max_i (max|W_oi| / s_i)² Σ_i taps q_i s_i²
    signal(o) = Σ_i |W_oi|² q_i                  A = max_i a_i s_i over all that share A's scale

in units of 1 / (12 · 127²). The first term is the rounding of the activation, the second that of
the weights. Both are products of sums and maxima of exponentials of log s, so the sum is convex in
log s: the optimum does not depend on how the network was scaled before.

Powers of two as factors would keep the float graph exact to the last bit, but cost 1.4 dB of the
3.5 dB that equalization gains on the sample. Other factors change float outputs by the rounding of
the new weights, about 1e-6 of their size.

Outputs of an activation that is not homogeneous (SiLU, HardSwish) can be rescaled, too, by a
multiplication inserted after it, as SmoothQuant does where nothing can absorb it. That saves
YOLOv6Lite-L (min-max, all convolutions in INT8): AP 0.03 without, 0.34 with it, 0.35 in float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from trt_yolov6.common.machine import single_torch_thread
from trt_yolov6.graph.index import constants_of, tensor_value
from trt_yolov6.quantization.equalization.channel_graph import (
    FIXED,
    ChannelMap,
    Convolution,
    trace_channels,
)
from trt_yolov6.quantization.equalization.rescaling import Shifts, rescale, shifts_by_source
from trt_yolov6.quantization.qdq.placement import place

if TYPE_CHECKING:
    from trt_yolov6.quantization.statistics import TensorStatistics

# Root mean square of an activation by its largest magnitude, typically; it weighs the two kinds of
# noise against each other, and both much alike over the channels.
_RMS_OF_RANGE = 0.1

# Range by standard deviation, where neither is measured.
_SPREAD = 4.0

# A channel that stays silent on the calibration images may speak on others: it counts at least as
# this part of the range that its weights let expect.
_LEAST_OF_ESTIMATE = 0.1

# Exponent of the norms that stand for maxima while minimizing, so that there are gradients.
_NORM = 64.0

# Iterations of L-BFGS. It starts where all channels have the same range, close to the optimum.
_STEPS = 20

# Factors are rounded, in octaves, so that the last bits of the search do not show in the result.
_PARTS_OF_OCTAVE = 64

# No channel moves further than this.
_MOST_OCTAVES = 16

_LEAST_LOG = math.log(1e-30)


def tensors_to_measure(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the tensors whose ranges per channel `equalize` would use, in the graph's order."""
    return tuple(dict.fromkeys(item.input for item in _readers(trace_channels(model))))


def equalize(
    model: onnx.ModelProto,
    statistics: Mapping[str, TensorStatistics] | None = None,
    *,
    smooth: bool = False,
    shift: bool = False,
) -> Solution:
    """Return the factors of a graph's channels for INT8; applied, they leave its function the same.

    The ranges of tensors change then, so they have to be collected again.

    Args:
        model: a float32 graph without Q/DQ, its nodes in topological order; it is not changed.
        statistics: ranges per channel of `tensors_to_measure(model)`, as `collect` gives them.
            Tensors without one have their ranges estimated from the weights and biases before them.
        smooth: also rescale outputs of SiLU, HardSwish and the like, by a multiplication with a
            constant per channel. TensorRT can fuse it into the activation's kernel.
        shift: also subtract the middle of each channel's range, before that multiplication, where
            `ChannelMap.shiftable` allows. SiLU and HardSwish hardly ever write values below zero,
            so half of INT8's levels would be unused.

    Raises:
        UserError: the graph is quantized already.
    """
    statistics = statistics or {}
    channels = trace_channels(model, through_activations=smooth or shift)
    shifts = _middles(channels, statistics) if shift else {}
    problem = _problem(model, channels, statistics, shifts)
    nothing = octaves = torch.zeros(problem.count, dtype=torch.float64)
    if problem.terms:
        found = (_minimum(problem) / math.log(2)).clamp(-_MOST_OCTAVES, _MOST_OCTAVES)
        octaves = (found * _PARTS_OF_OCTAVE).round() / _PARTS_OF_OCTAVE
    before, after = (problem.noise(item * math.log(2)) for item in (nothing, octaves))
    if not after < before:
        octaves = nothing
    return Solution(channels, np.exp2(octaves.numpy()).astype(np.float32), shifts)


def noise_to_signal(
    model: onnx.ModelProto, statistics: Mapping[str, TensorStatistics] | None = None
) -> float:
    """Return the objective of `equalize`, for the graph as it is.

    It is the expected ratio of INT8 noise to signal at a convolution's output, in power, averaged
    over output channels and summed over the convolutions whose input channels can be followed.
    """
    problem = _problem(model, trace_channels(model), statistics or {})
    return problem.noise(torch.zeros(problem.count, dtype=torch.float64))


@dataclass(frozen=True)
class Solution:
    """Changes to the channels of a graph: their factors and what is subtracted of them."""

    channels: ChannelMap
    factors: NDArray[np.float32]
    """(classes,)"""
    shifts: Shifts

    def applied(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return the graph, the one that this was made for, in that form."""
        return rescale(model, self.channels, self.factors, self.shifts)


def _middles(channels: ChannelMap, statistics: Mapping[str, TensorStatistics]) -> Shifts:
    """Return the middle of each channel's range, of the tensors that can be shifted."""
    count = len(shifts_by_source(channels, {}))
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    for name, sources in channels.sources.items():
        measured = statistics.get(name)
        if measured is None or measured.channels is None:
            continue
        if measured.channels.low.shape == sources.shape:
            np.minimum.at(low, sources, measured.channels.low)
            np.maximum.at(high, sources, measured.channels.high)
    seen = np.isfinite(low)
    middle = np.where(seen, (np.where(seen, low, 0) + np.where(seen, high, 0)) / 2, 0.0)
    # In float32, as the graph will have them.
    return {
        name: middle[channels.sources[name]].astype(np.float32).astype(np.float64)
        for name in channels.activations
        if name in channels.shiftable
    }


@dataclass(frozen=True)
class _Term:
    """Contribution of one convolution to the noise.

    Its channels are in groups, as its weights are: (groups, channels of a group).
    """

    classes: torch.Tensor
    """(groups, inputs) the classes of the input channels."""
    shared: int
    """Number of the scale that its input tensor is quantized with."""
    log_range: torch.Tensor
    """(groups, inputs) ln a_i"""
    rounding: torch.Tensor
    """(groups, inputs) mean over output channels of |W_oi|² / signal(o)"""
    log_peaks: torch.Tensor
    """(groups, outputs, inputs) ln max|W_oi|"""
    squares: torch.Tensor
    """(groups, inputs) taps q_i"""
    weight: torch.Tensor
    """(groups, outputs) 1 / signal(o) / number of output channels"""


@dataclass(frozen=True)
class _Problem:
    """The noise as a function of ln s of each class, sum of its terms."""

    terms: tuple[_Term, ...]
    count: int
    start: torch.Tensor
    """(classes,) ln s that gives every channel the same range, as far as the classes allow."""

    def noise(self, log_factors: torch.Tensor) -> float:
        """Return the noise for float64 (classes,) ln s."""
        tops = self._ranges(log_factors, lambda values: values.amax())
        steps = [
            (term.log_peaks - log_factors[term.classes].unsqueeze(1)).amax(dim=2)
            for term in self.terms
        ]
        return float(self._total(log_factors, tops, steps))

    def smooth_noise(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the noise with norms in place of maxima, as a function of ln s - start."""
        # Σ_i (P_oi / s_i)^n is a product of a matrix and a vector. The matrix is taken at the
        # start and relative to its rows' maxima, so that no power overflows.
        rows, powers = [], []
        for term in self.terms:
            at_start = term.log_peaks - self.start[term.classes].unsqueeze(1)
            top = at_start.amax(dim=2, keepdim=True)
            rows.append(top.squeeze(2))
            powers.append(torch.exp(_NORM * (at_start - top)))

        def noise(moved: torch.Tensor) -> torch.Tensor:
            steps = []
            for term, row, power in zip(self.terms, rows, powers, strict=True):
                inverse = torch.exp(-_NORM * moved[term.classes]).unsqueeze(2)
                steps.append(row + torch.bmm(power, inverse).squeeze(2).log() / _NORM)
            log_factors = self.start + moved
            tops = self._ranges(
                log_factors, lambda values: torch.logsumexp(_NORM * values, dim=0) / _NORM
            )
            return self._total(log_factors, tops, steps)

        return noise

    def _ranges(
        self, log_factors: torch.Tensor, highest: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Return ln A of each scale."""
        sharing: dict[int, list[torch.Tensor]] = {}
        for term in self.terms:
            scaled = term.log_range + log_factors[term.classes]
            sharing.setdefault(term.shared, []).append(scaled.reshape(-1))
        return {shared: highest(torch.cat(parts)) for shared, parts in sharing.items()}

    def _total(
        self,
        log_factors: torch.Tensor,
        tops: Mapping[int, torch.Tensor],
        steps: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for term, step in zip(self.terms, steps, strict=True):
            own = 2 * log_factors[term.classes]
            activation = torch.exp(2 * tops[term.shared]) * (term.rounding * torch.exp(-own)).sum()
            power = (term.squares * torch.exp(own)).sum(dim=1, keepdim=True)
            total = total + activation + (term.weight * torch.exp(2 * step) * power).sum()
        return total / (12 * 127**2)


def _minimum(problem: _Problem) -> torch.Tensor:
    """Return ln s of each class where the noise is least."""
    moved = torch.zeros(problem.count, dtype=torch.float64, requires_grad=True)
    free = torch.ones(problem.count, dtype=torch.float64)
    free[FIXED] = 0
    noise = problem.smooth_noise()
    optimizer = torch.optim.LBFGS([moved], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = noise(moved * free)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    # The vectors are short: handing them to several threads costs more than it saves.
    with single_torch_thread():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = (moved * free).detach()
    return problem.start + (found if found.isfinite().all() else 0)


def _problem(
    model: onnx.ModelProto,
    channels: ChannelMap,
    statistics: Mapping[str, TensorStatistics],
    shifts: Shifts | None = None,
) -> _Problem:
    weights = _weights(model, channels)
    ranges = _ranges(channels, weights, statistics)
    by_source = shifts_by_source(channels, shifts or {})
    # One name for all tensors that share a scale.
    shared = {name: group[0] for group in place(model).groups for name in group}
    numbers: dict[str, int] = {}
    terms = []
    sums, counts = np.zeros(channels.count), np.zeros(channels.count)
    for item in _readers(channels):
        weight = item.by_output(weights[item.weight]).astype(np.float64)
        own = ranges[item.input]
        power = item.read_by(len(weight), (_RMS_OF_RANGE * own) ** 2)
        energy = (weight**2).sum(axis=2)
        signal = (energy * power).sum(axis=1)
        has_signal = signal > 0
        if not has_signal.any() or own.max() <= 0:
            continue
        share = np.divide(1, signal, where=has_signal, out=np.zeros_like(signal))
        share /= has_signal.sum()
        outputs, inputs = energy.shape
        by_group = (item.groups, outputs // item.groups, inputs)
        reach = _reach(item.input, own, by_source[channels.sources[item.input]], statistics)
        with np.errstate(divide="ignore"):
            log_range = np.maximum(np.log(reach), _LEAST_LOG)
            log_peaks = np.maximum(np.log(np.abs(weight).max(axis=2)), _LEAST_LOG)
        shape = (item.groups, inputs)
        classes = channels.classes[item.input]
        terms.append(
            _Term(
                classes=torch.from_numpy(classes.astype(np.int64).reshape(shape)),
                shared=numbers.setdefault(shared.get(item.input, item.input), len(numbers)),
                log_range=torch.from_numpy(log_range.reshape(shape)),
                rounding=torch.from_numpy((energy * share[:, None]).reshape(by_group).sum(axis=1)),
                log_peaks=torch.from_numpy(log_peaks.reshape(by_group)),
                squares=torch.from_numpy(
                    (weight.shape[2] * (_RMS_OF_RANGE * own) ** 2).reshape(shape)
                ),
                weight=torch.from_numpy(share.reshape(by_group[:2])),
            )
        )
        live = reach > 0
        level = np.log(reach[live]).mean()
        np.add.at(sums, classes[live], level - np.log(reach[live]))
        np.add.at(counts, classes[live], 1)
    start = sums / np.maximum(counts, 1)
    start[FIXED] = 0
    return _Problem(tuple(terms), channels.count, torch.from_numpy(start))


def _reach(
    name: str,
    own: NDArray[np.float64],
    shift: NDArray[np.float64],
    statistics: Mapping[str, TensorStatistics],
) -> NDArray[np.float64]:
    """Return the largest magnitude of each channel of a tensor after its shift.

    Args:
        name: the tensor.
        own: (channels,) the largest magnitudes before, from `_ranges`.
        shift: (channels,) what is subtracted.
        statistics: ranges per channel.
    """
    measured = statistics.get(name)
    if not shift.any() or measured is None or measured.channels is None:
        return own + np.abs(shift)
    channels = measured.channels
    low, high = channels.low.astype(np.float64), channels.high.astype(np.float64)
    unseen = own - channels.amax
    return np.where(shift != 0, np.maximum(high - shift, shift - low) + unseen, own)


def _readers(channels: ChannelMap) -> list[Convolution]:
    return [item for item in channels.convolutions if item.input in channels.classes]


def _weights(model: onnx.ModelProto, channels: ChannelMap) -> dict[str, NDArray[np.float32]]:
    constants = constants_of(model)
    names = {name for item in channels.convolutions for name in (item.weight, item.bias) if name}
    return {name: tensor_value(constants[name]) for name in names}


def _ranges(
    channels: ChannelMap,
    weights: Mapping[str, NDArray[np.float32]],
    statistics: Mapping[str, TensorStatistics],
) -> dict[str, NDArray[np.float64]]:
    """Return the largest magnitude of each channel of the convolutions' inputs.

    It is the measured one, but at least a share of that expected from uncorrelated inputs of
    typical size, since a channel that is inactive on a few images may be active on others.
    """
    estimates: dict[int, float] = {}
    result: dict[str, NDArray[np.float64]] = {}
    for item in channels.convolutions:
        weight = item.by_output(weights[item.weight]).astype(np.float64)
        read = weight.shape[1] * item.groups
        sources = channels.sources.get(item.input)
        # Tensors that are not followed, such as the image, are assumed to be within 1.
        estimate = (
            np.ones(read)
            if sources is None
            else np.array([estimates.get(int(source), 1.0) for source in sources])
        )
        measured = statistics.get(item.input)
        if measured is not None and measured.channels is not None:
            own = measured.channels.amax.astype(np.float64)
            own = np.maximum(own, _LEAST_OF_ESTIMATE * estimate)
        else:
            own = estimate
        result[item.input] = own
        power = item.read_by(len(weight), (_RMS_OF_RANGE * own) ** 2)
        deviation = np.sqrt(((weight**2).sum(axis=2) * power).sum(axis=1))
        bias = weights[item.bias].astype(np.float64) if item.bias else 0
        written = channels.sources[item.output]
        estimates.update(
            zip(written.tolist(), (_SPREAD * deviation + np.maximum(bias, 0)).tolist(), strict=True)
        )
    return result
