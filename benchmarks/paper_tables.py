"""The paper's tables that this hardware can show, theirs and ours side by side, never mixed.

    python -m benchmarks.paper_tables --measure 1,14,20,21   measures; minutes on two cores
    python -m benchmarks.paper_tables                        writes docs/measurements/paper.md
    python -m benchmarks.paper_tables --check                fails where that is out of date

Tables 1 (counts), 14 and 21 (the sample) and 20 (CPU) are measured here, into
results/paper-tables.json; speeds of Tables 1 and 17 come from `benchmarks.gpu`, Table 15 from
`benchmarks.rep_optimizer` where its results are. Theirs is COCO, ours is the sample data set, since
no COCO weights are at hand: only directions can be compared, not figures.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ablations, paper
from benchmarks.tables import GPU, RESULTS, ROOT, markdown, qat_int8, rep_optimizer
from trt_yolov6.common.files import read_json, write_bytes, write_json
from trt_yolov6.common.machine import cpu_model, software_versions, timestamp
from trt_yolov6.comparison.rounds import Round, measure_round, summarize_rounds
from trt_yolov6.data.coco import load_coco
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.spec import BatchProfile, PredictOptions

SAMPLE = ROOT / "samples" / "yolov6n_bccd.pt"
FILE = RESULTS / "paper-tables.json"
ABLATIONS = "ablations.json"
PAGE = ROOT / "docs" / "measurements" / "paper.md"

NAMES = {
    "yolov6n": "YOLOv6-N",
    "yolov6t": "YOLOv6-T",
    "yolov6s": "YOLOv6-S",
    "yolov6m": "YOLOv6-M",
    "yolov6l_relu": "YOLOv6-L-ReLU",
    "yolov6l": "YOLOv6-L",
}

# --- measuring ----------------------------------------------------------------------------------


def measure_counts() -> list[dict[str, Any]]:
    """Table 1: parameters and FLOPs of each network after fusing, at 640 x 640."""
    from benchmarks.gpu_graphs import random_model
    from trt_yolov6.models import count_flops, count_parameters, fuse

    rows = []
    for variant in NAMES:
        model = fuse(random_model(variant))
        rows.append(
            {
                "variant": variant,
                "parameters": count_parameters(model),
                "flops": count_flops(model, 640),
            }
        )
    return rows


def measure_borders() -> list[dict[str, Any]]:
    """Table 14: AP of the sample by the size that images are resized to, and the border."""
    dataset = load_coco(ROOT / "samples", "val")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for resize, border in paper.TABLE_14:
            side = resize + 2 * border
            path = Path(folder) / f"{side}.onnx"
            if not path.exists():
                settings = ExportSettings(image_size=(side, side))
                build_engine(
                    graph_from_checkpoint(SAMPLE, settings), backend="onnxruntime", output=path
                )
            with load_engine(path) as engine:
                found = evaluate(engine, dataset, PredictOptions(border=border))
            rows.append({"resize": resize, "border": border, "AP": found.ap, "AP50": found.ap50})
    return rows


def measure_cpu() -> list[dict[str, Any]]:
    """Table 20: latency of N, T and S in FP32 at batch 1 in ONNX Runtime, in rounds."""
    from benchmarks.gpu_graphs import as_graph, random_model
    from trt_yolov6.graph.export import export_onnx

    variants = ("yolov6n", "yolov6t", "yolov6s")
    rounds: dict[str, list[Round]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for variant in variants:
            settings = ExportSettings(batch=BatchProfile(1, 1, 1))
            names = [f"class_{index}" for index in range(80)]
            model = export_onnx(random_model(variant), settings, names)
            paths[variant] = Path(folder) / f"{variant}.onnx"
            build_engine(
                as_graph(model, variant, 640, 1), backend="onnxruntime", output=paths[variant]
            )
        for number in range(8):
            for variant in variants if number % 2 == 0 else reversed(variants):
                rounds[variant].append(
                    measure_round(functools.partial(load_engine, paths[variant]), 1, 2.0)
                )
    rows = []
    for variant, own in rounds.items():
        found = summarize_rounds(own)
        if found.disturbed:
            sys.exit("Table 20: other processes disturbed nearly all runs; measure it again later.")
        rows.append(
            {
                "variant": variant,
                "ms": found.latency.value * 1e3,
                "interval_ms": [found.latency.low * 1e3, found.latency.high * 1e3],
                "runs": found.runs,
                "quiet_runs": found.quiet_runs,
            }
        )
    return rows


def measure_partial() -> list[dict[str, Any]]:
    """Table 21: AP of the sample with six layers in float, chosen by each metric."""
    from trt_yolov6.quantization.pipeline import calibrate
    from trt_yolov6.quantization.settings import QuantizationSettings
    from trt_yolov6.runtime.sensitivity_report import (
        REPORTED_LAYERS,
        TENSOR_METRICS,
        ap_on,
        measure,
    )

    graph = graph_from_checkpoint(SAMPLE, ExportSettings())
    settings = QuantizationSettings(calibrator="minmax", equalize=False)
    calibrated = calibrate(graph, ROOT / "calib", settings)
    score = ap_on(graph, load_coco(ROOT / "samples", "val"))
    rows: list[dict[str, Any]] = [
        {"float": "all", "layers": [], "AP": score(graph.model)},
        {"float": "none", "layers": [], "AP": score(calibrated.with_float(()))},
    ]
    for metric in TENSOR_METRICS:
        layers = measure(graph, calibrated, metric).names[:REPORTED_LAYERS]
        known = [row for row in rows if set(row["layers"]) == set(layers)]
        ap = known[0]["AP"] if known else score(calibrated.with_float(layers))
        rows.append({"float": metric, "layers": list(layers), "AP": ap})
    return rows


MEASURED: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "1": measure_counts,
    "14": measure_borders,
    "20": measure_cpu,
    "21": measure_partial,
}

# --- writing ------------------------------------------------------------------------------------


def page() -> str:
    """Return the page: for each table a section, the paper's figures first, ours under them."""
    parts = [
        "# The paper's tables, and ours\n",
        "Written by `python -m benchmarks.paper_tables`. The paper's figures are of COCO 2017 val "
        "(arXiv 2209.02976); ours are of the sample data set (blood cells, 72 images) where they "
        "are an AP, because there are no COCO weights here. So compare what a step changes, not "
        "the figures themselves.\n",
    ]
    for number, section in SECTIONS.items():
        parts.append(f"## Table {number}\n")
        if number in MEASURED and number not in read_json(FILE)["tables"]:
            command = f"python -m benchmarks.paper_tables --measure {number}"
            parts.append(f"Ours is not measured yet: `{command}`.\n")
        else:
            parts.append(section())
    return "\n".join(parts)


