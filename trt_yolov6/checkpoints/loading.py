"""Checkpoints in, as networks of `trt_yolov6.models`: the authors' (0.1 to 0.4) and our own.

The authors' format is in `meituan`, our own in `native`. Nothing of a file is run (see
`inert_pickle`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trt_yolov6.checkpoints.archive import TorchArchive
from trt_yolov6.checkpoints.inert_pickle import EXPORT_IT, Shell, damaged
from trt_yolov6.checkpoints.meituan.recognition import recognize, release
from trt_yolov6.checkpoints.meituan.tree import RELEASES, flatten
from trt_yolov6.checkpoints.meituan.weights import read_network
from trt_yolov6.checkpoints.native import Training, are_names, is_trained, read_trained
from trt_yolov6.data.class_names import COCO_NAMES
from trt_yolov6.errors import UserError
from trt_yolov6.models.blocks import ConvAct
from trt_yolov6.models.fusion import is_fused
from trt_yolov6.models.network import YOLOv6
from trt_yolov6.models.variants import Architecture


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what its file says about it."""

    model: YOLOv6
    """Network in eval mode, float32, in the form that the file has."""
    arch: Architecture
    class_names: tuple[str, ...]
    path: Path
    form: Literal["training", "fused", "mixed"]
    """`training`: all batch normalizations are there; `fused`: none is."""
    training: Training | None = None
    """Training record, if this package trained it."""
    release: str | None = None
    """Release of the authors' code that wrote it, such as `0.4`; None where this package did."""


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of this package's training, or of the authors' code, 0.1 to 0.4.

    Raises:
        UserError: the file is missing, damaged, hostile or holds something else.
    """
    with TorchArchive(Path(path)) as archive:
        if is_trained(archive.root):
            own, names, training = read_trained(archive)
            return Checkpoint(own, own.arch, names, archive.path, _form(own), training)
        root = _model_shell(archive)
        tree = flatten(archive, root)
    arch = recognize(tree)
    model = read_network(tree, arch)
    return Checkpoint(
        model=model,
        arch=arch,
        class_names=_class_names(archive, root, arch.num_classes),
        path=archive.path,
        form=_form(model),
        release=release(tree),
    )


def _model_shell(archive: TorchArchive) -> Shell:
    """Return the network in the file: the moving average of the weights where there is one."""
    root = archive.root
    candidates = [root]
    if isinstance(root, dict):
        candidates = [root.get("ema"), root.get("model")]
    for candidate in candidates:
        if isinstance(candidate, Shell) and not archive.is_tensor(candidate):
            if candidate.origin.startswith("yolov6."):
                return candidate
            raise UserError(
                f"{archive.path} holds {candidate.origin[:80]}, not a YOLOv6; {EXPORT_IT}."
            )
    values = candidates + (list(root.values()) if isinstance(root, dict) else [])
    values += [item for value in values if isinstance(value, dict) for item in value.values()]
    if any(archive.is_tensor(value) for value in values):
        raise UserError(
            f"{archive.path} holds a state dict, weights without their network; "
            "give the checkpoint that YOLOv6's training or release wrote."
        )
    raise UserError(f"{archive.path} holds no network; give a checkpoint of YOLOv6, {RELEASES}.")


def _class_names(archive: TorchArchive, root: Shell, count: int) -> tuple[str, ...]:
    names = root.state.get("names")
    if names is None and isinstance(archive.root, dict):
        names = archive.root.get("names")
    if isinstance(names, dict):
        names = [names.get(index) for index in range(len(names))]
    if names is None:
        # The authors' releases are trained on COCO and carry no names.
        return COCO_NAMES if count == 80 else tuple(f"class_{index}" for index in range(count))
    if not are_names(names, count):
        raise damaged(archive.path, f"its class names do not fit its {count} classes")
    return tuple(names)


def _form(model: YOLOv6) -> Literal["training", "fused", "mixed"]:
    if not any(isinstance(module, ConvAct) for module in model.modules()):
        return "training"
    return "fused" if is_fused(model) else "mixed"
