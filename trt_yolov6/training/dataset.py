"""A training set held decoded in memory, on the GPU where it fits, and the batches made from it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trt_yolov6.common.files import sha256_bytes
from trt_yolov6.common.text import counted
from trt_yolov6.data.coco import CocoDataset, CocoImage, DataReport
from trt_yolov6.data.images import same_files
from trt_yolov6.data.letterbox import Letterbox, fill, fit
from trt_yolov6.errors import UserError
from trt_yolov6.training.augmentation import (
    MAX_ASPECT,
    MIN_SIDE,
    AugmentationSettings,
    BatchPlan,
    draw,
    make_pictures,
    place_boxes,
    plan_batch,
    to_device,
    worth_keeping,
)
from trt_yolov6.training.data_validation import (
    CheckedSplit,
    OnBadData,
    decode,
    in_order,
    read_split,
    settle,
)
from trt_yolov6.training.targets import Targets

DATA_REPORT_FILE = "bad_data.json"

DEVICE_SHARE = 0.5
"""Part of a GPU's free memory that a training set may take; the rest is for training."""

_GPU_CHUNK = 32
_CPU_CHUNK = 4  # stays closer to the caches


@dataclass(frozen=True)
class TrainingSet:
    """A split, decoded, each image resized so that its long side is `image_size`."""

    image_size: int
    """Side S of the network's input, in pixels."""
    device: torch.device
    """Device that batches are made on."""
    class_names: tuple[str, ...]
    files: tuple[Path, ...]
    """The n image files."""
    images: Tensor
    """uint8 (n, 3, H, W) RGB on `device` or in host memory; images top left, padded with gray."""
    sizes: Tensor
    """int64 (n, 2) on the CPU: height and width of each image inside its row of `images`."""
    boxes: Tensor
    """float32 (m, 4) on the CPU: x1, y1, x2, y2 in pixels of the resized images, in order."""
    classes: Tensor
    """int64 (m,) on the CPU."""
    first: Tensor
    """int64 (n + 1,) on the CPU: objects `first[i]` to `first[i + 1]` belong to image i."""
    report: DataReport
    """Problems that were found and left out."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.sizes)

    @property
    def labels_sha256(self) -> str:
        """Hash of the images' names and sizes and of their objects, not of pixels."""
        names = repr((self.class_names, [path.name for path in self.files])).encode()
        parts = (self.sizes, self.boxes, self.classes, self.first)
        return sha256_bytes(names + b"".join(part.numpy().tobytes() for part in parts))

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
            strong: False turns off Mosaic and Mixup, as in the last epochs, but not affine, colour,
                flips and the gray border.
            share: (rank, processes): make only this part of the batch; lengths differ by one at
                most. With the same indices and generator state in every process, the parts make
                up the batch that a single process would make.

        Returns:
            float32 (B, 3, S, S) RGB in 0..1, and the `Targets`.
        """
        chosen = np.asarray(indices, np.int64)
        rank, processes = share
        part = slice(len(chosen) * rank // processes, len(chosen) * (rank + 1) // processes)
        plan = plan_batch(
            chosen[part],
            self.sizes.numpy(),
            draw(len(chosen), generator)[part],
            augmentation,
            size=self.image_size,
            strong=strong,
        )
        chunk = _GPU_CHUNK if self.device.type == "cuda" else _CPU_CHUNK
        pictures = make_pictures(plan, self._gather, self.device, chunk)
        return pictures, self.targets(plan)

    def _gather(self, images: NDArray[np.int64]) -> Tensor:
        """Return images, uint8 (k, 3, H, W), on the device."""
        if self.images.device == self.device:
            return self.images.index_select(0, to_device(torch.from_numpy(images), self.device))
        # One by one, directly to the device: gathering first would copy everything twice.
        gathered = torch.empty(
            len(images), *self.images.shape[1:], dtype=torch.uint8, device=self.device
        )
        for row, image in zip(gathered, images, strict=True):
            row.copy_(self.images[int(image)], non_blocking=True)
        return gathered

    def targets(self, plan: BatchPlan) -> Targets:
        """Return the objects of a batch without those of which too little is left."""
        all_boxes, all_classes, first = self.boxes.numpy(), self.classes.numpy(), self.first.numpy()
        found = []
        for layers in (plan.singles, plan.mosaics, plan.mixed):
            images = layers.images.ravel()
            counts = first[images + 1] - first[images]
            tiles = np.repeat(np.arange(len(images)), counts)
            # Indices into `boxes`: for each image, from its first object on.
            starts = np.repeat(first[images] - np.cumsum(counts) + counts, counts)
            indices = starts + np.arange(len(starts))
            boxes, keep = place_boxes(
                layers, plan.size, all_boxes[indices].astype(np.float64), tiles
            )
            rows = layers.rows[tiles // layers.images.shape[1]]
            found.append((rows[keep], boxes[keep], all_classes[indices][keep]))
        rows, boxes, classes = (np.concatenate(items) for items in zip(*found, strict=True))
        order = np.argsort(rows, kind="stable")
        rows, boxes, classes = rows[order], boxes[order], classes[order]

        counts = np.bincount(rows, minlength=plan.pictures)
        most = max(1, int(counts.max(initial=0)))
        columns = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        padded_boxes = np.zeros((plan.pictures, most, 4), np.float32)
        padded_classes = np.zeros((plan.pictures, most), np.int64)
        padded_boxes[rows, columns] = boxes
        padded_classes[rows, columns] = classes
        present = np.arange(most) < counts[:, None]
        return Targets(
            *(
                to_device(torch.from_numpy(array), self.device)
                for array in (padded_boxes, padded_classes, present)
            )
        )


def load_training_set(
    folder: str | Path,
    split: str | None,
    image_size: int,
    device: torch.device | str,
    *,
    on_bad_data: OnBadData = "refuse",
    progress: bool = True,
    report_file: str | Path | None = None,
    class_names: Sequence[str] | None = None,
) -> TrainingSet:
    """Decode a split of a data set into memory.

    Args:
        folder: the data set's folder.
        split: which part; default: as `load_coco`.
        image_size: the side of the network's input, in pixels; the images' long side.
        device: device of the batches. The images are held there if they take at most half of its
            free memory, otherwise in host memory, pinned for a GPU.
        on_bad_data: `refuse`: raise after checking everything; `skip`: leave out only what is
            wrong.
        progress: show a bar while loading, on a terminal.
        report_file: JSON file for the report, written if it is not empty.
        class_names: classes of the checkpoint to train on; a data set with the same classes is put
            in their order.

    Raises:
        BadDataError: there are problems, and `on_bad_data` is `refuse`.
        UserError: there is no such split, nothing to train on is left in it, or it does not fit
            into memory.
    """
    checked = read_split(folder, split)
    if class_names is not None:
        checked = in_order(checked, class_names)
    placed = [_in_corner(image, image_size) for image in checked.images]
    device = torch.empty(0, device=device).device  # `cuda` becomes `cuda:0`
    store = _allocate(
        [one.resized for one in placed], image_size, device, checked.report.annotation_file
    )
    report, good = decode(
        checked, lambda index, pixels: _keep(store[index], pixels, placed[index]), progress=progress
    )
    settle(report, on_bad_data, report_file)
    for new, old in enumerate(good):
        if new != old:
            store[new] = store[old]
    if not any(len(checked.boxes[index]) for index in good):
        raise UserError(
            f"{report.annotation_file} leaves no object to train on; give annotations of images "
            "that can be read."
        )
    return TrainingSet(
        image_size=image_size,
        device=device,
        class_names=checked.class_names,
        files=tuple(checked.images[index].path for index in good),
        images=store[: len(good)],
        sizes=torch.tensor([placed[index].resized for index in good]),
        boxes=_resized_boxes(checked, placed, good),
        classes=torch.from_numpy(np.concatenate([checked.classes[index] for index in good])),
        first=torch.from_numpy(np.cumsum([0, *(len(checked.boxes[index]) for index in good)])),
        report=report,
    )


def data_notes(
    data: TrainingSet, report_file: Path, validation: CocoDataset | None
) -> tuple[str, ...]:
    """Return sentences on what was left out of training, and on images in both splits.

    A network that has learnt images does well on them.
    """
    notes = [f"{note}." for note in data.report.notes]
    if count := len(data.report.problems):
        left = counted(count, "problem")
        notes.append(f"left out of training: {left} of the data; see {report_file}.")
    boxes = data.boxes.numpy().astype(np.float64)
    if lost := int((~worth_keeping(boxes, boxes)).sum()):
        notes.append(
            f"left out of training unless enlarged: {lost} of {counted(len(boxes), 'object')}, at "
            f"most {MIN_SIDE:g} pixels wide or high, or at least {MAX_ASPECT:g} times as long as "
            f"wide, in images of {data.image_size} pixels."
        )
    paths = [image.path for image in validation.images] if validation else []
    if same := same_files(paths, data.files):
        names, of = dict.fromkeys(map(str, same[0])), counted(len(paths), "validation image")
        notes.append(
            f"warning: training has {len(same)} of {of}, too, which makes AP too high: "
            f"{' is '.join(names)}, for example."
        )
    return tuple(notes)


def _in_corner(image: CocoImage, image_size: int) -> Letterbox:
    """Place an image in the corner of its row; augmentation moves it."""
    placed = fit((image.height, image.width), (image_size, image_size))
    return dataclasses.replace(placed, top=0, left=0)


def _resized_boxes(
    checked: CheckedSplit, placed: Sequence[Letterbox], good: Sequence[int]
) -> Tensor:
    """Return the boxes of the good images in pixels of the resized ones, float32 (m, 4)."""
    boxes = []
    for index in good:
        (height, width), whole = placed[index].resized, placed[index].source
        boxes.append(checked.boxes[index] * np.array([width / whole[1], height / whole[0]] * 2))
    return torch.from_numpy(np.concatenate(boxes).astype(np.float32))


def _keep(row: Tensor, pixels: NDArray[np.uint8], placed: Letterbox) -> None:
    """Store an image, uint8 (height, width, 3), resized as for evaluation, in a row (3, H, W)."""
    canvas = np.empty((*row.shape[1:], 3), np.uint8)
    fill(canvas, pixels, placed)
    row.copy_(torch.from_numpy(canvas).to(row.device).permute(2, 0, 1))


def _allocate(
    sizes: Sequence[tuple[int, int]], image_size: int, device: torch.device, file: Path
) -> Tensor:
    """Return uint8 (n, 3, H, W) for images of the sizes, on a device or in host memory."""
    # Only as high and wide as the largest image, so images of one format waste nothing.
    height = max((size[0] for size in sizes), default=1)
    width = max((size[1] for size in sizes), default=1)
    shape = len(sizes), 3, height, width
    needed = math.prod(shape)
    if device.type == "cuda" and needed <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return torch.empty(shape, dtype=torch.uint8, device=device)
    # Each of torchrun's processes on this machine holds a set of its own.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed *= processes
    free = _free_host_memory()
    if free is not None and needed > free:
        where = f" in {processes} processes" if processes > 1 else ""
        raise UserError(
            f"{file} takes {needed / 1e9:.1f} GB of memory{where} at {image_size} pixels and "
            f"{free / 1e9:.1f} GB are free; give a smaller `image_size` or a part of the data set."
        )
    if device.type == "cuda":
        # Beyond the limit of pinned memory, copies are only slower.
        with contextlib.suppress(RuntimeError):
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    return torch.empty(shape, dtype=torch.uint8)


def _free_host_memory() -> int | None:
    """Return the bytes that can be had without swapping, where the system reports it."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"MemAvailable: *(\d+) kB", text)
    return int(found[1]) * 1024 if found else None
