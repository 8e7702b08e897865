"""The comparison of detectors: which of them, at which precision, is best for its latency here.

    plan ──▶ build what must be built ──▶ AP, once an engine ──▶ latency, in rounds ──▶ results

`plan` says what is compared; `cases` are the engines and their building, `measure` has the steps
that measure, `timing` and `intervals` are about latency and its uncertainty. What was done once is
not done again (`steps`). `records` puts the results together, whose file `results` documents and
reads; `gate` holds them against earlier ones. `run` is the whole.
"""

from __future__ import annotations

from trt_yolov6.comparison.gate import Limits, Verdict, check
from trt_yolov6.comparison.plan import ModelEntry, Plan, read_plan
from trt_yolov6.comparison.results import read_results
from trt_yolov6.comparison.run import compare

__all__ = [
    "Limits",
    "ModelEntry",
    "Plan",
    "Verdict",
    "check",
    "compare",
    "read_plan",
    "read_results",
]
