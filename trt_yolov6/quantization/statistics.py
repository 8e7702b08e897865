"""Calibration statistics of a tensor: exact extremes and a histogram of magnitudes.

The histogram's range is a power of two and doubles when a larger value comes, pairs of bins
becoming one. Bins so merged are exactly the bins of the wider range, so the result depends neither
on the order of the values nor on the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 4096
"""Bins of a histogram. The range is less than twice the largest value, so 2048 at least are used;
TensorRT's own calibrators have 2048."""

SAMPLES = 1 << 15
"""Values of one image's tensor that go into the histogram at most; extremes and means take all."""

# An image may go beyond the range of the others by this many of their widths.
_FURTHEST = 4.0

# 2**-60 keeps BINS / range a float32; no activation that small means anything.
_LEAST_EXPONENT = -60


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """A tensor's channels (axis 1) over all calibration images, of all their values."""

    low: NDArray[np.float32]
    """(channels,) smallest values, with their signs."""
    high: NDArray[np.float32]
    """(channels,) largest values, with their signs."""
    mean: NDArray[np.float64]
    """(channels,)"""

    @property
    def amax(self) -> NDArray[np.float32]:
        """(channels,) largest magnitudes."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


@dataclass(frozen=True, eq=False)
class TensorStatistics:
    """One tensor over all calibration images."""

    name: str
    amax: float
    """Largest magnitude, exact; 0 for a tensor of zeros."""
    amin: float
    """Smallest value, with its sign, exact."""
    histogram: NDArray[np.int64]
    """(BINS,) counts of |x|, of a regular sample where the tensor is large; bin i holds the
    magnitudes from i to i + 1 times `bin_width`, the upper end excluded."""
    bin_width: float
    """A power of two; BINS times it is larger than `amax`."""
    count: int
    """Values seen, of which `histogram.sum()` were sampled."""
    channels: ChannelStatistics | None
    """None for tensors without such an axis."""
    reaches: NDArray[np.float64] | None = None
    """(2 channels,) magnitudes that an image not seen may reach (`_reaches`), at either end of each
    channel: each once in as many images as were seen. None of fewer than two images."""

    @property
    def bins_in_use(self) -> int:
        """Bins up to and with the one that `amax` falls into; at least 1."""
        return min(BINS, int(self.amax / self.bin_width) + 1)


class Accumulator:
    """Builds the statistics of one tensor, a batch at a time, in constant memory."""

    def __init__(self, name: str, copies: int = 1) -> None:
        """Take the tensor's name, and how many copies of each image come one after the other."""
        self.name = name
        self._copies = copies
        self._extremes: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
        self._amax = 0.0
        self._amin = math.inf
        self._exponent = _LEAST_EXPONENT
        self._histogram = np.zeros(BINS, np.int64)
        self._count = 0
        self._rows = 0
        # Each channel's two lowest and highest extremes of an image, the furthest first.
        self._lowest: list[NDArray[np.float32]] = []
        self._highest: list[NDArray[np.float32]] = []
        self._channel_sum: NDArray[np.float64] | None = None

    def add(self, values: NDArray[Any]) -> bool:
        """Take in one batch.

        Args:
            values: float (batch, channels, ...), or of any other shape, then without channels.

        Returns:
            Whether all values are finite; if not, nothing was taken in.
        """
        values = np.ascontiguousarray(values, np.float32)
        if not values.size:
            return True
        channels = values.shape[1] if values.ndim >= 2 else 1
        # (batch, channels, rest): reductions along the last, contiguous axis are the fast ones.
        grouped = values.reshape(values.shape[0] if values.ndim >= 2 else 1, channels, -1)
        highs, lows = grouped.max(axis=2), grouped.min(axis=2)
        high, low = highs.max(axis=0), lows.min(axis=0)
        magnitude = np.maximum(np.abs(high), np.abs(low))
        amax = float(magnitude.max())
        if not math.isfinite(amax):  # NaN survives max, min and abs
            return False
        if values.ndim >= 2:
            total = grouped.mean(axis=2).sum(axis=0, dtype=np.float64)
            self._channel_sum = total if self._channel_sum is None else self._channel_sum + total
            for own in zip(lows, highs, strict=True):
                self._extremes.append(own)
                if len(self._extremes) == self._copies:
                    every_low, every_high = zip(*self._extremes, strict=True)
                    lowest = [*self._lowest, np.minimum.reduce(every_low)]
                    highest = [*self._highest, np.maximum.reduce(every_high)]
                    self._lowest = list(np.sort(lowest, axis=0)[:2])
                    self._highest = list(-np.sort(-np.array(highest), axis=0)[:2])
                    self._extremes.clear()
        self._amax = max(self._amax, amax)
        self._amin = min(self._amin, float(low.min()))
        self._count_magnitudes(values)
        self._count += values.size
        self._rows += grouped.shape[0]
        return True

    def result(self) -> TensorStatistics:
        """Return the statistics so far; at least one value must have been added."""
        channels = reaches = None
        if self._lowest and self._channel_sum is not None:
            low, high = self._lowest[0], self._highest[0]
            channels = ChannelStatistics(low, high, self._channel_sum / self._rows)
            if len(self._lowest) > 1:
                above = _reaches(low, high, self._highest[1])
                below = _reaches(-high, -low, -self._lowest[1])
                reaches = np.concatenate([above, below])
        return TensorStatistics(
            name=self.name,
            amax=self._amax,
            amin=self._amin,
            histogram=self._histogram.copy(),
            bin_width=math.ldexp(1.0, self._exponent) / BINS,
            count=self._count,
            channels=channels,
            reaches=reaches,
        )

    def _count_magnitudes(self, values: NDArray[np.float32]) -> None:
        exponent = _exponent(self._amax)
        if exponent > self._exponent:
            self._histogram = _widened(self._histogram, exponent - self._exponent)
            self._exponent = exponent
        step = _stride(values.size, values.shape[-1] if values.ndim else 1)
        # Starting elsewhere each time, the images together leave no place of the tensor out.
        magnitudes = np.abs(values.reshape(-1)[self._rows % step :: step])
        # Multiplication by a power of two is exact, so the bins' borders are, too.
        magnitudes *= np.float32(math.ldexp(BINS, -exponent))
        self._histogram += np.bincount(magnitudes.astype(np.intp), minlength=BINS)


