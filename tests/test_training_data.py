"""A training set loads as evaluation sees it, and bad data is named, refused or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.training_data import checked_data, unaugmented

from trt_yolov6.data.coco import load_coco, read_coco_image
from trt_yolov6.data.letterbox import GRAY, letterbox
from trt_yolov6.errors import UserError
from trt_yolov6.training import dataset as dataset_module
from trt_yolov6.training.augmentation import AugmentationSettings, worth_keeping
from trt_yolov6.training.data_validation import BadDataError, settle
from trt_yolov6.training.dataset import TrainingSet, data_notes, load_training_set

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sample(root: Path) -> TrainingSet:
    return load_training_set(root / "samples", None, 320, "cpu", progress=False)


def test_the_sample_loads_whole(sample: TrainingSet, root: Path) -> None:
    dataset = load_coco(root / "samples")
    assert len(sample) == 72
    assert sample.class_names == dataset.class_names
    assert sample.files == tuple(image.path for image in dataset.images)
    assert sample.images.shape == (72, 3, 240, 320)  # no wider or higher than any image is
    assert len(sample.boxes) == len(dataset.annotations) == int(sample.first[-1])
    assert (sample.report.problems, sample.report.clipped) == ((), ())
    for index, image in enumerate(dataset.images):
        span = slice(sample.first[index], sample.first[index + 1])
        boxes, classes = sample.boxes[span], sample.classes[span]
        wanted = [a for a in dataset.annotations if a["image_id"] == image.id]
        x, y, width, height = np.array([a["bbox"] for a in wanted], float).T / 2
        np.testing.assert_allclose(boxes, np.stack([x, y, x + width, y + height], 1), rtol=1e-6)
        assert classes.tolist() == [dataset.category_ids.index(a["category_id"]) for a in wanted]


@pytest.mark.parametrize("size", [320, 704])
def test_unaugmented_batches_are_what_evaluation_sees(root: Path, size: int) -> None:
    """Shrunk and enlarged, and of images of several formats."""
    folder = root.parent / "shared" / "data" / "coco256"
    data = folder if folder.is_dir() else root / "samples"
    split = "val2017" if folder.is_dir() else None
    dataset = load_coco(data, split)
    held = load_training_set(data, split, size, "cpu", progress=False)
    indices = [3, 0, 8, 40]
    pictures, targets = unaugmented(held, torch.tensor(indices))
    assert pictures.dtype == torch.float32
    for row, index in enumerate(indices):
        image = dataset.images[index]
        boxed, placed = letterbox(read_coco_image(image), (size, size))
        wanted = torch.from_numpy(boxed).permute(2, 0, 1).float() / 255
        torch.testing.assert_close(pictures[row], wanted, atol=1e-4, rtol=0)

        boxes = targets.boxes[row][targets.present[row]].numpy()
        truth = [a["bbox"] for a in dataset.annotations if a["image_id"] == image.id]
        x, y, width, height = np.array(truth, float).reshape(-1, 4).T
        corners = np.stack([x, y, x + width, y + height], 1).clip(
            0, [image.width, image.height] * 2
        )
        resized = corners * placed.scale
        corners = corners[worth_keeping(resized, resized)]
        np.testing.assert_allclose(placed.to_source(boxes), corners, atol=1e-3)


def test_a_border_is_left_gray(sample: TrainingSet) -> None:
    pictures, targets = unaugmented(sample, [0, 5], border=10)
    gray = GRAY / 255
    torch.testing.assert_close(
        pictures[:, :, :, :10], torch.full((2, 3, 320, 10), gray), atol=1e-6, rtol=0
    )
    assert (pictures[:, :, 100:200, 10] != gray).any()
    present = targets.boxes[targets.present]
    assert present[:, 0::2].min() >= 10
    assert present[:, 0::2].max() <= 310
    weak = AugmentationSettings(translate=0, scale=0, hsv_h=0, hsv_s=0, hsv_v=0, border=10)
    pictures, _ = sample.batch([0], weak, torch.Generator(), strong=False)
    assert torch.allclose(pictures[..., :10], torch.tensor(gray))
    assert torch.allclose(pictures[..., -10:], torch.tensor(gray))


# ------------------------------------------------------------------------------------- bad data

GOOD = {"id": 1, "image_id": 1, "category_id": 5, "bbox": [4, 4, 20, 10]}


def write_set(root: Path, annotations: list[Any] | None, **changes: Any) -> Path:
    """Write three images of 40 x 30 and annotations; `changes` replace parts of the JSON."""
    content = {
        "images": [
            {"id": number, "file_name": f"{name}.png", "width": 40, "height": 30}
            for number, name in enumerate("abc", start=1)
        ],
        "categories": [{"id": 9, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": annotations,
        **changes,
    }
    folder = root / "images" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate("abc"):
        Image.new("RGB", (40, 30), (50 * index, 0, 0)).save(folder / f"{name}.png")
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


def bad(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "id": 7, **changes}


BAD_ANNOTATIONS = {
    "right of the image": (bad(bbox=[40, 0, 5, 5]), "outside", "lies outside its 40x30 pixels"),
    "above the image": (bad(bbox=[0, -9, 5, 9]), "outside", "lies outside its 40x30 pixels"),
    "no width": (bad(bbox=[3, 3, 0, 5]), "empty-box", "has no area"),
    "negative height": (bad(bbox=[3, 9, 5, -5]), "malformed", "sides are negative"),
    "NaN": (bad(bbox=[3, float("nan"), 5, 5]), "not-finite", "is not finite"),
    "infinite": (bad(bbox=[3, 3, float("inf"), 5]), "not-finite", "is not finite"),
    "overflow": (bad(bbox=[1e308, 3, 1e308, 5]), "not-finite", "is not finite"),
    "beyond floats": (bad(bbox=[10**400, 3, 5, 5]), "not-finite", "is not finite"),
    "no such class": (bad(category_id=4), "unknown-class", "category 4, which is not listed"),
    "class as text": (bad(category_id="five"), "unknown-class", "five, which is not listed"),
    "no such image": (bad(image_id=12), "unknown-image", "image 12, which is not listed"),
    "three numbers": (bad(bbox=[1, 2, 3]), "malformed", "where a box of four numbers should be"),
    "text in the box": (
        bad(bbox=[1, 2, 3, "four"]),
        "malformed",
        "a box of four numbers should be",
    ),
    "no box": ({"id": 7, "image_id": 1, "category_id": 5}, "malformed", "has None where a box"),
    "no object": ([1, 2], "malformed", "annotation number 2 is not a JSON object"),
    "twice": (bad(), "duplicate", "repeats the box [4, 4, 20, 10] of another one"),
}


@pytest.mark.parametrize("name", BAD_ANNOTATIONS)
def test_a_bad_annotation_is_named_refused_or_left_out(tmp_path: Path, name: str) -> None:
    annotation, kind, told = BAD_ANNOTATIONS[name]
    other = {**GOOD, "id": 8, "image_id": 2, "bbox": [1, 1, 39, 29]}
    folder = write_set(tmp_path, [GOOD, annotation, other])

    (problem,) = checked_data(folder).problems
    assert problem.kind == kind
    number = "number 2" if name == "no object" else "7"
    assert problem.sentence.startswith(f"annotation {number} ")
    assert told in problem.sentence
    assert problem.image == (None if kind == "unknown-image" or name == "no object" else "a.png")

    with pytest.raises(BadDataError) as error:
        load_training_set(folder, None, 40, "cpu", progress=False)
    message = str(error.value)
    assert "instances_train.json has 1 problem, the first being that annotation" in message
    assert message.endswith("; correct the data set or give `on_bad_data` skip to leave it out.")
    assert told in message
    assert error.value.report.problems == (problem,)

    held = load_training_set(folder, None, 40, "cpu", on_bad_data="skip", progress=False)
    assert held.report.problems == (problem,)
    assert held.boxes.tolist() == [[4, 4, 24, 14], [1, 1, 40, 30]]
    assert held.classes.tolist() == [0, 0]
    assert held.first.tolist() == [0, 1, 2, 2]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def other_size(path: Path) -> None:
    Image.new("RGB", (41, 30)).save(path)


@pytest.mark.parametrize(
    ("harm", "kind", "told"),
    [
        (Path.unlink, "missing-image", "image b.png is not in"),
        (cut_short, "unreadable-image", "b.png is cut short"),
        (lambda path: path.write_bytes(b""), "unreadable-image", "b.png is empty (0 bytes)"),
        (lambda path: path.write_text("no"), "unreadable-image", "b.png is damaged"),
        (other_size, "wrong-size", "b.png is 41x30 pixels, but its annotations were made for"),
    ],
)
def test_a_bad_image_is_named_refused_or_left_out(
    tmp_path: Path, harm: Any, kind: str, told: str
) -> None:
    annotations = [{**GOOD, "id": number, "image_id": number} for number in (1, 2, 3)]
    annotations[2]["category_id"] = 9
    folder = write_set(tmp_path, annotations)
    harm(folder / "images" / "train" / "b.png")

    (problem,) = checked_data(folder).problems
    assert (problem.image, problem.kind) == ("b.png", kind)
    assert told in problem.sentence
    with pytest.raises(BadDataError, match=r"b\.png"):
        load_training_set(folder, "train", 40, "cpu", progress=False)

    held = load_training_set(folder, "train", 40, "cpu", on_bad_data="skip", progress=False)
    assert [file.name for file in held.files] == ["a.png", "c.png"]
    assert held.images[:, 0, 0, 0].tolist() == [0, 100]
    assert held.classes.tolist() == [0, 1]
    assert held.first.tolist() == [0, 1, 2]


def test_an_image_without_a_recorded_size_is_a_problem(tmp_path: Path) -> None:
    images = [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "b.png", "width": None, "height": 30},
    ]
    folder = write_set(tmp_path, [GOOD, bad(image_id=2)], images=images)
    (problem,) = checked_data(folder).problems
    assert problem.sentence == "image b.png has no recorded size"
    held = load_training_set(folder, None, 40, "cpu", on_bad_data="skip", progress=False)
    assert len(held) == len(held.boxes) == 1


def test_a_box_partly_outside_is_clipped_and_noted(tmp_path: Path) -> None:
    folder = write_set(
        tmp_path, [bad(bbox=[-5, 20, 15, 20]), {**GOOD, "id": 2, "bbox": [30, 0, 10.005, 5]}]
    )
    held = load_training_set(folder, None, 80, "cpu", progress=False)
    torch.testing.assert_close(held.boxes, torch.tensor([[0.0, 40, 20, 60], [60, 0, 80, 10]]))
    (note,) = held.report.clipped
    assert (note.kind, note.image) == ("clipped", "a.png")
    assert note.sentence == (
        "annotation 7 of image a.png has the box [-5, 20, 15, 20], which reaches beyond its 40x30 "
        "pixels"
    )
    assert held.report.problems == ()


def test_crowds_are_left_out_and_images_without_annotation_counted(tmp_path: Path) -> None:
    folder = write_set(tmp_path, [GOOD, bad(image_id=2, iscrowd=1, bbox=None)])
    report = checked_data(folder)
    assert (report.crowds, report.empty_images, report.problems) == (1, 2, ())
    assert (report.images, report.annotations) == (3, 2)
    held = load_training_set(folder, None, 40, "cpu", progress=False)
    assert (len(held), len(held.boxes)) == (3, 1)


def test_objects_that_are_too_small_to_train_on_are_counted(tmp_path: Path) -> None:
    thin, tiny = (
        {**GOOD, "id": 2, "bbox": [0, 20, 39, 1.5]},
        {**GOOD, "id": 3, "bbox": [9, 9, 1, 1]},
    )
    folder = write_set(tmp_path, [GOOD, thin, tiny])
    for size, lost in ((40, 2), (160, 1)):
        held = load_training_set(folder, None, size, "cpu", progress=False)
        (note,) = data_notes(held, tmp_path / "report.json", None)
        assert note.startswith(
            f"left out of training unless enlarged: {lost} of 3 objects, at most 2"
        )
        _, targets = unaugmented(held, [0])
        assert int(targets.present.sum()) == 3 - lost


def test_the_report_is_written_whole(tmp_path: Path) -> None:
    folder = write_set(tmp_path, [GOOD, bad(category_id=4), bad(bbox=[3, 3, 0, 5])])
    file = tmp_path / "run" / "data.json"
    with pytest.raises(BadDataError, match=r"2 problems.*leave them out; all are listed in .*data"):
        load_training_set(folder, None, 40, "cpu", progress=False, report_file=file)
    written = json.loads(file.read_text())
    assert [entry["kind"] for entry in written["problems"]] == ["unknown-class", "empty-box"]
    assert written["problems"][0]["image"] == "a.png"
    assert written["annotation_file"].endswith("instances_train.json")
    settle(checked_data(folder), "skip", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == written
    # Nothing to say: nothing written, and nothing left of the data set before its correction.
    folder = write_set(tmp_path, [GOOD])
    load_training_set(folder, None, 40, "cpu", progress=False, report_file=file)
    assert not file.exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"categories": []}, "it has no categories"),
        ({"images": []}, "it has no images"),
        ({"annotations": None}, "it has no list 'annotations'"),
        ({"images": [{"id": 1}]}, "entry 0 of 'images' lacks 'file_name'"),
        ({"categories": [{"id": 1, "name": "a"}] * 2}, "category id 1 occurs twice"),
    ],
)
def test_a_file_that_is_none_is_refused_either_way(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    folder = write_set(tmp_path, **{"annotations": [GOOD], **changes})
    with pytest.raises(UserError, match="cannot be used as annotations") as error:
        load_training_set(folder, None, 40, "cpu", on_bad_data="skip", progress=False)
    assert told in str(error.value)


def test_nothing_left_to_train_on_is_refused(tmp_path: Path) -> None:
    for nothing in ([], [bad(category_id=4)]):
        folder = write_set(tmp_path, nothing)
        with pytest.raises(UserError, match="leaves no object to train on"):
            load_training_set(folder, None, 40, "cpu", on_bad_data="skip", progress=False)
    folder = write_set(tmp_path, [GOOD])
    for image in (folder / "images" / "train").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="leaves no object to train on"):
        load_training_set(folder, None, 40, "cpu", on_bad_data="skip", progress=False)


def test_a_set_that_does_not_fit_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_set(tmp_path, [GOOD])
    monkeypatch.setattr(dataset_module, "_free_host_memory", lambda: 1000)
    with pytest.raises(
        UserError, match=r"takes .* GB of memory at 40 pixels .* smaller `image_size`"
    ):
        load_training_set(folder, None, 40, "cpu", progress=False)


def test_the_processes_of_a_machine_hold_a_set_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_set(tmp_path, [GOOD])
    needed = load_training_set(folder, None, 40, "cpu", progress=False).images.numel()
    monkeypatch.setattr(dataset_module, "_free_host_memory", lambda: 2 * needed)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    load_training_set(folder, None, 40, "cpu", progress=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="GB of memory in 3 processes at 40 pixels"):
        load_training_set(folder, None, 40, "cpu", progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_set_is_held_on_the_gpu_where_it_fits(
    sample: TrainingSet, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = load_training_set(root / "samples", None, 320, "cuda", progress=False)
    assert held.images.device == held.device == torch.device("cuda:0")
    assert torch.equal(held.images.cpu(), sample.images)
    monkeypatch.setattr(dataset_module, "DEVICE_SHARE", 0)
    held = load_training_set(root / "samples", None, 320, "cuda", progress=False)
    assert held.images.is_pinned()
    assert unaugmented(held, [0])[0].is_cuda
