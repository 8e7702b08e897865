"""Pictures of noise, to calibrate on where it does not matter what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def save_noise(path: Path, seed: int) -> None:
    """Write 64 x 64 pixels of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def noise_folder(folder: Path) -> Path:
    """Make a folder with four pictures."""
    folder.mkdir()
    for number in range(4):
        save_noise(folder / f"{number}.png", seed=number)
    return folder
