"""The graphs that the GPU suite compares: ours, one decoded as the authors do, the bare heads.

All have random weights (seed 0), 80 classes, half precision inside and float32 at
both ends, so that they differ in nothing but what is compared.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import onnx
import onnx.utils
import torch

from benchmarks.authors_graph import authors_graph
from benchmarks.fp8_variants import random_graph
from trt_yolov6.detectors.spec import DetectorSpec
from trt_yolov6.graph.export import ExportSettings, export_onnx
from trt_yolov6.graph.float16 import to_fp16
from trt_yolov6.graph.index import shapes_of
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.operators import CONVOLUTIONS
from trt_yolov6.models import YOLOv6, architecture
from trt_yolov6.spec import BatchProfile

CLASSES = 80


def random_model(variant: str, classes: int = CLASSES) -> YOLOv6:
    """Return a variant with random weights, always the same ones."""
    torch.manual_seed(0)
    return YOLOv6(architecture(variant, classes)).eval()


def our_graph(
    model: YOLOv6, size: int, *, uint8: bool = False, outputs_only: bool = False
) -> onnx.ModelProto:
    """Export a model as `trt-yolov6 export --fp16` does, with a free batch axis.

    Args:
        model: see `random_model`.
        size: height and width of the input.
        uint8: pixels as input, normalized in the graph.
        outputs_only: stop at the six outputs of the heads: no decoding at all.
    """
    settings = ExportSettings((size, size), fp16=not outputs_only, uint8_input=uint8)
    graph = export_onnx(model, settings, verify=False)
    return to_fp16(_heads_of(graph)) if outputs_only else graph


def authors_half(model: YOLOv6, size: int, batch: int) -> onnx.ModelProto:
    """Return the graph decoded as the authors' export is, in half precision, for one batch size."""
    graph = authors_graph(model, (size, size), batch)
    for index, node in enumerate(graph.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return to_fp16(graph)


@dataclass(frozen=True)
class Job:
    """A graph to be made; `kind` is one of `KINDS`."""

    kind: str
    variant: str
    size: int
    batch: int
    """For the authors' decoding and for FP8, whose graphs have a fixed batch; else 0."""


KINDS: dict[str, Callable[[Job], bytes]] = {
    "ours": lambda job: our_graph(random_model(job.variant), job.size).SerializeToString(),
    "ours, uint8 input": lambda job: our_graph(
        random_model(job.variant), job.size, uint8=True
    ).SerializeToString(),
    "heads only": lambda job: our_graph(
        random_model(job.variant), job.size, outputs_only=True
    ).SerializeToString(),
    "authors": lambda job: authors_half(
        random_model(job.variant), job.size, job.batch
    ).SerializeToString(),
    "to quantize": lambda job: pickle.dumps(random_graph(job.variant, job.size, job.batch)),
}


def make(job: Job) -> bytes:
    """Make one graph; for a process of its own."""
    torch.set_num_threads(2)
    return KINDS[job.kind](job)


def make_all(jobs: Sequence[Job]) -> dict[Job, bytes]:
    """Make graphs side by side: tracing keeps one core busy for seconds."""
    workers = max(1, min(len(jobs), (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(make, jobs), strict=True))


def with_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return a copy of one of our graphs whose free batch axis is fixed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return copy


def as_graph(model: onnx.ModelProto, name: str, size: int, batch: int) -> Graph:
    """Wrap an ONNX model with a fixed batch for `build_engine`, whatever its outputs are."""
    return Graph(
        model=model,
        name=name,
        detector=DetectorSpec(
            tuple(f"class_{index}" for index in range(CLASSES)),
            (size, size),
            "rows" if len(model.graph.output) == 1 else "split",
        ),
        batch=BatchProfile(batch, batch, batch),
        precision="fp16",
        source=Path(__file__),
    )


def bytes_moved(model: onnx.ModelProto, batch: int, element: int) -> int:
    """Return the bytes that an engine's kernels move at least, through whatever memory.

    Every convolution and pooling reads its input and its weights and writes its output once;
    activations are fused, concatenations cost nothing, decoding is not counted.

    Args:
        model: a float graph with a fixed image size.
        batch: images.
        element: bytes an element: 2 in half precision, 1 in 8 bits.
    """
    sized = onnx.shape_inference.infer_shapes(with_batch(model, batch), data_prop=True)
    shapes = shapes_of(sized)
    return element * sum(
        math.prod(length or 1 for length in shapes[name])
        for node in model.graph.node
        if node.op_type in (*CONVOLUTIONS, "MaxPool")
        for name in (*node.input[:2], node.output[0])
    )


def _heads_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """Cut a float32 graph off after its heads."""
    first = [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Conv" and node.name.endswith("_pred")
    ]
    extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model))
    return extractor.extract_model(["images"], first)
