"""INT8 by several tools, side by side: the same float graph, the same images, exact arithmetic.

    python -m benchmarks.int8_tools --model sample --json benchmarks/results/int8-sample.json
    python -m benchmarks.int8_tools --model lite --json benchmarks/results/int8-lite.json

Compares this package's quantization, as it comes and step by step, with ONNX Runtime's
`quantize_static` and NVIDIA ModelOpt's ONNX PTQ. ModelOpt wants other versions of packages than
this one, so it lives in an environment of its own, whose Python `--modelopt` names:

    python -m venv ../modelopt-venv && ../modelopt-venv/bin/pip install 'nvidia-modelopt[onnx]'

Everything is judged by ONNX Runtime on the CPU with Q/DQ pairs computed exactly, which is what
TensorRT's 32-bit accumulation gives; ONNX Runtime's own INT8 kernels would give other figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from trt_yolov6.common.files import read_json, write_json
from trt_yolov6.common.machine import cpu_model
from trt_yolov6.data.calibration import (
    calibration_batches,
    calibration_images,
    images_sha256,
)
from trt_yolov6.data.coco import CocoDataset, load_coco
from trt_yolov6.diagnostics.inspection import inspect_file
from trt_yolov6.engines import load_engine
from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import at_opset
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.graph.inputs import input_spec
from trt_yolov6.graph.inspect import OnnxDetails
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.graph.operators import CONVOLUTIONS
from trt_yolov6.quantization.calibrators import METHODS, Method, group_amax
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.equalization.solve import equalize, tensors_to_measure
from trt_yolov6.quantization.judge import Judge
from trt_yolov6.quantization.pipeline import quantize
from trt_yolov6.quantization.qdq.insert import insert_qdq
from trt_yolov6.quantization.qdq.placement import Placement, place
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.statistics import TensorStatistics
from trt_yolov6.quantization.table import VARIANTS, Variant, model_sha256
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.spec import PredictOptions

SHARED = Path("../shared")

AGREEMENT_IMAGES = 32
"""Images of the first split that the agreement with the float graph is taken on."""

# What can stand between a pair and the layer that reads it: values are moved or selected, so that
# the layer still reads what was quantized.


@dataclass(frozen=True)
class Task:
    """A float detector, what it is calibrated on, and what it is judged on."""

    graph: Graph
    images: tuple[Path, ...]
    """Calibration images."""
    folder: Path
    """Where those are."""
    datasets: Mapping[str, CocoDataset]
    """Splits to judge on, by name; the agreement with the float graph is of the first."""


@dataclass(frozen=True)
class Contender:
    """One way to quantize."""

    name: str
    tool: str
    make: Callable[[Path], str]
    """Writes the quantized graph to a path and returns what there is to know about how."""


def main() -> None:
    """Quantize by every tool, judge, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("sample", "lite"), required=True)
    parser.add_argument(
        "--tools", default="ours,fallback,onnxruntime,modelopt", help="which to run"
    )
    parser.add_argument("--splits", help="of the data set to judge on, with commas; default: both")
    parser.add_argument("--judge", type=int, help="images judged on in each split; default: all")
    parser.add_argument("--modelopt", type=Path, default=Path("../modelopt-venv/bin/python"))
    parser.add_argument("--json", type=Path, help="results; rows of other tools in it are kept")
    options = parser.parse_args()
    task = _task(options.model, options.splits, options.judge)
    heading = {
        "model": options.model,
        "model_sha256": model_sha256(task.graph.model),
        "calibration_images": len(task.images),
        "calibration_sha256": images_sha256(task.images),
        "judged_on": {name: len(data.images) for name, data in task.datasets.items()},
    }
    tools = options.tools.split(",")
    rows = _rows_of_other_tools(options.json, heading, tools)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        first = next(iter(task.datasets.values()))
        judge = Judge(task.graph, [image.path for image in first.images[:AGREEMENT_IMAGES]])
        for contender in contenders(task, work, options.modelopt, tools):
            if contender.tool not in tools:
                continue
            path = work / "quantized.onnx"
            note = contender.make(path)
            row = {
                "name": contender.name,
                "tool": contender.tool,
                "note": note,
                **_figures(path, task.datasets),
                "agreement": judge.agreement(onnx.load(path)),
            }
            rows.append(row)
            print(format_row(row), flush=True)
            if options.json:
                write_json(
                    options.json,
                    {
                        **heading,
                        "command": " ".join(["python -m benchmarks.int8_tools", *sys.argv[1:]]),
                        "versions": _versions(options.modelopt),
                        "cpu": cpu_model(),
                        "rows": rows,
                    },
                )
    print(markdown(rows))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    splits = list(rows[0]["AP"])
    head = [
        "",
        *(f"AP {split}" for split in splits),
        f"AP50 {splits[0]}",
        "agreement",
        "INT8 convolutions",
        "multiply-adds",
        "nodes",
        "Q + DQ",
        "MB",
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    return "\n".join(lines + [format_row(row) for row in rows])


def format_row(row: Mapping[str, Any]) -> str:
    """Return one line of the table."""
    cells = [
        row["name"],
        *(f"{value:.4f}" for value in row["AP"].values()),
        f"{next(iter(row['AP50'].values())):.3f}",
        "" if row["agreement"] is None else f"{row['agreement']:.3f}",
        f"{row['int8_convolutions']} of {row['convolutions']}",
        f"{row['int8_share']:.1%}",
        str(row["nodes"]),
        f"{row['quantize_nodes']} + {row['dequantize_nodes']}",
        f"{row['bytes'] / 1e6:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


# --- what is quantized and judged ---------------------------------------------------------------


def _task(model: str, splits: str | None, limit: int | None) -> Task:
    if model == "sample":
        graph = graph_from_checkpoint(Path("samples/yolov6n_bccd_authors.pt"), ExportSettings())
        folder = Path("calib")
        images = calibration_images(folder)
        datasets = {"val": load_coco("samples", "val")}
        if (SHARED / "data" / "bccd").is_dir():
            datasets["train"] = load_coco(SHARED / "data" / "bccd", "train")
    else:
        graph = graph_from_onnx(SHARED / "models" / "yolov6lite_l_320.onnx")
        data = SHARED / "data" / "coco256"
        folder = data / "images" / "train2017"
        images = calibration_images(folder, 64)
        datasets = {split: load_coco(data, split) for split in ("val2017", "train2017")}
    return Task(
        graph,
        tuple(images),
        folder,
        {
            name: _shortened(dataset, limit)
            for name, dataset in datasets.items()
            if splits is None or name in splits.split(",")
        },
    )


def _shortened(dataset: CocoDataset, limit: int | None) -> CocoDataset:
    images = dataset.images[:limit]
    ids = {image.id for image in images}
    kept = tuple(item for item in dataset.annotations if item["image_id"] in ids)
    return dataclasses.replace(dataset, images=images, annotations=kept)


def _figures(path: Path, datasets: Mapping[str, CocoDataset]) -> dict[str, Any]:
    """Judge a graph: its accuracy, its nodes, and what of it runs in INT8."""
    with load_engine(path) as engine:
        results = {
            name: evaluate(engine, dataset, PredictOptions(batch=4), progress=False)
            for name, dataset in datasets.items()
        }
    details = inspect_file(path).details
    assert isinstance(details, OnnxDetails)
    layers = [layer for layer in details.layers if layer.operator in CONVOLUTIONS]
    integer = [layer for layer in layers if layer.precision == "int8"]
    return {
        "AP": {name: result.ap for name, result in results.items()},
        "AP50": {name: result.ap50 for name, result in results.items()},
        "nodes": sum(details.operators.values()),
        "quantize_nodes": details.quantize_nodes,
        "dequantize_nodes": details.dequantize_nodes,
        "convolutions": len(layers),
        "int8_convolutions": len(integer),
        "int8_share": sum(layer.flops or 0 for layer in integer)
        / sum(layer.flops or 0 for layer in layers),
        "bytes": path.stat().st_size,
    }


# --- who quantizes ------------------------------------------------------------------------------


def contenders(task: Task, work: Path, modelopt: Path, tools: Sequence[str]) -> Iterator[Contender]:
    """Yield who quantizes: of this package what `tools` names, and all others.

    Args:
        task: what is quantized.
        work: a folder for intermediate files.
        modelopt: the Python that has ModelOpt.
        tools: `ours` and `fallback`, or neither.
    """

    def as_it_is(path: Path) -> str:
        onnx.save(task.graph.model, path)
        return "the float graph"

    if "ours" in tools:
        yield Contender("FP32", "ours", as_it_is)
        yield Contender("ours, as it comes", "ours", lambda path: _own(task, path, False))
        yield from _own_steps(task)
    if "fallback" in tools:
        yield Contender("ours, float layers auto", "fallback", lambda path: _own(task, path, True))
    float_graph, arrays = work / "float.onnx", work / "images.npz"
    # Scales for each channel are not known before.
    onnx.save(at_opset(task.graph.model, 17), float_graph)
    minmax, entropy = CalibrationMethod.MinMax, CalibrationMethod.Entropy
    for method, where in (
        (minmax, "every operator"),
        (minmax, "convolutions"),
        (minmax, "convolutions' inputs"),
        (entropy, "convolutions"),
        (entropy, "convolutions' inputs"),
    ):
        yield Contender(
            f"ONNX Runtime {method.name.lower()}, {where}",
            "onnxruntime",
            _OnnxRuntime(task, float_graph, method, where),
        )
    for name in ("max", "entropy"):
        yield Contender(
            f"ModelOpt {name}", "modelopt", _ModelOpt(task, float_graph, arrays, modelopt, name)
        )


def _own(task: Task, path: Path, fallback: bool) -> str:
    settings = QuantizationSettings(
        image_limit=len(task.images), float_layers="auto" if fallback else ()
    )
    result = quantize(task.graph, task.folder, settings)
    onnx.save(result.graph.model, path)
    tried = ", ".join(f"{c.variant} {c.method} {c.agreement:.3f}" for c in result.candidates)
    kept = ", ".join(result.graph.float_layers) or "none"
    return f"chosen: {result.graph.calibration}; float layers: {kept}; tried: {tried}"


def _own_steps(task: Task) -> Iterator[Contender]:
    """The steps one by one; a form of the graph that is like an earlier one is left out."""
    methods: Mapping[Variant, tuple[Method, ...]] = {
        "plain": ("minmax", "entropy", "mse"),
        "equalized": ("minmax",),
        "smoothed": METHODS,
    }
    models: list[onnx.ModelProto] = []
    for variant in VARIANTS:
        model = task.graph.model
        if variant != "plain":
            ranges = _measured(task, model, tensors_to_measure(model))
            model = equalize(model, ranges, smooth=variant == "smoothed").applied(model)
        if model in models:
            continue
        models.append(model)
        placement = place(model)
        statistics = _measured(task, model, placement.tensors)
        for method in methods[variant]:
            amax = group_amax(statistics, placement.groups, method)
            yield Contender(
                f"{variant}, {method}", "ours", _Step(model, placement, amax, str(method))
            )


def _measured(
    task: Task, model: onnx.ModelProto, tensors: Sequence[str]
) -> dict[str, TensorStatistics]:
    return collect(model, calibration_batches(task.images, input_spec(model)), tensors)


@dataclass(frozen=True)
class _Step:
    """A form of the float graph with ranges of one calibrator."""

    model: onnx.ModelProto
    placement: Placement
    amax: Mapping[str, float]
    method: str

    def __call__(self, path: Path) -> str:
        onnx.save(insert_qdq(self.model, self.placement, self.amax), path)
        return f"{len(self.placement.tensors)} tensors, calibrated with {self.method}"


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """The calibration images as ONNX Runtime asks for them, a part of them at a time."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._spec = input_spec(task.graph.model)
        self.set_range(0, len(task.images))

    def __len__(self) -> int:
        return len(self._task.images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._batches = calibration_batches(
            self._task.images[start_index:end_index],
            self._spec,
            preprocessing=self._task.graph.preprocessing,
        )

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        images = next(self._batches, None)
        return None if images is None else {self._spec.name: images}


@dataclass(frozen=True)
class _OnnxRuntime:
    """ONNX Runtime's own quantizer, set as its documentation asks for TensorRT.

    Q/DQ format; activations and weights symmetric INT8, which is all that TensorRT takes; weights
    by channel; the graph prepared by its own pre-processing.
    """

    task: Task
    float_graph: Path
    method: CalibrationMethod
    where: str
    """`every operator` that it can quantize, its default, which takes the decoding in as well;
    `convolutions` for what they read and write; `convolutions' inputs` for what they read."""

    def __call__(self, path: Path) -> str:
        prepared = path.with_name("prepared.onnx")
        # Symbolic shape inference would need sympy; the ordinary one knows all these shapes.
        quant_pre_process(self.float_graph, prepared, skip_symbolic_shape=True)
        options: dict[str, Any] = {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "CalibTensorRangeSymmetric": True,
            # A few images at a time: its histograms are made of tensors it keeps until then.
            "CalibStridedMinMax": 4,
        }
        if self.where == "convolutions' inputs":
            options["OpTypesToExcludeOutputQuantization"] = list(CONVOLUTIONS)
        quantize_static(
            prepared,
            path,
            _Reader(self.task),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=None if self.where == "every operator" else list(CONVOLUTIONS),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=self.method,
            extra_options=options,
        )
        return "quantize_static, QDQ, per channel, " + ", ".join(
            f"{key} {value}" for key, value in options.items()
        )


@dataclass(frozen=True)
class _ModelOpt:
    """NVIDIA ModelOpt's command, with its defaults except for the precision of the rest: FP32."""

    task: Task
    float_graph: Path
    arrays: Path
    python: Path
    method: str

    def __call__(self, path: Path) -> str:
        if not self.python.is_file():
            raise UserError(
                f"{self.python} does not exist; name a Python that has nvidia-modelopt with "
                "--modelopt, or leave modelopt out of --tools."
            )
        if not self.arrays.is_file():
            spec = input_spec(self.task.graph.model)
            preprocessing = self.task.graph.preprocessing
            batches = calibration_batches(self.task.images, spec, preprocessing=preprocessing)
            images = np.concatenate(list(batches))
            named: dict[str, Any] = {spec.name: images}
            np.savez(self.arrays, **named)
        options = [
            "--quantize_mode=int8",
            f"--calibration_method={self.method}",
            "--high_precision_dtype=fp32",
            "--calibration_eps=cpu",
        ]
        finished = subprocess.run(
            [
                str(self.python),
                "-m",
                "modelopt.onnx.quantization",
                f"--onnx_path={self.float_graph}",
                f"--calibration_data_path={self.arrays}",
                f"--output_path={path}",
                *options,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode:
            raise UserError(f"ModelOpt failed: {finished.stderr.strip().splitlines()[-1]}")
        return "modelopt.onnx.quantization " + " ".join(options)


def _versions(modelopt: Path) -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "numpy")}
    if modelopt.is_file():
        script = "from importlib.metadata import version; print(version('nvidia-modelopt'))"
        asked = subprocess.run(
            [str(modelopt), "-c", script], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            found["nvidia-modelopt"] = asked.stdout.strip()
    return found


def _rows_of_other_tools(
    file: Path | None, heading: Mapping[str, Any], tools: Sequence[str]
) -> list[dict[str, Any]]:
    """Return an earlier run's rows of tools that are not run now, if all else was the same."""
    if file is None or not file.is_file():
        return []
    earlier = read_json(file)
    if any(earlier.get(key) != value for key, value in heading.items()):
        return []
    return [row for row in earlier["rows"] if row["tool"] not in tools]


if __name__ == "__main__":
    main()
