"""Class names: the 80 of COCO in the order in which detectors number them, and files of names."""

from __future__ import annotations

import json
from pathlib import Path

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
    if path.suffix in (".yaml", ".yml"):
        raise UserError(
            f"{path} is not a list of names; give a file of one a line as `class_names`."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable text file; check `class_names`.") from error
    if path.suffix == ".json":
        try:
            categories = sorted(json.loads(text)["categories"], key=lambda item: item["id"])
            return tuple(str(item["name"]) for item in categories)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} has no COCO categories; give such a file or one name a line as "
                "`class_names`."
            ) from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise UserError(f"{path} is empty; write one class name a line.")
    return names