def pooled(parts: Sequence[TensorStatistics]) -> TensorStatistics:
    """Return the statistics of several tensors taken as one, for those that share a scale.

    Each part counts with all its values, however many of them were sampled. There are no channels.

    Args:
        parts: at least one; the first gives the name.
    """
    exponent = max(_exponent(part.amax) for part in parts)
    width = math.ldexp(1.0, exponent) / BINS
    total = np.zeros(BINS, np.float64)
    for part in parts:
        doublings = round(math.log2(width / part.bin_width))
        weight = part.count / max(1, int(part.histogram.sum()))
        total += _widened(part.histogram, doublings) * weight
    known = [part.reaches for part in parts if part.reaches is not None]
    return TensorStatistics(
        name=parts[0].name,
        amax=max(part.amax for part in parts),
        amin=min(part.amin for part in parts),
        histogram=np.rint(total).astype(np.int64),
        bin_width=width,
        count=sum(part.count for part in parts),
        channels=None,
        reaches=np.concatenate(known) if known else None,
    )


def _reaches(
    low: NDArray[np.float32], high: NDArray[np.float32], next_high: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return the magnitude that each channel's upper end may reach in an image that was not seen.

    Without the image that reaches furthest, the range would have been narrower, and that image
    would have gone beyond it by a part of its width. The next image may go beyond the whole range
    by the same part.

    Args:
        low: (channels,) smallest values.
        high: (channels,) largest ones.
        next_high: (channels,) the largest without that image.
    """
    end = high.astype(np.float64)
    width, narrower = end - low, next_high.astype(np.float64) - low
    beyond = np.minimum(width - narrower, _FURTHEST * narrower)
    part = np.divide(beyond, narrower, where=narrower > 0, out=np.zeros_like(beyond))
    result: NDArray[np.float64] = np.abs(end + part * width)
    return result


def _exponent(amax: float) -> int:
    """Return the least exponent of two above `amax`, within what the histogram can count."""
    return max(_LEAST_EXPONENT, math.frexp(amax)[1]) if amax else _LEAST_EXPONENT


def _widened(histogram: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    """Return the histogram over a range 2**doublings as wide."""
    if doublings >= BINS.bit_length():  # all of it falls into the first bin
        wide = np.zeros_like(histogram)
        wide[0] = histogram.sum()
        return wide
    merged = histogram.reshape(-1, 1 << doublings).sum(axis=1)
    return np.concatenate([merged, np.zeros(BINS - merged.size, np.int64)])


def _stride(size: int, row: int) -> int:
    """Return a step that takes about SAMPLES of `size` values and visits every column of a row."""
    step = -(-size // SAMPLES)
    while step > 1 and math.gcd(step, row) != 1:
        step += 1
    return step
