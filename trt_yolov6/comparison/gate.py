"""The gate: is a comparison slower or less accurate than an earlier one, beyond the limits?

Latency is noisy, so a slowdown fails only if the whole interval of the ratio is beyond the limit;
the errors of two runs add in quadrature. If part of the interval is beyond it, the slowdown is
undecided: it passes with a line that says so, or fails if `strict`. AP is exact: the same images
and arithmetic give the same AP, so any drop beyond the limit fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from trt_yolov6.common.ranges import Checked, NotNegative
from trt_yolov6.common.statistics import Interval, ratio_of
from trt_yolov6.common.text import counted
from trt_yolov6.comparison.results import THRESHOLDS, latency_of, other_basis
from trt_yolov6.errors import UserError

SAME_ENGINE = Interval(1.0, 1.0, 1.0)
"""The ratio of an engine to itself: the same file, backend and driver, so not measured again."""


@dataclass(frozen=True)
class Limits(Checked):
    """Allowed loss of a comparison against its baseline."""

    max_slowdown: NotNegative = 3.0
    """Percent that a latency may grow by."""
    max_ap_drop: Annotated[float, Meta(ge=0, le=100)] = 0.2
    """AP points (hundredths) that an AP may fall by: 0.2 allows 0.518 after 0.520."""
    strict: bool = False
    """Undecided slowdowns fail."""
    other_device: bool = False
    """Accept a baseline from another device."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of the gate; each reason is a line."""

    failures: tuple[str, ...]
    undecided: tuple[str, ...]
    """Limits that noise leaves undecided."""
    passed: tuple[str, ...]
    strict: bool

    @property
    def ok(self) -> bool:
        """True where nothing fell short."""
        return not self.failures and not (self.strict and self.undecided)


def check(
    results: Mapping[str, Any],
    baseline: Mapping[str, Any],
    limits: Limits | None = None,
    *,
    paired: Mapping[tuple[str, int], Interval] | None = None,
) -> Verdict:
    """Compare results with those of an earlier comparison.

    Every engine of the baseline (see `matched`) must be there with each of its batch sizes; further
    engines are not judged.

    Args:
        results, baseline: from `results.read_results` or `run.compare`.
        limits: how much may be lost.
        paired: ratios of latencies by engine and batch from `run.side_by_side`, which replace those
            of two runs.

    Raises:
        UserError: the baseline is of another data set or, unless allowed, of another device.
    """
    limits = limits or Limits()
    check_comparable(results, baseline, limits)
    lines: dict[_Outcome, list[str]] = {"failed": [], "undecided": [], "passed": []}
    now = {engine["engine"]: engine for engine in results["engines"]}
    names = matched(results, baseline)
    for engine in baseline["engines"]:
        name = names.get(engine["engine"])
        if name is None:
            text = f"{engine['engine']}: the baseline has it, this comparison does not"
            lines["failed"].append(text)
            continue
        subject = _subject(name, engine["engine"])
        outcome, text = _judge_ap(subject, now[name]["AP"], engine["AP"], limits.max_ap_drop)
        lines[outcome].append(text)
    timings = {(timing["engine"], timing["batch"]): timing for timing in results["timings"]}
    for timing in baseline["timings"]:
        name = names.get(timing["engine"])
        if name is None:
            continue
        key = name, timing["batch"]
        subject = f"{_subject(name, timing['engine'])}, batch {key[1]}"
        ratio = (paired or {}).get(key)
        outcome, text = _judge_latency(
            subject, timings.get(key), timing, ratio, limits.max_slowdown
        )
        lines[outcome].append(text)
    return Verdict(
        tuple(lines["failed"]), tuple(lines["undecided"]), tuple(lines["passed"]), limits.strict
    )


def matched(results: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, str]:
    """Return for each engine of a baseline the same engine of a comparison, by their names.

    Equal weights, precision, backend and size make the same engine, whatever its file is called;
    otherwise, as for a checkpoint that was trained again, the name decides.
    """
    own = [_identity(engine) for engine in results["engines"]]
    theirs = [_identity(engine) for engine in baseline["engines"]]
    found: dict[str, str] = {}
    for engine, identity in zip(baseline["engines"], theirs, strict=True):
        if identity is not None and own.count(identity) == theirs.count(identity) == 1:
            found[engine["engine"]] = results["engines"][own.index(identity)]["engine"]
    left = {engine["engine"] for engine in results["engines"]} - set(found.values())
    for engine in baseline["engines"]:
        name = engine["engine"]
        if name not in found and name in left:
            found[name] = name
    return found


