"""Value types that every package shares: tensors, batch profiles, precisions, output layouts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.common.ranges import Checked, plain
from trt_yolov6.errors import UserError

PrecisionName = Literal["fp32", "fp16", "int8", "int8-dynamic", "fp8"]
"""Lowest precision in a graph. `int8-dynamic` is ONNX Runtime's dynamic quantization: INT8 weights,
activation ranges computed at run time."""

EnginePrecision = Literal[PrecisionName, "unknown"]
"""Precision of an engine: `unknown` for a plan without a manifest."""

_PRECISIONS = (
    "give fp32, fp16, int8 or fp8, the last two followed by +fp16 or :LAYERS if wanted, such as "
    "int8+fp16:6"
)

_PRECISION = re.compile(r"(fp32|fp16|int8|fp8)(\+fp16)?(?::(\d{1,4}|auto))?")


@dataclass(frozen=True)
class Precision:
    """A precision to build in, written as `fp32`, `fp16`, `int8`, `fp8` or `int8+fp16:6`.

    After an 8-bit type, `+fp16` puts everything else in half precision, and `:6` or `:auto` keeps
    that many layers in float, those most sensitive to INT8.

    Examples:
        >>> Precision.parse("int8+fp16:6")
        Precision(base='int8', rest='fp16', float_layers=6)
        >>> str(Precision("int8", float_layers="auto"))
        'int8:auto'
    """

    base: Literal["fp32", "fp16", "int8", "fp8"] = "fp32"
    rest: Literal["fp32", "fp16"] = "fp32"
    """Precision of the layers that are not quantized; only for the 8-bit types."""
    float_layers: int | Literal["auto"] | tuple[str, ...] = 0
    """Layers kept in float: how many of the most sensitive ones, `auto` (as few as keep the
    accuracy), or their names. With FP8 only names."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "float_layers", choice_of_layers(self.float_layers))
        if self.base not in ("fp32", "fp16", "int8", "fp8") or self.rest not in ("fp32", "fp16"):
            raise UserError(f"{self.base}+{self.rest} is not a precision; {_PRECISIONS}.")
        if not self.quantizes and (self.rest != "fp32" or self.float_layers not in (0, ())):
            raise UserError(f"{self} is not a precision: only int8 and fp8 leave a rest in float.")
        if self.base == "fp8" and not isinstance(self.float_layers, tuple) and self.float_layers:
            raise UserError(
                f"'{self}': layers are ranked for INT8 only; leave `:{self.float_layers}` out."
            )

    @classmethod
    def parse(cls, text: str | Precision) -> Precision:
        """Return the precision that a text names; a `Precision` is returned unchanged.

        Raises:
            UserError: the text is not a precision.
        """
        if isinstance(text, Precision):
            return text
        found = _PRECISION.fullmatch(str(text).strip().lower())
        base: Any = found[1] if found else ""
        if found is None or (base in ("fp32", "fp16") and found[0] != base):
            raise UserError(f"{text!r} is not a precision; {_PRECISIONS}.")
        kept: Any = "auto" if found[3] == "auto" else int(found[3] or 0)
        return cls(base, "fp16" if found[2] else "fp32", kept)

    @property
    def quantizes(self) -> bool:
        """True for INT8 and FP8."""
        return self.base in ("int8", "fp8")

    def __str__(self) -> str:
        kept = self.float_layers
        layers = ",".join(kept) if isinstance(kept, tuple) else str(kept or "")
        return self.base + ("+fp16" if self.rest == "fp16" else "") + (layers and f":{layers}")


def choice_of_layers(layers: Any) -> Any:
    """Return a choice of float layers, see `Precision.float_layers`; NumPy's numbers as Python's.

    Raises:
        UserError: it is not one.
    """
    if is_whole(layers) and layers >= 0:
        return int(layers)
    is_names = isinstance(layers, tuple) and all(isinstance(one, str) for one in layers)
    if not (is_names or layers == "auto"):
        raise UserError(
            f"`float_layers` is {layers!r}; give a number of layers, auto or a tuple of names."
        )
    return layers


