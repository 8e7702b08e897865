"""Recognize a graph's family and the layout of its outputs.

Several families share a layout and differ in their preprocessing, so shapes alone do not decide.
Other evidence is the exporter's metadata, the names of nodes and weights, and the operators between
the last convolutions and the output. If that does not decide either, the user has to: a wrong guess
would cost AP silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trt_yolov6.detectors.families import FAMILIES, Family, family_named
from trt_yolov6.detectors.layouts import EFFICIENT_NMS_WORDS, LAYOUTS, STRIDES
from trt_yolov6.detectors.metadata import literal
from trt_yolov6.errors import UserError
from trt_yolov6.spec import OutputLayout, TensorSpec


@dataclass(frozen=True)
class GraphFacts:
    """Input of recognition; for a plan without its graph, only the first two are known."""

    outputs: tuple[TensorSpec, ...]
    image_size: tuple[int, int] | None
    """Input height and width in pixels."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    producer: str = ""
    """The exporter, as the file and the graph in it name it."""
    names: frozenset[str] = frozenset()
    """Names of nodes and weights."""
    tail: frozenset[str] | None = None
    """Operators that values go through after the last layers; None where unknown."""
    decoding: frozenset[str] | None = None
    """Operators of `tail` that compute more than a probability; None where unknown."""


def recognize(
    facts: GraphFacts, path: str | Path, decoder: str | None = None
) -> tuple[Family, OutputLayout]:
    """Return the family of a graph and the layout of its outputs.

    Args:
        facts: from `graph.outputs.facts_of`.
        path: of the graph, for messages.
        decoder: a name of `FAMILIES`; None: recognized.

    Raises:
        UserError: the outputs have no known layout, not one of the named family's, or one of
            several families among which only the user can choose.
    """
    family = None if decoder is None else family_named(decoder)
    task = facts.metadata.get("task", "detect")
    if task != "detect":
        raise UserError(f"{path} is a model for the task {task}; a detector is needed.")
    possible = _possible_layouts(facts)
    if family is not None:
        fitting = [layout for layout in family.layouts if layout in possible]
        if not fitting:
            raise UserError(
                f"{path} has outputs of no layout that `decoder` {family.name} reads "
                f"({_listed(facts.outputs)}); it reads {', '.join(family.layouts)}.",
            )
        if {"rows", "grid_rows"} <= set(fitting):
            # A plan does not show which; by default YOLOX's exporter leaves the decoding out.
            return family, "rows" if facts.decoding else "grid_rows"
        return family, fitting[0]
    choices = _families_by_evidence(facts, possible) if possible else []
    if not choices:
        raise UserError(
            f"{path} has outputs of no known layout ({_listed(facts.outputs)}); export it with "
            "`trt-yolov6 export`, or as one of the families "
            f"{', '.join(FAMILIES)} is exported (see Other detectors in the documentation)."
        )
    if len(choices) != 1:
        raise UserError(
            f"{path} has outputs ({_listed(facts.outputs)}) that several families share; "
            f"name one as `decoder`: {_titled(choices)}.",
        )
    ((name, layout),) = choices
    return FAMILIES[name], layout


def is_detector(
    facts: GraphFacts, decoder: str | None = None, *, only_known_anchors: bool = False
) -> bool:
    """Return whether a graph's outputs are of a known layout.

    Args:
        facts: from `graph.outputs.facts_of`.
        decoder: the layouts of this family only.
        only_known_anchors: outputs with all anchors must have as many as the input's size gives.
    """
    possible = set(_possible_layouts(facts))
    if decoder is not None:
        possible &= set(family_named(decoder).layouts)
    if not possible or not only_known_anchors or possible & _NMS_INSIDE:
        return bool(possible)
    known = _anchor_counts(facts.image_size, 1, 3)
    return any(known.intersection(spec.shape) for spec in facts.outputs if len(spec.shape) == 3)


_Choice = tuple[str, OutputLayout]


def _families_by_evidence(facts: GraphFacts, possible: Sequence[OutputLayout]) -> list[_Choice]:
    """Return the families that a graph of one of the layouts may be of."""
    first = possible[0]
    if _is_ultralytics(facts):
        if facts.metadata.get("head") == "RTDETRDecoder":
            return []  # the shape is known, but boxes are fractions of a stretched image
        return [("yolov8", one) for one in possible if one in FAMILIES["yolov8"].layouts]
    if first in ("split_by_class", "end2end_ppyoloe") or (
        "corner_rows" in possible and _PADDLE in facts.producer
    ):
        layout: OutputLayout = "corner_rows" if "corner_rows" in possible else first
        # Nothing in the graph says how its images were normalized.
        return [("ppyoloe", layout), ("ppyoloe-plus", layout)]
    if first == "grids_yolov5":
        # Nor does it contain the anchors.
        return [("yolov5", "grids_yolov5"), ("yolov7", "grids_yolov7")]
    if first == "rows":
        others = (one for one in possible if one in ("columns", "best"))
        return [*_families_of_rows(facts), *(("yolov8", one) for one in others)]
    # Families with these layouts have the same outputs and the same preprocessing.
    usual = {"efficient_nms": "yolov7", "end2end_yolov7": "yolov7"}
    usual |= {"columns": "yolov8", "best": "yolov8"}
    if first in usual:
        return [(usual[first], first)]
    return [(name, first) for name, family in FAMILIES.items() if first in family.layouts]