def _identity(engine: Mapping[str, Any]) -> tuple[Any, ...] | None:
    sha256 = engine.get("source_sha256")
    if not sha256:
        return None
    size = tuple(engine.get("image_size") or ())
    return sha256, engine.get("precision"), engine.get("backend"), size


def _subject(name: str, before: str) -> str:
    return name if name == before else f"{name} ({before} in the baseline)"


def check_comparable(
    results: Mapping[str, Any], baseline: Mapping[str, Any], limits: Limits
) -> None:
    """Refuse a baseline that these results cannot be compared with.

    Raises:
        UserError: it is of another data set, other thresholds, or another device.
    """
    check_basis(results["data"], results["settings"], baseline)
    if not limits.other_device:
        for engine in results["engines"]:
            check_device(engine["device"], baseline)


def check_device(device: str, baseline: Mapping[str, Any]) -> None:
    """Refuse a baseline without an engine on this device.

    Raises:
        UserError: it was measured elsewhere.
    """
    before = sorted({engine["device"] for engine in baseline["engines"]})
    if device not in before:
        raise UserError(
            f"the baseline was measured on {', '.join(before) or 'no device'}, this comparison on "
            f"{device}; make a baseline here, or give `other_device`."
        )


def check_basis(
    data: Mapping[str, Any], settings: Mapping[str, Any], baseline: Mapping[str, Any]
) -> None:
    """Refuse a baseline of other data or thresholds, before anything is measured.

    Data and settings are as in results: from `measure.data_record` and `plan.settings_of`.

    Raises:
        UserError: it is of another data set or other thresholds.
    """
    key = other_basis(data, settings, baseline)
    if key in THRESHOLDS:
        raise UserError(
            f"the baseline was evaluated with {key} {baseline['settings'].get(key)}, this "
            f"comparison with {settings.get(key)}; use the same, or make a new baseline."
        )
    if key is not None:
        raise UserError(
            f"the baseline is of another data set ({baseline['data'].get('root')}, "
            f"{baseline['data'].get('split')}); compare on the same one, or make a new baseline."
        )


def format_verdict(verdict: Verdict) -> str:
    """Return a verdict as text: a line for each reason, then the outcome."""
    lines = [
        *(f"failed: {text}" for text in verdict.failures),
        *(f"undecided: {text}" for text in verdict.undecided),
        *(f"passed: {text}" for text in verdict.passed),
    ]
    if verdict.ok:
        lines.append("gate: passed" + (" (noise left some undecided)" if verdict.undecided else ""))
    else:
        reasons = len(verdict.failures) + (len(verdict.undecided) if verdict.strict else 0)
        lines.append(f"gate: failed, {counted(reasons, 'reason')}")
    return "\n".join(lines)


_Outcome = Literal["failed", "undecided", "passed"]


def _judge_ap(
    name: str, now: float | None, before: float | None, allowed: float
) -> tuple[_Outcome, str]:
    if before is None:
        return "passed", f"{name}: the baseline has no AP"
    if now is None:
        return "failed", f"{name}: the baseline has AP {before:.4f}, this comparison has none"
    points = 100 * (now - before)
    text = f"{name}: AP {now:.4f} after {before:.4f} ({points:+.2f} points, allowed -{allowed:g})"
    # A drop of exactly the limit is allowed; 1e-9 stands for the rounding of the subtraction.
    return "passed" if -points <= allowed + 1e-9 else "failed", text


def _judge_latency(
    subject: str,
    now: Mapping[str, Any] | None,
    before: Mapping[str, Any],
    side_by_side: Interval | None,
    allowed: float,
) -> tuple[_Outcome, str]:
    """Judge a timing of a baseline by the one now, or by their ratio if measured side by side."""
    if now is None:
        return "failed", f"{subject}: the baseline has a latency, this comparison does not"
    if side_by_side == SAME_ENGINE:
        return "passed", f"{subject}: same engine, not measured again"
    earlier, later = latency_of(before), latency_of(now)
    ratio = side_by_side or ratio_of(later, earlier)
    how = ", side by side" if side_by_side else ""
    text = (
        f"{subject}: {_percent(ratio.value)} ({earlier.value:.4g} to {later.value:.4g} ms; "
        f"between {_percent(ratio.low)} and {_percent(ratio.high)} with noise{how}; allowed "
        f"{allowed:+g} %)"
    )
    most = 1 + allowed / 100
    return "failed" if ratio.low > most else "undecided" if ratio.high > most else "passed", text


def _percent(ratio: float) -> str:
    """Return how much longer a ratio of latencies says it takes."""
    return f"{100 * (ratio - 1):+.1f} %"
