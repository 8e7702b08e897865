"""A detector small enough to know the right answer of: it finds coloured cells of 8 x 8 pixels.

Its input is 64 x 64. Each of the 64 cells is an anchor whose box is the cell; its scores for the
three classes are the mean of its red, green and blue pixels. On black images with cells painted in
pure colours it is a perfect detector.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from trt_yolov6.common.files import sha256_file
from trt_yolov6.data.coco import CocoDataset, load_coco
from trt_yolov6.detectors.spec import DetectorSpec
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.base import Engine
from trt_yolov6.engines.manifest import Manifest, write_manifest
from trt_yolov6.spec import BatchProfile, NmsSettings, OutputLayout, PredictOptions

SIZE, CELL = 64, 8
GRID = SIZE // CELL
NAMES = ("red", "green", "blue")
# Between the tiny detector's scores of gray, 114 / 255, and of the colours drawn here.
SURE = PredictOptions(confidence=0.6)


def cell_boxes() -> NDArray[np.float32]:
    """Return float32 (64, 4): the cells' x1, y1, x2, y2, row by row."""
    rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
    corners = np.stack([columns, rows, columns + 1, rows + 1], axis=1) * CELL
    return corners.astype(np.float32)


def load_tiny(
    folder: Path,
    layout: OutputLayout = "split",
    batch: int | None = None,
    uint8: bool = False,
    nms: NmsSettings | None = None,
) -> Engine:
    """Write the detector, with a manifest for `end2end`, and load it as any engine.

    `end2end` finds one box in each image of its batch, of class 1: a cell near the middle.
    """
    path = folder / f"tiny_{layout}_{batch}_{uint8}.onnx"
    onnx.save(_graph(layout, batch, uint8), path)
    if layout == "end2end":
        write_manifest(
            path,
            Manifest(
                engine=path.name,
                model="tiny",
                detector=DetectorSpec(NAMES, (SIZE, SIZE), layout, nms=nms),
                batch=BatchProfile(batch or 1, batch or 1, batch or 1),
                precision="fp32",
                backend="onnxruntime",
                backend_version="",
                target="cpu",
                plan_sha256=sha256_file(path),
                source="tiny",
                source_sha256="",
            ),
        )
    return load_engine(path)


def load_named(folder: Path) -> Engine:
    """Load the detector with its class names, which `load_tiny` leaves out."""
    engine = load_tiny(folder)
    engine.detector = dataclasses.replace(engine.detector, class_names=NAMES)
    return engine


def _graph(layout: OutputLayout, batch: int | None, uint8: bool) -> onnx.ModelProto:
    free = batch or "batch"
    nodes, constants = [], []

    def constant(name: str, value: NDArray[np.generic]) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    image = "images"
    if uint8:
        nodes += [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Div", ["planes", constant("full", np.float32(255))], ["unit"]),
        ]
        image = "unit"
    nodes += [
        helper.make_node(
            "AveragePool", [image], ["pooled"], kernel_shape=[CELL, CELL], strides=[CELL, CELL]
        ),
        helper.make_node("Reshape", ["pooled", constant("flat", np.array([0, 3, -1]))], ["cells"]),
        # Zero, (batch, 1, cells): added to constants, it gives them the batch's length.
        helper.make_node("ReduceMax", ["cells"], ["brightest"], axes=[1]),
        helper.make_node("Mul", ["brightest", constant("zero", np.float32(0))], ["nothing"]),
    ]
    boxes = cell_boxes()
    outputs: list[tuple[str, list[int | str]]]
    if layout == "split":
        nodes += [
            helper.make_node("Transpose", ["cells"], ["scores"], perm=[0, 2, 1]),
            helper.make_node("Transpose", ["nothing"], ["column"], perm=[0, 2, 1]),
            helper.make_node("Add", ["column", constant("grid", boxes[None])], ["boxes"]),
        ]
        outputs = [("boxes", [free, 64, 4]), ("scores", [free, 64, 3])]
    elif layout == "rows":
        centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        # Objectness 0.5, so that a score is objectness times class.
        constant_part = np.concatenate([centre, side, np.full((64, 1), 0.5)], axis=1)
        nodes += [
            helper.make_node(
                "Add",
                ["nothing", constant("grid", constant_part.T[None].astype(np.float32))],
                ["boxes"],
            ),
            helper.make_node("Concat", ["boxes", "cells"], ["columns"], axis=1),
            helper.make_node("Transpose", ["columns"], ["rows"], perm=[0, 2, 1]),
        ]
        outputs = [("rows", [free, 64, 8])]
    else:
        found = [[index, 24, 24, 32, 32, 0.5, 1] for index in range(batch or 1)]
        nodes += [
            helper.make_node("ReduceMax", ["nothing"], ["least"], keepdims=0),
            helper.make_node(
                "Add", ["least", constant("found", np.array(found, np.float32))], ["detections"]
            ),
        ]
        outputs = [("detections", [len(found), 7])]
    shape = [free, SIZE, SIZE, 3] if uint8 else [free, 3, SIZE, SIZE]
    kind = TensorProto.UINT8 if uint8 else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in outputs],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def write_cells(root: Path, images: int = 11, spoil: float = 0.0) -> CocoDataset:
    """Write black pictures with coloured cells, of several sizes, and annotate the cells.

    `spoil` is the share of annotations that are moved so far that nothing matches them well.
    """
    random = np.random.default_rng(0)
    folder = root / "images" / "val"
    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number in range(images):
        factor = (1, 2, 5)[number % 3]
        rows = (GRID, GRID // 2)[number % 2]
        pixels = np.zeros((rows * CELL, SIZE, 3), np.uint8)
        for cell in random.choice(rows * GRID, 5, replace=False):
            label = int(random.integers(3))
            strength = random.integers(160, 256)
            y, x = divmod(int(cell), GRID)
            pixels[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL, label] = strength
            shift = CELL * (random.random() < spoil) / 4
            side = CELL * factor
            boxes.append(
                {
                    "id": len(boxes),
                    "image_id": 100 + number,
                    "category_id": (label + 1) * 10,
                    "bbox": [x * side + shift * factor, y * side, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
        name = f"{number}.png"
        Image.fromarray(large).save(folder / name)
        height, width = large.shape[:2]
        records.append({"id": 100 + number, "file_name": name, "height": height, "width": width})
    content = {
        "images": records,
        "annotations": boxes,
        "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(NAMES)],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return load_coco(root)
