"""AP of graphs and engines on a part of the samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx

from trt_yolov6.data.coco import CocoDataset
from trt_yolov6.engines import load_engine
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.spec import PredictOptions


def first_images(dataset: CocoDataset, count: int) -> CocoDataset:
    """The first images of a data set and their objects."""
    images = dataset.images[:count]
    ids = {image.id for image in images}
    kept = [entry for entry in dataset.annotations if entry["image_id"] in ids]
    numbered = tuple({**entry, "id": number} for number, entry in enumerate(kept, start=1))
    return dataclasses.replace(dataset, images=images, annotations=numbered)


def average_precision(engine: Path, dataset: CocoDataset, batch: int = 8) -> float:
    """AP (0.50:0.95) of an engine or ONNX file, Q/DQ pairs computed in float."""
    with load_engine(engine) as loaded:
        ap = evaluate(loaded, dataset, PredictOptions(batch=batch), progress=False).ap
    assert ap is not None
    return ap


def graph_precision(model: onnx.ModelProto, folder: Path, dataset: CocoDataset) -> float:
    """The same of a graph, which is written to a folder for it."""
    path = folder / "graph.onnx"
    onnx.save(model, path)
    return average_precision(path, dataset)