def table_1() -> str:
    """Return sizes and speeds."""
    theirs = markdown(
        [
            "Method",
            "Size",
            "AP",
            "AP50",
            "FPS (b1)",
            "FPS (b32)",
            "ms (b1)",
            "Params, M",
            "FLOPs, G",
        ],
        [list(row) for row in paper.TABLE_1],
    )
    speeds = {
        (row["variant"], row["batch"]): row["fps"]
        for row in read_json(RESULTS / GPU)["parts"]["decoding"]
        if row["graph"] == "ours"
    }
    rows = []
    for row in _measured("1"):
        fps = [speeds.get((row["variant"], batch)) for batch in (1, 32)]
        rows.append(
            [
                NAMES[row["variant"]],
                *("" if value is None else f"{value:.0f}" for value in fps),
                "" if fps[0] is None else f"{1e3 / fps[0]:.3f}",
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['flops'] / 1e9:.1f}",
            ]
        )
    head = ["Method", "FPS (b1)", "FPS (b32)", "ms (b1)", "Params, M", "FLOPs, G"]
    return _beside(
        "T4, TensorRT 7.2, FP16",
        theirs,
        f"{_gpu()}, FP16, random weights; counted on our networks, fused",
        markdown(head, rows),
    )


def table_14() -> str:
    """Return AP by border."""
    models = list(next(iter(paper.TABLE_14.values())))
    theirs = markdown(
        ["Image size", "Border", *models],
        [[size, border, *aps.values()] for (size, border), aps in paper.TABLE_14.items()],
    )
    ours = markdown(
        ["Image size", "Border", "AP", "AP50"],
        [
            [row["resize"], row["border"], f"{100 * row['AP']:.1f}", f"{100 * row['AP50']:.1f}"]
            for row in _measured("14")
        ],
    )
    return _beside(
        "Mosaic off in the last epochs", theirs, "the sample checkpoint (N), ONNX Runtime", ours
    )


def table_15() -> str:
    """Return the cost of plain PTQ with and without RepOptimizer."""
    theirs = markdown(["Release", "Model", "FP32 AP", "INT8 AP"], [list(r) for r in paper.TABLE_15])
    rows = [
        [row["name"], f"{100 * row['AP']['val']:.1f}"]
        for row in read_json(RESULTS / "int8-sample.json")["rows"]
        if row["name"] in ("FP32", "plain, minmax", "plain, entropy", "ours, as it comes")
    ]
    ours = markdown(["the authors' checkpoint (N)", "AP"], rows) + "\n" + rep_optimizer()
    return _beside("YOLOv6-S", theirs, "YOLOv6-N on BCCD, exact INT8 arithmetic", ours)


def table_17() -> str:
    """Return speed of quantized engines."""
    theirs = markdown(
        ["Model", "AP", "FPS (b1)", "FPS (b32)"],
        [["" if cell is None else cell for cell in row] for row in paper.TABLE_17],
    )
    rows = [
        [
            row["graph"],
            row["fp8_convolutions"] or 0,
            f"{row['fps']:.0f}",
            f"{row['fps_to_fp16']:.3f}",
        ]
        for row in read_json(RESULTS / GPU)["parts"]["fp8"]["speed"]
    ]
    ours = markdown(["YOLOv6-S", "FP8 convolutions", "FPS (b32)", "to FP16"], rows)
    note = (
        "No INT8 here: TensorRT-RTX 1.6 builds no INT8 convolutions for this GPU, and 1.7, which "
        "does for others, refuses it. FP8 is what stands in, and it is slower than FP16 there."
    )
    return _beside("T4, TensorRT 8", theirs, f"{_gpu()}, random weights", ours) + f"\n{note}\n"


