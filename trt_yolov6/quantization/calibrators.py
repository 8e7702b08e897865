"""Calibrators: from a tensor's statistics to the magnitude that INT8's 127 or FP8's 448 represents.

All are pure functions of the statistics that `collect` returns. Activations are quantized
symmetrically with one scale a tensor, amax / 127 or amax / 448, and zero point 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.errors import UserError
from trt_yolov6.quantization.statistics import TensorStatistics, pooled
from trt_yolov6.quantization.types import INT8, QuantizedType

Method = Literal["margin", "minmax", "entropy", "percentile", "mse"]

METHODS: tuple[Method, ...] = get_args(Method)

FLOATING_METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse")
"""Calibrators for FP8; entropy assumes a uniform grid."""

AUTO_METHODS: tuple[Method, ...] = tuple(one for one in METHODS if one != "minmax")
"""Calibrators tried for INT8, without `minmax`: `margin` equals it where no margin is needed."""

PERCENTILE = 99.99
"""Per cent of a tensor's values that the percentile calibrator does not clip by default."""

EMPTY_AMAX = 1.0
"""Range given to a tensor that is zero on all calibration images. Any scale represents it exactly;
this one cannot divide by zero, not even in half precision."""

_ENTROPY_LEVELS = 128

# Values of a channel that lie beyond its range in an image that goes beyond it. Of 200 tensors of
# four networks, of maps from 10 to 320 values wide, it was two to five in most.
_BEYOND = 4

# How many times as wide as min-max a range with a margin may be, and the steps that are tried.
_WIDEST, _MARGIN_STEP = 4.0, 0.05


def methods_for(quantized: QuantizedType) -> tuple[Method, ...]:
    """Return the calibrators of a type."""
    return FLOATING_METHODS if quantized.is_floating else METHODS


def methods_to_try(quantized: QuantizedType) -> tuple[Method, ...]:
    """Return the calibrators that `auto` tries, in that order."""
    return FLOATING_METHODS if quantized.is_floating else AUTO_METHODS


def amax_of(
    statistics: TensorStatistics,
    method: Method,
    quantized: QuantizedType = INT8,
) -> float:
    """Return the magnitude at which a tensor is clipped; its scale is this over the largest level.

    Args:
        statistics: of one tensor, or `pooled` of several that share a scale.
        method: `margin`: see `margin_amax`; `minmax`: nothing is clipped; `entropy`: see
            `entropy_amax`; `percentile`: see `percentile_amax`; `mse`: see `mse_amax`.
        quantized: what the tensor is quantized to.

    Returns:
        A finite number above 0 and, except for `margin`, not above the tensor's largest magnitude;
        `EMPTY_AMAX` for a tensor of zeros.

    Raises:
        UserError: there is no such method for this type.
    """
    if method not in methods_for(quantized):
        raise UserError(
            f"there is no calibrator {method!r} for {quantized.label}; choose one of "
            f"{', '.join(methods_for(quantized))}."
        )
    if statistics.amax == 0:
        return EMPTY_AMAX
    if method == "minmax":
        return statistics.amax
    if method == "margin":
        return margin_amax(statistics, quantized)
    if method == "entropy":
        return entropy_amax(statistics)
    if method == "percentile":
        return percentile_amax(statistics)
    return mse_amax(statistics, quantized)


def group_amax(
    statistics: Mapping[str, TensorStatistics],
    groups: Iterable[Sequence[str]],
    method: Method,
    quantized: QuantizedType = INT8,
) -> dict[str, float]:
    """Return the clipping magnitude of every tensor, one for each group that shares a scale.

    A group is calibrated as a single tensor of all its members' values, so a member of zeros, or a
    small one, does not decide the range. With `minmax` it is the largest of the members' ranges.

    Args:
        statistics: by tensor.
        groups: tensors that share a scale, such as `Placement.groups`; those without statistics
            get their group's range, too, as long as one member has some.
        method: see `amax_of`.
        quantized: see `amax_of`.

    Returns:
        The ranges in the order of `statistics`, those of further members of groups after them.

    Raises:
        UserError: see `amax_of`.
    """
    shared: dict[str, float] = {}
    for group in groups:
        known = [statistics[name] for name in group if name in statistics]
        if known:
            amax = amax_of(pooled(known), method, quantized)
            shared.update(dict.fromkeys(group, amax))
    single = {
        name: shared[name] if name in shared else amax_of(item, method, quantized)
        for name, item in statistics.items()
    }
    return single | shared


