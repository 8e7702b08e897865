"""Ground truth of a training batch: boxes and classes, padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The annotated objects of a batch.

    boxes:   float32 (batch, most, 4), x1, y1, x2, y2 in pixels of the network's input
    classes: int64 (batch, most), index into the class names
    present: bool (batch, most); False for padding, whose boxes and classes are zero
    """

    boxes: Tensor
    classes: Tensor
    present: Tensor

    def to(self, device: torch.device | str) -> Targets:
        """Return the same on another device."""
        return Targets(self.boxes.to(device), self.classes.to(device), self.present.to(device))


def pad_targets(boxes: Sequence[Tensor], classes: Sequence[Tensor]) -> Targets:
    """Join the objects of several images, at least one object long.

    Args:
        boxes: float (n, 4) an image; all on one device.
        classes: integer (n,) an image.
    """
    device = boxes[0].device
    most = max(1, *(len(item) for item in boxes)) if boxes else 1
    joined = torch.zeros(len(boxes), most, 4, device=device)
    labels = torch.zeros(len(boxes), most, dtype=torch.int64, device=device)
    present = torch.zeros(len(boxes), most, dtype=torch.bool, device=device)
    for row, (corners, names) in enumerate(zip(boxes, classes, strict=True)):
        joined[row, : len(corners)] = corners
        labels[row, : len(names)] = names
        present[row, : len(names)] = True
    return Targets(joined, labels, present)
