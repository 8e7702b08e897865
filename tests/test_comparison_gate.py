"""The gate: what counts as slower or less accurate, and what noise leaves open."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from trt_yolov6.common.statistics import Interval
from trt_yolov6.comparison.gate import SAME_ENGINE, Limits, check, format_verdict, matched
from trt_yolov6.errors import UserError

RESULTS: dict[str, Any] = {
    "data": {"root": "d", "split": "val", "annotations_sha256": "a", "images_sha256": "b"},
    "settings": {"confidence": 0.03, "iou": 0.65, "max_detections": 300, "border": 0},
    "engines": [{"engine": "n fp32", "AP": 0.5200, "device": "cpu"}],
    "timings": [
        {"engine": "n fp32", "batch": 1, "latency_ms": {"median": 10.0, "interval": [9.9, 10.1]}}
    ],
}


def changed(ap: float = 0.52, median: float = 10.0, error: float = 0.1) -> dict[str, Any]:
    value = copy.deepcopy(RESULTS)
    value["engines"][0]["AP"] = ap
    interval = [median - error, median + error]
    value["timings"][0]["latency_ms"] = {"median": median, "interval": interval}
    return value


def test_nothing_changed_passes() -> None:
    verdict = check(RESULTS, RESULTS)
    assert verdict.ok
    assert not verdict.failures
    assert not verdict.undecided
    assert len(verdict.passed) == 2


@pytest.mark.parametrize(
    ("median", "error", "outcome"),
    [
        (10.0, 0.1, "passed"),
        (10.2, 0.02, "undecided"),  # 2 %, give or take the baseline's own percent
        (10.4, 0.1, "undecided"),  # 4 %, but 3 % lies within the noise
        (10.7, 0.1, "failed"),
        (9.0, 0.1, "passed"),
        (12.0, 6.0, "undecided"),
    ],
)
def test_a_slowdown_fails_only_where_noise_cannot_explain_it(
    median: float, error: float, outcome: str
) -> None:
    verdict = check(changed(median=median, error=error), RESULTS, Limits(max_slowdown=3))
    assert verdict.ok == (outcome != "failed")
    lists = {
        "failed": verdict.failures,
        "undecided": verdict.undecided,
        "passed": [text for text in verdict.passed if "batch" in text],
    }
    assert [name for name, texts in lists.items() if texts] == [outcome]
    strict = check(changed(median=median, error=error), RESULTS, Limits(3, strict=True))
    assert strict.ok == (outcome == "passed")


@pytest.mark.parametrize(
    ("ap", "ok"), [(0.5200, True), (0.5180, True), (0.5179, False), (0.6, True)]
)
def test_ap_may_fall_by_so_many_hundredths(ap: float, ok: bool) -> None:
    assert check(changed(ap=ap), RESULTS, Limits(max_ap_drop=0.2)).ok is ok


def test_what_was_measured_side_by_side_is_decided_where_two_runs_are_not() -> None:
    noisy = changed(median=10.6, error=2.0)
    assert check(noisy, RESULTS).undecided
    key = "n fp32", 1
    assert not check(noisy, RESULTS, paired={key: Interval(1.06, 1.05, 1.07)}).ok
    fine = check(noisy, RESULTS, paired={key: Interval(1.00, 0.99, 1.01)})
    assert fine.ok
    assert not fine.undecided


def test_an_engine_or_batch_size_that_is_gone_fails() -> None:
    missing = changed()
    missing["timings"] = []
    assert "batch 1" in check(missing, RESULTS).failures[0]
    missing["engines"] = []
    missing["engines"].append({"engine": "other", "AP": 0.6, "device": "cpu"})
    assert check(missing, RESULTS).failures == (
        "n fp32: the baseline has it, this comparison does not",
    )


def test_reasons_are_lines_and_the_last_one_is_the_outcome() -> None:
    text = format_verdict(check(changed(ap=0.5, median=11.0), RESULTS))
    lines = text.splitlines()
    assert lines[0] == "failed: n fp32: AP 0.5000 after 0.5200 (-2.00 points, allowed -0.2)"
    assert lines[1].startswith("failed: n fp32, batch 1: +10.0 % (10 to 11 ms; between ")
    assert lines[-1] == "gate: failed, 2 reasons"


def test_a_baseline_of_other_data_device_or_thresholds_is_refused() -> None:
    for change, words in (
        (("data", "images_sha256"), "another data set"),
        (("settings", "iou"), "iou"),
    ):
        other = changed()
        other[change[0]][change[1]] = "other"
        with pytest.raises(UserError, match=words):
            check(RESULTS, other)
    other = changed()
    other["engines"][0]["device"] = "another cpu"
    with pytest.raises(UserError, match="`other_device`"):
        check(RESULTS, other)
    assert check(RESULTS, other, Limits(other_device=True)).ok
    # Engines on a second device are missing here, which is not a reason to refuse the others.
    other["engines"].append({"engine": "n fp16", "AP": 0.52, "device": "cpu"})
    assert check(RESULTS, other).failures == (
        "n fp16: the baseline has it, this comparison does not",
    )


@pytest.mark.parametrize("limits", [{"max_slowdown": -1}, {"max_ap_drop": 101}])
def test_limits_out_of_range_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"^`{next(iter(limits))}` must be at"):
        Limits(**limits)  # type: ignore[arg-type]


def test_an_unchanged_engine_is_not_judged_by_two_noisy_measurements() -> None:
    verdict = check(changed(median=5.0), changed(median=10.0), paired={("n fp32", 1): SAME_ENGINE})
    assert verdict.passed[-1] == "n fp32, batch 1: same engine, not measured again"


def renamed(name: str, sha256: str) -> dict[str, Any]:
    value = copy.deepcopy(RESULTS)
    value["engines"][0] |= {"engine": name, "source_sha256": sha256, "precision": "fp32"}
    value["timings"][0]["engine"] = name
    return value


def test_an_engine_is_matched_by_what_it_is_and_else_by_its_name() -> None:
    assert matched(renamed("new", "a"), renamed("old", "a")) == {"old": "new"}
    verdict = check(renamed("new", "a"), renamed("old", "a"))
    assert verdict.ok
    assert all(text.startswith("new (old in the baseline)") for text in verdict.passed)
    # Trained again: the weights differ, the name is the same.
    assert matched(renamed("n", "b"), renamed("n", "a")) == {"n": "n"}
    assert matched(renamed("new", "b"), renamed("old", "a")) == {}
    assert not check(renamed("new", "b"), renamed("old", "a")).ok
