"""Augmentation in batches on the device: Mosaic, Mixup, affine, colour, flips, and their boxes.

A batch is made in two steps. `plan_batch` turns random numbers into geometry, on the CPU in
float64: which images lie where in which picture, as one matrix a picture. `render` then samples
each picture once, straight from its one or four images, on the device. Boxes follow the same
matrices, on the CPU, so they are the same whatever the device.

Coordinates are continuous: pixel i covers i to i + 1, its centre is at i + 0.5. Boxes and pixels
therefore move alike under any matrix. (The authors' code applies its matrix to pixel indices, so
that its boxes end up to half a pixel away from the picture, times the change of scale.)

A mosaic is described from its seam, the point where its four images meet. The images are not cut
off at the edge of a canvas of twice the size, as they are in the authors' code, because no such
canvas is made; where it would have ended, at a zoom under about 0.6, there is more image and less
gray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from trt_yolov6.common.ranges import Checked, Share
from trt_yolov6.data.letterbox import GRAY, fit

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

MIN_SIDE = 2.0
"""Pixels that both sides of a box must exceed after augmentation."""
MIN_VISIBLE = 0.1
"""Part of a box's area that must be left inside the picture."""
MAX_ASPECT = 20.0
"""Ratio of a box's sides that must not be reached after augmentation."""


@dataclass(frozen=True)
class AugmentationSettings(Checked):
    """Augmentation settings; the defaults are the authors' for N, T and S.

    Source: the configurations of meituan/YOLOv6 v0.2 (`data_aug`); see `augmentation_for`.

    Raises:
        UserError: a value is out of its range.
    """

    mosaic: Share = 1.0
    """Probability that four images are joined into one picture."""
    mixup: Share = 0.0
    """Probability that a mosaic is blended with another one."""
    degrees: Annotated[float, Meta(ge=0, le=180)] = 0.0
    """Maximum rotation in degrees, uniform in both directions."""
    translate: Share = 0.1
    """Shift on each axis, uniform in plus or minus this fraction of the image size."""
    scale: Annotated[float, Meta(ge=0, le=0.99)] = 0.5
    """Zoom, uniform in 1 plus or minus this."""
    shear: Annotated[float, Meta(ge=0, le=44)] = 0.0
    """Maximum shear in degrees on each axis, uniform in both directions."""
    hsv_h: Share = 0.015
    """Hue, an angle from red, is multiplied by a factor uniform in 1 plus or minus this."""
    hsv_s: Share = 0.7
    """Saturation gain, sampled like `hsv_h`."""
    hsv_v: Share = 0.4
    """Value (brightness) gain, sampled like `hsv_h`."""
    flip_lr: Share = 0.5
    """Probability of mirroring left to right."""
    flip_ud: Share = 0.0
    """Probability of mirroring top to bottom."""
    border: Annotated[int, Meta(ge=0)] = 0
    """Gray pixels left on every side of a picture that is not a mosaic, as in `letterbox.fit`: the
    gray border of the paper's Section 2.4.3."""


def augmentation_for(variant: str) -> AugmentationSettings:
    """Return the authors' settings for a variant's name; M and larger are varied more."""
    if variant.startswith(("yolov6m", "yolov6l", "yolov6x")) and "lite" not in variant:
        return AugmentationSettings(scale=0.9, mixup=0.1)
    return AugmentationSettings()


@dataclass(frozen=True)
class Layers:
    """L pictures to be sampled, each from T images.

    With T = 1, `matrix` starts from the image's pixels. With T = 4, the images are those at the
    top left, top right, bottom left and bottom right of a mosaic, and it starts from the seam:
    the image at the bottom right has its top left corner there, and so on.
    """

    rows: Indices
    """(L,): which picture of the batch this becomes, or is blended into."""
    images: Indices
    """(L, T)."""
    sizes: Indices
    """(L, T, 2): height and width of each image, in pixels."""
    matrix: Floats
    """(L, 2, 3): takes (x, y, 1) to pixels of the picture."""


