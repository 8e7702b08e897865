"""Shared by the tests: the sample, what is made once a run, and threads."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import importlib
import importlib.util
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import hypothesis
import onnx
import onnxruntime

# It appends its folder to `sys.path`: imported first by a test that restores the path, it would
# lack its own modules in the next.
import onnxruntime.transformers
import pytest
from filelock import FileLock
from numpy.typing import NDArray
from support.accuracy import graph_precision

from trt_yolov6.backends import BACKENDS
from trt_yolov6.data.coco import load_coco
from trt_yolov6.engines.build import BuiltEngine, build_engine
from trt_yolov6.graph.model import Graph

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    """Let hypothesis take its time: a busy machine is not a mistake of the code."""
    hypothesis.settings.register_profile("busy", deadline=None)
    hypothesis.settings.load_profile("busy")


LONG = (
    "ray",
    "ptq",
    "checkpoint",
    "documents",
    "training_on_machines",
    "suppression",
    "triton_server",
    "trainer",
    "qat",
    "export",
    "sample_ap",
    "notebook",
    "equalization",
    "fuzz",
    "models",
    "tensorrt_api",
    "comparison",
    "rep_optimizer",
    "fp8",
    "reconstruction",
    "cli",
    "graph_network",
    "overfit",
    "placement",
    "insert",
    "quantization_search",
    "benchmarking",
    "fallback",
    "trained_checkpoint",
)
"""Files that take longest, the longest first; Ray's mostly waits for processes that start."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first: no worker starts on one while the others have no more."""
    place = {ROOT / "tests" / f"test_{name}.py": index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    """Hide what is imported from the garbage collector, which takes a sixth of the time else.

    A twentieth is what it takes still if it looks after every 700 objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`make_once(name, make)` returns `make(folder)`, called in one worker a run.

    The result is pickled for the others; files that it names stay in the folder.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each worker has a folder of its own, in that of the run

    def once(name: str, make: Callable[[Path], Any]) -> Any:
        place = folder / "made-once" / name
        place.mkdir(parents=True, exist_ok=True)
        result = place / "result.pickle"
        with FileLock(place / "lock"):
            if not result.exists():
                result.write_bytes(pickle.dumps(make(place)))
        return pickle.loads(result.read_bytes())

    return once


@pytest.fixture(scope="session")
def sample_engine(make_once: Callable[..., Any]) -> BuiltEngine:
    """The sample checkpoint as `trt-yolov6 build` makes it: FP32, dynamic batch, 640."""

    def build(folder: Path) -> BuiltEngine:
        from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint

        graph = graph_from_checkpoint(
            ROOT / "samples" / "yolov6n_bccd_authors.pt", ExportSettings()
        )
        return build_engine(graph, backend="onnxruntime", output=folder / "yolov6n.onnx")

    built: BuiltEngine = make_once("sample_engine", build)
    return built


@pytest.fixture(scope="session")
def sample_320(make_once: Callable[..., Any]) -> Graph:
    """The sample for images of 320 x 320: the same layers, for a quarter of the work."""

    def export(_: Path) -> Graph:
        from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint

        checkpoint = ROOT / "samples" / "yolov6n_bccd_authors.pt"
        return graph_from_checkpoint(checkpoint, ExportSettings((320, 320)))

    graph: Graph = make_once("sample_320", export)
    return graph


@pytest.fixture(scope="session")
def sample_320_ap(make_once: Callable[..., Any], sample_320: Graph) -> float:
    """Its AP on all sample images."""

    def evaluate(folder: Path) -> float:
        return graph_precision(sample_320.model, folder, load_coco(ROOT / "samples"))

    ap: float = make_once("sample_320_ap", evaluate)
    return ap


@dataclass(frozen=True)
class Traced:
    """The part of a `torch.onnx.ONNXProgram` that the package uses."""

    content: bytes

    @property
    def model_proto(self) -> onnx.ModelProto:
        """The graph, to be changed at will."""
        model: onnx.ModelProto = onnx.ModelProto.FromString(self.content)
        return model

    def with_weights(self, weights: dict[str, NDArray[Any]]) -> Traced:
        """The graph of the same network with other weights; those that no node reads do not count.

        As after a trace, small tensors that are equal are one, and biases of zeros are left out.
        """
        model = self.model_proto
        first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
        read: dict[str, str] = {}
        stored = list(model.graph.initializer)
        del model.graph.initializer[:]
        biases = {node.input[2] for node in model.graph.node if node.op_type in WITH_BIAS}
        for item in stored:
            if item.name in weights:
                item = onnx.numpy_helper.from_array(weights[item.name], item.name)
            value = onnx.numpy_helper.to_array(item)
            key = item.data_type, value.shape, value.tobytes()
            if item.name in biases and not value.any():
                read[item.name] = ""
            elif value.size <= MERGED and first.setdefault(key, item.name) != item.name:
                read[item.name] = first[key]
            else:
                model.graph.initializer.append(item)
        for node in model.graph.node:
            names = [read.get(name, name) for name in node.input]
            node.input[:] = names if names[-1:] != [""] else names[:-1]
        return Traced(model.SerializeToString())


MERGED = 1024
"""Values, at most, of tensors that PyTorch's exporter merges where they are equal."""
WITH_BIAS = ("Conv", "ConvTranspose")


@pytest.fixture(scope="session", autouse=True)
def traced_once(make_once: Callable[..., Any]) -> Iterator[Callable[..., Any] | None]:
    """Let PyTorch trace a network once a run: it takes seconds, and dozens of tests want the same.

    A network is the same if its modules, architecture, input and options are. Its weights are put
    into the graph of one in which no two are equal. Yields PyTorch's own export.
    """
    if importlib.util.find_spec("torch") is None:
        yield None  # as on a machine that only runs engines
        return
    import torch
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    trace = torch.onnx.export

    def traced(module: torch.nn.Module, args: tuple[torch.Tensor, ...], **options: Any) -> Traced:
        shapes = [(tuple(one.shape), one.dtype) for one in args]
        arch = getattr(getattr(module, "model", None), "arch", None)
        network = hashlib.sha256(repr((module, arch, shapes, options)).encode()).hexdigest()

        def make(_: Path) -> Traced:
            unequal = copy.deepcopy(module)
            generator = torch.Generator().manual_seed(0)
            for value in unequal.state_dict().values():
                value.normal_(generator=generator)
            program = trace(unequal, args, **options)
            assert program is not None
            return Traced(program.model_proto.SerializeToString())

        found: Traced = make_once(f"traced/{network}", make)
        return found.with_weights(
            {name: value.numpy() for name, value in module.state_dict().items()}
        )

    # A third of the time of a trace goes into reading the source of the exporter's 500 operators.
    operators = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", operators)
        patch.setattr(torch.onnx, "export", traced)
        yield trace


@pytest.fixture(scope="session", autouse=True)
def one_thread_a_session() -> Iterator[None]:
    """Let ONNX Runtime compute on one thread: others would spin while they wait for work.

    That takes the core from the other worker, and a third more processor time in all.
    """
    options_of_a_session = onnxruntime.SessionOptions

    def with_one_thread() -> Any:
        options = options_of_a_session()
        options.intra_op_num_threads = 1
        return options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", with_one_thread)
        yield


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def gpu_backend(request: pytest.FixtureRequest) -> ModuleType:
    """Each TensorRT that runs here, as its module."""
    module = importlib.import_module(BACKENDS[request.param].module)
    state = module.availability()
    if not state.can_run:
        pytest.skip(state.detail)
    return module


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread: small networks gain nothing from more where cores are busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
