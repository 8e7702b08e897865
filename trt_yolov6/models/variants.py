"""The family as a table: a variant is one row of multipliers and choices (paper, Section 2.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trt_yolov6.errors import UserError

BlockKind = Literal["repvgg", "conv", "scaled"]
ActivationName = Literal["relu", "silu"]
HeadKind = Literal["distance", "offset"]

STRIDES = (8, 16, 32)
"""Input pixels a cell of each output level, finest level first."""

_STAGE_CHANNELS = (64, 128, 256, 512, 1024)
_NECK_CHANNELS = (256, 128, 128, 256, 256, 512)
_STAGE_REPEATS = (6, 12, 18, 6)
_NECK_REPEATS = (12, 12, 12, 12)


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes a network's layers; two equal values build the same layers."""

    name: str
    """As in the variants table, or `yolov6-custom`."""
    stage_channels: tuple[int, int, int, int, int]
    """Output channels of the stem and of the stages 2 to 5."""
    neck_channels: tuple[int, int, int, int, int, int]
    """Output channels, along the neck: lateral5, lateral4, down3, bottomup4, down4, bottomup5."""
    stage_repeats: tuple[int, int, int, int]
    """Length of the stages 2 to 5: blocks, or bottlenecks of two blocks each where CSP is used."""
    neck_repeats: tuple[int, int, int, int]
    """Length of the neck's topdown4, topdown3, bottomup4 and bottomup5, counted likewise."""
    block: BlockKind
    """`repvgg`: 3x3, 1x1 and identity branches while training, each normalized; `conv`: one 3x3
    convolution; `scaled`: the branches with learned scales, which RepOptimizer is made from."""
    csp_ratio: float | None
    """Hidden over output channels of a CSPStackRep block; None for plain RepBlocks."""
    activation: ActivationName
    """Activation of backbone and neck."""
    reg_max: int
    """Largest distance bin of the distribution focal loss; 0: distances are regressed directly."""
    num_classes: int
    head: HeadKind = "distance"
    """`distance`: four distances from the anchor point; `offset`: the head of v0.1, centre, size
    and objectness."""
    head_activation: ActivationName = "silu"
    input_channels: int = 3


@dataclass(frozen=True)
class Variant:
    """One row of the table: the multipliers and choices that make a variant."""

    depth: float
    width: float
    block: BlockKind = "repvgg"
    csp_ratio: float | None = None
    activation: ActivationName = "relu"
    reg_max: int = 0


VARIANTS: dict[str, Variant] = {
    "yolov6n": Variant(depth=0.33, width=0.25),
    "yolov6t": Variant(depth=0.25, width=0.50),
    # The T that the authors' v0.2 code configures and publishes is not the T of the paper.
    "yolov6t_released": Variant(depth=0.33, width=0.375),
    "yolov6s": Variant(depth=0.33, width=0.50),
    "yolov6m": Variant(depth=0.60, width=0.75, csp_ratio=2 / 3, reg_max=16),
    "yolov6l": Variant(
        depth=1.0, width=1.0, block="conv", csp_ratio=1 / 2, activation="silu", reg_max=16
    ),
    "yolov6l_relu": Variant(depth=1.0, width=1.0, csp_ratio=1 / 2, reg_max=16),
}


def architecture(name: str, num_classes: int = 80) -> Architecture:
    """Return the architecture of a row of `VARIANTS`.

    Raises:
        UserError: there is no such variant.
    """
    row = VARIANTS.get(name)
    if row is None:
        raise UserError(f"there is no variant {name!r}; choose one of {', '.join(VARIANTS)}.")

    def channels(base: int) -> int:
        return math.ceil(base * row.width / 8) * 8

    def repeats(base: int) -> int:
        blocks = max(round(base * row.depth), 1)
        return blocks if row.csp_ratio is None else max(blocks // 2, 1)

    c1, c2, c3, c4, c5 = map(channels, _STAGE_CHANNELS)
    n1, n2, n3, n4, n5, n6 = map(channels, _NECK_CHANNELS)
    r2, r3, r4, r5 = map(repeats, _STAGE_REPEATS)
    q1, q2, q3, q4 = map(repeats, _NECK_REPEATS)
    return Architecture(
        name=name,
        stage_channels=(c1, c2, c3, c4, c5),
        neck_channels=(n1, n2, n3, n4, n5, n6),
        stage_repeats=(r2, r3, r4, r5),
        neck_repeats=(q1, q2, q3, q4),
        block=row.block,
        csp_ratio=row.csp_ratio,
        activation=row.activation,
        reg_max=row.reg_max,
        num_classes=num_classes,
    )


def variant_name(arch: Architecture) -> str:
    """Return the row of `VARIANTS` that has this trunk, or `yolov6-custom`.

    Only what makes the size counts. The block kind (RepOptimizer trains S without branches), the
    head and the number of classes do not.
    """
    for name in VARIANTS:
        if _trunk(architecture(name)) == _trunk(arch):
            return name
    return "yolov6-custom"


def _trunk(arch: Architecture) -> tuple[object, ...]:
    ratio = None if arch.csp_ratio is None else round(arch.csp_ratio, 3)
    return (
        arch.stage_channels,
        arch.neck_channels,
        arch.stage_repeats,
        arch.neck_repeats,
        ratio,
        arch.activation,
    )