def table_20() -> str:
    """Return latency on a CPU."""
    theirs = markdown(["Model", "Input", "ms (b1)"], [list(row) for row in paper.TABLE_20])
    rows = [
        [
            NAMES[row["variant"]],
            640,
            f"{row['ms']:.1f}",
            f"{row['interval_ms'][0]:.1f} to {row['interval_ms'][1]:.1f}",
        ]
        for row in _measured("20")
    ]
    ours = markdown(["Model", "Input", "ms (b1)", "interval"], rows)
    where = read_json(FILE)["tables"]["20"]
    return _beside(
        "Intel Core i7, 2.6 GHz, OpenCV DNN, FP32",
        theirs,
        f"{where['device']}, 2 cores, ONNX Runtime, FP32, random weights, {where['date'][:10]}",
        ours,
    )


def table_21() -> str:
    """Return AP with six layers in float."""
    theirs = markdown(["Six layers by", "AP"], [list(row) for row in paper.TABLE_21])
    ours = markdown(
        ["In float", "AP", "layers"],
        [
            [row["float"], f"{100 * row['AP']:.2f}", ", ".join(row["layers"])]
            for row in _measured("21")
        ],
    )
    return _beside(
        "YOLOv6-S (v1.0) with RepOptimizer",
        theirs,
        "sample (N), min-max, not equalized, exact INT8 arithmetic; by `ap` takes a run for every "
        "layer and was left out",
        ours,
    )


def table_5() -> str:
    """Return the gain of each design of the network."""
    theirs = markdown(["Network", "AP", "FPS (b32)"], [list(row) for row in paper.TABLE_5])
    return (
        f"**The paper's** (T4, FP16):\n\n{theirs}\nOurs is not measured: the steps lead from "
        "YOLOv5's anchors, backbone and neck, which `train` does not build.\n"
    )


def ablation(number: str) -> str:
    """Return one of Tables 6 to 11: what a choice of the recipe brings."""
    head, rows = paper.ABLATIONS[number]
    theirs = markdown(list(head), [list(row) for row in rows])
    data = read_json(RESULTS / ABLATIONS)
    ours = markdown(
        [ablations.TABLES[number][0], "AP", "seeds"],
        [[label, f"{100 * ap:.1f}", seeds] for label, ap, seeds in ablations.rows_of(data, number)],
    )
    done = data.get("after_epoch", data["epochs"])
    when = f"after epoch {done} of {data['epochs']}; seeds alone make 1 or 2 points"
    return _beside("AP of COCO", theirs, f"YOLOv6-N on BCCD, {when}", ours)


def table_11() -> str:
    """Return the last of these tables, and how ours of all of them came about."""
    data = read_json(RESULTS / ABLATIONS)
    text = f"Ours of Tables 6 to 11: {data['device']}, {data['date']}, `{data['command']}`."
    return f"{ablation('11')}\n{text} {data.get('remark', '')}".strip() + "\n"


def table_16() -> str:
    """Return the share of INT8's loss that training recovers."""
    theirs = markdown(["Network", "INT8 AP", "FPS"], [list(row) for row in paper.TABLE_16])
    where = "YOLOv6-S (v1.0), T4"
    return _beside(where, theirs, "sample (N) on BCCD, exact INT8 arithmetic", qat_int8())


SECTIONS: dict[str, Callable[[], str]] = {
    "1": table_1,
    "5": table_5,
    **{number: functools.partial(ablation, number) for number in ablations.TABLES},
    "11": table_11,
    "14": table_14,
    "15": table_15,
    "16": table_16,
    "17": table_17,
    "20": table_20,
    "21": table_21,
}


def _measured(number: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_json(FILE)["tables"][number]["rows"]
    return rows


def _gpu() -> str:
    data = read_json(RESULTS / GPU)
    return f"{data['gpu']['name']}, {data['backend']} {data['backend_version']}"


def _beside(where: str, theirs: str, ours_where: str, ours: str) -> str:
    return f"**The paper's** ({where}):\n\n{theirs}\n**Ours** ({ours_where}):\n\n{ours}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--measure", default="", metavar="N,...", help="tables to measure")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    for number in filter(None, options.measure.split(",")):
        value = read_json(FILE) if FILE.exists() else {"tables": {}}
        value["tables"][number] = {
            "command": f"python -m benchmarks.paper_tables --measure {number}",
            "date": timestamp(),
            "device": cpu_model(),
            "versions": software_versions(),
            "rows": MEASURED[number](),
        }
        write_json(FILE, value)
    text = page()
    if options.check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit("docs/measurements/paper.md differs from the results; run this script.")
        return
    write_bytes(PAGE, text.encode())


if __name__ == "__main__":
    main()
