"""Figures of matplotlib, without its global state, written as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trt_yolov6.common.files import atomic_path
from trt_yolov6.errors import MissingDependencyError


def new_figure(width: float, height: float) -> Any:
    """Return a figure of a size in inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"matplotlib does not import ({error}); install it with `pip install matplotlib`."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(path: str | Path, figure: Any) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    with atomic_path(path) as temporary:
        # Without the version in it, the same values give the same bytes.
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
