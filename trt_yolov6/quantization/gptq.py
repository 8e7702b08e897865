"""Adaptive rounding: choose INT8 weights so that the layer's output, not the weight, is nearest.

Rounding every weight to the nearest level ignores that errors of weights with correlated inputs add
up or cancel. AdaRound (Nagel et al. 2020, "Up or down?", equation 21) learns for each weight
whether to round up or down, in thousands of gradient steps per layer. The same layer-wise objective
is a quadratic form in the weights' errors, with the inputs' second moments as its matrix, and can
be solved greedily in closed form, as here: round one column of weights, compensate its error
optimally in the columns still free, continue with the next (Frantar et al. 2023, "GPTQ", section
3). That takes seconds, needs no learning rate, is not limited to the two nearest levels, and is
deterministic.

The matrix is the inputs' covariance, since the bias compensates shifts of a layer's mean output.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from trt_yolov6.common.machine import single_torch_thread, usable_cpus
from trt_yolov6.graph.editing import replace_tensor, with_outputs
from trt_yolov6.graph.index import attributes, constants_of, tensor_value
from trt_yolov6.graph.quantized import QuantizedLayer
from trt_yolov6.graph.reference import reference_session, runner
from trt_yolov6.quantization.bias_correction import layers_of_both, shift_bias
from trt_yolov6.quantization.qdq.integer_arithmetic import with_integer_convolutions
from trt_yolov6.quantization.types import INT8

# Output positions of one image whose inputs count, for one layer.
_POSITIONS = 1024

# Positions whose products of codes add up to less than 2^24.
_EXACT_POSITIONS = 1024

# Rows of products that are computed at a time, from the diagonal on.
_TRIANGLE_ROWS = 192

# Added to the diagonal of the covariance, as a part of its mean: GPTQ's damping.
_DAMPING = 0.01

# Columns rounded before their errors are spread over all that follow.
_BLOCK = 64

# Memory for the sums of products of the layers that one pass over the images serves. YOLOv6-N's
# take 103 MiB; S needs three passes.
_SUMS_BYTES = 160 << 20

# Rows of so few weights, those of 3x3 depthwise convolutions, get the scale that suits rounding
# best. It halves the error; of 16 to 96 weights it takes a tenth to a fifth away.
_SHORT_ROW = 9

# Parts of the scale that the largest weight asks for; of equal ones the first is taken.
_SCALES = np.concatenate([[1.0], np.linspace(0.8, 1.1, 31)])


def adapt_rounding(
    float_model: onnx.ModelProto, quantized_model: onnx.ModelProto, images: Sequence[NDArray[Any]]
) -> onnx.ModelProto:
    """Return the Q/DQ graph with its INT8 weights rounded for the inputs that they meet.

    Scales stay, except those of rows with few weights; biases absorb the shift of mean outputs.
    Transposed convolutions whose taps overlap keep their weights.

    Args:
        float_model: the float32 graph that was quantized, after equalization.
        quantized_model: made from it by `insert_qdq`, tensors called as there; it is not changed.
        images: a few dozen inputs of the graph, with one pass over them for each `_SUMS_BYTES`.
    """
    result = copy.deepcopy(quantized_model)
    stored = constants_of(result)
    jobs = [_Job(*both) for both in layers_of_both(result, float_model)]
    # PyTorch's own threads would wait for each other after every step.
    with single_torch_thread(), ThreadPoolExecutor(len(usable_cpus())) as workers:
        for chunk in _chunks([job for job in jobs if job.is_linear_in_positions]):
            _measure(quantized_model, chunk, images, workers)
            for job in chunk:  # one at a time: wide layers take a few copies of their covariance
                levels, scale, mean_error = job.rounded()
                replace_tensor(stored[job.layer.weight], levels)
                if scale is not None:
                    replace_tensor(stored[job.layer.weight_scale], scale)
                shift_bias(result, job.layer, -mean_error)
    return result


class _Job:
    """One layer: it gathers the moments of its inputs, then rounds."""

    def __init__(
        self, layer: QuantizedLayer, node: onnx.NodeProto, weight: NDArray[np.float32]
    ) -> None:
        self.layer = layer
        self._weight = weight
        scale = None if layer.activations is None else layer.activations.scale
        self._unit = 1.0 if scale is None else float(tensor_value(scale).reshape(-1)[0])
        self._reads_codes = scale is not None
        self._kernel = (int(weight.shape[2]), int(weight.shape[3]))
        given = attributes(node)
        self._groups: int = given.get("group", 1)
        self._strides = list(given.get("strides", (1, 1)))
        self._pads = list(given.get("pads", (0, 0, 0, 0)))  # top, left, bottom, right
        self._dilations = list(given.get("dilations", (1, 1)))
        self.is_linear_in_positions = given.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and (
            not layer.transposed or (self._strides == list(self._kernel) and not any(self._pads))
        )
        self._count = 0
        self._sum: torch.Tensor | None = None
        self._products: list[torch.Tensor] = []
        self._overlaps: _Overlaps | None = None

    @property
    def columns(self) -> int:
        """Weights that make one output value."""
        if self.layer.transposed:
            return int(self._weight.shape[0]) // self._groups
        return int(np.prod(self._weight.shape[1:]))

    @property
    def bytes(self) -> int:
        """Upper bound of the memory for the sums and the sums of products.

        Only an image shows whether `_Overlaps` is used.
        """
        starts = range(0, self.columns, _TRIANGLE_ROWS)
        values = sum(min(_TRIANGLE_ROWS, self.columns - s) * (self.columns - s) for s in starts)
        found = self._groups * (values + self.columns) * (4 if self._reads_codes else 8)
        channels = int(self._weight.shape[1])
        return max(found, _Overlaps.bytes(self._kernel, channels)) if self._is_plain else found

    def add(self, values: NDArray[np.float32]) -> None:
        """Take in a batch of the layer's inputs (batch, channels, height, width).

        After a pair they are multiples of its scale. In units of it their sums of products are
        exact in float32 below 2^24, so that every processor finds the same.
        """
        for image in values:
            padded = self._padded(image)
            rows, columns = self._outputs(padded)
            # A step that shares no factor with the width would be better; odd ones mostly do.
            step = max(1, rows * columns // _POSITIONS) | 1
            positions = torch.arange(0, rows * columns, step)
            self._count += len(positions)
            if step == 1 and self._is_plain:
                if self._overlaps is None:
                    self._overlaps = _Overlaps(self._kernel, self._pads, len(image))
                self._overlaps.add(self._codes(padded), rows, columns)
                continue
            inputs = self._codes(self._inputs_at(padded, positions, columns))
            for part in torch.split(inputs, _EXACT_POSITIONS, dim=2):
                self._add(part)

    @property
    def _is_plain(self) -> bool:
        """True if each next output reads a window of codes that is one value further."""
        alone = self._groups == 1 and not self.layer.transposed and self._reads_codes
        steps = {*self._strides, *self._dilations}
        return alone and steps == {1} and max(self._kernel) > 1

    def _codes(self, values: torch.Tensor) -> torch.Tensor:
        return (values / np.float32(self._unit)).round() if self._reads_codes else values

    def _add(self, part: torch.Tensor) -> None:
        """Add up (groups, columns, positions), of the products one triangle in blocks of rows."""
        kind = torch.int32 if self._reads_codes else torch.float64
        total = part.sum(dim=2).to(kind)
        self._sum = total if self._sum is None else self._sum.add_(total)
        transposed = part.transpose(1, 2)
        for index, start in enumerate(range(0, part.shape[1], _TRIANGLE_ROWS)):
            end = start + _TRIANGLE_ROWS
            products = (part[:, start:end] @ transposed[:, :, start:]).to(kind)
            if index < len(self._products):
                self._products[index] += products
            else:
                self._products.append(products)

    def _moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and covariance of the inputs, float64; the sums are gone then."""
        covariance = torch.zeros(self._groups, self.columns, self.columns, dtype=torch.float64)
        total = torch.zeros(self._groups, self.columns, dtype=torch.float64)
        for index, rows in enumerate(self._products):
            start, end = index * _TRIANGLE_ROWS, index * _TRIANGLE_ROWS + rows.shape[1]
            covariance[:, start:end, start:] = rows
            covariance[:, end:, start:end] = covariance[:, start:end, end:].transpose(1, 2)
        if self._sum is not None:
            total += self._sum
        if self._overlaps is not None:
            self._overlaps.put(total[0], covariance[0])
        self._sum, self._products, self._overlaps = None, [], None
        # Of codes all of this is whole numbers below 2^53: what does not vary has no variance.
        covariance *= self._count
        covariance.baddbmm_(total.unsqueeze(2), total.unsqueeze(1), alpha=-1)
        covariance *= (self._unit / self._count) ** 2
        return total * (self._unit / self._count), covariance

    def rounded(
        self,
    ) -> tuple[NDArray[np.int8], NDArray[np.floating[Any]] | None, NDArray[np.float64]]:
        """Return the levels, the scale if it is a new one, and the shift of the mean output."""
        mean, covariance = self._moments()
        rows = torch.from_numpy(self._to_rows(self._weight).astype(np.float64))
        spread = np.broadcast_to(self.layer.scale, self._weight.shape)
        # One scale serves a row, since it belongs to one output channel.
        scale = torch.from_numpy(self._to_rows(spread)[:, :, :1].astype(np.float64))
        own_scale = None
        if self.columns <= _SHORT_ROW and not self.layer.transposed and self._has_scale_a_row:
            kind = self.layer.weights.scale_type
            scale, levels = _best_scales(rows, scale, covariance, kind)
            own_scale = scale.reshape(-1).numpy().astype(kind)
        else:
            levels = rounded_rows(rows, scale, covariance)
        errors = ((levels * scale - rows) @ mean.unsqueeze(2)).squeeze(2).numpy()
        shape = self._weight.shape
        outputs = shape[1] * self._groups if self.layer.transposed else shape[0]
        # The taps of a transposed convolution are rows of their own, for one channel each.
        mean_error = errors.reshape(outputs, -1).mean(axis=1)
        return self._from_rows(levels.numpy()).astype(np.int8), own_scale, mean_error

    @property
    def _has_scale_a_row(self) -> bool:
        scale = self.layer.weights.scale
        return scale is not None and list(scale.dims) == [self._weight.shape[0]]

    def _padded(self, image: NDArray[np.float32]) -> torch.Tensor:
        top, left, bottom, right = self._pads
        values = torch.from_numpy(image.astype(np.float32, copy=False))
        return F.pad(values, (left, right, top, bottom))

    def _outputs(self, padded: torch.Tensor) -> tuple[int, int]:
        """Return height and width of the map whose values each have a window of inputs."""
        height, width = (
            (size - (taps - 1) * apart - 1) // stride + 1
            for size, taps, stride, apart in zip(padded.shape[1:], *self._window, strict=True)
        )
        return height, width

    @property
    def _window(self) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Taps, strides and dilations; one input makes a block of a transposed one's outputs."""
        if self.layer.transposed:
            return (1, 1), (1, 1), (1, 1)
        return self._kernel, self._strides, self._dilations

    def _inputs_at(self, padded: torch.Tensor, positions: torch.Tensor, width: int) -> torch.Tensor:
        """Return (groups, columns, positions) of the inputs of some output positions."""
        kernel, strides, dilations = self._window
        first = positions // width * (strides[0] * padded.shape[2])
        first += positions % width * strides[1]
        found = torch.empty(len(padded), kernel[0] * kernel[1], len(positions))
        for tap in range(kernel[0] * kernel[1]):
            row, column = divmod(tap, kernel[1])
            moved = row * dilations[0] * padded.shape[2] + column * dilations[1]
            torch.index_select(padded.flatten(1), 1, first + moved, out=found[:, tap])
        return found.view(self._groups, -1, len(positions))

    def _to_rows(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Arrange weights as (groups, rows, columns): what a row holds makes one output value."""
        if not self.layer.transposed:
            return weight.reshape(self._groups, weight.shape[0] // self._groups, -1)
        grouped = weight.reshape(self._groups, -1, int(np.prod(weight.shape[1:])))
        return np.ascontiguousarray(np.swapaxes(grouped, 1, 2))

    def _from_rows(self, rows: NDArray[Any]) -> NDArray[Any]:
        if not self.layer.transposed:
            return rows.reshape(self._weight.shape)
        return np.ascontiguousarray(np.swapaxes(rows, 1, 2)).reshape(self._weight.shape)


class _Overlaps:
    """Sums of products of codes over all windows of a map, where these overlap.

    The sum for two taps is one over all pairs of values so far apart, whatever the taps, less the
    pairs that no window has there: those of which the first lies in a few rows and columns at the
    border. So 13 sums serve the 45 pairs of taps of a 3x3 window.
    """

    def __init__(self, kernel: tuple[int, int], pads: Sequence[int], channels: int) -> None:
        """Take a kernel, its padding (top, left, bottom, right), and the number of channels."""
        self._kernel, self._pads, self._taps = kernel, pads, _taps(kernel)
        # All at once: among what comes and goes they would take half as much memory again.
        self._sum = _zeros(channels, len(self._taps))
        self._apart = {step: _zeros(channels, channels) for step in _steps(self._taps)}
        counts = range(len(self._taps), 0, -1)
        self._missing = [_zeros(channels, channels * count) for count in counts]

    @staticmethod
    def bytes(kernel: tuple[int, int], channels: int) -> int:
        """Return the memory that the sums for a kernel and a number of channels take."""
        taps = _taps(kernel)
        blocks = len(_steps(taps)) + len(taps) * (len(taps) + 1) // 2
        return channels * (channels * blocks + len(taps)) * 4

    def add(self, padded: torch.Tensor, height: int, width: int) -> None:
        """Take in (channels, rows, columns) codes with their padding, for a map of some size."""
        rows, columns = padded.shape[1:]
        # With zeros after each row, values some rows and columns apart are as far apart in memory,
        # and what lies beyond the map is zero.
        spread, below = self._kernel[1] - 1, self._kernel[0]
        line = columns + spread
        flat = F.pad(padded, (0, spread, 0, below)).flatten(1)
        self._sum += torch.stack(
            [padded[:, r : r + height, c : c + width].sum(dim=(1, 2)) for r, c in self._taps], dim=1
        ).to(torch.int32)
        for step, sums in self._apart.items():
            moved = step[0] * line + step[1]
            for start in range(0, rows * line, _EXACT_POSITIONS):
                end = min(start + _EXACT_POSITIONS, rows * line)
                sums += (flat[:, start:end] @ flat[:, start + moved : end + moved].T).to(
                    torch.int32
                )
        offsets = torch.arange(rows)[:, None] * line + torch.arange(columns)
        top, left, bottom, right = self._pads
        inner = torch.zeros(rows, columns, dtype=torch.bool)
        inner[top : rows - bottom, left : columns - right] = True
        for index, (row, column) in enumerate(self._taps):
            outside = inner.clone()
            outside[row : row + height, column : column + width] = False
            own = offsets[outside]
            apart = [_between((row, column), other) for other in self._taps[index:]]
            steps = torch.tensor([down * line + across for down, across in apart])
            others = flat[:, own + steps[:, None]]
            first = flat[:, own]
            for start in range(0, len(first), _TRIANGLE_ROWS):
                part = slice(start, start + _TRIANGLE_ROWS)
                self._missing[index][part] += (first[part] @ others.flatten(0, 1).T).to(torch.int32)

    def put(self, total: torch.Tensor, products: torch.Tensor) -> None:
        """Add sums (channels x taps,) and sums of products of pairs of them, float64, in place."""
        taps = len(self._taps)
        total += self._sum.reshape(-1)
        blocks = products.view(-1, taps, len(products) // taps, taps)
        for index, other in itertools.combinations_with_replacement(range(taps), 2):
            # (first channels, second ones, taps from the first on)
            missing = self._missing[index].view(*blocks.shape[::2], taps - index)
            step = _between(self._taps[index], self._taps[other])
            found = self._apart[step] - missing[..., other - index]
            blocks[:, index, :, other] += found
            if index != other:
                blocks[:, other, :, index] += found.T


def _taps(kernel: tuple[int, int]) -> list[tuple[int, int]]:
    return [(row, column) for row in range(kernel[0]) for column in range(kernel[1])]


def _between(tap: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Return how many rows and columns another tap is after one, the first in memory."""
    return other[0] - tap[0], other[1] - tap[1]


def _steps(taps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return how far apart pairs of taps are, each distance once."""
    pairs = itertools.combinations_with_replacement(taps, 2)
    return sorted({_between(*pair) for pair in pairs})


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def rounded_rows(rows: torch.Tensor, scale: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Round rows of weights so that their outputs' squared error is small (GPTQ).

    With the columns in some order, the covariance is R Rᵀ for an upper triangular R, and the error
    of an output |e R|² for errors e of its weights. Rounded one after the other, each weight makes
    up for what those before it have left in its own component of e R: what GPTQ does, without an
    inverse.

    Args:
        rows: float64 (groups, rows, columns).
        scale: float64 (groups, rows, 1), above 0.
        covariance: float64 (groups, columns, columns) of the inputs that a group's rows read.

    Returns:
        float64 (groups, rows, columns) integers in -127..127.
    """
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    # The columns whose inputs vary most go first: later ones can make up for their errors.
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    level = diagonal.mean(dim=1)
    damping = torch.where(level > 0, _DAMPING * level, torch.ones_like(level))
    reverse = order.flip(1)
    levels = torch.empty_like(rows)
    for group in range(len(rows)):
        first = order[group]
        # From the other end a lower triangle is an upper one.
        last_first = covariance[group][reverse[group][:, None], reverse[group]]
        last_first.diagonal().add_(damping[group])
        torch.linalg.cholesky(last_first, out=last_first)
        upper = last_first.flip(0, 1)
        found = _rounded(rows[group][:, first].T.contiguous(), scale[group].T, upper)
        levels[group][:, first] = found.T
    return levels


def _best_scales(
    rows: torch.Tensor, scale: torch.Tensor, covariance: torch.Tensor, kind: np.dtype[Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales with which rows are rounded best, and the levels; see `rounded_rows`.

    Args:
        rows: float64 (groups, rows, columns).
        scale: float64 (groups, rows, 1) for their largest weights.
        covariance: float64 (groups, columns, columns).
        kind: type that scales are stored in.
    """
    groups, count, columns = rows.shape
    several = (scale * torch.from_numpy(_SCALES)).numpy().astype(kind)
    scales = torch.from_numpy(several.astype(np.float64)).reshape(groups, -1, 1)
    many = rows.repeat_interleave(len(_SCALES), dim=1)
    levels = rounded_rows(many, scales, covariance)
    errors = levels * scales - many
    lost = ((errors @ covariance) * errors).sum(dim=2).reshape(groups, count, -1)
    # Of equal ones the first, whatever the processor.
    best = torch.from_numpy(lost.numpy().argmin(axis=2))[:, :, None]
    found = levels.reshape(groups, count, -1, columns)
    index = best.unsqueeze(3).expand(-1, -1, -1, columns)
    return scales.reshape(groups, count, -1).gather(2, best), found.gather(2, index).squeeze(2)


def _rounded(weights: torch.Tensor, scale: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Round (columns, rows) weights, by (1, rows) scales, one column after the other."""
    levels, errors = torch.empty_like(weights), torch.empty_like(weights)
    scales = scale[0].numpy()
    for start in range(0, len(weights), _BLOCK):
        block = slice(start, start + _BLOCK)
        left = (upper[:start, block].T @ errors[:start]).numpy()
        # NumPy takes a third of PyTorch's time for steps as small as these.
        own, made, lost = (one[block].numpy() for one in (weights, levels, errors))
        factor = upper[block, block].numpy()
        for column in range(len(own)):
            target = own[column] + left[column] / factor[column, column]
            made[column] = np.clip(np.rint(target / scales), -INT8.largest, INT8.largest)
            lost[column] = own[column] - made[column] * scales
            left[column + 1 :] += factor[column, column + 1 :, None] * lost[column]
    return levels


def _chunks(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    chunk: list[_Job] = []
    for job in jobs:
        if chunk and sum(item.bytes for item in chunk) + job.bytes > _SUMS_BYTES:
            yield chunk
            chunk = []
        chunk.append(job)
    if chunk:
        yield chunk


def _measure(
    model: onnx.ModelProto,
    jobs: Sequence[_Job],
    images: Sequence[NDArray[Any]],
    workers: ThreadPoolExecutor,
) -> None:
    """Run the images through the Q/DQ graph and give each job what its layer reads."""
    names = list(dict.fromkeys(job.layer.input for job in jobs))
    exact = with_integer_convolutions(with_outputs(model, names))
    run = runner(reference_session(exact), names)
    for image in images:
        values = run(image)
        inputs = [values[job.layer.input] for job in jobs]
        list(workers.map(_Job.add, jobs, inputs))  # to see their errors
        del values, inputs  # or two images' would be held
