"""Small detectors of every family: a network that finds coloured cells, with each one's own head.

The input is 64 x 64, so a head with strides 8, 16 and 32 has 84 cells. The network proper looks at
the colour of each cell of 8 x 8 pixels: on a black image with cells painted in pure colours it
finds exactly these, as classes red, green and blue. Each cell has a box of its own, random but
known (`BOXES`). What a family's head predicts for it is computed here by the inverse of the
family's formula; the graph then decodes it, or leaves it raw, as the family's exporter does.

The graph undoes the family's pre-processing first: given another's input it finds other colours,
or finds them elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIZE = 64
STRIDES = (8, 16, 32)
NAMES = ("red", "green", "blue")
MOST = 20
"""Boxes that a graph with NMS inside gives for an image (the exporters' usual number is 300)."""
SURE = 0.98
"""The score of a pure colour; its objectness, where there is one, is the same."""
V5_ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
V7_ANCHORS = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)
CHOSEN = 1
"""The anchor of each cell that finds something, in heads with three."""


def _cells(stride: int) -> NDArray[np.float64]:
    """Return (cells, 2): column and row of each cell, row by row."""
    count = SIZE // stride
    return np.array([(x, y) for y in range(count) for x in range(count)], np.float64)


def _boxes(stride: int) -> NDArray[np.float64]:
    """Return (cells, 4), x1, y1, x2, y2: around each cell's centre, moved and sized at random."""
    rng = np.random.default_rng(stride)
    cells = _cells(stride)
    centre = (cells + 0.5 + rng.uniform(-0.35, 0.35, cells.shape)) * stride
    half = rng.uniform(0.6, 1.0, cells.shape) * stride
    return np.concatenate([centre - half, centre + half], axis=1)


BOXES = {stride: _boxes(stride) for stride in STRIDES}
"""By stride, (cells, 4): x1, y1, x2, y2 in input pixels."""


# --- what each head predicts for these boxes: the inverse of its formula ------------------------


def yolox_offsets(boxes: NDArray[Any], cells: NDArray[Any], stride: float) -> NDArray[np.float64]:
    """Return (n, 4): centre in cells from the cell's corner, logarithms of the sides in cells."""
    centre, sides = _centre_and_sides(boxes)
    return np.concatenate([centre / stride - cells, np.log(sides / stride)], axis=1)


def anchor_logits(
    boxes: NDArray[Any], cells: NDArray[Any], stride: float, anchor: Sequence[float]
) -> NDArray[np.float64]:
    """Return (n, 4): what YOLOv5's sigmoid is applied to."""
    centre, sides = _centre_and_sides(boxes)
    # From centre = (2 s - 0.5 + cell) stride and side = (2 s)^2 anchor.
    place = (centre / stride - cells + 0.5) / 2
    size = np.sqrt(sides / np.array(anchor)) / 2
    return logit(np.concatenate([place, size], axis=1))


def distances(boxes: NDArray[Any], cells: NDArray[Any], stride: float) -> NDArray[np.float64]:
    """Return (n, 4): from the cell's centre to left, top, right, bottom, in cells."""
    centre = (cells + 0.5) * stride
    return np.concatenate([centre - boxes[:, :2], boxes[:, 2:] - centre], axis=1) / stride


def logit(values: Any) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.log(values) - np.log1p(-np.asarray(values))
    return result


def _centre_and_sides(boxes: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]


def _distribution(values: NDArray[Any], bins: int = 16) -> NDArray[np.float64]:
    """Return (n, 4 x bins): logits of a distribution over integers with these means (DFL)."""
    below = np.floor(values)
    weights = np.full((*values.shape, bins), 1e-9)
    rows, columns = np.indices(values.shape)
    weights[rows, columns, below.astype(int)] += 1 - (values - below)
    weights[rows, columns, below.astype(int) + 1] += values - below
    return np.log(weights).reshape(len(values), -1)


