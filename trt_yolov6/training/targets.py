"""Ground truth of a training batch: boxes and classes, padded to one length."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The annotated objects of a batch."""

    boxes: Tensor
    """float32 (batch, most, 4), x1, y1, x2, y2 in pixels of the network's input."""
    classes: Tensor
    """int64 (batch, most), index into the class names."""
    present: Tensor
    """bool (batch, most); False for padding, whose boxes and classes are zero."""
