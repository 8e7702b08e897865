"""Pictures of noise, to calibrate on where it does not matter what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trt_yolov6.data.loader import fill_row
from trt_yolov6.data.preprocessing import YOLOV6, Preprocessing
from trt_yolov6.spec import TensorSpec, empty_input


def save_noise(path: Path, seed: int) -> None:
    """Write 64 x 64 pixels of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def noise_folder(folder: Path) -> Path:
    """Make a folder with three pictures: of more, the search would make everything twice."""
    folder.mkdir()
    for number in range(3):
        save_noise(folder / f"{number}.png", seed=number)
    return folder


def prepared(
    images: Sequence[NDArray[np.uint8]], spec: TensorSpec, how: Preprocessing = YOLOV6
) -> NDArray[Any]:
    """Return images as the input that a spec describes."""
    array = empty_input(spec, len(images))
    for row, image in zip(array, images, strict=True):
        fill_row(row, image, spec, 0, how)
    return array