# --- pictures of coloured cells -----------------------------------------------------------------

OBJECTS = ((2, 1, 0), (2, 5, 1), (4, 3, 2), (4, 6, 0))
"""Row, column and class of the painted cells of stride 8."""


def object_boxes() -> NDArray[np.float64]:
    """Return (4, 4): the boxes of `OBJECTS` in input pixels."""
    return np.array([BOXES[8][row * 8 + column] for row, column, _ in OBJECTS])


def picture(fit: str = "letterbox") -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return a picture of 96 x 128 pixels that shows `OBJECTS` once it is fitted into the input.

    Returns:
        uint8 (96, 128, 3) RGB, and (4, 4) the objects' boxes in it.
    """
    # By hand: a letterbox halves it and leaves 8 rows above, a corner none; stretching takes 2/3.
    per_row, per_column, above = {
        "letterbox": (2.0, 2.0, 8),
        "corner": (2.0, 2.0, 0),
        "stretch": (1.5, 2.0, 0),
    }[fit]
    image = np.zeros((96, 128, 3), np.uint8)
    for row, column, label in OBJECTS:
        top, bottom = (round((8 * edge - above) * per_row) for edge in (row, row + 1))
        left, right = (round(8 * edge * per_column) for edge in (column, column + 1))
        image[top:bottom, left:right, label] = 255
    boxes = (object_boxes() - [0, above, 0, above]) * [per_column, per_row, per_column, per_row]
    return image, boxes


def write_dataset(folder: Path, fit: str, images: int = 2) -> Path:
    """Write a COCO data set that shows `picture` several times; return its folder."""
    (folder / "images" / "val").mkdir(parents=True)
    (folder / "annotations").mkdir()
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, images + 1):
        image, boxes = picture(fit)
        image[0, 0] = number  # no copy of another: calibration leaves copies out
        name = f"{number}.png"
        cv2.imwrite(str(folder / "images" / "val" / name), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        pictures.append({"id": number, "file_name": name, "width": 128, "height": 96})
        for (_, _, label), box in zip(OBJECTS, boxes, strict=True):
            sides = box[2:] - box[:2]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [*box[:2].tolist(), *sides.tolist()],
                    "area": float(sides.prod()),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(NAMES)]
    (folder / "annotations" / "instances_val.json").write_text(
        json.dumps({"images": pictures, "annotations": annotations, "categories": categories})
    )
    return folder


# --- the graphs ---------------------------------------------------------------------------------


class _Writer:
    """Collects nodes and constants; every method returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def op(self, kind: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        name = to or f"t{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(kind, list(inputs), [name], f"{kind}_{len(self.nodes)}", **attributes)
        )
        return name

    def split(self, source: str, lengths: Sequence[int], axis: int) -> list[str]:
        names = [f"t{len(self.nodes)}_{index}" for index in range(len(lengths))]
        sizes = self.constant(lengths, np.int64)
        self.nodes.append(helper.make_node("Split", [source, sizes], names, axis=axis))
        return names

    def reshape(self, source: str, *shape: int) -> str:
        return self.op("Reshape", source, self.constant(shape, np.int64))

    def conv(self, source: str, weight: NDArray[Any], name: str, stride: int = 1) -> str:
        """A convolution of that name, without a bias."""
        self.constants.append(numpy_helper.from_array(weight.astype(np.float32), f"{name}.weight"))
        self.nodes.append(
            helper.make_node(
                "Conv",
                [source, f"{name}.weight"],
                [f"{name}_out"],
                name,
                kernel_shape=list(weight.shape[2:]),
                strides=[stride, stride],
            )
        )
        return f"{name}_out"

    def same(self, source: str, channels: int, name: str) -> str:
        """A 1 x 1 convolution that changes nothing: where a head has its predictions."""
        return self.conv(source, np.eye(channels)[..., None, None], name)


