"""A training set held decoded in memory, on the GPU where it fits, and the batches made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trt_yolov6.training.augmentation import AugmentationSettings
from trt_yolov6.training.data_check import DataReport, OnBadData
from trt_yolov6.training.targets import Targets


@dataclass(frozen=True)
class TrainingSet:
    """A split, decoded, each image resized so that its long side is `image_size`."""

    image_size: int
    """Side S of the network's input, in pixels."""
    device: torch.device
    """Where batches are made."""
    class_names: tuple[str, ...]
    files: tuple[Path, ...]
    """The n image files."""
    images: Tensor
    """uint8 (n, 3, H, W) RGB on `device` or in host memory; each image top left, gray beside."""
    sizes: Tensor
    """int64 (n, 2) on the CPU: height and width of each image inside its row of `images`."""
    boxes: Tensor
    """float32 (m, 4) on the CPU: x1, y1, x2, y2 in pixels of the resized images, in order."""
    classes: Tensor
    """int64 (m,) on the CPU."""
    first: Tensor
    """int64 (n + 1,) on the CPU: objects `first[i]` to `first[i + 1]` belong to image i."""
    report: DataReport
    """What was found wrong and, since it loaded, left out."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.sizes)

    def objects(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the boxes, float32 (k, 4), and classes, int64 (k,), of one image, on the CPU."""
        span = slice(int(self.first[index]), int(self.first[index + 1]))
        return self.boxes[span], self.classes[span]

    def batch(
        self,
        indices: Tensor | Sequence[int],
        augmentation: AugmentationSettings,
        generator: torch.Generator,
        *,
        strong: bool,
        share: tuple[int, int] = (0, 1),
    ) -> tuple[Tensor, Targets]:
        """Return augmented pictures and their objects, on `device`.

        Args:
            indices: which images, each 0..n-1; more are drawn for Mosaic and Mixup.
            augmentation: how to vary them.
            generator: on the CPU; the only source of chance, so the same state gives the same
                batch, on any device up to rounding (the objects exactly). It advances by the same
                amount whatever the settings.
            strong: False turns Mosaic and Mixup off, as for the last epochs; affine, colour,
                flips and the gray border stay.
            share: (rank, processes): make only this part of the batch, of equal lengths or one
                longer, in order. With the same indices and generator state in every process, the
                parts are those of the whole batch that one process would make.

        Returns:
            float32 (B, 3, S, S) RGB in 0..1, and the `Targets`.
        """
        raise NotImplementedError

    def unaugmented(
        self, indices: Tensor | Sequence[int], *, border: int = 0
    ) -> tuple[Tensor, Targets]:
        """Return letterboxed images and all their objects, as evaluation would see them.

        Args:
            indices: which images.
            border: gray pixels on every side, see `letterbox.fit`.

        Returns:
            As `batch`.
        """
        raise NotImplementedError


def load_training_set(
    folder: str | Path,
    split: str | None,
    image_size: int,
    device: torch.device | str,
    *,
    on_bad_data: OnBadData = "refuse",
    progress: bool = True,
    report_file: str | Path | None = None,
) -> TrainingSet:
    """Decode a split in COCO format into memory.

    Args:
        folder: the data set's folder.
        split: which part; default: as `load_coco`.
        image_size: the side of the network's input, in pixels; the images' long side.
        device: where batches shall be made; the images are held there if they take at most
            half of its free memory, else in host memory, pinned if it is for a GPU.
        on_bad_data: `refuse`: raise at the first look; `skip`: leave out exactly what is wrong.
        progress: show a bar while loading, on a terminal.
        report_file: where to write the report as JSON if there is anything in it.

    Raises:
        BadDataError: there are problems and they are to be refused.
        UserError: there is no such split, nothing to train on is left in it, or it does not fit
            into memory.
    """
    raise NotImplementedError
