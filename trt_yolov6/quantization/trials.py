"""The candidates that a search tries, and the table that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trt_yolov6.common.text import aligned
from trt_yolov6.quantization.calibrators import Method
from trt_yolov6.quantization.table import Variant, Weights

Decision = Literal["graph", "ranges", "weights", "float layers", "gradients"]
"""Decision that a candidate is tried for: the form of the graph, the calibrator, rounding of
weights, the layers that stay in float, tuning by gradients."""


@dataclass(frozen=True)
class Candidate:
    """One way to quantize, and what came of it."""

    decides: Decision
    variant: Variant
    method: Method
    agreement: float
    """AP of its detections against the float network's confident ones, 0..1."""
    loss: float
    """Movement of boxes and scores (`judge.Judge.loss`), which decides; the lower the better."""
    weights: Weights = "nearest"
    float_layers: tuple[str, ...] = ()
    seconds: float = 0.0
    """Seconds of making and judging it."""
    slowdown: float = 0.0
    """Estimated share by which its float layers lengthen INT8's run time, 0..1."""
    ap: float | None = None
    """AP on labelled images, 0..1, where it was measured."""

    @property
    def outcome(self) -> str:
        """Outcome of the trial, in words."""
        return f"agreement with float {self.agreement:.3f}, moved by {self.loss:.4f}"

    def to_json(self) -> dict[str, Any]:
        """Return it JSON-ready, for the manifest."""
        return {
            "decides": self.decides,
            "graph": self.variant,
            "ranges": self.method,
            "weights": self.weights,
            "float_layers": list(self.float_layers),
            "agreement": round(self.agreement, 4),
            "loss": round(self.loss, 5),
            **({} if self.ap is None else {"ap": round(self.ap, 4)}),
            "slowdown": round(self.slowdown, 4),
            "seconds": round(self.seconds, 1),
        }


def simplest_of_the_best(candidates: Sequence[Candidate], tolerance: float) -> Candidate:
    """Return the first candidate whose loss exceeds the best's by at most a share of it."""
    least = min(candidate.loss for candidate in candidates)
    return next(item for item in candidates if item.loss <= (1 + tolerance) * least)


def tried_table(candidates: Sequence[Candidate]) -> list[str]:
    """Return a search's candidates as lines of a table; none without candidates."""
    if not candidates:
        return []
    labelled = any(item.ap is not None for item in candidates)
    last = *(("AP",) if labelled else ()), "slower", "seconds"
    rows = [("decision", "tried", "moved", "agreement", *last)]
    for item in candidates:
        what = {
            "graph": item.variant,
            "ranges": item.method,
            "weights": item.weights,
            "float layers": f"{len(item.float_layers)} in float",
            "gradients": "tuned by gradients",
        }[item.decides]
        if item.float_layers and item.decides != "float layers":
            what += f", {len(item.float_layers)} in float"
        slower = f"{item.slowdown:.1%}" if item.float_layers else ""
        ap = ("" if item.ap is None else f"{item.ap:.4f}",) if labelled else ()
        cells = (f"{item.loss:.4f}", f"{item.agreement:.3f}", *ap, slower, f"{item.seconds:.1f}")
        rows.append((item.decides, what, *cells))
    return aligned(rows, left=2)