def _colours(graph: _Writer, source: str, preprocessing: str) -> str:
    """Undo a family's pre-processing: return RGB in 0..1."""
    if preprocessing == "yolox":
        source = graph.op("Gather", source, graph.constant([2, 1, 0], np.int64), axis=1)
        return graph.op("Div", source, graph.constant(255))
    if preprocessing == "imagenet":
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        shape = (1, 3, 1, 1)
        scaled = graph.op("Mul", source, graph.constant(np.reshape(std, shape)))
        return graph.op("Add", scaled, graph.constant(np.reshape(mean, shape)))
    return source


def _levels(
    graph: _Writer, rgb: str, regressions: Sequence[NDArray[Any]], head: str
) -> list[tuple[str, str]]:
    """Return for each stride the predictions (batch, channels, rows, columns): boxes, classes.

    Classes are logits; those of strides 16 and 32 are as low as black's.
    """
    found = []
    for index, (stride, regression) in enumerate(zip(STRIDES, regressions, strict=True)):
        side = SIZE // stride
        mean = np.zeros((3, 3, stride, stride))
        mean[range(3), range(3)] = 1 / stride**2
        seen = graph.conv(rgb, mean, f"backbone.{index}", stride)
        if stride != 8:
            seen = graph.op("Mul", seen, graph.constant(0))
        sure = graph.op("Clip", seen, graph.constant(1e-3), graph.constant(SURE))
        doubt = graph.op("Sub", graph.constant(1), sure)
        logits = graph.op("Sub", graph.op("Log", sure), graph.op("Log", doubt))
        nothing = graph.op(
            "Mul",
            graph.op("ReduceMean", seen, graph.constant([1], np.int64)),
            graph.constant(0),
        )
        channels = regression.shape[1]
        constant = graph.constant(regression.T.reshape(1, channels, side, side))
        boxes = graph.op("Add", nothing, constant)
        found.append(
            (
                graph.same(boxes, channels, f"{head}.reg_preds.{index}"),
                graph.same(logits, 3, f"{head}.cls_preds.{index}"),
            )
        )
    return found


def _each(formula: Any) -> list[NDArray[np.float64]]:
    return [formula(BOXES[stride], _cells(stride), stride) for stride in STRIDES]


def _anchor_points() -> tuple[NDArray[Any], NDArray[Any]]:
    """Return (84, 2) cells and (84, 1) strides of all levels."""
    strides = [np.full((len(_cells(stride)), 1), stride) for stride in STRIDES]
    return np.concatenate([_cells(stride) for stride in STRIDES]), np.concatenate(strides)


def _corner_boxes(graph: _Writer, flat: str) -> str:
    """Decode distances (batch, 84, 4) to corners, as YOLOv6 and PP-YOLOE do."""
    cells, strides = _anchor_points()
    before, after = graph.split(flat, (2, 2), 2)
    points = graph.constant(cells[None] + 0.5)
    corners = graph.op(
        "Concat", graph.op("Sub", points, before), graph.op("Add", points, after), axis=2
    )
    return graph.op("Mul", corners, graph.constant(strides[None]))


def _flat(graph: _Writer, levels: Sequence[str], channels: int) -> str:
    """Return (batch, 84, channels) of all levels."""
    flat = [graph.reshape(level, 0, channels, -1) for level in levels]
    return graph.op("Transpose", graph.op("Concat", *flat, axis=2), perm=[0, 2, 1])


def _to_centres(graph: _Writer, corners: str) -> str:
    first, second = graph.split(corners, (2, 2), 2)
    centre = graph.op("Mul", graph.op("Add", first, second), graph.constant(0.5))
    return graph.op("Concat", centre, graph.op("Sub", second, first), axis=2)


