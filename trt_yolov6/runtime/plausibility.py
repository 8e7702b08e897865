"""Check, on the first batch of a run, whether a network's outputs can be a detector's.

A wrong guess of the family, a sigmoid left out on export, or an overflow in half precision still
gives an AP, and an AP of 0 does not say why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.detectors.layouts import Anchors, Found, reader
from trt_yolov6.engines.base import Engine
from trt_yolov6.errors import UserError
from trt_yolov6.spec import NmsSettings

_SLACK = 0.01
"""Tolerance of scores outside 0..1: half precision rounds."""

_EVERY = 0.99
"""The share of anchors above the threshold from which it is called every one."""

_LOWEST = NmsSettings().confidence
"""The threshold that is taken where a lower one is asked for, at which any anchor may pass."""


def check_outputs(
    engine: Engine,
    outputs: Mapping[str, NDArray[Any]],
    images: int,
    confidence: float,
    batch: NDArray[Any],
) -> tuple[str, ...]:
    """Refuse outputs that are not a detector's, and return what is odd about others, as sentences.

    Args:
        engine: the engine that computed them.
        outputs: all outputs by name.
        images: number of rows that are images, not padding.
        confidence: threshold of scores.
        batch: the engine's input, to find the first tensor inside that is not finite.

    Raises:
        UserError: nothing in an output is finite, they are for fewer images, scores are not within
            0..1, or boxes are fractions of the image or end before they begin.
    """
    warnings = []
    broken = [name for name, array in outputs.items() if has_non_finite(array)]
    if broken:
        first = engine.first_non_finite(batch)
        where = f"; the first tensor that is not is {first}" if first else ""
        problem = f"{engine.path} gives NaN or infinity in {', '.join(broken)}{where}"
        if any(not np.isfinite(outputs[name]).any() for name in broken):
            raise UserError(f"{problem}. Build it with fp32, or check its weights.")
        warnings.append(f"{problem}. What is not finite counts as no detection")
    read = reader(engine.output_layout, outputs, engine.image_size, images)
    predictions = [read(index) for index in range(images)]
    _check_scores(engine, predictions)
    anchors = [one for one in predictions if isinstance(one, Anchors)]
    _check_boxes(engine, anchors, confidence)
    threshold = max(confidence, _LOWEST)
    if anchors and all(_share(one, threshold) >= _EVERY for one in anchors):
        warnings.append(
            f"every anchor of {engine.path} passes the threshold {threshold:g}: its scores are "
            "hardly probabilities (a sigmoid too many, or weights that are not trained)"
        )
    return tuple(warnings)


def has_non_finite(array: NDArray[Any]) -> bool:
    """Return whether any number is NaN or infinite; one pass, without an array of flags."""
    if not np.issubdtype(array.dtype, np.floating) or not array.size:
        return False
    with np.errstate(invalid="ignore"):
        return not (np.isfinite(array.min()) and np.isfinite(array.max()))


def _check_scores(engine: Engine, predictions: Sequence[Anchors | Found]) -> None:
    scores = []
    for one in predictions:
        found = one.scores if isinstance(one, Anchors) else one.scores[one.classes >= 0]
        scores.append(found.reshape(-1))
    values = np.concatenate([np.empty(0, np.float32), *scores])
    values = values[np.isfinite(values)]
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    if low < -_SLACK or high > 1 + _SLACK:
        raise UserError(
            f"{engine.path} has scores from {low:.3g} to {high:.3g}, read as {engine.decoder} "
            f"({engine.output_layout}): these are not probabilities. Export it with its sigmoid, "
            "or name its family with `decoder`.",
        )


def _check_boxes(engine: Engine, anchors: Sequence[Anchors], confidence: float) -> None:
    boxes = []
    for one in anchors:
        with np.errstate(invalid="ignore"):
            chosen = np.flatnonzero(one.scores.max(axis=1, initial=0) > confidence)[:1000]
        boxes.append(one.corners(chosen))
    corners = np.concatenate([np.empty((0, 4)), *boxes])
    corners = corners[np.isfinite(corners).all(axis=1)]
    if len(corners) < 3:
        return
    side = max(engine.image_size)
    if np.abs(corners).max() <= 2 < side / 8:
        raise UserError(
            f"{engine.path} has all boxes within 2 pixels of the corner, read as {engine.decoder} "
            f"({engine.output_layout}): they are fractions of the image, or not decoded. Export it "
            "with boxes in pixels, or name its family with `decoder`.",
        )
    sides = corners[:, 2:] - corners[:, :2]
    if ((sides < 0).any(axis=1)).mean() > 0.5:
        raise UserError(
            f"{engine.path} has boxes that end before they begin, read as {engine.decoder} "
            f"({engine.output_layout}): they are laid out otherwise. Name its family with "
            "`decoder`.",
        )


def _share(anchors: Anchors, threshold: float) -> float:
    """Return the part of an image's anchors whose best score is above a threshold."""
    with np.errstate(invalid="ignore"):
        return float((anchors.scores.max(axis=1, initial=0) > threshold).mean())
