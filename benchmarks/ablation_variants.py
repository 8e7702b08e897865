"""The trainings of the paper's ablations, in order of importance, and the tables they make.

A variant is a recipe with a few choices changed; it is trained once in every fold. Three schedules:
`full` has 125 epochs at 640 pixels, to be compared with earlier figures; `short` has smaller images
and fewer epochs, and is what variants of N, T and S are compared with each other in; `large` has
fewer epochs still, for M and L.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from trt_yolov6.quantization.metrics import Metric


RESULT_FILE, FOUND_FILE = "result.json", "found.npz"
"""A variant's figures and detections of a fold, in its folder `STATE/<variant>/<fold>`."""


@dataclass(frozen=True)
class Quantized:
    """Settings that bring a trained network to INT8: min-max calibration, not equalized."""

    network: str
    """The variant that trained it."""
    trained: Literal["plain", "distilled"] | None = None
    """Quantization-aware training, without and with channel-wise distillation; None: PTQ."""
    float_layers: int = 0
    """Most sensitive layers that stay in float."""
    ranked_by: Metric | None = None
    """Metric that ranks them."""
    per_tensor: bool = False
    """One scale for all of a layer's weights; else one a channel."""


@dataclass(frozen=True)
class Variant:
    """One way to train or quantize a network."""

    model: str
    """`n`, `s`, ... as `train --model` takes it."""
    changes: tuple[str, ...] = ()
    """Assignments for `train --set`."""
    architecture: tuple[tuple[str, Any], ...] = ()
    """Fields of `ArchitectureOptions`."""
    schedule: Literal["short", "large", "full"] = "short"
    stretch: float = 1.0
    """Epochs, times those of the schedule."""
    seed: int = 0
    borders: bool = False
    """Judge it with gray borders as well (Table 14)."""
    scales: str | None = None
    """The variant whose scales RepOptimizer takes."""
    teacher: str | None = None
    """The variant that teaches it."""
    quantized: Quantized | None = None
    """Not trained, but made of a trained one."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The variants that must be trained before."""
        network = None if self.quantized is None else self.quantized.network
        return tuple(name for name in (self.scales, self.teacher, network) if name is not None)


class HasSize(Protocol):
    """Anything with an image size."""

    @property
    def image_size(self) -> int:
        """Side in pixels."""


PLAIN, BORDER, INNER = "plain", "border", "inner"
"""Inputs that networks are judged with: as trained; with 16 gray pixels around it; and with the
image shrunk by 6 pixels and 3 gray ones around it (paper, 2.4.3)."""


def inputs_of(variant: Variant, order: HasSize) -> dict[str, tuple[int, int]]:
    """Return side of the input and gray border inside it, for all that a variant is judged with."""
    size = order.image_size
    inputs = {PLAIN: (size, 0)}
    if variant.borders:
        inputs |= {BORDER: (size + 32, 16), INNER: (size, 3)}
    return inputs


def _of(model: str, *changes: str, **others: Any) -> Variant:
    return Variant(model, changes, **{"schedule": _schedule(model)} | others)


def _built(model: str, **options: Any) -> Variant:
    return Variant(model, architecture=tuple(options.items()), schedule=_schedule(model))


def _schedule(model: str) -> Literal["short", "large"]:
    return "large" if model.startswith(("m", "l")) else "short"


_NO_FADING = "plain_epochs=0"
_NO_DECAY = "distillation.epochs=1000000"
_UNCLIPPED = "optimizer.clip_norm=none"
_FOCAL, _GIOU = "losses.classification=focal", "losses.box=giou"
_MORE = 4 / 3
"""Table 12 has 400 epochs and 300."""
_LONG = 2.5
"""100 epochs in the place of 40."""
_DEFAULT = 300 / 125
"""`train` has 300 epochs by default, `full` 125."""