@dataclass(frozen=True)
class BatchPlan:
    """Plan of a batch: the images and transforms of each picture."""

    pictures: int
    """Number of pictures, B."""
    size: int
    """Their side S, in pixels."""
    singles: Layers
    """Pictures that are not mosaics."""
    mosaics: Layers
    """Mosaic pictures."""
    mixed: Layers
    """Second mosaics, to be blended into some of the first."""
    mix: Floats
    """The part, 0..1, that the first mosaic keeps, for each of `mixed`."""
    colour: Floats
    """(B, 3): factors of hue, saturation and value."""


# Places of the random numbers of one picture, all uniform in 0..1.
_LAYER = 16  # first image, three others, their order (4), seam (2), affine (6)
_ROW = 7  # mosaic?, mixup?, left to right?, top to bottom?, hue, saturation, value
_BETA = 63
DRAWS = 2 * _LAYER + _ROW + _BETA
"""Random numbers a picture takes, whatever the settings."""


def draw(pictures: int, generator: torch.Generator) -> Floats:
    """Return the random numbers of a batch, (pictures, DRAWS), uniform in 0..1."""
    return torch.rand(pictures, DRAWS, dtype=torch.float64, generator=generator).numpy()


def plan_batch(
    images: Indices,
    sizes: Indices,
    numbers: Floats,
    settings: AugmentationSettings,
    *,
    size: int,
    strong: bool,
) -> BatchPlan:
    """Decide what a batch is made of.

    Args:
        images: (B,): the image each picture is about.
        sizes: (n, 2): height and width of every image of the set.
        numbers: (B, DRAWS), see `draw`.
        settings: how to vary the pictures.
        size: side of a picture.
        strong: allow Mosaic and Mixup.
    """
    first, second = numbers[:, :_LAYER], numbers[:, _LAYER : 2 * _LAYER]
    row = numbers[:, 2 * _LAYER : 2 * _LAYER + _ROW]
    beta = numbers[:, 2 * _LAYER + _ROW :]
    is_mosaic = row[:, 0] < (settings.mosaic if strong else 0)
    is_mixed = is_mosaic & (row[:, 1] < settings.mixup)
    flips = row[:, 2:4] < (settings.flip_lr, settings.flip_ud)
    gains = np.array([settings.hsv_h, settings.hsv_s, settings.hsv_v])

    def affine(rows: Indices, of: Floats) -> Floats:
        return _affine(of[rows, 10:], flips[rows], settings, size)

    def mosaic(rows: Indices, about: Indices, of: Floats) -> Layers:
        return _mosaic_layers(rows, about[rows], sizes, of[rows], affine(rows, of), size)

    mosaics, mixed = np.flatnonzero(is_mosaic), np.flatnonzero(is_mixed)
    singles = np.flatnonzero(~is_mosaic)
    others = (second[:, 0] * len(sizes)).astype(np.int64)
    return BatchPlan(
        pictures=len(images),
        size=size,
        singles=_single_layers(
            singles, images[singles], sizes, affine(singles, first), size, settings.border
        ),
        mosaics=mosaic(mosaics, images, first),
        mixed=mosaic(mixed, others, second),
        # The middle one of 63 uniform numbers has the distribution Beta(32, 32).
        mix=np.sort(beta[mixed])[:, _BETA // 2],
        colour=1 + gains * (2 * row[:, 4:7] - 1),
    )


def _affine(
    numbers: Floats, flips: NDArray[np.bool_], settings: AugmentationSettings, size: int
) -> Floats:
    """Return matrices (L, 2, 3) from a plane centred on 0 to the picture, flips included.

    Rotation and zoom come first, then the two shears at once, then the shift: `numbers`, (L, 6),
    are of angle, zoom, shears of x and y, shifts of x and y; `flips`, (L, 2), of x and y.
    """
    signed = 2 * numbers - 1
    angle = np.radians(settings.degrees * signed[:, 0])
    zoom = 1 + settings.scale * signed[:, 1]
    tangent = np.tan(np.radians(settings.shear * signed[:, 2:4]))
    cosine, sine = zoom * np.cos(angle), zoom * np.sin(angle)
    matrix = np.empty((len(numbers), 2, 3))
    matrix[:, 0, 0] = cosine - tangent[:, 0] * sine
    matrix[:, 0, 1] = sine + tangent[:, 0] * cosine
    matrix[:, 1, 0] = tangent[:, 1] * cosine - sine
    matrix[:, 1, 1] = tangent[:, 1] * sine + cosine
    matrix[:, :, 2] = size * (0.5 + settings.translate * signed[:, 4:6])
    matrix[flips] *= -1
    matrix[:, :, 2][flips] += size
    return matrix


def _single_layers(
    rows: Indices, images: Indices, sizes: Indices, affine: Floats, size: int, border: int
) -> Layers:
    """Put each image in the middle of a picture and then apply its matrix."""
    placed = [fit((int(h), int(w)), (size, size), border) for h, w in sizes[images]]
    # Zoom and offset of each axis, x first, from the image's pixels to the centred plane.
    zoom = np.array(
        [(p.resized[1] / p.source[1], p.resized[0] / p.source[0]) for p in placed]
    ).reshape(-1, 2)
    offset = np.array([(p.left, p.top) for p in placed], np.float64).reshape(-1, 2) - size / 2
    return Layers(rows, images[:, None], sizes[images][:, None], _after(affine, zoom, offset))


def _mosaic_layers(
    rows: Indices, images: Indices, sizes: Indices, numbers: Floats, affine: Floats, size: int
) -> Layers:
    """Add three random images to each, shuffle the four, and choose the seam.

    The seam is uniform in the middle half of a plane of twice the picture's size.
    """
    others = (numbers[:, 1:4] * len(sizes)).astype(np.int64)
    four = np.concatenate([images[:, None], others], axis=1)
    four = np.take_along_axis(four, np.argsort(numbers[:, 4:8]), axis=1)
    seam = size * (numbers[:, 8:10] - 0.5)
    return Layers(rows, four, sizes[four], _after(affine, np.ones_like(seam), seam))


def _after(affine: Floats, zoom: Floats, offset: Floats) -> Floats:
    """Return the matrices that first apply `zoom` and `offset`, both (L, 2), then `affine`."""
    matrix: Floats = affine.copy()
    matrix[:, :, :2] *= zoom[:, None]
    matrix[:, :, 2:] += affine[:, :, :2] @ offset[:, :, None]
    return matrix


def place_boxes(
    layers: Layers, size: int, boxes: Floats, tiles: Indices
) -> tuple[Floats, NDArray[np.bool_]]:
    """Move boxes from their images into the pictures.

    Args:
        layers: the pictures.
        size: their side S.
        boxes: (k, 4), x1, y1, x2, y2 in pixels of the images.
        tiles: (k,): which image each box is of, as an index into `layers.images.ravel()`.

    Returns:
        (k, 4), the boxes in pixels of the pictures, clipped to 0..S: exact for zoom, shift and
        flips; with rotation or shear, the box around the four corners. And (k,), whether enough
        of each is left, see `worth_keeping`.
    """
    per = layers.images.shape[1]
    shift = np.zeros_like(boxes)
    if per == 4:
        heights, widths = layers.sizes.reshape(-1, 2)[tiles].T
        place = tiles % 4
        shift[:, 0::2] = np.where(place % 2 == 0, -widths, 0)[:, None]
        shift[:, 1::2] = np.where(place < 2, -heights, 0)[:, None]
    moved = boxes + shift
    corners = moved[:, [[0, 1], [2, 1], [0, 3], [2, 3]]]  # (k, 4, 2)
    matrix = layers.matrix[tiles // per]
    corners = np.einsum("kij,kcj->kci", matrix[:, :, :2], corners) + matrix[:, None, :, 2]
    whole = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    inside = whole.clip(0, size)
    return inside, worth_keeping(whole, inside)


def worth_keeping(whole: Floats, inside: Floats) -> NDArray[np.bool_]:
    """Return which boxes are still worth learning after augmentation.

    Both sides must exceed `MIN_SIDE`, the visible area must exceed `MIN_VISIBLE` of the whole, and
    no side may be `MAX_ASPECT` times the other. The thresholds are the authors'.

    Args:
        whole: (k, 4), x1, y1, x2, y2: the boxes in the picture's pixels, wherever they reach.
        inside: (k, 4): what of them lies inside the picture.
    """
    sides = inside[:, 2:] - inside[:, :2]
    area = np.prod(whole[:, 2:] - whole[:, :2], axis=1)
    shorter, longer = sides.min(1, initial=np.inf), sides.max(1, initial=0)
    return (
        (shorter > MIN_SIDE)
        & (np.prod(sides, axis=1) > MIN_VISIBLE * area)
        & (longer < MAX_ASPECT * shorter)
    )


def make_pictures(
    plan: BatchPlan, gather: Callable[[Indices], Tensor], device: torch.device, chunk: int
) -> Tensor:
    """Make the pictures of a batch.

    Args:
        plan: what they are made of.
        gather: takes indices of k images and returns uint8 (k, 3, H, W) on `device`, each image
            at the top left of its (H, W).
        device: where to work.
        chunk: pictures to work on at once; bounds the memory needed in addition to the result.

    Returns:
        float32 (B, 3, S, S) RGB in 0..1.
    """
    out = torch.empty(plan.pictures, 3, plan.size, plan.size, device=device)

    for layers in (plan.singles, plan.mosaics, plan.mixed):
        for start in range(0, len(layers.rows), chunk):
            part = slice(start, start + chunk)
            images, rows = layers.images[part], _rows(layers.rows[part], device)
            pictures = gather(images.ravel())
            pictures = pictures.view(*images.shape, *pictures.shape[1:])
            sizes = _upload(layers.sizes[part], device)
            inverse = _upload(invert(layers.matrix[part]), device)
            made = render(pictures, sizes, inverse, plan.size)
            if layers is plan.mixed:
                kept = _upload(plan.mix[part], device)
                made = torch.lerp(made, out[rows], kept[:, None, None, None])
            out[rows] = made
    if (plan.colour != 1).any():
        colour = _upload(plan.colour, device)
        for start in range(0, plan.pictures, chunk):
            part = slice(start, start + chunk)
            adjust_colours_(out[part], colour[part])
    return out


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device, without waiting for what the device is doing."""
    if device.type == "cuda":
        # From memory that is not pinned, a copy first waits for all work that is queued.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _upload(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(array.astype(np.float32)), device)


def _rows(rows: Indices, device: torch.device) -> slice | Tensor:
    """Return an index for rows in ascending order: a slice if they are neighbours."""
    if int(rows[-1] - rows[0]) + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return to_device(torch.from_numpy(rows), device)


def invert(matrix: Floats) -> Floats:
    """Return the inverses of affine matrices (L, 2, 3)."""
    linear = np.linalg.inv(matrix[:, :, :2])
    return np.concatenate([linear, -linear @ matrix[:, :, 2:]], axis=2)


def render(pictures: Tensor, sizes: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Sample pictures from one or four images each, bilinearly; gray outside of them.

    Args:
        pictures: uint8 (L, T, 3, H, W), T = 1 or 4: the images of each, at the top left of (H, W).
        sizes: float32 (L, T, 2): height and width of each image.
        inverse: float32 (L, 2, 3): from pixels of the picture to where `Layers.matrix` starts.
        size: side S of a picture.

    Returns:
        float32 (L, 3, S, S) in 0..1.
    """
    count, tiles, channels, height, width = pictures.shape
    device = pictures.device
    # The images of a picture one below the other, so that one call samples all four.
    atlas = torch.empty(count, channels, tiles, height, width, device=device)
    torch.mul(pictures.transpose(1, 2), 1 / 255, out=atlas)

    centres = torch.arange(size, device=device) + 0.5
    a = inverse[:, :, :, None, None]
    columns, lines = centres[None, None, None, :], centres[None, None, :, None]
    x, y = (
        a[:, axis, 0] * columns[:, 0] + (a[:, axis, 1] * lines[:, 0] + a[:, axis, 2])
        for axis in (0, 1)
    )  # (L, S, S) each

    sides = sizes[:, :, :, None, None]
    if tiles == 1:
        high, wide = sides[:, 0, 0], sides[:, 0, 1]
        inside = (x >= 0) & (y >= 0) & (x < wide) & (y < high)
        below = None
    else:
        left, top = x < 0, y < 0
        high, wide = (
            torch.where(
                top,
                torch.where(left, sides[:, 0, axis], sides[:, 1, axis]),
                torch.where(left, sides[:, 2, axis], sides[:, 3, axis]),
            )
            for axis in (0, 1)
        )
        inside = (x >= -wide) & (y >= -high) & (x < wide) & (y < high)
        # From the seam to the image's own pixels.
        x = torch.where(left, x + wide, x)
        y = torch.where(top, y + high, y)
        below = height * (3 - 2 * top.float() - left.float())
    # Clamp to the image's edge pixels, so that no neighbour in the atlas bleeds in.
    x = torch.minimum(x, wide - 0.5).clamp_(min=0.5)
    y = torch.minimum(y, high - 0.5).clamp_(min=0.5)
    if below is not None:
        y += below
    grid = torch.stack([x.mul_(2 / width).sub_(1), y.mul_(2 / (height * tiles)).sub_(1)], dim=-1)
    sampled = grid_sample(
        atlas.flatten(2, 3), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled.masked_fill_(~inside[:, None], GRAY / 255)


def adjust_colours_(pictures: Tensor, factors: Tensor) -> Tensor:
    """Multiply hue, saturation and value of pictures, in place.

    Hue is an angle from red, 0..360 degrees, and wraps around; saturation and value stop at 1.

    Args:
        pictures: float32 (B, 3, height, width) RGB in 0..1; changed.
        factors: float32 (B, 3): of hue, saturation and value.

    Returns:
        `pictures`.
    """
    red, green, blue = pictures.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    tiny = 1e-12
    # Hue in sixths of a turn, 0..6: from red, green or blue, whichever is strongest.
    hue = torch.where(
        value == red,
        (green - blue) + 6 * chroma * (blue > green),
        torch.where(value == green, (blue - red) + 2 * chroma, (red - green) + 4 * chroma),
    )
    of_hue, of_saturation, of_value = (f[:, None, None] for f in factors.unbind(1))
    hue = hue.div_(chroma.clamp(min=tiny)).mul_(of_hue)
    # Below 12 because no factor exceeds 2.
    hue = torch.where(hue >= 6, hue - 6, hue)
    saturation = chroma.div_(value.clamp(min=tiny)).mul_(of_saturation).clamp_(max=1)
    value = value.mul_(of_value).clamp_(max=1)
    depth = saturation.mul_(value)  # how far the weakest primary lies below the strongest
    # How far each primary is from full, 0..1: the flanks of its trapezoid over the hue circle.
    for plane, (centre, flank, sign) in zip(
        (red, green, blue), ((3.0, 2.0, -1.0), (2.0, 1.0, 1.0), (4.0, 1.0, 1.0)), strict=True
    ):
        away = (hue - centre).abs_().sub_(flank).mul_(sign).clamp_(0, 1)
        torch.addcmul(value, depth, away, value=-1, out=plane)
    return pictures