def margin_amax(statistics: TensorStatistics, quantized: QuantizedType) -> float:
    """Return min-max with a margin for images that were not seen.

    If channels have equal ranges, an image that exceeds one of them is clipped, which nearly every
    image does in some of hundreds of channels. The images that reach furthest in each channel show
    by how much (`TensorStatistics.reaches`). A wider range costs resolution: the margin minimizes
    the sum of squared errors by rounding and by expected clipping.
    """
    reaches = statistics.reaches
    if reaches is None or reaches.max(initial=0) <= statistics.amax:
        return statistics.amax
    steps = round((_WIDEST - 1) / _MARGIN_STEP)
    candidates = statistics.amax * (1 + _MARGIN_STEP * np.arange(steps + 1, dtype=np.float64))
    rounding = statistics.count * quantization_error(statistics, candidates, quantized)
    beyond = np.maximum(reaches[reaches > statistics.amax] - candidates[:, None], 0)
    return float(candidates[np.argmin(rounding + _BEYOND * (beyond**2).sum(axis=1))])


def percentile_amax(statistics: TensorStatistics, percentile: float = PERCENTILE) -> float:
    """Return the magnitude that `percentile` per cent of the values do not exceed, zeros included.

    Linear within a bin. In the lowest bin, as in a tensor that is zero almost everywhere, it would
    clip all information: then it is the largest magnitude.
    """
    below = np.cumsum(statistics.histogram)
    rank = percentile / 100 * below[-1]
    index = int(np.searchsorted(below, rank))
    if percentile == 100 or index == 0:
        return statistics.amax
    inside = (rank - below[index - 1]) / (below[index] - below[index - 1])
    return min(statistics.amax, float(index + inside) * statistics.bin_width)