# Lengths of the stages and of the neck by which parameters and FLOPs come to those in Table 2: the
# paper shortens or lengthens a network where it changes its blocks.
_CSP_N: dict[str, Any] = {"stage_repeats": (1, 3, 4, 1), "neck_repeats": (3,) * 4}  # 2.3M, 5.6G
_CSP_S: dict[str, Any] = {"stage_repeats": (2, 4, 6, 2), "neck_repeats": (4,) * 4}  # 11.5M, 27.7G
_CSP_M: dict[str, Any] = {"stage_repeats": (2, 5, 7, 2), "neck_repeats": (5,) * 4}  # 27.8M, 68.4G
_REP_M: dict[str, Any] = {"stage_repeats": (4, 8, 12, 4), "neck_repeats": (8,) * 4}  # 67.1M, 175.8G
# The nearest to 54.7M and 142.7G: 60.8M and 145.3G.
_CSP_L: dict[str, Any] = {"stage_repeats": (2, 3, 5, 2), "neck_repeats": (3,) * 4}
# The nearest to 58.6M and 144.7G: 62.5M and 151.0G.
_WIDE_NECK: dict[str, Any] = {
    "neck_channels": (384, 192, 192, 384, 384, 768),
    "neck_repeats": (1,) * 4,
}


def _class_losses(model: str) -> dict[str, Variant]:
    """Return the variants of Table 8 besides the recipe itself."""
    return {
        f"{model}-{name.replace('_', '-')}": _of(model, f"losses.classification={name}")
        for name in ("focal", "quality_focal", "poly")
    }


def _box_losses(model: str, names: tuple[str, ...]) -> dict[str, Variant]:
    """Return the variants of Table 9 besides the recipe itself."""
    return {f"{model}-{name}": _of(model, f"losses.box={name}") for name in names}


def _combinations(model: str, own: tuple[str, str]) -> dict[str, Variant]:
    """Return the combinations of Table 4 besides the model's own."""
    found = {}
    for act in ("relu", "silu", "leaky_relu"):
        for block in ("repvgg", "conv"):
            if (block, act) != own:
                name = f"{model}-{block}-{act.replace('_', '-')}"
                found[name] = _built(model, block=block, activation=act)
    return found


