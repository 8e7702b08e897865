"""Plots of an evaluation: precision and recall by class, and the confusion matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.plots import new_figure, save_figure
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.detectors.overlap import iou

CONFUSION_CONFIDENCE = 0.25
"""Score from which a detection is a statement, for the confusion matrix."""

CONFUSION_IOU = 0.5
"""Overlap from which a detection is about an object."""

_MOST_NAMED = 12
"""Classes whose curves have a name; of more, the mean's is enough."""


class Confusion:
    """A confusion matrix, filled image by image."""

    def __init__(self, classes: int) -> None:
        """Start with nothing counted."""
        self.counts: NDArray[np.int64] = np.zeros((classes + 1, classes + 1), np.int64)
        """Rows: detected classes, columns: annotated ones; the last of each is for no object."""

    def add(
        self,
        found: Detections,
        row_of: Sequence[int | None],
        boxes: NDArray[np.float64],
        classes: NDArray[np.int64],
    ) -> None:
        """Count an image. The surest detection takes the object it overlaps most, of any class.

        Args:
            found: detections, the best first.
            row_of: of each of the detector's classes, the row; None: it is not counted.
            boxes: (n, 4) of the objects, x1, y1, x2, y2 in pixels.
            classes: (n,) of the objects, their columns.
        """
        free = np.ones(len(boxes), bool)
        nothing = len(self.counts) - 1
        for box, score, label in zip(found.xyxy, found.confidence, found.class_id, strict=True):
            row = row_of[int(label)]
            if score < CONFUSION_CONFIDENCE or row is None:
                continue
            overlaps = np.where(free, iou(box.astype(np.float64), boxes), 0)
            best = int(overlaps.argmax()) if len(boxes) else 0
            if len(boxes) and overlaps[best] >= CONFUSION_IOU:
                free[best] = False
                self.counts[row, classes[best]] += 1
            else:
                self.counts[row, nothing] += 1
        for column in classes[free]:
            self.counts[nothing, column] += 1


def write_plots(
    folder: str | Path,
    class_names: Sequence[str],
    precision: NDArray[np.float64],
    confusion: NDArray[np.int64],
) -> tuple[Path, Path]:
    """Write `pr-curves.png` and `confusion.png`; return their paths.

    Args:
        folder: made if missing.
        class_names: of the data set, in its order.
        precision: (101, classes) at recalls 0, 0.01 ... 1 and IoU 0.5; -1 for a class without an
            object.
        confusion: `Confusion.counts`.

    Raises:
        UserError: one cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    # Between dollars matplotlib reads a formula, and it leaves out labels that begin with _.
    names = [re.sub("^_", " _", name.replace("$", r"\$")) for name in class_names]
    curves, matrix = Path(folder) / "pr-curves.png", Path(folder) / "confusion.png"
    save_figure(curves, _curves(names, precision))
    save_figure(matrix, _matrix(names, confusion))
    return curves, matrix


def _curves(class_names: Sequence[str], precision: NDArray[np.float64]) -> Any:
    figure = new_figure(8, 6)
    axes = figure.subplots()
    recall = np.linspace(0, 1, len(precision))
    known = [index for index in range(precision.shape[1]) if precision[0, index] > -1]
    for index in known:
        values = precision[:, index]
        named = len(known) <= _MOST_NAMED
        axes.plot(
            recall,
            values,
            linewidth=1.2 if named else 0.6,
            alpha=1 if named else 0.4,
            label=f"{class_names[index]} {values.mean():.3f}" if named else None,
        )
    if known:
        mean = precision[:, known].mean(axis=1)
        axes.plot(recall, mean, color="black", linewidth=2.2, label=f"mean {mean.mean():.3f}")
        axes.legend(title="AP50", fontsize=8, loc="lower left")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title("Precision and recall at IoU 0.5", fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    return figure


def _matrix(class_names: Sequence[str], counts: NDArray[np.int64]) -> Any:
    size = len(counts)
    side = min(18.0, 3.5 + 0.45 * size)
    figure = new_figure(side, side)
    axes = figure.subplots()
    of_column = counts / np.maximum(1, counts.sum(axis=0, keepdims=True))
    axes.imshow(of_column, cmap="Blues", vmin=0, vmax=1)
    font = 8 if size <= 25 else 5
    axes.set_xticks(np.arange(size), [*class_names, "nothing"], rotation=90, fontsize=font)
    axes.set_yticks(np.arange(size), [*class_names, "nothing"], fontsize=font)
    axes.set_xlabel("what is there")
    axes.set_ylabel("what was found")
    axes.set_title(
        f"Objects by class, scores from {CONFUSION_CONFIDENCE}, IoU from {CONFUSION_IOU}; "
        "shaded by column",
        fontsize=9,
    )
    if size <= 25:
        for row, column in np.argwhere(counts):
            colour = "white" if of_column[row, column] > 0.5 else "black"
            axes.text(
                column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=7
            )
    return figure
