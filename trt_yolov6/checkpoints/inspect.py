"""Inspect a checkpoint: network, form, classes, parameters and training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CheckpointDetails:
    """Content of a checkpoint of the authors' code or of this package's training."""

    architecture: str
    release: str | None
    """Release of the authors' code that wrote it, such as `0.4`; None where this package did."""
    form: str
    """`training`, `fused` or `mixed`."""
    class_names: tuple[str, ...]
    parameters: int
    """Learned values in the form that the file has."""
    fused_parameters: int
    """Learned values after fusing."""
    fused_flops: int
    """FLOPs of the fused network for one square image of side `image_size`, counted as in the
    paper's Table 1."""
    image_size: int
    """Side of the input in pixels that the authors train and test the network at."""
    block: str
    """Kind of block that the network is built of: see `models.Architecture`."""
    activation: str
    regression_bins: int
    """Largest distance bin of the distribution focal loss; 0 for plain distances."""
    batch_norm_eps: tuple[float, ...]
    """The epsilons that occur in its batch normalizations; empty when fused."""
    training: dict[str, Any] | None = None
    """`settings`, `epoch` and `ap`, where this package trained it; None for the authors' files."""


def inspect_checkpoint(path: Path) -> CheckpointDetails:
    """Return a checkpoint's content.

    Raises:
        UserError: the file is not a checkpoint that this package reads.
    """
    from torch import nn

    from trt_yolov6.checkpoints.loading import load_checkpoint
    from trt_yolov6.models import count_flops, count_parameters, fuse

    checkpoint = load_checkpoint(path)
    fused = fuse(checkpoint.model)
    epsilons = {m.eps for m in checkpoint.model.modules() if isinstance(m, nn.BatchNorm2d)}
    return CheckpointDetails(
        architecture=checkpoint.arch.name,
        release=checkpoint.release,
        form=checkpoint.form,
        class_names=checkpoint.class_names,
        parameters=count_parameters(checkpoint.model),
        fused_parameters=count_parameters(fused),
        fused_flops=count_flops(fused, checkpoint.arch.image_size),
        image_size=checkpoint.arch.image_size,
        block=checkpoint.arch.block,
        activation=checkpoint.arch.activation,
        regression_bins=checkpoint.arch.reg_max,
        batch_norm_eps=tuple(sorted(epsilons)),
        training=dataclasses.asdict(checkpoint.training) if checkpoint.training else None,
    )