def mse_amax(statistics: TensorStatistics, quantized: QuantizedType) -> float:
    """Return the clipping magnitude of the least mean squared quantization error.

    It is searched for among 64 magnitudes from amax/64 to amax, on a histogram of a quarter of the
    bins, and then among 31 around the best of these.
    """
    amax, coarse = statistics.amax, 64
    quarter = statistics.histogram[: -(-statistics.bins_in_use // 4) * 4].reshape(-1, 4).sum(axis=1)
    candidates = np.arange(1, coarse + 1, dtype=np.float64) * (amax / coarse)
    errors = _error(quarter, 4 * statistics.bin_width, candidates, quantized)
    best = int(np.argmin(errors)) + 1
    fine = (best + np.arange(-15, 16, dtype=np.float64) / 16) * (amax / coarse)
    fine = fine[(fine > 0) & (fine <= amax)]
    return float(fine[np.argmin(quantization_error(statistics, fine, quantized))])


def quantization_error(
    statistics: TensorStatistics,
    amax: NDArray[np.float64] | float,
    quantized: QuantizedType = INT8,
) -> NDArray[np.float64]:
    """Return the mean squared error of quantizing a tensor, for each clipping magnitude given.

    Exact for values spread evenly within each bin of the histogram. For INT8, with u = x / scale
    and n = min(round(u), 127), the squared error in units of the scale is (u - n)**2, clipping
    included; its integral from 0 to u is n / 12 + (u - n)**3 / 3.

    Args:
        statistics: of one tensor.
        amax: clipping magnitudes above 0.
        quantized: what the tensor is quantized to.

    Returns:
        float64, of the shape of `amax`, in squared units of the tensor.
    """
    histogram = statistics.histogram[: statistics.bins_in_use]
    return _error(histogram, statistics.bin_width, amax, quantized)


def _error(
    histogram: NDArray[np.int64],
    width: float,
    amax: NDArray[np.float64] | float,
    quantized: QuantizedType,
) -> NDArray[np.float64]:
    scale = np.asarray(amax, np.float64)[..., None] / quantized.largest
    integral = quantized.squared_error(np.arange(histogram.size + 1) * width / scale)
    means = np.diff(integral, axis=-1) @ histogram
    error: NDArray[np.float64] = means * scale[..., 0] ** 3 / (width * max(1, histogram.sum()))
    return error


def entropy_amax(statistics: TensorStatistics) -> float:
    """Return the clipping magnitude whose quantized distribution diverges least from the real one.

    The Kullback-Leibler calibration of TensorRT, as S. Migacz gave it in "8-bit Inference with
    TensorRT" (GTC 2017): for each number i of bins from 128 up, P is the histogram cut after bin
    i, with all that was cut off added to its last bin; Q is the same i bins without the addition,
    merged into 128 levels, each level's mass spread evenly over its bins that are not empty. The i
    of the least KL(P || Q) wins, the larger of equals.

    Zero is represented exactly at every scale, so the first bin, where ReLU puts its zeros, is
    given no more than its neighbour's weight. Of what is then left, more than half is never cut
    off: cut at the lowest value of a tensor that stays away from zero, as images do, P and Q would
    both be a single bin and agree perfectly.
    """
    # Pairs of bins: the resolution of TensorRT's own histograms, 2048 in all.
    bins = statistics.histogram.reshape(-1, 2).sum(axis=1).astype(np.float64)
    width = 2 * statistics.bin_width
    bins[0] = min(bins[0], bins[1])
    last = (statistics.bins_in_use + 1) // 2
    bins = bins[:last]
    if last <= _ENTROPY_LEVELS or not bins.any():
        return statistics.amax
    divergence = _divergences(bins)
    if not np.isfinite(divergence).any():
        return statistics.amax
    best = divergence.size - 1 - int(np.argmin(divergence[::-1]))
    return min(statistics.amax, (best + _ENTROPY_LEVELS) * width)


def _divergences(bins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return KL(P || Q) of `entropy_amax` for i = 128 .. len(bins), all at once.

    Q is constant over the filled bins of a level, so sum(P log Q) needs only the levels' masses,
    which running sums give: the cost is that of candidates times levels, not times bins.
    Impossible candidates have an infinite divergence.
    """
    mass = np.concatenate([[0.0], np.cumsum(bins)])
    filled = np.concatenate([[0], np.cumsum(bins > 0)])
    logs = bins * np.log(bins, out=np.zeros_like(bins), where=bins > 0)
    entropy = np.concatenate([[0.0], np.cumsum(logs)])

    cut = np.arange(_ENTROPY_LEVELS, bins.size + 1)
    total, kept, end = mass[-1], mass[cut], bins[cut - 1]
    clipped = total - kept
    # Level k of i bins is made of the bins j with floor(128 j / i) = k.
    edges = -(-np.arange(_ENTROPY_LEVELS + 1) * cut[:, None] // _ENTROPY_LEVELS)
    level = np.diff(mass[edges], axis=1)
    members = np.diff(filled[edges], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.where(members > 0, np.log(level / members), 0.0)
        # sum(p log p) over the bins, the last with what was cut off.
        top = end + clipped
        p_log_p = entropy[cut] - logs[cut - 1] + np.where(top > 0, top * np.log(top), 0.0)
        p_log_q = (level * log_q).sum(axis=1) + clipped * log_q[:, -1]
        result = (p_log_p - p_log_q) / total - np.log(total) + np.log(kept)
    # Where the last bin is empty, Q gives nothing to what P has there.
    unsupported = (end == 0) & (clipped > 0)
    return np.where(unsupported | (clipped > kept), np.inf, result)