def yolov6(first_release: bool = False) -> onnx.ModelProto:
    """Rows with an objectness of 1; the first release decoded as YOLOX does."""
    if first_release:
        return yolox(decoded=True, head="detect", preprocessing="unit")
    graph = _Writer()
    levels = _levels(graph, _colours(graph, "images", "unit"), _each(distances), "detect")
    boxes = _corner_boxes(graph, _flat(graph, [level[0] for level in levels], 4))
    scores = graph.op("Sigmoid", _flat(graph, [level[1] for level in levels], 3))
    ones = graph.op(
        "Add",
        graph.op("Mul", graph.split(scores, (1, 2), 2)[0], graph.constant(0)),
        graph.constant(1),
    )
    graph.op("Concat", _to_centres(graph, boxes), ones, scores, axis=2, to="outputs")
    return _model(graph, {"outputs": ["batch", 84, 8]})


def yolox(
    decoded: bool = False, head: str = "head", preprocessing: str = "yolox"
) -> onnx.ModelProto:
    """(batch, 84, 8): objectness and scores after a sigmoid, boxes raw unless `decoded`."""
    graph = _Writer()
    rgb = _colours(graph, "images", preprocessing)
    parts = []
    for index, (boxes, classes) in enumerate(_levels(graph, rgb, _each(yolox_offsets), head)):
        sure = graph.constant(np.full((1, 3, 1, 1), logit(SURE) if index == 0 else -12))
        weight = np.zeros((1, 3, 1, 1))
        weight[:] = 1 / 3
        zero = graph.op("Mul", classes, graph.constant(0))
        objectness = graph.conv(graph.op("Add", zero, sure), weight, f"{head}.obj_preds.{index}")
        gates = [graph.op("Sigmoid", objectness), graph.op("Sigmoid", classes)]
        parts.append(graph.op("Concat", boxes, *gates, axis=1))
    rows = _flat(graph, parts, 8)
    if not decoded:
        graph.op("Identity", rows, to="output")
        return _model(graph, {"output": ["batch", 84, 8]})
    cells, strides = _anchor_points()
    place, logs, rest = graph.split(rows, (2, 2, 4), 2)
    stride = graph.constant(strides[None])
    centre = graph.op("Mul", graph.op("Add", place, graph.constant(cells[None])), stride)
    sides = graph.op("Mul", graph.op("Exp", logs), stride)
    graph.op("Concat", centre, sides, rest, axis=2, to="output")
    return _model(graph, {"output": ["batch", 84, 8]})


