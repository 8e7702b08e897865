"""The comparison of detectors: which of them, at which precision, is best for its latency here.

    plan ──▶ build what must be built ──▶ AP, once an engine ──▶ latency, in rounds ──▶ results

`plan` says what is compared, `run` does it and goes on after an interruption (`steps`), `timing`
and `intervals` are about latency and its uncertainty, `results` is the file that comes of it, and
`gate` holds it against an earlier one.
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
