"""This package's own checkpoints: what `train` writes and `load_checkpoint` reads.

A zip file of torch.save with plain values and tensors only, so `torch.load(weights_only=True)` and
our own reader (see `inert_pickle`) take it without running anything:

    format         `trt-yolov6 checkpoint`
    version        2; version 1 had fewer fields in its architecture
    architecture   the fields of `models.Architecture`
    class_names    list of strings
    weights        tensors by name, in training form: kernels in half precision, the rest in float32
    settings       JSON: how it was trained (`training.TrainSettings`)
    epoch          completed epochs
    AP             COCO AP on the validation split in 0..1, or None
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trt_yolov6.checkpoints.archive import TorchArchive
from trt_yolov6.checkpoints.inert_pickle import Shell
from trt_yolov6.common.files import write_bytes
from trt_yolov6.common.records import as_record
from trt_yolov6.errors import UserError
from trt_yolov6.models.network import YOLOv6, shapes_only
from trt_yolov6.models.variants import Architecture, can_be_built, variant_name

FORMAT = "trt-yolov6 checkpoint"
VERSION = 2

_REMEDY = "copy or train it again."
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Training:
    """Training record of a checkpoint of this package."""

    settings: Mapping[str, Any]
    """The fields of `training.recipe.TrainSettings`, as plain values."""
    epoch: int
    """Completed epochs."""
    ap: float | None
    """COCO AP on the validation split in 0..1; None where it was not evaluated."""

    @property
    def image_size(self) -> int | None:
        """Side of the input in pixels that it was trained at; None where the file has none."""
        size = self.settings.get("image_size")
        return size if isinstance(size, int) and size > 0 else None


def write_checkpoint(
    path: str | Path, model: YOLOv6, class_names: tuple[str, ...], training: Training
) -> None:
    """Write a network in training form, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    weights = {
        name: _stored(tensor)
        for name, tensor in model.state_dict().items()
        if not name.endswith(_COUNTER)
    }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": dataclasses.asdict(model.arch),
        "class_names": list(class_names),
        "weights": weights,
        "settings": json.dumps(dict(training.settings)),
        "epoch": training.epoch,
        "AP": training.ap,
    }
    write_torch(path, content)


def write_torch(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write what `torch.load` reads, whole or not at all, by way of memory.

    Given a path, torch.save would put its name into the file; given an open file, it hides what the
    system says of a full disk.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    # Not `getbuffer()`: Python 3.12 crashes at its end where that write failed.
    write_bytes(path, buffer.getvalue())


def _stored(tensor: Tensor) -> Tensor:
    """Return kernels in half precision, unless they overflow it, and all else as it is."""
    tensor = tensor.detach().to("cpu", memory_format=torch.contiguous_format).clone()
    if tensor.ndim > 1:
        half = tensor.half()
        if torch.isfinite(half).all():
            return half
    return tensor


def is_trained(root: Any) -> bool:
    """Return True where what was pickled says that it is in this format."""
    return isinstance(root, dict) and root.get("format") == FORMAT


def read_trained(archive: TorchArchive) -> tuple[YOLOv6, tuple[str, ...], Training]:
    """Return network (eval mode, float32), class names and training of an opened file.

    Raises:
        UserError: it is damaged, or of a later version.
    """
    root, path = archive.root, archive.path
    version = root.get("version")
    if version not in (1, VERSION):
        raise UserError(
            f"{path} is a checkpoint of a format that this release of trt-yolov6 does not read "
            f"(it reads versions 1 to {VERSION}); update it."
        )
    arch = _architecture(path, root.get("architecture"), version)
    names = root.get("class_names")
    if not are_names(names, arch.num_classes):
        raise _damaged(path, f"its class names do not fit its {arch.num_classes} classes")
    training = _training(path, root)
    shells = root.get("weights")
    if not isinstance(shells, dict):
        raise _damaged(path, "it has no weights")
    model = shapes_only(arch)
    weights: dict[str, Tensor] = {}
    for name, expected in model.state_dict().items():
        if name.endswith(_COUNTER):
            weights[name] = torch.tensor(0)
            continue
        shell = shells.get(name)
        if not (isinstance(shell, Shell) and archive.is_tensor(shell)):
            raise _damaged(path, f"the weight {name} is missing")
        tensor = archive.tensor(shell)
        if tensor.shape != expected.shape or not tensor.is_floating_point():
            raise _damaged(path, f"the weight {name} does not fit its architecture")
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{path} has weights that are not finite numbers ({name}); its training diverged: "
                "use another checkpoint."
            )
        if name.endswith("running_var") and (tensor < 0).any():
            raise _damaged(path, f"{name} has a negative variance")
        weights[name] = tensor
    surplus = sorted(str(name)[:80] for name in shells.keys() - weights.keys())
    if surplus:
        raise _damaged(path, f"it has weights that are not known (the first is {surplus[0]})")
    model.load_state_dict(weights, assign=True)
    return model.eval(), tuple(names), training


def are_names(value: Any, count: int) -> bool:
    """Return whether a value is a list of `count` texts."""
    is_list = isinstance(value, list | tuple) and len(value) == count
    return is_list and all(isinstance(name, str) for name in value)


def _architecture(path: Path, fields: Any, version: int) -> Architecture:
    if version == 1 and isinstance(fields, dict):
        # All of the neck had the activation of the blocks then.
        defaults = {field.name: field.default for field in dataclasses.fields(Architecture)}
        added = {name: defaults[name] for name in ("neck", "pooling", "mbla")}
        fields = {**added, "neck_activation": fields.get("activation"), **fields}
    known = {field.name for field in dataclasses.fields(Architecture)}
    if not isinstance(fields, dict) or set(fields) != known:
        raise _damaged(path, "its architecture is not complete")
    arch = as_record(fields, Architecture, f"{path} is damaged: its architecture", _REMEDY)
    if not can_be_built(arch):
        raise _damaged(path, "its architecture is not one that can be built")
    return dataclasses.replace(arch, name=variant_name(arch))


def _training(path: Path, root: Mapping[str, Any]) -> Training:
    epoch, ap, text = root.get("epoch"), root.get("AP"), root.get("settings")
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or not isinstance(epoch, int):
        raise _damaged(path, "how it was trained cannot be read")
    if ap is not None and not (isinstance(ap, float) and 0 <= ap <= 1):
        raise _damaged(path, "its AP is not a number from 0 to 1")
    return Training(settings, epoch, ap)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}; {_REMEDY}")
