"""Augmentation in batches on the device: Mosaic, Mixup, affine, colour, flips, and their boxes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AugmentationSettings:
    """How strongly pictures are varied; the defaults are the authors' for N, T and S.

    Source: the configurations of meituan/YOLOv6 v0.2 (`data_aug`); see `augmentation_for`.
    """

    mosaic: float = 1.0
    """Probability, 0..1, that four images are joined into one picture."""
    mixup: float = 0.0
    """Probability, 0..1, that a mosaic is blended with another one."""
    degrees: float = 0.0
    """Rotation, uniform in plus or minus so many degrees."""
    translate: float = 0.1
    """Shift on each axis, uniform in plus or minus this fraction of the image size; 0..1."""
    scale: float = 0.5
    """Zoom, uniform in 1 plus or minus this; at least 0, under 1."""
    shear: float = 0.0
    """Shear on each axis, uniform in plus or minus so many degrees; at least 0, under 45."""
    hsv_h: float = 0.015
    """Hue is multiplied by a factor uniform in 1 plus or minus this; 0..1."""
    hsv_s: float = 0.7
    """As `hsv_h`, for saturation."""
    hsv_v: float = 0.4
    """As `hsv_h`, for value (brightness)."""
    flip_lr: float = 0.5
    """Probability, 0..1, of mirroring left to right."""
    flip_ud: float = 0.0
    """Probability, 0..1, of mirroring top to bottom."""
    border: int = 0
    """Gray pixels left on every side of a picture that is no mosaic, as in `letterbox.fit`: the
    gray border of the paper's Section 2.4.3."""


def augmentation_for(variant: str) -> AugmentationSettings:
    """Return the authors' settings for a variant, such as `yolov6s`; M and L are varied more.

    Raises:
        UserError: there is no such variant.
    """
    raise NotImplementedError
