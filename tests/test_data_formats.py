"""Data sets as real tools write them: COCO's variations, YOLO's text files, Pascal VOC's XML."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trt_yolov6.data.class_names import read_class_names
from trt_yolov6.data.coco import CocoDataset, load_coco
from trt_yolov6.errors import UserError
from trt_yolov6.training.data_validation import in_order, read_split

WIDTH, HEIGHT = 40, 30
BOXES = {"a": [("cat", (2, 4, 10, 20)), ("dog", (20, 5, 8, 6))], "b": [("dog", (0, 0, 40, 30))]}
"""By image: class and x, y, width, height."""


def images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in BOXES:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{name}.png")


def coco_content() -> dict[str, Any]:
    numbers = {name: index for index, name in enumerate(BOXES, start=1)}
    classes = {"cat": 1, "dog": 2}
    return {
        "images": [
            {"id": number, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT}
            for name, number in numbers.items()
        ],
        "categories": [{"id": number, "name": name} for name, number in classes.items()],
        "annotations": [
            {
                "id": index,
                "image_id": numbers[name],
                "category_id": classes[label],
                "bbox": list(box),
                "iscrowd": 0,
            }
            for index, (name, label, box) in enumerate(
                ((name, label, box) for name, objects in BOXES.items() for label, box in objects),
                start=1,
            )
        ],
    }


def write_coco(root: Path, content: dict[str, Any], encoding: str = "utf-8") -> Path:
    images(root / "images" / "val")
    (root / "annotations").mkdir()
    file = root / "annotations" / "instances_val.json"
    file.write_text(json.dumps(content), encoding=encoding)
    return root


def objects(dataset: CocoDataset) -> list[tuple[str, str, tuple[float, ...]]]:
    """Return image, class and box of every object."""
    stems = {image.id: image.path.stem for image in dataset.images}
    names = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    return sorted(
        (
            stems[entry["image_id"]],
            names[entry["category_id"]],
            tuple(round(value, 6) for value in entry["bbox"]),
        )
        for entry in dataset.annotations
    )


EXPECTED = sorted(
    (name, label, tuple(float(value) for value in box))
    for name, found in BOXES.items()
    for label, box in found
)


def string_ids(content: dict[str, Any]) -> None:
    for image in content["images"]:
        image["id"] = Path(image["file_name"]).stem
    for entry in content["annotations"]:
        entry["image_id"] = "ab"[entry["image_id"] - 1]


def numbers_as_text(content: dict[str, Any]) -> None:
    for records in content.values():
        for record in records:
            record.update({key: str(v) for key, v in record.items() if isinstance(v, int)})
            if "bbox" in record:
                record["bbox"] = [str(value) for value in record["bbox"]]


def ids_as_floats(content: dict[str, Any]) -> None:
    for entry in content["annotations"]:
        entry["image_id"], entry["category_id"] = (
            float(entry["image_id"]),
            str(entry["category_id"]),
        )


def crowds_as_text(content: dict[str, Any]) -> None:
    for entry in content["annotations"]:
        entry["iscrowd"] = "0"


def with_folders(prefix: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["file_name"] = prefix + image["file_name"]

    return change


@pytest.mark.parametrize(
    "change",
    [
        string_ids,
        numbers_as_text,
        ids_as_floats,
        crowds_as_text,
        with_folders("images/val/"),
        with_folders("val/"),
        with_folders("/home/annotator/set/"),
        with_folders("C:\\\\set\\\\images\\\\val\\\\"),
        with_folders("../../data/images/val/"),
    ],
)
def test_what_is_plainly_meant_is_read(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    content = coco_content()
    change(content)
    dataset = load_coco(write_coco(tmp_path, content))
    assert objects(dataset) == EXPECTED
    assert [entry["iscrowd"] for entry in dataset.annotations] == [0, 0, 0]
    # Training reads the same.
    assert [len(boxes) for boxes in read_split(tmp_path, "val").boxes] == [2, 1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_does_not_matter(tmp_path: Path, encoding: str) -> None:
    assert objects(load_coco(write_coco(tmp_path, coco_content(), encoding))) == EXPECTED


def test_an_image_that_is_missing_is_named_as_the_file_has_it(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = "/home/annotator/set/gone.png"
    with pytest.raises(UserError, match=r"image /home/annotator/set/gone\.png is not in"):
        load_coco(write_coco(tmp_path, content))


def test_two_names_for_one_image_are_refused(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = "one/a.png"
    content["images"][1]["file_name"] = "two/a.png"
    write_coco(tmp_path, content)
    for read in (load_coco, lambda root: read_split(root, "val")):
        with pytest.raises(UserError, match=r"one/a\.png and two/a\.png are both found as"):
            read(tmp_path)


def test_an_image_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    content = coco_content()
    content["images"].append({**content["images"][0], "id": 99})
    write_coco(tmp_path, content)
    for read in (load_coco, lambda root: read_split(root, "val")):
        with pytest.raises(
            UserError, match=r"image a\.png is listed twice, .* with id 99; correct"
        ):
            read(tmp_path)


def as_fractions(box: list[float]) -> list[float]:
    return [box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT]


def as_corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


@pytest.mark.parametrize(
    ("unit", "said"), [(as_fractions, "fractions of the image"), (as_corners, "x1, y1, x2, y2")]
)
def test_boxes_in_other_units_are_refused(
    tmp_path: Path, unit: Callable[[list[float]], list[float]], said: str
) -> None:
    content = coco_content()
    for entry in content["annotations"]:
        entry["bbox"] = unit(entry["bbox"])
    write_coco(tmp_path, content)
    for read in (load_coco, lambda root: read_split(root, "val")):
        with pytest.raises(UserError, match=said):
            read(tmp_path)


def test_boxes_that_overhang_their_image_a_little_are_pixels(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][2]["bbox"] = [0, 0, WIDTH + 2, HEIGHT + 2]
    assert len(load_coco(write_coco(tmp_path, content)).annotations) == 3


# --- YOLO ---------------------------------------------------------------------------------------


def write_yolo(
    root: Path, split_folder: str = "images/val", label_folder: str = "labels/val", **keys: Any
) -> Path:
    images(root / split_folder)
    labels = root / label_folder
    labels.mkdir(parents=True, exist_ok=True)
    for name, found in BOXES.items():
        lines = [
            f"{('dog', 'cat').index(label)} {(x + w / 2) / WIDTH} {(y + h / 2) / HEIGHT} "
            f"{w / WIDTH} {h / HEIGHT}"
            for label, (x, y, w, h) in found
        ]
        (labels / f"{name}.txt").write_text("\n".join(lines) + "\n")
    content = {"val": split_folder, "names": ["dog", "cat"], "nc": 2, **keys}
    # JSON is YAML.
    (root / "data.yaml").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("folders", "keys"),
    [
        (("images/val", "labels/val"), {}),
        (("images/val", "labels/val"), {"names": {"1": "cat", "0": "dog"}, "train": "nowhere"}),
        (("val/images", "val/labels"), {"val": "../val/images"}),
        (("valid/images", "valid/labels"), {"val": None, "valid": "valid/images"}),
        (("set/val", "set/val"), {"path": "set", "val": "val"}),
        (("images/val", "images/val"), {}),
    ],
)
def test_yolo_text_files_are_read(
    tmp_path: Path, folders: tuple[str, str], keys: dict[str, Any]
) -> None:
    write_yolo(tmp_path, *folders, **keys)
    for data in (tmp_path, tmp_path / "data.yaml"):
        dataset = load_coco(data, "val")
        assert dataset.class_names == ("dog", "cat")
        assert objects(dataset) == EXPECTED
    assert [len(boxes) for boxes in read_split(tmp_path, "val").boxes] == [2, 1]


def test_labels_mean_the_class_numbers_that_names_has_as_keys(tmp_path: Path) -> None:
    write_yolo(tmp_path, names={"1": "cat", "4": "dog"})
    for file, text in (("a", "1 0.5 0.5 0.5 0.5"), ("b", "4 0.5 0.5 0.5 0.5")):
        (tmp_path / "labels" / "val" / f"{file}.txt").write_text(text)
    box = (10, 7.5, 20, 15)
    assert objects(load_coco(tmp_path, "val")) == [("a", "cat", box), ("b", "dog", box)]
    (tmp_path / "labels" / "val" / "b.txt").write_text("0 0.5 0.5 0.5 0.5")
    with pytest.raises(UserError, match="is of category 0, which is not listed"):
        load_coco(tmp_path, "val")


@pytest.mark.parametrize(
    ("labels", "hinted"), [((1, 2), True), ((2, 1), True), ((0, 2), False), ((1, 3), False)]
)
def test_labels_that_would_fit_if_counted_from_1_are_said_to_start_at_0(
    tmp_path: Path, labels: tuple[int, int], hinted: bool
) -> None:
    write_yolo(tmp_path)
    for file, label in zip("ab", labels, strict=True):
        (tmp_path / "labels" / "val" / f"{file}.txt").write_text(f"{label} 0.5 0.5 0.5 0.5")
    with pytest.raises(UserError, match=f"is of category {max(labels)}, which is not li") as caught:
        load_coco(tmp_path, "val")
    assert ("class numbers start at 0" in str(caught.value)) is hinted


@pytest.mark.parametrize("count", [1, 3, "two"])
def test_a_number_of_classes_that_contradicts_their_names_is_refused(
    tmp_path: Path, count: object
) -> None:
    write_yolo(tmp_path, nc=count)
    with pytest.raises(
        UserError, match=rf"data\.yaml says nc: {count}, but 'names' has 2; correct"
    ):
        load_coco(tmp_path, "val")


def test_a_split_without_a_single_label_file_is_refused_with_the_path_of_one(
    tmp_path: Path,
) -> None:
    write_yolo(tmp_path)
    labels = tmp_path / "labels" / "val"
    (labels / "a.txt").unlink()
    assert len(load_coco(tmp_path, "val").annotations) == 1
    (labels / "b.txt").unlink()
    with pytest.raises(UserError, match=r"no image of val has labels.*labels/val/a\.txt"):
        load_coco(tmp_path, "val")


def test_images_without_a_label_file_are_noted(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    assert not load_coco(tmp_path, "val").notes
    (tmp_path / "labels" / "val" / "a.txt").write_text("")  # without objects, and said so
    assert not load_coco(tmp_path, "val").notes
    (tmp_path / "labels" / "val" / "a.txt").unlink()
    (tmp_path / "images" / "val" / "a.txt").write_text("a caption, not labels")
    (note,) = load_coco(tmp_path, "val").notes
    assert "1 of 2 images of val have no label file" in note
    assert "val/a.png" in note
    assert read_split(tmp_path, "val").report.notes == (note,)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        (unicodedata.normalize("NFD", "zähler.png"), unicodedata.normalize("NFC", "zähler.txt")),
        ("A.PNG", "a.TXT"),
    ],
)
def test_labels_are_found_whatever_the_capitals_and_the_form_of_umlauts(
    tmp_path: Path, image: str, label: str
) -> None:
    write_yolo(tmp_path)
    (tmp_path / "images" / "val" / "a.png").rename(tmp_path / "images" / "val" / image)
    (tmp_path / "labels" / "val" / "a.txt").rename(tmp_path / "labels" / "val" / label)
    dataset = load_coco(tmp_path, "val")
    assert not dataset.notes
    assert sorted(box for *_, box in objects(dataset)) == sorted(box for *_, box in EXPECTED)


def test_labels_of_one_image_are_not_those_of_one_in_capitals(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "images" / "val" / "b.png").rename(tmp_path / "images" / "val" / "A.png")
    (note,) = load_coco(tmp_path, "val").notes
    assert "A.png" in note


def test_class_names_are_the_words_that_the_yaml_has(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("val: images/val\nnc: 2\nnames: [no, 007]\n")
    assert load_coco(tmp_path).class_names == ("no", "007")
    (tmp_path / "data.yaml").write_text("val: images/val\nnames:\n  0: 1.10\n  1: null\n")
    assert load_coco(tmp_path).class_names == ("1.10", "null")


def test_a_split_may_be_a_number_and_a_key_without_a_value_is_none(tmp_path: Path) -> None:
    write_yolo(tmp_path, "2017", "2017")
    (tmp_path / "data.yaml").write_text(
        "train: ~\nval: 2017\ntest:\nnames: [dog, cat]\nnc: null\nkpt_shape:\n"
    )
    assert objects(load_coco(tmp_path)) == EXPECTED


def test_images_that_share_a_label_file_are_noted(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "val" / "a.jpg")
    (note,) = load_coco(tmp_path, "val").notes
    assert "images of val share 1 label file," in note
    assert "labels/val/a.txt, of a.jpg and a.png" in note
    (tmp_path / "labels" / "val" / "a.txt").unlink()
    (note,) = load_coco(tmp_path, "val").notes
    assert "2 of 3 images of val have no label file" in note


def test_a_listed_image_that_is_missing_is_not_said_to_lack_labels(tmp_path: Path) -> None:
    write_yolo(tmp_path, val="lists/val.txt")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "val.txt").write_text("images/val/a.png\n")
    with pytest.raises(UserError, match=r"image .*lists/images/val/a\.png of val is not there"):
        load_coco(tmp_path)


def test_a_list_of_images_and_a_polygon_are_read(tmp_path: Path) -> None:
    write_yolo(tmp_path, val="val.txt")
    (tmp_path / "val.txt").write_text("./images/val/b.png\n")
    (tmp_path / "labels" / "val" / "b.txt").write_text("0 0.25 0.5 0.75 0.5 0.5 1.0\n")
    assert objects(load_coco(tmp_path)) == [("b", "dog", (10, 15, 20, 15))]


def test_keypoints_after_a_box_are_not_a_polygon(tmp_path: Path) -> None:
    write_yolo(tmp_path, kpt_shape=[2, 3])
    labels = tmp_path / "labels" / "val"
    for file in labels.iterdir():
        lines = file.read_text().splitlines()
        file.write_text("".join(f"{line} 0.9 0.9 2 0 0 0\n" for line in lines))
    assert objects(load_coco(tmp_path)) == EXPECTED


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0 20 15 10 10", "fractions of the image, not in pixels"),
        ("0 20 15 10 10\n1 0.5 0.5 0.1 0.1\n1 0.5 0.4 0.1 0.1", "line 1 has 0 20 15 10 10 where"),
        ("0 0.5 0.5 0.1", r"b\.txt line 1"),
        ("cat 0.5 0.5 0.1 0.1", r"line 1 has cat .* where a class number and four fractions"),
        ("7 0.5 0.5 0.1 0.1", r"b\.txt line 1 is of category 7"),
    ],
)
def test_a_label_that_cannot_be_meant_is_named(tmp_path: Path, line: str, said: str) -> None:
    write_yolo(tmp_path)
    (tmp_path / "labels" / "val" / "a.txt").unlink()
    (tmp_path / "labels" / "val" / "b.txt").write_text(line)
    with pytest.raises(UserError, match=said):
        load_coco(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("val: images/val", "no list 'names'"),
        ("names: [a]\nval: nowhere", "is not there"),
        ("names: [a]", "names no images"),
        ("[1", "is not a YAML file"),
        ("7", "does not hold keys"),
        ("names: {one: a, two: b}\nval: images/val", "no list 'names'"),
        ("names: [[a], b]\nval: images/val", "no list 'names'"),
        ("names: [a]\nval: [images/val, [7]]", r"has val: .*'images/val', .*; give a folder"),
        ("names: [a]\nval: labels/val", "val has no image in .*labels"),
    ],
)
def test_a_data_yaml_that_is_none_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        load_coco(tmp_path / "data.yaml")
    assert "\n" not in str(error.value)


def test_of_several_yaml_files_the_one_with_class_names_describes_the_set(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").rename(tmp_path / "cells.yaml")
    (tmp_path / "damaged.yaml").write_text("[1")
    (tmp_path / "settings.yml").write_text("epochs: 3")
    assert objects(load_coco(tmp_path, "val")) == EXPECTED


def test_blank_lines_are_no_objects_and_what_is_no_text_is_named(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    labels = tmp_path / "labels" / "val"
    (labels / "a.txt").write_text("\n" + (labels / "a.txt").read_text() + "  \n")
    assert objects(load_coco(tmp_path, "val")) == EXPECTED
    (labels / "b.txt").write_bytes(b"\xff\xfe0 0.5")
    with pytest.raises(UserError, match=r"b\.txt is not a readable text file"):
        load_coco(tmp_path, "val")


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "images" / "val" / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"b\.png is damaged or not an image; correct it"):
        load_coco(tmp_path, "val")


# --- Pascal VOC ---------------------------------------------------------------------------------


def voc_xml(name: str, difficult: int = 0) -> str:
    # As the development kit counts: from 1, the last pixel within.
    found = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox>"
        f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
        "</bndbox></object>"
        for label, (x, y, w, h) in BOXES[name]
    )
    return (
        f"<annotation><filename>{name}.png</filename><size><width>{WIDTH}</width>"
        f"<height>{HEIGHT}</height><depth>3</depth></size>{found}</annotation>"
    )


def test_voc_with_lists_is_read(tmp_path: Path) -> None:
    images(tmp_path / "JPEGImages")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    for name in BOXES:
        (tmp_path / "Annotations" / f"{name}.xml").write_text(voc_xml(name))
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("a\n")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("b\n")
    (tmp_path / "ImageSets" / "Main" / "dog_train.txt").write_text("b 1\n")
    assert objects(load_coco(tmp_path)) == [item for item in EXPECTED if item[0] == "a"]
    train = load_coco(tmp_path, "train")
    # The classes of the whole set, so that both splits have one order.
    assert train.class_names == ("cat", "dog")
    assert objects(train) == [item for item in EXPECTED if item[0] == "b"]


def test_lists_name_files_with_blanks_and_may_be_empty(tmp_path: Path) -> None:
    images(tmp_path / "JPEGImages")
    (tmp_path / "Annotations").mkdir()
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for stem, name in (("cell 1", "a"), ("cell", "b")):
        (tmp_path / "Annotations" / f"{stem}.xml").write_text(voc_xml(name))
    (lists / "val.txt").write_text("\ufeffcell 1\n")
    (lists / "train.txt").write_text("cell  -1\ncell 1  0\n")
    (lists / "test.txt").write_text("\n")
    assert objects(load_coco(tmp_path, "val")) == [item for item in EXPECTED if item[0] == "a"]
    assert objects(load_coco(tmp_path, "train")) == EXPECTED
    with pytest.raises(UserError, match="has no split 'test'"):
        load_coco(tmp_path, "test")


def test_voc_beside_the_images_is_read_and_difficult_objects_do_not_count(tmp_path: Path) -> None:
    images(tmp_path / "valid")
    for name in BOXES:
        (tmp_path / "valid" / f"{name}.xml").write_text(voc_xml(name, int(name == "b")))
    (tmp_path / ".idea").mkdir()
    for hidden in (".idea/misc.xml", "valid/._a.xml"):
        (tmp_path / hidden).write_text("<project/>")
    dataset = load_coco(tmp_path)
    assert objects(dataset) == EXPECTED
    assert [entry["iscrowd"] for entry in dataset.annotations] == [0, 0, 1]
    file = tmp_path / "valid" / "b.xml"
    whole = file.read_text()
    sizes = "", f"<size><width>0</width><height>{HEIGHT}</height></size>"
    for size in sizes:  # as some tools leave it
        file.write_text(re.sub("<size>.*</size>", size, whole))
        assert load_coco(tmp_path).images == dataset.images
    for name in ("before.png", "b", ""):  # as it was called before, or without its ending
        file.write_text(re.sub("<filename>.*</filename>", f"<filename>{name}</filename>", whole))
        assert load_coco(tmp_path).images == dataset.images
    file.write_text(whole)
    file.write_text(file.read_text().replace("<name>dog</name>", ""))
    with pytest.raises(
        UserError, match=r"b\.xml object 1 is of category None, which is not listed"
    ):
        load_coco(tmp_path, "val")
    for text, said in (("<annotation>", "an XML file"), ("<other/>", "a Pascal VOC annotation")):
        (tmp_path / "valid" / "b.xml").write_text(text)
        with pytest.raises(UserError, match=rf"b\.xml is not {said}"):
            load_coco(tmp_path, "val")


# --- class names --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_class_names_are_a_text_file_s_lines_or_coco_s_categories_by_id(
    tmp_path: Path, encoding: str
) -> None:
    lines, categories = tmp_path / "names.txt", tmp_path / "coco.json"
    lines.write_text("dog\n\n cat \n", encoding)
    assert read_class_names(lines) == ("dog", "cat")
    content = {"categories": [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}]}
    categories.write_text(json.dumps(content), encoding)
    assert read_class_names(categories) == ("dog", "cat")


@pytest.mark.parametrize("ids", [range(1, 13), map(str, range(1, 13)), "lkjihgfedcba"])
def test_a_list_of_names_has_the_order_of_the_data_set(
    tmp_path: Path, ids: Iterable[object]
) -> None:
    content: dict[str, Any] = {"images": coco_content()["images"], "annotations": []}
    content["categories"] = [{"id": own, "name": f"class {own}"} for own in ids][::-1]
    dataset = load_coco(write_coco(tmp_path, content))
    assert len(dataset.class_names) == 12
    assert read_class_names(dataset.annotation_file) == dataset.class_names


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "not a readable text file"),
        ("bytes.txt", b"\xff\xfe\xfd", "not a readable text file"),
        ("empty.txt", b" \n", "is empty; write one class name a line"),
        ("data.YAML", b"names: [cat]\n", "not a list of names; give a file of one a line"),
        ("cut.json", b"{", "is not a JSON file"),
        ("deep.json", b"[" * 100_000, "is not a JSON file"),
        ("bare.json", b'{"categories": []}', "has no COCO categories"),
        ("list.JSON", b"[1]", "has no COCO categories"),
        ("nameless.json", b'{"categories": [{"id": 1}]}', "has no COCO categories"),
    ],
)
def test_what_names_no_classes_is_refused(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} .*{said}|{name} {said}"):
        read_class_names(tmp_path / name)


def test_training_takes_the_network_s_order_of_classes(tmp_path: Path) -> None:
    checked = read_split(write_yolo(tmp_path), "val")
    assert checked.class_names == ("dog", "cat")
    turned = in_order(checked, ["Cat", "Dog"])
    assert turned.class_names == ("Cat", "Dog")
    assert [item.tolist() for item in turned.classes] == [[0, 1], [1]]
    assert in_order(checked, ["cat", "bird"]) is checked
    assert in_order(checked, ["class_0", "class_1"]) is checked