def yolov5(grids: bool = False, anchors: Any = V5_ANCHORS) -> onnx.ModelProto:
    """(batch, 252, 8) decoded, or the three (batch, 3, rows, columns, 8) before the sigmoid."""
    graph = _Writer()
    rgb = _colours(graph, "images", "unit")
    regressions = [
        anchor_logits(BOXES[stride], _cells(stride), stride, anchors[index][CHOSEN])
        for index, stride in enumerate(STRIDES)
    ]
    rows, raw = [], []
    for index, (boxes, classes) in enumerate(_levels(graph, rgb, regressions, "model.24")):
        side = SIZE // STRIDES[index]
        three = []
        for anchor in range(3):
            sure = logit(SURE) if anchor == CHOSEN and index == 0 else -12
            zero = graph.op("Mul", graph.split(classes, (1, 2), 1)[0], graph.constant(0))
            objectness = graph.op("Add", zero, graph.constant(sure))
            three.append(graph.op("Concat", boxes, objectness, classes, axis=1))
        joined = graph.op("Concat", *three, axis=1)
        joined = graph.same(joined, 24, f"model.24.m.{index}")
        shaped = graph.reshape(joined, 0, 3, 8, side, side)
        level = graph.op(
            "Transpose",
            shaped,
            perm=[0, 1, 3, 4, 2],
            **({"to": f"output{index}"} if grids else {}),
        )
        raw.append(f"output{index}")
        if grids:
            continue
        place, size, rest = graph.split(graph.op("Sigmoid", level), (2, 2, 4), 4)
        cells = _cells(STRIDES[index]).reshape(1, 1, side, side, 2)
        doubled = graph.op("Mul", place, graph.constant(2))
        centre = graph.op("Add", doubled, graph.constant(cells - 0.5))
        centre = graph.op("Mul", centre, graph.constant(STRIDES[index]))
        doubled = graph.op("Mul", size, graph.constant(2))
        squared = graph.op("Pow", doubled, graph.constant(2))
        sides = graph.op(
            "Mul", squared, graph.constant(np.reshape(anchors[index], (1, 3, 1, 1, 2)))
        )
        whole = graph.op("Concat", centre, sides, rest, axis=4)
        rows.append(graph.reshape(whole, 0, -1, 8))
    if grids:
        cells_a_side = [SIZE // stride for stride in STRIDES]
        shapes = {
            name: ["batch", 3, side, side, 8] for name, side in zip(raw, cells_a_side, strict=True)
        }
        return _model(graph, shapes)
    graph.op("Concat", *rows, axis=1, to="output0")
    return _model(graph, {"output0": ["batch", 252, 8]})


def yolov7_end2end() -> onnx.ModelProto:
    """(n, 7): batch index, x1, y1, x2, y2, class, score, of ONNX's own NonMaxSuppression."""
    model = yolov5(anchors=V7_ANCHORS)
    graph = _continued(model)
    boxes, sure, classes = graph.split("output0", (4, 1, 3), 2)
    scores = graph.op("Mul", classes, sure)
    to_corners = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]])
    corners = graph.op("MatMul", boxes, graph.constant(to_corners))
    best = graph.op("ReduceMax", scores, graph.constant([2], np.int64))
    label = graph.op("Cast", graph.op("ArgMax", scores, axis=2), to_type=TensorProto.FLOAT)
    # Boxes of different classes are moved apart, so that one suppression serves all.
    moved = graph.op("Add", corners, graph.op("Mul", label, graph.constant(SIZE)))
    kept = _nms(graph, moved, graph.op("Transpose", best, perm=[0, 2, 1]))
    image, _, anchor = graph.split(kept, (1, 1, 1), 1)
    place = graph.op("Concat", image, anchor, axis=1)
    parts = [graph.op("GatherND", values, place) for values in (corners, label, best)]
    number = graph.op("Cast", image, to_type=TensorProto.FLOAT)
    graph.op("Concat", number, *parts, axis=1, to="output")
    return _model(graph, {"output": ["n", 7]})


def efficient_nms() -> onnx.ModelProto:
    """num_dets, det_boxes, det_scores, det_classes, in operators that ONNX Runtime has."""
    model = yolov5(anchors=V7_ANCHORS)
    graph = _continued(model)
    boxes, sure, classes = graph.split("output0", (4, 1, 3), 2)
    centre, sides = graph.split(boxes, (2, 2), 2)
    half = graph.op("Mul", sides, graph.constant(0.5))
    corners = graph.op(
        "Concat", graph.op("Sub", centre, half), graph.op("Add", centre, half), axis=2
    )
    values, labels, chosen = _best(graph, corners, graph.op("Mul", classes, sure))
    graph.op("Identity", values, to="det_scores")
    graph.op("Identity", chosen, to="det_boxes")
    graph.op("Cast", labels, to="det_classes", to_type=TensorProto.INT32)
    enough = graph.op("Greater", values, graph.constant(0.25))
    count = graph.op("Cast", enough, to_type=TensorProto.INT32)
    graph.op("ReduceSum", count, graph.constant([1], np.int64), to="num_dets")
    return _model(
        graph,
        {
            "num_dets": ["batch", 1],
            "det_boxes": ["batch", MOST, 4],
            "det_scores": ["batch", MOST],
            "det_classes": ["batch", MOST],
        },
    )


