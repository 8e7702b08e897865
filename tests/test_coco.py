"""COCO-format data sets load with their ids mapped; each kind of damage gets one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trt_yolov6.data.coco import load_coco, read_coco_image
from trt_yolov6.errors import UserError

ROOT = Path(__file__).parents[1]


def write_dataset(
    root: Path, split: str = "val", folder: str = "images/{}", **changes: Any
) -> dict[str, Any]:
    """Write two images of 40 x 30 with one box each; `changes` replace parts of the JSON."""
    content: dict[str, Any] = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"id": 0, "image_id": 7, "category_id": 90, "bbox": [1, 2, 10, 20]},
            {"id": 5, "image_id": 3, "category_id": 1, "bbox": [0, 0, 4, 5], "area": 12.5},
        ],
        **changes,
    }
    images = root / folder.format(split)
    images.mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(images / name)
    annotations = root / "annotations"
    annotations.mkdir(exist_ok=True)
    (annotations / f"instances_{split}.json").write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("folder", ["images/{}", "{}", "images"])
def test_ids_with_gaps_become_ranks(tmp_path: Path, folder: str) -> None:
    write_dataset(tmp_path, folder=folder)
    dataset = load_coco(tmp_path)
    assert dataset.split == "val"
    assert dataset.category_ids == (1, 90)
    assert dataset.class_names == ("person", "toothbrush")
    assert [(image.id, image.height, image.width) for image in dataset.images] == [
        (7, 30, 40),
        (3, 30, 40),
    ]
    assert all(image.path.is_file() for image in dataset.images)


def test_annotations_get_ids_from_1_and_areas_where_missing(tmp_path: Path) -> None:
    # pycocotools would take the annotation with id 0 for one that nothing matches.
    write_dataset(tmp_path)
    first, second = load_coco(tmp_path).annotations
    assert (first["id"], first["area"], first["iscrowd"]) == (1, 200, 0)
    assert (second["id"], second["area"]) == (2, 12.5)
    for area in (10**400, math.nan, -1):
        write_dataset(tmp_path, annotations=[{**BOX, "area": area}])
        assert load_coco(tmp_path).annotations[0]["area"] == 12


def test_the_sample_loads() -> None:
    dataset = load_coco(ROOT / "samples")
    assert len(dataset.images) == 72
    assert dataset.class_names == ("RBC", "WBC", "Platelets")


def test_the_80_classes_of_coco_load_in_their_order() -> None:
    root = ROOT.parent / "shared" / "data" / "coco256"
    if not root.is_dir():
        pytest.skip("needs ../shared/data/coco256")
    dataset = load_coco(root, "val2017")
    assert len(dataset.images) == 128
    assert len(dataset.class_names) == 80
    assert dataset.category_ids[-1] == 90
    assert dataset.class_names[11:13] == ("stop sign", "parking meter")


def test_the_default_split_is_the_only_one_or_val_or_val2017(tmp_path: Path) -> None:
    write_dataset(tmp_path, "special")
    assert load_coco(tmp_path).split == "special"
    write_dataset(tmp_path, "train")
    with pytest.raises(UserError, match="`split`: special, train"):
        load_coco(tmp_path)
    write_dataset(tmp_path, "val2017")
    assert load_coco(tmp_path).split == "val2017"
    write_dataset(tmp_path, "val")
    assert load_coco(tmp_path).split == "val"
    with pytest.raises(UserError, match=r"no split 'test'.*special, train, val, val2017"):
        load_coco(tmp_path, "test")


def test_missing_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / "images" / "val" / "b.png").unlink()
    with pytest.raises(UserError, match=r"image b\.png is not in .*val"):
        load_coco(tmp_path)
    (tmp_path / "images" / "val" / "a.png").unlink()
    with pytest.raises(UserError, match=r"2 images are missing.*a\.png is not in"):
        load_coco(tmp_path)


IMAGE = {"id": 7, "file_name": "a.png", "width": 40, "height": 30}
BOX = {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": [IMAGE, IMAGE]}, "image id 7 occurs twice"),
        ({"categories": [{"id": 90, "name": "x"}] * 2}, "category id 90 occurs twice"),
        ({"images": []}, "no images"),
        ({"categories": []}, "no categories"),
        ({"annotations": None}, "no list 'annotations'"),
        ({"images": [{**IMAGE, "width": "wide"}]}, "a.png has no recorded size"),
        ({"images": [{**IMAGE, "width": 0}]}, "no recorded size"),
        ({"images": ["a.png"]}, "lacks 'id'"),
        ({"annotations": [{**BOX, "bbox": [1, 2, 3]}]}, "a box of four numbers"),
        ({"annotations": [{**BOX, "bbox": [1, 2, -3, 4]}]}, "the box"),
        ({"annotations": [{**BOX, "bbox": [1, 2, float("nan"), 4]}]}, "the box"),
        ({"annotations": [{**BOX, "bbox": [1, 2, 3, 10**400]}]}, "the box"),
        ({"annotations": [{**BOX, "bbox": [1, 2, 1e200, 1e200]}]}, "the box"),
        ({"images": [{**IMAGE, "id": 10**400}]}, "a wrong one"),
        ({"annotations": [{**BOX, "image_id": 8}]}, "image 8, which is not listed"),
        ({"annotations": [{**BOX, "category_id": 2}]}, "category 2, which is not listed"),
    ],
)
def test_malformed_annotations_are_named_in_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write_dataset(tmp_path, **changes)
    with pytest.raises(UserError, match=said) as caught:
        load_coco(tmp_path)
    assert "instances_val.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def break_json(root: Path) -> None:
    (root / "annotations" / "instances_val.json").write_text('{"images": [')


def empty_json(root: Path) -> None:
    (root / "annotations" / "instances_val.json").write_text("[]")


def lose_images(root: Path) -> None:
    (root / "images").rename(root / "pictures")


def lose_annotations(root: Path) -> None:
    (root / "annotations").rename(root / "labels")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_json, "not a JSON file"),
        (empty_json, "not a JSON object"),
        (lose_images, "neither images/val/ nor val/"),
        (lose_annotations, "COCO, YOLO or VOC layout"),
    ],
)
def test_a_damaged_folder_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    write_dataset(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=said):
        load_coco(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        load_coco(tmp_path / "nowhere")


@pytest.mark.parametrize("recorded", [(30, 40), (40, 30)])
def test_a_turned_photograph_is_read_in_the_orientation_that_was_recorded(
    tmp_path: Path, recorded: tuple[int, int]
) -> None:
    height, width = recorded
    image = {"id": 7, "file_name": "turned.png", "width": width, "height": height}
    write_dataset(tmp_path, images=[image], annotations=[])
    stored = np.zeros((30, 40, 3), np.uint8)
    stored[:10, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    Image.fromarray(stored).save(tmp_path / "images" / "val" / "turned.png", exif=exif)
    pixels = read_coco_image(load_coco(tmp_path).images[0])
    expected = stored if recorded == (30, 40) else np.rot90(stored, -1)
    np.testing.assert_array_equal(pixels, expected)


def test_an_image_of_another_size_than_recorded_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, images=[{**IMAGE, "width": 80, "height": 60}], annotations=[])
    with pytest.raises(UserError, match=r"a\.png is 40x30 pixels.*80x60"):
        read_coco_image(load_coco(tmp_path).images[0])
