"""The family as a table: a variant is one row of multipliers and choices (paper, Section 2.1).

The rows of v0.1 to v0.2.1 are of "YOLOv6" (arXiv 2209.02976), those of 0.3 and 0.4 of "YOLOv6 v3.0"
(arXiv 2301.05586) and of the authors' later configurations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trt_yolov6.errors import UserError

BlockKind = Literal["repvgg", "conv", "scaled", "qarepvgg", "lite"]
StackKind = Literal["plain", "csp", "mbla"]
NeckKind = Literal["pan", "bifusion", "lite"]
PoolingKind = Literal["sppf", "cspsppf", "none"]
ActivationName = Literal["relu", "silu", "hardswish", "leaky_relu"]
HeadKind = Literal["distance", "offset"]

STRIDES = (8, 16, 32)
"""Input pixels a cell of each output level of most networks, finest level first."""
FOUR_STRIDES = (*STRIDES, 64)
"""Strides of networks with four levels: P6 and Lite."""

_STAGE_CHANNELS = (64, 128, 256, 512, 1024)
_NECK_CHANNELS = (256, 128, 128, 256, 256, 512)
_P6_STAGE_CHANNELS = (64, 128, 256, 512, 768, 1024)
_P6_NECK_CHANNELS = (512, 256, 128, 128, 256, 256, 512, 512, 1024)
_STAGE_REPEATS = (6, 12, 18, 6)
_NECK_REPEATS = 12
_MBLA_STAGE_REPEATS = (4, 8, 8, 4)
_MBLA_NECK_REPEATS = 8
_LITE_STAGE_CHANNELS = (32, 64, 128, 256)
_LITE_STEM_CHANNELS = 24
_LITE_NECK_CHANNELS = 96
_LITE_STAGE_REPEATS = (1, 3, 7, 3)

_MOST_CHANNELS = 16384
_MOST_REPEATS = 1000
_MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes a network's layers; two equal values build the same layers."""

    name: str
    """Row of the variants table, or `yolov6-custom`."""
    stage_channels: tuple[int, ...]
    """Output channels of the stem and of the stages 2 to 5, or to 6 (P6)."""
    neck_channels: tuple[int, ...]
    """Output channels along the neck: of the lateral layers from coarse to fine, then of each
    downsampling and the stack after it, from fine to coarse. With three levels that is lateral5,
    lateral4, down3, bottomup4, down4, bottomup5. Of Lite: the one number that all levels have."""
    stage_repeats: tuple[int, ...]
    """Length of the stages 2 and on: blocks, or bottlenecks of two blocks (CSP) or three (MBLA)."""
    neck_repeats: tuple[int, ...]
    """Length of the neck's stacks along the neck, counted likewise: topdown4, topdown3, bottomup4
    and bottomup5 with three levels. Empty for Lite."""
    block: BlockKind
    """`repvgg`: 3x3, 1x1 and identity branches while training, each normalized; `conv`: one 3x3
    convolution; `scaled`: the branches with learned scales, which RepOptimizer is made from;
    `qarepvgg`: branches of which only the 3x3 is normalized, and their sum; `lite`: depthwise."""
    csp_ratio: float | None
    """Hidden over output channels of a CSPStackRep or MBLA block; None for plain RepBlocks."""
    activation: ActivationName
    """Activation of the blocks of backbone and neck, and of the pooling."""
    reg_max: int
    """Largest distance bin of the distribution focal loss; 0: distances are regressed directly."""
    num_classes: int
    head: HeadKind = "distance"
    """`distance`: four distances from the anchor point; `offset`: the head of v0.1, centre, size
    and objectness."""
    head_activation: ActivationName = "silu"
    input_channels: int = 3
    neck_activation: ActivationName = "relu"
    """Activation of the neck's lateral, downsampling and fusing layers: ReLU in every release."""
    neck: NeckKind = "pan"
    """`pan`: Rep-PAN of v0.1 to v0.2.1; `bifusion`: 0.3's, which looks at a finer level, too."""
    pooling: PoolingKind = "sppf"
    """Pooling block at the end of the backbone."""
    mbla: bool = False
    """True for stacks of MBLA blocks (0.4) instead of CSPStackRep blocks."""

    @property
    def stack(self) -> StackKind:
        """Kind of stack that the stages consist of."""
        if self.mbla:
            return "mbla"
        return "plain" if self.csp_ratio is None else "csp"

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels a cell of each output level, finest level first."""
        four = self.neck == "lite" or len(self.stage_channels) > 5
        return FOUR_STRIDES if four else STRIDES

    @property
    def head_channels(self) -> tuple[int, ...]:
        """Channels between neck and head, finest level first."""
        if self.neck == "lite":
            return self.neck_channels * len(self.strides)
        laterals = len(self.strides) - 1
        return (self.neck_channels[laterals - 1], *self.neck_channels[laterals + 1 :: 2])

    def hidden_channels(self, out_channels: int) -> int:
        """Return the channels inside a CSPStackRep or MBLA block."""
        assert self.csp_ratio is not None
        # A ratio such as 2/3 may fall a hair short of the integer that it stands for.
        return int(out_channels * self.csp_ratio + 1e-6)

    @property
    def size_multiple(self) -> int:
        """Divisor of the input's height and width.

        Lite's coarsest level is rounded up, so that it takes what three levels take.
        """
        return 32 if self.neck == "lite" else self.strides[-1]

    @property
    def image_size(self) -> int:
        """Side of the input in pixels that the authors train and test the network at."""
        if self.neck == "lite":
            return 320
        return 640 if len(self.strides) == 3 else 1280


@dataclass(frozen=True)
class Variant:
    """One row of the table: the multipliers and choices that make a variant."""

    depth: float
    width: float
    block: BlockKind = "repvgg"
    csp_ratio: float | None = None
    activation: ActivationName = "relu"
    reg_max: int = 0
    neck: NeckKind = "pan"
    pooling: PoolingKind = "sppf"
    mbla: bool = False
    p6: bool = False
    """True for a sixth stage and a fourth level."""


_N = Variant(depth=0.33, width=0.25)
_S = Variant(depth=0.33, width=0.50)
_M = Variant(depth=0.60, width=0.75, csp_ratio=2 / 3, reg_max=16)
_L = Variant(depth=1.0, width=1.0, block="conv", csp_ratio=1 / 2, activation="silu", reg_max=16)


def _of(row: Variant, **changes: object) -> Variant:
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


_N_V3 = _of(_N, neck="bifusion", pooling="cspsppf")
_S_V3 = _of(_S, neck="bifusion", pooling="cspsppf")
_M_V3, _L_V3 = _of(_M, neck="bifusion"), _of(_L, neck="bifusion")
_MBLA = _of(_L_V3, depth=0.5, mbla=True)
_BASE = _of(_L_V3, activation="relu")
_LITE = Variant(
    depth=1.0, width=1.0, block="lite", activation="hardswish", neck="lite", pooling="none"
)

VARIANTS: dict[str, Variant] = {
    "yolov6n": _N,
    "yolov6t": Variant(depth=0.25, width=0.50),
    # The T that the authors' v0.2 code configures and publishes is not the T of the paper.
    "yolov6t_released": Variant(depth=0.33, width=0.375),
    "yolov6s": _S,
    "yolov6m": _M,
    "yolov6l": _L,
    "yolov6l_relu": _of(_L, block="repvgg", activation="relu"),
    "yolov6n_v3": _N_V3,
    "yolov6s_v3": _S_V3,
    "yolov6m_v3": _M_V3,
    "yolov6l_v3": _L_V3,
    "yolov6n6": _of(_N_V3, p6=True),
    "yolov6s6": _of(_S_V3, p6=True),
    "yolov6m6": _of(_M_V3, p6=True),
    "yolov6l6": _of(_L_V3, p6=True),
    "yolov6n_qa": _of(_N_V3, block="qarepvgg"),
    "yolov6s_qa": _of(_S_V3, block="qarepvgg"),
    "yolov6m_qa": _of(_M_V3, block="qarepvgg"),
    "yolov6n_base": _of(_N_V3, block="conv", reg_max=16),
    "yolov6s_base": _of(_BASE, depth=0.7, width=0.50, pooling="cspsppf"),
    "yolov6m_base": _of(_BASE, depth=0.8, width=0.75),
    "yolov6l_base": _BASE,
    "yolov6s_mbla": _of(_MBLA, width=0.5),
    "yolov6m_mbla": _of(_MBLA, width=0.75),
    "yolov6l_mbla": _MBLA,
    "yolov6x_mbla": _of(_MBLA, depth=1.0),
    "yolov6lite_s": _of(_LITE, width=0.7),
    "yolov6lite_m": _of(_LITE, width=1.1),
    "yolov6lite_l": _of(_LITE, width=1.5),
}


def architecture(name: str, num_classes: int = 80) -> Architecture:
    """Return the architecture of a row of `VARIANTS`.

    Raises:
        UserError: there is no such variant.
    """
    row = VARIANTS.get(name)
    if row is None:
        raise UserError(f"there is no variant {name!r}; choose one of {', '.join(VARIANTS)}.")

    def repeats(base: int) -> int:
        blocks = max(round(base * row.depth), 1)
        return blocks if row.csp_ratio is None else max(blocks // 2, 1)

    def scaled(scale: Callable[[int], int], bases: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(scale(base) for base in bases)

    lite = row.neck == "lite"
    if lite:
        stage_channels = (
            _LITE_STEM_CHANNELS,
            *(_multiple_of_16(base * row.width) for base in _LITE_STAGE_CHANNELS),
        )
        neck_channels: tuple[int, ...] = (_LITE_NECK_CHANNELS,)
        stage_repeats: tuple[int, ...] = _LITE_STAGE_REPEATS
        neck_repeats: tuple[int, ...] = ()
    else:

        def channels(base: int) -> int:
            return math.ceil(base * row.width / 8) * 8

        stage_channels = scaled(channels, _P6_STAGE_CHANNELS if row.p6 else _STAGE_CHANNELS)
        neck_channels = scaled(channels, _P6_NECK_CHANNELS if row.p6 else _NECK_CHANNELS)
        stage_repeats = _MBLA_STAGE_REPEATS if row.mbla else _STAGE_REPEATS
        if row.p6:
            stage_repeats = (*stage_repeats, stage_repeats[-1])
        neck_repeat = _MBLA_NECK_REPEATS if row.mbla else _NECK_REPEATS
        neck_repeats = (neck_repeat,) * (6 if row.p6 else 4)
    return Architecture(
        name=name,
        stage_channels=stage_channels,
        neck_channels=neck_channels,
        stage_repeats=scaled(repeats, stage_repeats),
        neck_repeats=scaled(repeats, neck_repeats),
        block=row.block,
        csp_ratio=row.csp_ratio,
        activation=row.activation,
        reg_max=row.reg_max,
        num_classes=num_classes,
        head_activation="hardswish" if lite else "silu",
        neck_activation="hardswish" if lite else "relu",
        neck=row.neck,
        pooling=row.pooling,
        mbla=row.mbla,
    )


def _multiple_of_16(channels: float) -> int:
    """Round to the nearest multiple of 16 that is not more than a tenth less."""
    nearest = max(16, int(channels + 8) // 16 * 16)
    return nearest if nearest >= 0.9 * channels else nearest + 16


def can_be_built(arch: Architecture) -> bool:
    """Return whether the parts of an architecture fit each other, and it is not absurdly large."""
    is_lite = arch.neck == "lite"
    parts = (arch.stage_channels, arch.neck_channels, arch.stage_repeats, arch.neck_repeats)
    widths = (*arch.stage_channels, *arch.neck_channels)
    laterals = arch.neck_channels[: len(arch.strides) - 1]
    stacks = (*arch.stage_channels[1:], *laterals, *arch.neck_channels[len(laterals) + 1 :: 2])
    return (
        tuple(map(len, parts)) in ([(5, 1, 4, 0)] if is_lite else [(5, 6, 4, 4), (6, 9, 5, 6)])
        and all(1 <= width <= _MOST_CHANNELS for width in widths)
        and all(1 <= count <= _MOST_REPEATS for count in (*arch.stage_repeats, *arch.neck_repeats))
        and is_lite == (arch.block == "lite") == (arch.pooling == "none")
        # Lite takes halves of the neck's channels, and eighths of the stages'.
        and not (is_lite and any(width % 8 for width in arch.stage_channels))
        and not (is_lite and arch.neck_channels[0] % 2)
        and not (arch.mbla and arch.csp_ratio is None)
        and (arch.csp_ratio is None or 0 < arch.csp_ratio <= 1)
        and (arch.csp_ratio is None or all(map(arch.hidden_channels, stacks)))
        and 0 <= arch.reg_max <= 1024
        and 1 <= arch.num_classes <= _MOST_CLASSES
        and arch.input_channels == 3
    )


def variant_name(arch: Architecture) -> str:
    """Return the row of `VARIANTS` that this network is of, or `yolov6-custom`.

    What makes the size has to agree: the trunk. Where several rows have the same, block and bins
    decide; where none has these, the first row: S trained with RepOptimizer, which has no branches,
    is an S still. The kind of head and the number of classes do not count.
    """
    alike = [name for name in VARIANTS if _trunk(architecture(name)) == _trunk(arch)]
    for name in alike:
        row = VARIANTS[name]
        if (row.block, row.reg_max) == (arch.block, arch.reg_max):
            return name
    return alike[0] if alike else "yolov6-custom"


def _trunk(arch: Architecture) -> Architecture:
    """Return an architecture with the same values in all that does not make the size."""
    ratio = None if arch.csp_ratio is None else round(arch.csp_ratio, 3)
    trunk = dataclasses.replace(arch, name="", block="conv", csp_ratio=ratio, reg_max=0)
    return dataclasses.replace(
        trunk, num_classes=1, head="distance", head_activation="silu", input_channels=3
    )