def ppyoloe(form: str = "exclude_nms", plus: bool = False) -> onnx.ModelProto:
    """PaddleDetection's three exports, with the inputs and names of Paddle2ONNX.

    `exclude_nms`: (batch, 84, 4) and (batch, 3, 84); `exclude_post_process`: (batch, 84, 7);
    `nms`: (n, 6) and (batch,). All but the second divide by the input `scale_factor`.
    """
    graph = _Writer()
    rgb = _colours(graph, "image", "unit" if plus else "imagenet")
    levels = _levels(graph, rgb, _each(distances), "conv2d")
    boxes = _corner_boxes(graph, _flat(graph, [level[0] for level in levels], 4))
    flat = [graph.reshape(level[1], 0, 3, -1) for level in levels]
    scores = graph.op("Sigmoid", graph.op("Concat", *flat, axis=2))
    if form == "exclude_post_process":
        turned = graph.op("Transpose", scores, perm=[0, 2, 1])
        graph.op("Concat", boxes, turned, axis=2, to="concat_14.tmp_0")
        return _model(graph, {"concat_14.tmp_0": ["batch", 84, 7]}, "image", "")
    vertical, horizontal = graph.split("scale_factor", (1, 1), 1)
    factor = graph.op("Concat", horizontal, vertical, horizontal, vertical, axis=1)
    boxes = graph.op("Div", boxes, graph.reshape(factor, -1, 1, 4))
    if form == "exclude_nms":
        graph.op("Identity", boxes, to="divide_0.tmp_0")
        graph.op("Identity", scores, to="concat_13.tmp_0")
        outputs: dict[str, list[Any]] = {
            "divide_0.tmp_0": ["batch", 84, 4],
            "concat_13.tmp_0": ["batch", 3, 84],
        }
        return _model(graph, outputs, "image", "", scale_factor=True)
    kept = _nms(graph, boxes, scores)
    image, label, anchor = graph.split(kept, (1, 1, 1), 1)
    value = graph.op("GatherND", scores, kept)
    box = graph.op("GatherND", boxes, graph.op("Concat", image, anchor, axis=1))
    number = graph.op("Cast", label, to_type=TensorProto.FLOAT)
    column = graph.op("Unsqueeze", value, graph.constant([1], np.int64))
    graph.op("Concat", number, column, box, axis=1, to="multiclass_nms3_0.tmp_0")
    length = graph.op("Shape", kept, start=0, end=1)
    graph.op("Cast", length, to="multiclass_nms3_0.tmp_2", to_type=TensorProto.INT32)
    outputs = {"multiclass_nms3_0.tmp_0": ["n", 6], "multiclass_nms3_0.tmp_2": [1]}
    return _model(graph, outputs, "image", "", scale_factor=True, batch=1)


def yolov8(form: str = "columns", metadata: bool = True) -> onnx.ModelProto:
    """(batch, 7, 84) with distributions over distances (DFL), or the best (batch, 20, 6)."""
    graph = _Writer()
    regressions = [_distribution(item) for item in _each(distances)]
    levels = _levels(graph, _colours(graph, "images", "unit"), regressions, "model.22")
    flat = [graph.reshape(level[0], 0, 64, -1) for level in levels]
    bins = graph.reshape(graph.op("Concat", *flat, axis=2), 0, 4, 16, 84)
    shares = graph.op("Softmax", graph.op("Transpose", bins, perm=[0, 2, 1, 3]), axis=1)
    numbers = np.arange(16.0).reshape(1, 16, 1, 1)
    flat_distances = graph.reshape(graph.conv(shares, numbers, "model.22.dfl.conv"), 0, 4, 84)
    before, after = graph.split(flat_distances, (2, 2), 1)
    cells, strides = _anchor_points()
    points = graph.constant(cells.T[None] + 0.5)
    first, second = graph.op("Sub", points, before), graph.op("Add", points, after)
    flat = [graph.reshape(level[1], 0, 3, -1) for level in levels]
    scores = graph.op("Sigmoid", graph.op("Concat", *flat, axis=2))
    stride = graph.constant(strides.T[None])
    notes = _ultralytics_metadata() if metadata else {}
    if form == "columns":
        centre = graph.op("Div", graph.op("Add", first, second), graph.constant(2))
        sides = graph.op("Sub", second, first)
        boxes = graph.op("Mul", graph.op("Concat", centre, sides, axis=1), stride)
        graph.op("Concat", boxes, scores, axis=1, to="output0")
        return _model(graph, {"output0": ["batch", 7, 84]}, metadata=notes)
    boxes = graph.op("Mul", graph.op("Concat", first, second, axis=1), stride)
    corners = graph.op("Transpose", boxes, perm=[0, 2, 1])
    values, labels, chosen = _best(graph, corners, graph.op("Transpose", scores, perm=[0, 2, 1]))
    axis = graph.constant([2], np.int64)
    parts = [graph.op("Unsqueeze", values, axis)]
    parts.append(graph.op("Unsqueeze", graph.op("Cast", labels, to_type=TensorProto.FLOAT), axis))
    graph.op("Concat", chosen, *parts, axis=2, to="output0")
    return _model(graph, {"output0": ["batch", MOST, 6]}, metadata=notes)


