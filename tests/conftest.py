"""Shared by the tests: where the sample lies, and an engine built from it once a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trt_yolov6.engines.build import BuiltEngine, build_engine
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def sample_engine(tmp_path_factory: pytest.TempPathFactory) -> BuiltEngine:
    """The sample checkpoint as `trt-yolov6 build` makes it: FP32, dynamic batch, 640."""
    graph = graph_from_checkpoint(ROOT / "samples" / "yolov6n_bccd_authors.pt", ExportSettings())
    output = tmp_path_factory.mktemp("engines") / "yolov6n.onnx"
    return build_engine(graph, backend="onnxruntime", output=output)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread: small networks gain nothing from more where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
