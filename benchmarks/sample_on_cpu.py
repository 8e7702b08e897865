"""Measure what docs/measurements/speed.md reports for a CPU: the sample, and the authors' graph.

    python -m benchmarks.sample_on_cpu [--duration 60] [--json benchmarks/results/cpu.json]

Measures the AP of each form of the exported graph, the share of an evaluation's wall time that is
the engine's own, and the latency of our graph and of one decoded as the authors decode, interleaved
in one run: a ratio that a busy machine changes little.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

from benchmarks.authors_graph import authors_graph
from trt_yolov6.bench.latency import benchmark_many
from trt_yolov6.bench.text import format_report
from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.common.files import write_json
from trt_yolov6.data.coco import load_coco
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.spec import BatchProfile, NmsSettings, PredictOptions

WEIGHTS = Path("samples/yolov6n_bccd_authors.pt")

FORMS = {
    "fp32": ExportSettings(),
    "fp32, batch 1 fixed": ExportSettings(batch=BatchProfile(1, 1, 1)),
    "fp32, batch 8 fixed": ExportSettings(batch=BatchProfile(8, 8, 8)),
    "fp32, uint8 input": ExportSettings(uint8_input=True),
    "fp32, NMS inside": ExportSettings(nms=NmsSettings()),
    "fp16": ExportSettings(fp16=True),
}


def main() -> None:
    """Run all and print what goes into docs/measurements/speed.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--duration", type=float, default=60.0, help="seconds a measurement")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    dataset = load_coco("samples", "val")
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.sample_on_cpu", *sys.argv[1:]]),
        "evaluations": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in FORMS.items():
            path = Path(folder) / f"{name.replace(' ', '_').replace(',', '')}.onnx"
            built = build_engine(
                graph_from_checkpoint(WEIGHTS, settings), backend="onnxruntime", output=path
            )
            with load_engine(built.path) as engine:
                # Fixed batch 1 is what it says; everything else is evaluated at batch 8.
                batch = min(8, engine.batch.max)
                value = evaluate(engine, dataset, PredictOptions(batch=batch)).to_json()
            value["nodes"] = len(onnx.load(path).graph.node)
            value["engine_share"] = value["inference_s"] / value["wall_s"]
            result["evaluations"][name] = value
            print(
                f"{name:22s} AP {value['AP']:.4f}  AP50 {value['AP50']:.4f}  "
                f"{value['nodes']} nodes  engine {value['engine_share']:.1%} of the wall time"
            )
        theirs = Path(folder) / "authors_graph.onnx"
        onnx.save(authors_graph(load_checkpoint(WEIGHTS).model), theirs)
        ours = Path(folder) / "fp32.onnx"
        fixed = Path(folder) / "fp32_batch_1_fixed.onnx"
        engines = [load_engine(path) for path in (ours, fixed, theirs)]
        measured = benchmark_many(engines, batch=1, duration=options.duration)
        print(format_report(measured))
        baseline = measured[-1].latency.median
        ratios = {item.engine.name: item.latency.median / baseline for item in measured}
        print("median latency over that of the authors' decoding:", ratios)
        result["authors_graph_nodes"] = len(onnx.load(theirs).graph.node)
        result["batch_1_interleaved"] = [item.to_json() for item in measured]
        result["latency_ratio_to_authors_graph"] = ratios
        (batch_32,) = benchmark_many(engines[:1], batch=32, duration=options.duration)
        print(format_report([batch_32]))
        result["batch_32"] = batch_32.to_json()
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