VARIANTS: dict[str, Variant] = {
    # What others are made of, or compared with.
    "s-search": Variant("s", architecture=(("block", "scaled"),)),
    "s": _of("s", borders=True),
    "n": _of("n", borders=True),
    # N, table by table: 2, 6, 8, 11, 4, 9, 10, 14, 12, 7.
    "n-csp": _built("n", csp_ratio=0.5, **_CSP_N),
    "n-atss": _of("n", "losses.assigner=atss"),
    "n-simota": _of("n", "losses.assigner=simota"),
    "s-rep": Variant("s", scales="s-search"),
    **_class_losses("n"),
    "n-objectness": _built("n", objectness=True),
    "n-again": _of("n", seed=1, borders=True),
    # INT8 of S: Tables 15, 21 and 16.
    "s-ptq": Variant("s", quantized=Quantized("s")),
    "s-rep-ptq": Variant("s", quantized=Quantized("s-rep")),
    "s-ptq-per-tensor": Variant("s", quantized=Quantized("s", per_tensor=True)),
    "s-rep-ptq-per-tensor": Variant("s", quantized=Quantized("s-rep", per_tensor=True)),
    **{
        f"s-rep-six-{metric}": Variant("s", quantized=Quantized("s-rep", None, 6, metric))
        for metric in ("mse", "cosine", "snr", "ap")
    },
    "s-rep-qat-distilled": Variant("s", quantized=Quantized("s-rep", "distilled")),
    "s-rep-partial-distilled": Variant("s", quantized=Quantized("s-rep", "distilled", 6, "mse")),
    "s-rep-qat": Variant("s", quantized=Quantized("s-rep", "plain")),
    "s-qat-distilled": Variant("s", quantized=Quantized("s", "distilled")),
    **_combinations("n", ("repvgg", "relu")),
    **_box_losses("n", ("giou", "ciou")),
    "n-dfl": _built("n", dfl=True),
    "n-no-fading": _of("n", _NO_FADING, borders=True),
    "n-longer": _of("n", stretch=_MORE),
    "n-no-warmup": _of("n", "losses.warmup_epochs=0"),
    "n-simota-warmup": _of("n", "losses.warmup_assigner=simota"),
    # The default recipe: the longest of all but L, so it begins before the rest of S.
    "s-full": _of("s", schedule="full"),
    # The rest of S: Tables 2, 11, 8, 9, 10, 14, 12.
    "s-csp": _built("s", csp_ratio=0.5, **_CSP_S),
    "s-objectness": _built("s", objectness=True),
    **_class_losses("s"),
    **_box_losses("s", ("siou", "ciou")),
    "s-dfl": _built("s", dfl=True),
    "s-no-fading": _of("s", _NO_FADING, borders=True),
    "s-longer": _of("s", stretch=_MORE),
    "s-again": _of("s", seed=1, borders=True),
    # Where RepOptimizer should show: with the head of the first release.
    "s-v1-search": Variant("s", architecture=(("block", "scaled"), ("objectness", True))),
    "s-v1-rep": Variant("s", scales="s-v1-search"),
    **{
        f"{name}-ptq{tail}": Variant("s", quantized=Quantized(name, per_tensor=bool(tail)))
        for name in ("s-objectness", "s-v1-rep")
        for tail in ("", "-per-tensor")
    },
    "n-full": _of("n", schedule="full"),
    # Once more with other seeds: Tables 11 and 6.
    "s-objectness-again": Variant("s", architecture=(("objectness", True),), seed=1),
    "n-simota-again": _of("n", "losses.assigner=simota", seed=1),
    # Where ours contradict the paper: with the losses that its Tables 10 and 11 are of, and whether
    # more epochs close the gap.
    "n-focal-giou": _of("n", _FOCAL, _GIOU),
    "n-focal-giou-dfl": _of("n", _FOCAL, _GIOU, architecture=(("dfl", True),)),
    "s-focal-dfl": _of("s", _FOCAL, architecture=(("dfl", True),)),
    "n-focal-giou-objectness": _of("n", _FOCAL, _GIOU, architecture=(("objectness", True),)),
    "s-focal-objectness": _of("s", _FOCAL, architecture=(("objectness", True),)),
    "n-dfl-longer": Variant("n", architecture=(("dfl", True),), stretch=_MORE),
    "s-csp-longer": Variant("s", architecture=(("csp_ratio", 0.5), *_CSP_S.items()), stretch=_MORE),
    # As many epochs as `train` has by default.
    "n-default": _of("n", schedule="full", stretch=_DEFAULT),
    "s-default": _of("s", schedule="full", stretch=_DEFAULT),
    # Larger networks. L first, since it teaches: Tables 3 and 13; T for Table 12.
    "l": _of("l"),
    "l-wide-neck": _of("l", architecture=tuple(_WIDE_NECK.items())),
    # Without clipped gradients, as L was trained at first: its loss diverged in some trainings.
    "l-unclipped": _of("l", _UNCLIPPED),
    "l-by-kernel": _of("l", _UNCLIPPED, "cuda_graphs=false"),
    "t": _of("t"),
    "t-longer": _of("t", stretch=_MORE),
    # M: Tables 10, 11, 14, 8, 9.
    "m": _of("m", borders=True),
    "m-no-dfl": _built("m", dfl=False),
    "m-objectness": _built("m", objectness=True),
    "l-distilled": _of("l", teacher="l"),
    "l-class-distilled": _of("l", "distillation.box_weight=0", _NO_DECAY, teacher="l"),
    "l-both-distilled": _of("l", _NO_DECAY, teacher="l"),
    "m-no-fading": _of("m", _NO_FADING, borders=True),
    **_class_losses("m"),
    **_box_losses("m", ("siou", "ciou")),
    # Tables 2 and 4 of M and L-ReLU.
    "m-csp-half": _built("m", csp_ratio=0.5, **_CSP_M),
    "l-relu": _of("l_relu"),
    "l-relu-csp": _built("l_relu", csp_ratio=2 / 3, **_CSP_L),
    "m-repblock": _built("m", csp_ratio=0.0, **_REP_M),
    **_combinations("m", ("repvgg", "relu")),
    "m-distilled": _of("m", teacher="m"),
    # Where M and L contradict the paper: whether more epochs close the gap.
    "m-long": _of("m", stretch=_LONG),
    "m-conv-relu-long": _of(
        "m", architecture=(("block", "conv"), ("activation", "relu")), stretch=_LONG
    ),
    "l-long": _of("l", stretch=_LONG),
    "l-wide-neck-long": _of("l", architecture=tuple(_WIDE_NECK.items()), stretch=_LONG),
}
"""Every variant by name, the most important first."""

