"""Intervals of a latency that hold from one run of a comparison to the next.

Run times within a second or two resemble each other more than they resemble those of an hour later:
clocks drift, memory is laid out otherwise, neighbours come and go. An interval from all runs as if
they were independent is narrow and wrong. So engines are measured in rounds, each with the engine
loaded again, over the whole time, and a round's median counts as one observation.

`prediction_interval` says where one more round would fall, in 95 of 100 cases (Hahn and Meeker,
Statistical Intervals, Section 4.7; normal observations): m ± t s √(1 + 1/n). It does not
shrink with the number of rounds, because what a later run meets, such as another clock, does not
average out within this one. Nor is it narrower than what is known to happen between runs and may
not happen within one (`CPU_DRIFT`). Two runs of a comparison disagree by less than that:
their intervals overlap.

`ratio_interval` compares engines of one run. Their rounds come in pairs, side by side in time, so
that drift cancels; it is Student's confidence interval for the mean of the logarithms' differences,
m ± t s √(1/n), and does shrink.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Probability that an interval is to cover."""


@dataclass(frozen=True)
class Interval:
    """A value and the interval around it."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width: smaller differences may be chance."""
        return (self.high - self.low) / 2

    @property
    def log_error(self) -> float:
        """Half the width as a natural logarithm, of a value above 0; the larger half of the two."""
        if self.low <= 0:
            return math.inf
        return max(math.log(self.high / self.value), math.log(self.value / self.low))

    def overlaps(self, other: Interval) -> bool:
        """Return whether there is a value that lies in both."""
        return self.low <= other.high and other.low <= self.high


def prediction_interval(rounds: Sequence[float], floor: float = 0.0) -> Interval:
    """Return the median of the rounds and where a further one is to be expected.

    Args:
        rounds: the median time of each round, at least two, all above 0.
        floor: least relative half width, for drift that a run too short to see it is blind to.
    """
    logs = [math.log(value) for value in rounds]
    count = len(logs)
    centre = statistics.median(logs)
    half = student_t(CONFIDENCE, count - 1) * statistics.stdev(logs) * math.sqrt(1 + 1 / count)
    half = max(half, math.log1p(floor))
    return Interval(math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def ratio_interval(rounds: Sequence[float], base: Sequence[float]) -> Interval:
    """Return how many times as long one engine takes as another, from rounds in pairs.

    Args:
        rounds: the median time of each of its rounds, at least two.
        base: that of the other engine in the same rounds.
    """
    logs = [math.log(own / other) for own, other in zip(rounds, base, strict=True)]
    count = len(logs)
    centre = statistics.fmean(logs)
    half = student_t(CONFIDENCE, count - 1) * statistics.stdev(logs) / math.sqrt(count)
    return Interval(math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def ratio_of(value: Interval, base: Interval) -> Interval:
    """Return the ratio of two values that were measured apart; their errors add in quadrature."""
    centre = value.value / base.value
    half = math.hypot(value.log_error, base.log_error)
    if math.isinf(half):
        return Interval(centre, 0.0, math.inf)
    return Interval(centre, centre * math.exp(-half), centre * math.exp(half))


def student_t(confidence: float, freedom: int) -> float:
    """Return the value that Student's t stays within, both ways, with a probability.

    The distribution has a closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3
    and 26.7.4); bisection turns it around.

    Args:
        confidence: the probability, in 0..1 without the ends.
        freedom: degrees of freedom, 1 or more.
    """
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if _within(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return high


def _within(value: float, freedom: int) -> float:
    """Return the probability that |t| is at most `value`."""
    angle = math.atan(value / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    total, term = 0.0, cosine if freedom % 2 else 1.0
    for step in range(freedom % 2 + 2, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (step - 1) / step
    if freedom % 2:
        return 2 / math.pi * (angle + sine * total)
    return sine * total
