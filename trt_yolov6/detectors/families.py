"""The families of detectors, a row each: the layouts it is exported in, and the images it takes.

Its name is what `--decoder` takes. The source of the pre-processing is named next to each; it is
what the release's own evaluation does, since that is what its AP was reported with.
"""

from __future__ import annotations

from dataclasses import dataclass

from trt_yolov6.data.preprocessing import YOLOV6, Preprocessing
from trt_yolov6.errors import UserError, did_you_mean
from trt_yolov6.spec import OutputLayout


@dataclass(frozen=True)
class Family:
    """Detectors whose exports are read alike."""

    name: str
    title: str
    """Usual name."""
    layouts: tuple[OutputLayout, ...]
    """The forms of its exports, see `OutputLayout`."""
    preprocessing: Preprocessing = YOLOV6


_IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
_IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
_PADDLE_LAYOUTS: tuple[OutputLayout, ...] = ("split_by_class", "corner_rows", "end2end_ppyoloe")

_FAMILIES = (
    # Section 2.4.3 and the authors' evaluator: shrunk by area, enlarged linearly, RGB in 0..1.
    Family("yolov6", "YOLOv6", ("split", "rows", "end2end", "efficient_nms")),
    # The validation loaders of both shrink by area as well.
    Family("yolov5", "YOLOv5", ("rows", "grids_yolov5", "efficient_nms")),
    Family("yolov7", "YOLOv7", ("rows", "grids_yolov7", "efficient_nms", "end2end_yolov7")),
    # Releases from 0.1.1 on: neither divided nor normalized, as OpenCV reads it. (What 0.1.0 took:
    # --preprocess colour=rgb mean=123.675,116.28,103.53 std=58.395,57.12,57.375.)
    Family(
        "yolox",
        "YOLOX",
        ("grid_rows", "rows", "efficient_nms"),
        Preprocessing("corner", "linear", "bgr", std=(1.0, 1.0, 1.0)),
    ),
    # PaddleDetection's readers: resized without keeping the ratio, by cubic interpolation
    # (`interp: 2`), normalized as for ImageNet; PP-YOLOE+ only divided (`norm_type: none`).
    Family(
        "ppyoloe",
        "PP-YOLOE",
        _PADDLE_LAYOUTS,
        Preprocessing("stretch", "cubic", "rgb", _IMAGENET_MEAN, _IMAGENET_STD),
    ),
    Family("ppyoloe-plus", "PP-YOLOE+", _PADDLE_LAYOUTS, Preprocessing("stretch", "cubic")),
    # Ultralytics' loader resizes linearly. Its own YOLOv5 and v6 ("u") have this head as well.
    Family(
        "yolov8",
        "YOLOv8 and later (v9, v10, 11, 12, 26)",
        ("columns", "best", "efficient_nms"),
        Preprocessing(interpolation="linear"),
    ),
)

FAMILIES = {family.name: family for family in _FAMILIES}
"""Families by name."""


def family_named(name: str) -> Family:
    """Return a family.

    Raises:
        UserError: no family has that name.
    """
    if name not in FAMILIES:
        raise UserError(
            f"`decoder` {name} is not known{did_you_mean(name, FAMILIES)}; choose one of "
            f"{', '.join(FAMILIES)}.",
        )
    return FAMILIES[name]
