"""Class names: the 80 of COCO in the order in which detectors number them, and files of names."""

from __future__ import annotations

from pathlib import Path

from trt_yolov6.common.files import read_json
from trt_yolov6.data.annotations import whole
from trt_yolov6.errors import UserError

_COCO = """\
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, \
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, \
giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, \
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, \
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, \
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, \
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, \
hair drier, toothbrush"""

COCO_NAMES = tuple(_COCO.split(", "))


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Read class names from a text file, one a line, or from a COCO annotation file's categories.

    Raises:
        UserError: the file is missing, empty or neither, such as YAML.
    """
    path = Path(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        raise UserError(
            f"{path} is not a list of names; give a file of one a line as `class_names`."
        )
    if path.suffix.lower() == ".json":
        content = read_json(path)
        try:
            entries = [(whole(item["id"]), str(item["name"])) for item in content["categories"]]
        except (KeyError, TypeError):
            entries = []
        if not entries:
            raise UserError(
                f"{path} has no COCO categories; give such a file or one name a line as "
                "`class_names`."
            )
        if all(isinstance(own, int) for own, _ in entries):  # else as they come, as `coco` has it
            entries.sort()
        return tuple(name for _, name in entries)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable text file; check `class_names`.") from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise UserError(f"{path} is empty; write one class name a line.")
    return names