REPEATS = {
    "n": "n-again",
    "s": "s-again",
    "n-simota": "n-simota-again",
    "s-objectness": "s-objectness-again",
}
"""Variants and the same with other seeds. Where both are there, the mean of both is compared: what
chance gave one that others are compared with would be in every difference."""

# --- the paper's tables -------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One AP of a table: of a variant, with an input."""

    variant: str
    input: str = PLAIN


@dataclass(frozen=True)
class Table:
    """A table of the paper as a grid: rows of choices, columns of networks."""

    number: str
    title: str
    what: str
    """Heading of the rows."""
    columns: tuple[str, ...]
    """Networks, as in `paper`."""
    base: str
    """The row that the others are compared with."""
    rows: dict[str, tuple[Cell | None, ...]]
    """By label: a cell a column; None where there is nothing of ours."""
    bases: dict[str, str] = dataclasses.field(default_factory=dict)
    """Rows that are compared with another one than `base`."""

    @property
    def is_plain(self) -> bool:
        """True where networks are compared; False: what one network makes of several inputs."""
        cells = [cell for row in self.rows.values() for cell in row if cell is not None]
        return all(cell.input == PLAIN for cell in cells)

    def base_of(self, row: str, column: int) -> str | None:
        """Return the row that a row is compared with in a column; None for that row itself."""
        base = self.bases.get(row, self.base)
        if self.rows[base][column] is None:
            # The paper's own choice for that network.
            base = [other for other, cells in self.rows.items() if cells[column] is not None][-1]
        return None if base == row else base


def _row(*names: str | None) -> tuple[Cell | None, ...]:
    return tuple(None if name is None else Cell(name) for name in names)


_NSM = ("YOLOv6-N", "YOLOv6-S", "YOLOv6-M")
_ROW_4 = {"Conv": "conv", "RepConv": "repvgg"}
_ACT_4 = {"SiLU": "silu", "ReLU": "relu", "LReLU": "leaky-relu"}


def _table_4() -> dict[str, tuple[Cell | None, ...]]:
    rows = {}
    for act, act_name in _ACT_4.items():
        for block, block_name in _ROW_4.items():
            own = (block, act) == ("RepConv", "ReLU")
            tail = "" if own else f"-{block_name}-{act_name}"
            rows[f"{block}, {act}"] = _row(f"n{tail}", f"m{tail}")
    return rows


def _table_14() -> dict[str, tuple[Cell | None, ...]]:
    rows: dict[str, tuple[Cell | None, ...]] = {}
    for fading, tail in (("with", ""), ("without", "-no-fading")):
        for label, name in (("+ 16", BORDER), ("+ 0", PLAIN), ("- 6 + 3", INNER)):
            if (fading, name) != ("without", INNER):  # the paper has none
                rows[f"{label}, {fading} fading"] = tuple(Cell(f"{m}{tail}", name) for m in "nsm")
    return rows


