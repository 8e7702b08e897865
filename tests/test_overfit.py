"""The whole recipe learns: four photographs by heart, from random weights, on a CPU."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from trt_yolov6.models.variants import VARIANTS
from trt_yolov6.training.augmentation import AugmentationSettings
from trt_yolov6.training.recipe import recipe_for
from trt_yolov6.training.trainer import train


def write_four(samples: Path, folder: Path) -> Path:
    """Write the four sample images with the fewest objects as a data set with one split, `val`."""
    content = json.loads((samples / "annotations" / "instances_val.json").read_text())
    counts = Counter(entry["image_id"] for entry in content["annotations"])
    images = sorted(content["images"], key=lambda image: (counts[image["id"]], image["id"]))[:4]
    (folder / "annotations").mkdir(parents=True)
    (folder / "images" / "val").mkdir(parents=True)
    for image in images:
        name = image["file_name"]
        shutil.copy(samples / "images" / "val" / name, folder / "images" / "val" / name)
    chosen = {image["id"] for image in images}
    kept = [entry for entry in content["annotations"] if entry["image_id"] in chosen]
    assert {entry["category_id"] for entry in kept} == {1, 2, 3}
    (folder / "annotations" / "instances_val.json").write_text(
        json.dumps({**content, "images": images, "annotations": kept})
    )
    return folder


@pytest.mark.slow
def test_four_images_are_learned_by_heart(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # N with half of its channels and as few blocks as can be, which takes a quarter of the time.
    mini = dataclasses.replace(VARIANTS["yolov6n"], width=0.125, depth=0.1)
    monkeypatch.setitem(VARIANTS, "yolov6mini", mini)
    data = write_four(root / "samples", tmp_path / "data")
    settings = recipe_for(
        "yolov6mini",
        str(data),
        train_split="val",
        epochs=110,  # after 80, one seed of four was at 0.87
        plain_epochs=0,
        batch=4,
        image_size=192,
        eval_interval=0,
        augmentation=AugmentationSettings(
            mosaic=0, translate=0, scale=0, hsv_h=0, hsv_s=0, hsv_v=0, flip_lr=0
        ),
    )
    # Four images are an eighth of what the learning rate is meant for.
    faster = dataclasses.replace(settings.optimizer, learning_rate=0.06, accumulate=1)
    result = train(
        dataclasses.replace(settings, optimizer=faster), tmp_path / "run", progress=False
    )
    assert result.last_ap is not None
    assert result.last_ap > 0.9