OutputLayout = Literal[
    "split",
    "split_by_class",
    "rows",
    "corner_rows",
    "grid_rows",
    "columns",
    "grids_yolov5",
    "grids_yolov7",
    "end2end",
    "end2end_yolov7",
    "end2end_ppyoloe",
    "best",
    "efficient_nms",
]
"""Layout of a graph's detections; `detectors.layouts` has the arithmetic.

Coordinates are in input pixels, scores and objectness in 0..1, unless it says otherwise. Outputs
are found by their shapes where no name is given. Every anchor, NMS still to be done:

split:           `boxes` (batch, anchors, 4): x1, y1, x2, y2, float32;
                 `scores` (batch, anchors, classes), float32 or float16. Convolutions on a GPU keep
                 channels last, so nothing has to be moved for it
split_by_class:  (batch, anchors, 4): x1, y1, x2, y2; (batch, classes, anchors): scores
rows:            (batch, anchors, 5 + classes): cx, cy, w, h, objectness, scores
corner_rows:     (batch, anchors, 4 + classes): x1, y1, x2, y2, scores
grid_rows:       as `rows`, but cx and cy are in cells from the cell's corner, w and h logarithms of
                 cells; the cells of strides 8, 16, 32 (and 64) one after the other
columns:         (batch, 4 + classes, anchors): cx, cy, w, h, scores
grids_yolov5, grids_yolov7:
                 three outputs (batch, 3, rows, columns, 5 + classes), before the sigmoid, of
                 strides 8, 16, 32; with the anchors of that release

Of each image the best, NMS done:

end2end:         `detections` (n, 7): batch index, x1, y1, x2, y2, score, class
end2end_yolov7:  (n, 7): batch index, x1, y1, x2, y2, class, score
end2end_ppyoloe: (n, 6): class, score, x1, y1, x2, y2, image after image; (batch,): n of each
best:            (batch, n, 6): x1, y1, x2, y2, score, class
efficient_nms:   outputs with `num`, `box`, `score` and `class` in their names: (batch, 1),
                 (batch, n, 4) x1, y1, x2, y2, (batch, n), (batch, n)
"""


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number, of Python or NumPy, and not True or False."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def two_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width of a size that is one side, or both.

    Raises:
        UserError: it is not whole numbers.
    """
    sides = tuple(size) if isinstance(size, (list, tuple, np.ndarray)) else (size, size)
    if len(sides) != 2 or not all(map(is_whole, sides)):
        raise UserError(f"the size {size!r} is not whole; give one side, or height and width.")
    return int(sides[0]), int(sides[1])


@dataclass(frozen=True)
class BatchProfile(Checked):
    """The batch sizes an engine takes, and the one it is tuned for."""

    min: int = 1
    opt: int = 32
    max: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.min <= self.opt <= self.max:
            raise UserError(
                f"the batch profile {self.min},{self.opt},{self.max} is not increasing from 1; "
                "give MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX."
            )

    def __str__(self) -> str:
        sizes = f"{self.min} to {self.max}, tuned for {self.opt}"
        return str(self.min) if self.is_static else sizes

    def steps(self) -> tuple[int, ...]:
        """Return ascending batch sizes, so that padding to the next one at most doubles a batch.

        Examples:
            >>> BatchProfile(1, 8, 12).steps()
            (1, 2, 4, 8, 12)
        """
        powers = {2**power for power in range(self.max.bit_length())}
        larger = {size for size in powers if size > self.min}
        return tuple(sorted(larger | {self.min, self.opt, self.max}))

    @classmethod
    def of(cls, batch: int | Sequence[int] | BatchProfile) -> BatchProfile:
        """Return a profile: of one batch size, of (min, opt, max), or the one given.

        Examples:
            >>> BatchProfile.of(8)
            BatchProfile(min=8, opt=8, max=8)
        """
        if isinstance(batch, BatchProfile):
            return batch
        sizes = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,) * 3
        if len(sizes) != 3:
            raise UserError(f"the batch profile {sizes} is not (min, opt, max); give these three.")
        return cls(*sizes)

    @property
    def is_static(self) -> bool:
        """True when only one batch size is taken."""
        return self.min == self.max


@dataclass(frozen=True)
class NmsSettings:
    """Thresholds of the non-maximum suppression, in 0..1, and how many boxes an image keeps."""

    confidence: float = 0.03
    iou: float = 0.65
    max_detections: int = 300

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, number := plain(value))
            if type(number) not in (float, int):
                raise UserError(f"`{name}` must be a number, got {value!r}.")
        if not 0 <= self.confidence < 1:
            raise UserError(
                f"`confidence` {self.confidence} is out of range; give 0 to less than 1."
            )
        if not 0 < self.iou <= 1:
            raise UserError(f"IoU threshold {self.iou} is out of range; give `iou` in 0..1.")
        if not is_whole(self.max_detections) or self.max_detections < 1:
            raise UserError(
                f"`max_detections` {self.max_detections} is out of range; give a whole number "
                "from 1."
            )


_NMS = NmsSettings()


@dataclass(frozen=True)
class PredictOptions:
    """Options for going from images to detections; the defaults depend on detector and task.

    Examples:
        >>> PredictOptions(confidence=0.1).nms(NmsSettings(iou=0.7))
        NmsSettings(confidence=0.1, iou=0.7, max_detections=300)
    """

    confidence: float | None = None
    """Least score in 0..1. Default: 0.4 to predict and draw, 0.03 to evaluate and time, or that of
    NMS inside the graph if it is higher."""
    iou: float | None = None
    """IoU threshold of NMS in 0..1. Default: 0.65, or the graph's."""
    max_detections: int | None = None
    """Most boxes kept in an image. Default: 300, or the graph's."""
    resize: int | tuple[int, int] | None = None
    """Side, or (height, width) in pixels, to resize images to; gray fills the rest."""
    border: int | None = None
    """Gray pixels on every side of an image, as some YOLOv6 evaluations add (0)."""
    batch: int | None = None
    """Images given to the engine at a time. Default: up to 8."""
    workers: int | None = None
    """Threads that read and pre-process. Default: one a core, at most 16."""
    gpus: int = 1
    """GPUs of this machine to use, one process each. With several, a script needs
    `if __name__ == "__main__":`, as `multiprocessing` requires."""
    clip: bool = True
    """Clip boxes to the image; evaluation never does."""

    def __post_init__(self) -> None:
        self.nms()
        for name, least in (("gpus", 1), ("workers", 1), ("batch", 1), ("border", 0)):
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and value >= least):
                raise UserError(
                    f"`{name}` {value!r} is out of range; give a whole number from {least}."
                )

    def nms(self, default: NmsSettings | None = None) -> NmsSettings:
        """Return the thresholds; those that are None come from `default`, else `NmsSettings()`."""
        # One by one, as `asdict` would take a tenth of a small network's time.
        default = default or _NMS
        return NmsSettings(
            default.confidence if self.confidence is None else self.confidence,
            default.iou if self.iou is None else self.iou,
            default.max_detections if self.max_detections is None else self.max_detections,
        )

    def over(self, default: NmsSettings) -> PredictOptions:
        """Return the options with `default` in place of thresholds that are None."""
        return replace(self, **vars(self.nms(default)))

    def thresholds(self) -> dict[str, Any]:
        """Return the thresholds that are given, by name."""
        values = {name: getattr(self, name) for name in ("confidence", "iou", "max_detections")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape (None where it varies) and NumPy dtype of an engine's input or output."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    @property
    def sides(self) -> tuple[int | None, ...]:
        """Height and width in pixels of a batch of images; uint8 ones have channels last."""
        return self.shape[1:3] if self.dtype == np.uint8 else self.shape[2:4]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of a batch, 0 where a length varies."""
        return tuple(length or 0 for length in self.shape[1:])

    def fits(self, batch: Any) -> bool:
        """Return whether an array's `shape` and `dtype` are those of a batch of any size."""
        lengths = self.shape[1:], batch.shape[1:]
        return (
            batch.dtype == self.dtype
            and len(batch.shape) == len(self.shape)
            and all(length in (None, given) for length, given in zip(*lengths, strict=True))
        )

    def to_json(self) -> dict[str, Any]:
        """Return it JSON-ready: the dtype's name, null where a length varies."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype.name}


def image_size_of(spec: TensorSpec) -> tuple[int, int]:
    """Return height and width in pixels of an engine's input."""
    height, width = spec.sides
    assert height is not None
    assert width is not None
    return height, width


def empty_input(spec: TensorSpec, rows: int) -> NDArray[Any]:
    """Return an uninitialized array for a batch of `rows` images.

    Raises:
        UserError: it takes more memory than there is.
    """
    try:
        return np.empty((rows, *spec.row_shape), spec.dtype)
    except (MemoryError, ValueError, OverflowError) as error:  # the last two: beyond any address
        height, width = image_size_of(spec)
        raise UserError(
            f"a batch of {rows} images of {height}x{width} does not fit in memory; give a smaller "
            "`batch`.",
        ) from error