def _families_of_rows(facts: GraphFacts) -> list[_Choice]:
    anchors = next(spec.shape[1] for spec in facts.outputs if len(spec.shape) == 3)
    if anchors is not None and anchors in _anchor_counts(facts.image_size, 3):
        return [("yolov5", "rows")]
    if any("detect.cls_preds" in _dotted(name) for name in facts.names):
        return [("yolov6", "rows")]
    if facts.tail is not None and "Sigmoid" in facts.tail and not facts.decoding:
        return [("yolox", "grid_rows")]
    if any("head.cls_preds" in _dotted(name) for name in facts.names):
        return [("yolox", "rows")]
    if facts.tail is not None and "Exp" in facts.tail:
        # YOLOX decodes with it, and so does the first YOLOv6.
        return [("yolov6", "rows"), ("yolox", "rows")]
    return [("yolov6", "rows")]


_PADDLE = "PaddlePaddle"
"""Paddle2ONNX's name for itself in a graph's name, and in early versions as the producer."""


def _is_ultralytics(facts: GraphFacts) -> bool:
    # YOLOv5's own exporter leaves names and stride only.
    return facts.metadata.get("author") == "Ultralytics" or facts.metadata.get(
        "description", ""
    ).startswith("Ultralytics")


def _has_nms_inside(metadata: Mapping[str, str]) -> bool:
    """Return whether Ultralytics' exporter notes that the graph chooses the boxes itself."""
    if metadata.get("end2end") == "True":
        return True
    arguments = literal(metadata.get("args", "{}"))
    return isinstance(arguments, dict) and bool(arguments.get("nms"))


def _dotted(name: str) -> str:
    """Return a name with the dots that some exporters write as slashes."""
    return name.strip("/").replace("/", ".")


# --- shapes -------------------------------------------------------------------------------------


def _possible_layouts(facts: GraphFacts) -> list[OutputLayout]:
    """Return the layouts that the outputs' names and shapes admit."""
    outputs = facts.outputs
    for name, layout in LAYOUTS.items():
        if layout.fits is not None and layout.fits(outputs):
            return [name]
    ranks = sorted(len(spec.shape) for spec in outputs)
    if {spec.name for spec in outputs} == {"boxes", "scores"} and ranks == [3, 3]:
        boxes, scores = sorted(outputs, key=lambda spec: spec.name)
        if not _by_class(boxes, scores):
            return ["split"]
    if ranks == [3, 3]:
        boxes, scores = sorted(outputs, key=lambda spec: spec.shape[2] != 4)
        anchors, last = boxes.shape[1], scores.shape[2]
        if boxes.shape[2] == 4 != last and (None in (anchors, last) or anchors == last):
            return ["split_by_class"]
    if len(outputs) == 4 and all(
        sum(word in spec.name.lower() for spec in outputs) == 1 for word in EFFICIENT_NMS_WORDS
    ):
        return ["efficient_nms"]
    if ranks == [5, 5, 5]:
        return ["grids_yolov5", "grids_yolov7"]
    if ranks == [1, 2]:
        counts, rows = sorted(outputs, key=lambda spec: len(spec.shape))
        if rows.shape[1] in (6, None) and np.issubdtype(counts.dtype, np.integer):
            return ["end2end_ppyoloe"]
    if ranks == [2] and outputs[0].shape[1] == 7:
        return ["end2end" if outputs[0].name == "detections" else "end2end_yolov7"]
    # YOLOv5's older exports also have the three grids.
    if ranks in ([3], [3, 5, 5, 5]):
        return _layouts_of_one(next(spec for spec in outputs if len(spec.shape) == 3), facts)
    return []


def _by_class(boxes: TensorSpec, scores: TensorSpec) -> bool:
    """Return whether scores come as (batch, classes, anchors)."""
    anchors = boxes.shape[1]
    return anchors is not None and scores.shape[2] == anchors != scores.shape[1]


def _layouts_of_one(spec: TensorSpec, facts: GraphFacts) -> list[OutputLayout]:
    """Return the layouts of a single output of rank 3: anchors first, or anchors last."""
    _, first, last = spec.shape
    if first is None and last is None and _is_ultralytics(facts):
        return ["best" if _has_nms_inside(facts.metadata) else "columns"]
    rows: list[OutputLayout] = ["rows", "grid_rows", "corner_rows"]
    known = _anchor_counts(facts.image_size, 1, 3)
    if last == 6 and first not in known:
        # Six columns are also a box, objectness and one class.
        if first is None:
            return ["best"] if _is_ultralytics(facts) else [*rows, "best"]
        return ["best"] if first <= _MOST_FOUND else rows
    found: list[OutputLayout] = []
    first_known, last_known = first in known, last in known
    if first_known == last_known:  # neither, or both: the longer axis is the anchors'
        both = first == last or (first_known and last_known)
        rows_fit = last is not None and (first is None or first >= last)
        columns_fit = first is not None and (last is None or last > first)
    else:
        both, rows_fit, columns_fit = False, first_known, last_known
    if (rows_fit or both) and (last is None or last >= 6):
        found += rows
    elif (rows_fit or both) and last == 5 and _PADDLE in facts.producer:
        found.append("corner_rows")  # of one class
    if (columns_fit or both) and first is not None and first >= 5:
        found.append("columns")
    return found


_NMS_INSIDE = {name for name, layout in LAYOUTS.items() if layout.nms_inside}

_MOST_FOUND = 1000
"""Boxes of an image that a graph with NMS inside gives at most; a head has more anchors."""


def _anchor_counts(size: tuple[int, int] | None, *each: int) -> set[int]:
    """Return how many anchors heads with one of `each` a cell have for an input."""
    if size is None:
        return set()
    cells = [sum((size[0] // one) * (size[1] // one) for one in strides) for strides in STRIDES]
    return {count * number for count in each for number in cells}


def _listed(outputs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{output.name} {list(output.shape)}" for output in outputs)


def _titled(choices: Sequence[_Choice]) -> str:
    names = list(dict.fromkeys(name for name, _ in choices))
    return ", ".join(f"{name} ({FAMILIES[name].title})" for name in names)
