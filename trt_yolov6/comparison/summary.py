"""The results of a comparison as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trt_yolov6.common.text import fitted, four_digits
from trt_yolov6.comparison.results import latency_of


def format_results(results: Mapping[str, Any], width: int | None = None) -> str:
    """Return the results as text: a line for each engine and batch size, then notes.

    The table has at most `width` columns, if that is not None.
    """
    engines = {engine["engine"]: engine for engine in results["engines"]}
    ratios = {(one["engine"], one["batch"]): one for one in results["ratios"]}
    rows = [("engine", "AP", "AP50", "batch", "median ms", "95 % interval", "FPS", "time / first")]
    for timing in results["timings"]:
        engine = engines[timing["engine"]]
        latency = latency_of(timing)
        ratio = ratios.get((timing["engine"], timing["batch"]))
        rows.append(
            (
                timing["engine"],
                ap_text(engine["AP"]),
                ap_text(engine["AP50"]),
                str(timing["batch"]),
                four_digits(latency.value) + (" *" if timing["disturbed"] else ""),
                f"{four_digits(latency.low)} .. {four_digits(latency.high)}",
                four_digits(timing["throughput_fps"]),
                "" if ratio is None else ratio_text(ratio),
            )
        )
    data = results["data"]
    lines = [
        f"{data['images']} images of {data['root']}, {data['split']}; engine alone, resident "
        f"input, {results['settings']['rounds']} rounds",
        *fitted(rows, 1, width),
    ]
    if any(timing["disturbed"] for timing in results["timings"]):
        lines.append("* other processes disturbed too many runs; the interval allows for that")
    lines += sorted({f"note: {one['note']}" for one in results["engines"] if one["note"]})
    lines += [f"left out: {text}" for text in results["left_out"]]
    devices = dict.fromkeys(
        f"{one['device']}, {one['backend']} {one['backend_version']}" for one in results["engines"]
    )
    lines += [f"on {device}" for device in devices]
    return "\n".join(lines)


def ratio_text(ratio: Mapping[str, Any]) -> str:
    """Return a ratio with its error, such as `1.32 ± 0.02`."""
    low, high = ratio["interval"]
    return f"{ratio['ratio']:.3f} ± {(high - low) / 2:.3f}"


def ap_text(value: float | None) -> str:
    """Return an AP with four digits, or that there is none."""
    return "n/a" if value is None else f"{value:.4f}"