def _ultralytics_metadata() -> dict[str, str]:
    return {
        "description": "Ultralytics YOLO model",
        "author": "Ultralytics",
        "task": "detect",
        "stride": "32",
        "imgsz": f"[{SIZE}, {SIZE}]",
        "names": str(dict(enumerate(NAMES))),
    }


def _nms(graph: _Writer, boxes: str, scores: str) -> str:
    """Return (n, 3): image, class, anchor."""
    limits = [graph.constant([MOST], np.int64), graph.constant([0.65]), graph.constant([0.25])]
    return graph.op("NonMaxSuppression", boxes, scores, *limits)


def _best(graph: _Writer, corners: str, scores: str) -> tuple[str, str, str]:
    """Return the best pairs of anchor and class: (b, n) scores, (b, n) classes, (b, n, 4) boxes."""
    values, places = (f"t{len(graph.nodes)}_{name}" for name in ("values", "places"))
    flat = graph.reshape(scores, 0, -1)
    count = graph.constant([MOST], np.int64)
    graph.nodes.append(helper.make_node("TopK", [flat, count], [values, places], axis=1))
    three = graph.constant(3, np.int64)
    labels = graph.op("Mod", places, three)
    anchors = graph.op("Div", places, three)
    index = graph.op("Unsqueeze", anchors, graph.constant([2], np.int64))
    wide = graph.op("Expand", index, graph.constant([1, 1, 4], np.int64))
    return values, labels, graph.op("GatherElements", corners, wide, axis=1)


def _continued(model: onnx.ModelProto) -> _Writer:
    graph = _Writer()
    graph.nodes = list(model.graph.node)
    graph.constants = list(model.graph.initializer)
    return graph


def _model(
    graph: _Writer,
    outputs: dict[str, list[Any]],
    source: str = "images",
    producer: str = "pytorch",
    scale_factor: bool = False,
    batch: int | str = "batch",
    metadata: dict[str, str] | None = None,
) -> onnx.ModelProto:
    for node in graph.nodes:  # `to` is a name of ours for the output
        for attribute in node.attribute:
            if attribute.name == "to_type":
                attribute.name = "to"
    inputs = [helper.make_tensor_value_info(source, TensorProto.FLOAT, [batch, 3, SIZE, SIZE])]
    if scale_factor:
        shape = [batch, 2]
        inputs.append(helper.make_tensor_value_info("scale_factor", TensorProto.FLOAT, shape))
    integers = ("num_dets", "det_classes", "multiclass_nms3_0.tmp_2")
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "PaddlePaddle Graph 0" if producer == "" else "detector",
            inputs,
            [
                helper.make_tensor_value_info(
                    name, TensorProto.INT32 if name in integers else TensorProto.FLOAT, shape
                )
                for name, shape in outputs.items()
            ],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
        producer_name=producer,
    )
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    return model