TABLES: dict[str, Table] = {
    table.number: table
    for table in (
        Table(
            "2",
            "blocks and channel coefficients",
            "Block",
            (*_NSM, "YOLOv6-L-ReLU"),
            "RepBlock",
            {
                "RepBlock": _row("n", "s", "m-repblock", None),
                "CSPStackRep, 2/3": _row(None, None, "m", "l-relu-csp"),
                "CSPStackRep, 1/2": _row("n-csp", "s-csp", "m-csp-half", "l-relu"),
            },
        ),
        Table(
            "3",
            "width and depth of the neck",
            "Neck",
            ("YOLOv6-L",),
            "slender and deep",
            {"wide and shallow": _row("l-wide-neck"), "slender and deep": _row("l")},
        ),
        Table(
            "4",
            "convolution and activation",
            "Layers",
            ("YOLOv6-N", "YOLOv6-M"),
            "RepConv, ReLU",
            _table_4(),
        ),
        Table(
            "6",
            "assignment",
            "Assignment",
            ("YOLOv6-N",),
            "TAL",
            {"ATSS": _row("n-atss"), "SimOTA": _row("n-simota"), "TAL": _row("n")},
        ),
        Table(
            "7",
            "assignment of the first epochs",
            "Assignment of the first epochs",
            ("YOLOv6-N",),
            "ATSS",
            {
                "as later (TAL)": _row("n-no-warmup"),
                "ATSS": _row("n"),
                "SimOTA": _row("n-simota-warmup"),
            },
        ),
        Table(
            "8",
            "class loss",
            "Class loss",
            _NSM,
            "VariFocal",
            {
                "focal": _row("n-focal", "s-focal", "m-focal"),
                "poly": _row("n-poly", "s-poly", "m-poly"),
                "quality focal": _row("n-quality-focal", "s-quality-focal", "m-quality-focal"),
                "VariFocal": _row("n", "s", "m"),
            },
        ),
        Table(
            "9",
            "box loss",
            "Box loss",
            _NSM,
            "GIoU",
            {
                "GIoU": _row("n-giou", "s", "m"),
                "CIoU": _row("n-ciou", "s-ciou", "m-ciou"),
                "SIoU": _row("n", "s-siou", "m-siou"),
            },
        ),
        Table(
            "10",
            "distribution focal loss",
            "Distribution focal loss",
            _NSM,
            "without",
            {"without": _row("n", "s", "m-no-dfl"), "with": _row("n-dfl", "s-dfl", "m")},
        ),
        Table(
            "11",
            "objectness loss",
            "Objectness loss",
            _NSM,
            "without",
            {
                "without": _row("n", "s", "m-no-dfl"),
                "with": _row("n-objectness", "s-objectness", "m-objectness"),
            },
        ),
        Table(
            "12",
            "more epochs",
            "Epochs",
            ("YOLOv6-N", "YOLOv6-T", "YOLOv6-S"),
            "300",
            {"300": _row("n", "t", "s"), "400": _row("n-longer", "t-longer", "s-longer")},
        ),
        Table(
            "13",
            "self-distillation",
            "Distillation",
            ("YOLOv6-L",),
            "none",
            {
                "none": _row("l"),
                "classes": _row("l-class-distilled"),
                "classes and boxes": _row("l-both-distilled"),
                "classes and boxes, weight decays": _row("l-distilled"),
            },
            {
                "classes and boxes": "classes",
                "classes and boxes, weight decays": "classes and boxes",
            },
        ),
        Table(
            "14",
            "gray borders",
            "Image and border",
            _NSM,
            "+ 16, without fading",
            _table_14(),
            {
                "+ 0, with fading": "+ 16, with fading",
                "- 6 + 3, with fading": "+ 0, with fading",
            },
        ),
    )
}
"""Tables 2 to 14 by number, except for 5."""
