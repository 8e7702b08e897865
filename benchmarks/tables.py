"""The tables of the README and of docs/, made from the results that are committed.

    python -m benchmarks.tables            rewrites them
    python -m benchmarks.tables --check    says which are out of date, and fails if any is

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import picture_tables
from benchmarks.paper import TABLE_1
from benchmarks.tensorrt8 import layer_kind
from trt_yolov6.common.files import read_json, write_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
PLACEMENTS = {
    "fp16": "FP16",
    "default": "from 1000 multiply-adds a value on (`--fp8`)",
    "no_head_from_2000": "from 2000 on",
    "no_head": "all but first, transposed and head",
    "all": "every convolution",
    "default_layer_scales": "as `--fp8`, one scale a layer (wrong results)",
}
"""Names of `fp8_variants`' placements in the documents."""

THEIR_AP = {("n", 125): "0.518 after 125 epochs", ("s", 125): "0.464 after 112 epochs"}
"""AP of the authors' released code on BCCD with the same settings, by variant and our epochs."""

REP_OPTIMIZER = "rep-optimizer.json"
NETWORKS = {
    "multi-branch": "multi-branch (RepVGG blocks)",
    "single-branch": "single-branch, ordinary SGD",
    "hyper-search": "hyper-search network",
    "rep-optimizer": "**single-branch, RepOptimizer**",
}
"""Names of `rep_optimizer`'s networks in the documents."""

GPU = "h200-tensorrt-rtx-1.6.1.json"
TENSORRT8 = "h100-tensorrt-8.json"
TRAINING_SPEED = "training-speed.json"

TENSORRT8_FORMS = {
    ("fp32", "ours"): "FP32",
    ("fp16", "authors"): "FP16, the authors' decoding",
    ("fp16", "ours"): "FP16",
    ("int8", "ptq"): "INT8",
    ("int8", "one_term"): "INT8, shortcuts in half precision",
    ("int8+float6", "ptq"): "INT8, six layers in float",
    ("int8", "activated_first"): "INT8, scores before the concatenation",
    ("int8+float6", "by_time"): "INT8, six layers in float, weighed by time",
    ("int8", "ptq-rest-fp32"): "INT8, the rest in FP32",
    ("int8", "ptq-shifted"): "INT8, channels shifted",
    ("int8", "ptq-smoothed"): "INT8, channels smoothed",
    ("int8", "qat"): "INT8 after QAT",
    ("int8", "cache"): "INT8 by a calibration cache",
    ("int8", "tensorrt-entropy"): "INT8, TensorRT's entropy calibration",
    ("int8", "tensorrt-minmax"): "INT8, TensorRT's min-max calibration",
}
"""Names of `tensorrt8`'s rows in the documents, by precision and method."""

_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables_filled(text: str) -> str:
    """Return a text whose tables are those of the committed results.

    Raises:
        KeyError: it has a table that is not known here.
    """
    return _BLOCK.sub(lambda match: match[1] + TABLES[match["name"]]() + match[3], text)


def int8_steps() -> str:
    """AP by what was done to the two networks, and by which tool."""
    sample, lite = result("int8-sample.json"), result("int8-lite.json")
    columns = ((sample, "val"), (lite, "val2017"), (lite, "train2017"))
    names = list(dict.fromkeys(row["name"] for data in (lite, sample) for row in data["rows"]))
    rows = []
    for name in names:
        cells = []
        for data, split in columns:
            found = [row for row in data["rows"] if row["name"] == name]
            cells.append(f"{found[0]['AP'][split]:.4f}" if found else "")
        label = name if not name.startswith("ours, ") else f"**{name}**"
        rows.append([label, *cells])
    return markdown(
        [
            "AP",
            "the authors' N, 72 images",
            "YOLOv6Lite-L, 128 COCO images",
            "YOLOv6Lite-L, the 128 it was tuned on",
        ],
        rows,
    )


REAL_NETWORKS = "int8-real-networks.json"
INT8_NETWORKS = {
    "sample": "sample",
    "rescaled": "rescaled",
    "sample, 125 epochs": "sample, 125 epochs",
    "rescaled, 125 epochs": "rescaled, 125 epochs",
    "authors-n": "the authors' N",
    "lite-l": "YOLOv6Lite-L",
    "yolox-nano": "YOLOX-Nano",
}
"""Names of `int8_real_networks`' networks in the documents, in their order there."""

INT8_OTHERS = ("ours, FP8", "ours, gradients 5 minutes")
"""Tools of `int8_real_networks` whose rows have a table of their own."""


def int8_real_networks(wanted: Callable[[str], bool]) -> str:
    """AP and agreement with float of networks on held-out images, by the tools that are wanted."""
    order = list(INT8_NETWORKS)
    found = sorted(
        (
            row
            for row in result(REAL_NETWORKS)["rows"]
            if not row.get("draw") and wanted(row["tool"])
        ),
        key=lambda row: (
            order.index(row["network"]),
            not row["tool"].startswith("ours"),
            row["tool"],
        ),
    )
    timed = any("slower" in row for row in found)
    rows = [
        [
            INT8_NETWORKS[row["network"]],
            row["tool"],
            row["images"],
            f"{row['ap']:.4f}",
            f"{100 * row['ap_change'][0]:+.2f} "
            f"[{100 * row['ap_change'][1]:+.2f}, {100 * row['ap_change'][2]:+.2f}]",
            f"{row['agreement']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]",
            f"{row['int8_convolutions']} of {row['convolutions']}",
            *([f"{row['slower']:.1%}"] if timed else []),
        ]
        for row in found
    ]
    head = ["network", "tool", "images", "AP", "points to float", "agreement"]
    head += ["quantized convolutions", *(["slower"] if timed else [])]
    return markdown(head, rows)


def int8_draws() -> str:
    """The default over several draws of the images that calibrate."""
    drawn: dict[str, list[dict[str, Any]]] = {}
    for row in result(REAL_NETWORKS)["rows"]:
        if "draw" in row and row["tool"] == "ours":
            drawn.setdefault(row["network"], []).append(row)
    rows = []
    for network, name in INT8_NETWORKS.items():
        found = sorted(drawn.get(network, ()), key=lambda row: int(row["draw"]))
        if len(found) > 1:
            points = [100 * row["ap_change"][0] for row in found]
            agreed = [row["agreement"] for row in found]
            deviation = statistics.stdev(points)
            rows.append(
                [
                    *(name, len(found), f"{statistics.mean(points):+.2f}", f"{deviation:.2f}"),
                    f"{deviation / len(found) ** 0.5:.2f}",
                    ", ".join(f"{one:+.2f}" for one in points),
                    f"{statistics.mean(agreed):.3f}, {min(agreed):.3f} to {max(agreed):.3f}",
                ]
            )
    head = ["network", "draws", "points to float, mean", "standard deviation", "standard error"]
    return markdown([*head, "each", "agreement: mean, range"], rows)


def gpu_decoding() -> str:
    """Speed by the way boxes are decoded, with its share of the roofline."""
    rows = [
        [
            row["variant"].replace("yolov6", "").upper(),
            row["batch"],
            row["graph"],
            f"{row['ms']:.3f}",
            picture_tables.number(row["fps"]),
            f"{row['fps_to_authors']:.3f}",
            f"{row['roofline_ms']:.3f}",
            f"{row['roofline_share']:.0%}",
        ]
        for row in result(GPU)["parts"]["decoding"]
    ]
    head = ["", "batch", "graph", "ms", "FPS", "to the authors'", "roofline, ms", "of it"]
    return markdown(head, rows)


def gpu_fp8() -> str:
    """FP8 against FP16: speed of S, AP of the sample."""
    part = result(GPU)["parts"]["fp8"]
    rows = [
        [
            PLACEMENTS[row["graph"]],
            row["fp8_convolutions"] or 0,
            f"{row['ms']:.3f}",
            picture_tables.number(row["fps"]),
            f"{row['fps_to_fp16']:.3f}",
            f"{row['roofline_share']:.0%}",
        ]
        for row in part["speed"]
    ]
    head = ["YOLOv6-S, batch 32", "FP8 convolutions", "ms", "FPS", "to FP16", "of its roofline"]
    return markdown(head, rows)


def gpu_fp8_accuracy() -> str:
    """AP of FP8 on the GPU, with FP32."""
    parts = result(GPU)["parts"]
    theirs = next(row["AP"] for row in parts["accuracy"] if row["AP_to_FP32_on_CPU"] == 0)
    ours = next(row["AP"] for row in result(QAT)["rows"] if row["case"] == "sample-float")
    rows = []
    for row in parts["fp8"]["accuracy"]:
        base = theirs if "authors" in row["engine"] else ours
        cpu = row.get("AP_onnxruntime_cpu")
        rows.append(
            [
                row["engine"],
                *(f"{value:.4f}" for value in (row["AP"], base)),
                f"{row['AP'] - base:+.4f}",
                "" if cpu is None else f"{cpu:.4f}",
            ]
        )
    head = ["`--fp8`", "AP on the H200", "FP32 on a CPU", "", "the same file on a CPU"]
    return markdown(head, rows)


def gpu_streams() -> str:
    """Several streams against one, and what `bench` adds to bare CUDA events."""
    parts = result(GPU)["parts"]
    rows = [
        [
            f"{row['variant']}, batch 1, {row['streams']} streams, to one stream",
            f"{picture_tables.number(row['fps'])} FPS",
            f"{row['to_one_stream']:.2f}",
        ]
        for row in parts["streams"]
        if "to_one_stream" in row
    ]
    rows += [
        [
            f"{row['variant']}, batch {row['batch']}, `bench`'s median to bare CUDA events",
            f"{row['bench_ms']:.3f} ms",
            f"{row['ratio']:.3f}",
        ]
        for row in parts["overhead"]
    ]
    return markdown(["", "measured", "ratio"], rows)


def gpu_whole() -> str:
    """Images and files to boxes while the CPU prepared pictures and suppressed boxes."""
    parts = result(GPU)["parts"]
    rows = []
    for row in parts["boxes"]:
        figure = f"{row['ms']:.3f} ms" if "ms" in row else f"{row['fps']:,.0f} FPS"
        rows.append(
            [
                f"{row['variant']}, batch {row['batch']}, uint8 image in {row['memory']} memory to "
                "boxes, to the engine alone",
                figure.replace(",", " "),
                f"{row['to_engine']:.2f}",
            ]
        )
    rows += [
        [
            f"{row['engine']}, batch 32, JPEG files in memory to boxes, to the slowest stage alone",
            f"{picture_tables.number(row['whole_fps'])} FPS",
            f"{row['to_slowest_stage']:.2f}",
        ]
        for row in parts["jpeg"]
    ]
    return markdown(["", "measured", "ratio"], rows)


def pictures(name: str) -> str:
    """A table of the way from pictures to boxes."""
    head, *rows = picture_tables.TABLES[name](result(picture_tables.RESULT))
    return markdown(head, rows)


def gpu_accuracy() -> str:
    """AP of the sample through engines on the GPU."""
    rows = [
        [
            row["engine"],
            f"{row['AP']:.4f}",
            f"{row['AP50']:.4f}",
            f"{row['AP_to_FP32_on_CPU']:+.4f}",
        ]
        for row in result(GPU)["parts"]["accuracy"]
    ]
    return markdown(["the authors' checkpoint, 72 images", "AP", "AP50", "to the CPU's"], rows)


def gpu_where() -> str:
    """Environment of the GPU figures."""
    data = result(GPU)
    gpu, ceilings = data["gpu"], data["parts"]["ceilings"]
    return (
        f"{gpu['name']}, driver {gpu['driver']}, {data['backend']} {data['backend_version']}, "
        f"{data['date'][:10]}, {data['seconds']:.0f} s in all: `{data['command']}`. Measured "
        f"ceilings: {ceilings['bytes_per_second'] / 1e12:.2f} TB/s, "
        f"{ceilings['fp16_flops'] / 1e12:.0f} TFLOP/s in FP16, "
        f"{ceilings['fp8_flops'] / 1e12:.0f} in FP8.\n"
    )


SUPPRESSION = "h100-suppression.json"


def suppression() -> str:
    """Time of suppression on the GPU, by batch and candidates."""
    if not (RESULTS / SUPPRESSION).is_file():
        return _NOT_MEASURED
    data = result(SUPPRESSION)
    rows = []
    for part, source in (("real", "the sample network, "), ("speed", "random boxes, ")):
        for name, row in data[part].items():
            if "superseded" in row:
                continue
            batch, rest = name.removeprefix("batch ").split(", ", 1)
            case = rest if part == "speed" else f"{rest}: {row['candidates']:.0f} candidates"
            if case.endswith(" 1 classes"):
                case = case.removesuffix("es")
            rows.append([source + case, batch, f"{row['kept']:.0f}", f"{row['ms']:.3f}"])
    return markdown(["outputs", "batch", "kept an image", "ms"], rows)


def suppression_where() -> str:
    """Environment of the figures of suppression, and what else was checked there."""
    if not (RESULTS / SUPPRESSION).is_file():
        return _NOT_MEASURED
    data = result(SUPPRESSION)
    sets, leak = data["equality"], data["leak"]
    rows = [*data["real"].values(), *data["speed"].values()]
    return (
        f"{data['gpu']}, {data['time'][:10]}: `{data['command']}`. "
        f"{sum(row['different'] for row in rows)} images of this table and {sets['different']} of "
        f"{sets['sets']} random sets, with up to {sets['most_candidates']} candidates, have other "
        f"boxes than on the CPU. {leak['batches']} batches (revision {leak['commit']}) leave "
        f"{leak['gpu_bytes']} more bytes of GPU memory and {leak['host_bytes']} of host memory in "
        f"use. {data.get('note', '')}\n"
    )


CPU_SUPPRESSION = "cpu-suppression.json"


def cpu_suppression() -> str:
    """Time of suppression on a CPU, and OpenCV's."""
    if not (RESULTS / CPU_SUPPRESSION).is_file():
        return _NOT_MEASURED
    rows = [
        [
            "the sample network" if name == "sample" else f"random boxes, {name}",
            f"{row['candidates']:.0f}",
            f"{row['suppress_again_ms']:.2f}",
            f"{row['suppress_ms']:.2f}",
            f"{row['suppress_ms_of_the_slowest_image']:.2f}",
            f"{row['postprocess_ms']:.2f}",
            f"{row['opencv_ms']:.2f}",
        ]
        for name, row in result(CPU_SUPPRESSION)["cpu"].items()
    ]
    head = ["outputs", "candidates", "suppression, back to back", "after OpenCV's"]
    head += ["of the slowest image", "all post-processing", "OpenCV, all candidates"]
    return markdown(head, rows)


QAT = "qat-bccd.json"


def qat_int8() -> str:
    """INT8 of the sample: PTQ, quantization-aware training full and partial (Tables 15 and 16)."""
    return _qat_table(
        {
            "float": "sample-float",
            "float, trained on alike": "sample-float_trained",
            "PTQ, min-max": "sample-8bit-ptq",
            "PTQ, calibrator and equalization chosen, biases as they are": "sample-8bit-ptq-tuned",
            "PTQ, six layers in float": "sample-8bit-ptq-6float",
            "full QAT": "sample-8bit-qat",
            "full QAT, channel-wise distillation": "sample-8bit-qat+cwd",
            "partial QAT, six layers in float": "sample-8bit-qat-6float",
            "partial QAT, channel-wise distillation": "sample-8bit-qat+cwd-6float",
        }
    )


def qat_visible() -> str:
    """Where PTQ breaks the sample: rescaled channels, not equalized, and 4 bits (Table 17)."""
    rows = {}
    for label, network in (
        ("channels rescaled up to 32-fold, INT8", "rescaled_32-8bit"),
        ("channels rescaled up to 256-fold, INT8", "rescaled_256-8bit"),
        ("4-bit weights and activations", "sample-4bit"),
    ):
        rows[f"{label}: PTQ"] = f"{network}-ptq"
        rows[f"{label}: QAT"] = f"{network}-qat"
        rows[f"{label}: QAT, channel-wise distillation"] = f"{network}-qat+cwd"
    return _qat_table({"float": "sample-float", **rows})


def qat_where() -> str:
    """Environment of the figures of quantization-aware training."""
    if not (RESULTS / QAT).is_file():
        return "Not measured yet.\n"
    data = result(QAT)
    text = (
        f"{data['devices']} x {data['device']}, PyTorch {data['versions']['torch']}, "
        f"{data['date']}, {data['seconds']:.0f} s in all: `{data['command']}`."
    )
    if data.get("remark"):
        text += f" {data['remark']}"
    alone = data.get("alone")
    if alone and alone.get("train_s"):
        text += f" Alone on the GPU, {data['epochs']} epochs took {alone['train_s']:.0f} s"
        text += f" and {alone['peak_bytes'] / 1e9:.2f} GB at most"
        float_bytes = data["float_training"]["peak_bytes"]
        text += f"; float training takes {float_bytes / 1e9:.2f} GB."
    return text + "\n"


def _qat_table(cases: Mapping[str, str]) -> str:
    """Return median AP over the seeds, its spread, and the exported graphs' AP, by case.

    Not every graph came back from the GPU, so the same networks' own AP stands next to it.
    Until the trainings have been run, a line that says so.
    """
    if not (RESULTS / QAT).is_file():
        return "Not measured yet: `python -m benchmarks.qat_bccd` fills this in.\n"
    found = result(QAT)["rows"]
    base = statistics.median([row["AP"] for row in found if row["case"] == "sample-float"])
    rows = []
    for label, case in cases.items():
        own = [row for row in found if row["case"] == case and row.get("AP") is not None]
        values = sorted(row["AP"] for row in own)
        if not values:
            continue
        exported = [row for row in own if row.get("AP_exported") is not None]
        spread = f"{values[0]:.4f} to {values[-1]:.4f} ({len(values)})" if len(values) > 1 else ""
        exact, same = (
            f"{statistics.median(row[name] for row in exported):.4f}" if exported else ""
            for name in ("AP_exported", "AP")
        )
        middle = statistics.median(values)
        rows.append([label, f"{middle:.4f}", spread, f"{middle - base:+.4f}", exact, same])
    head = ["", "AP, median", "of seeds", "to float", "exported", "the same in PyTorch"]
    return markdown(head, rows)


def training() -> str:
    """AP of the recipe on BCCD and its time, with the authors' code."""
    where, rows = "", []
    for data in (result("h100-train-bccd.json"), result("h200-train-bccd.json")):
        epochs = data["epochs"]
        where += f"- {epochs} epochs: {data['device']}, {data['date']}: `{data['command']}`.\n"
        alone = {run["model"]: f"{run['epoch_s']:.2f} s" for run in data["timing"]}
        for model in dict.fromkeys(run["model"] for run in data["runs"]):
            runs = [run for run in data["runs"] if run["model"] == model]
            last = [run["AP"] for run in runs]
            rows.append(
                [
                    f"YOLOv6-{model.upper()}",
                    str(epochs),
                    f"**{statistics.median(last):.3f}** ({', '.join(f'{ap:.3f}' for ap in last)})",
                    f"{statistics.median(run['best_AP'] for run in runs):.3f}",
                    THEIR_AP.get((model, epochs), ""),
                    alone.get(model, ""),
                ]
            )
    head = ["", "epochs", "AP at the end, median (of seeds)", "best"]
    head += ["the authors' code", "an epoch, alone"]
    return f"{where}\n{markdown(head, rows)}"


def training_speed() -> str:
    """Speed of training against the number of GPUs, and what bounds it."""
    if not (RESULTS / TRAINING_SPEED).is_file():
        return "Not measured yet: `python -m benchmarks.training_speed` fills this in.\n"
    data = result(TRAINING_SPEED)

    def place(row: dict[str, Any]) -> tuple[str, int, int]:
        return row["model"], row["batch"], row["gpus"]

    profiles = {
        (*place(row), row.get("of", "common")): row["profile_ms"]
        for row in data["rows"]
        if "profile_ms" in row
    }
    timed = sorted((row for row in data["rows"] if "step_ms" in row), key=place)
    # The fastest way of one GPU to the same result.
    base: dict[tuple[str, int, int], float] = {}
    for row in timed:
        if row["statistics"].partition(",")[0] == "common":
            base[place(row)] = min(row["step_ms"], base.get(place(row), row["step_ms"]))
    rows = []
    for row in timed:
        model, batch, gpus = place(row)
        spent = profiles.get((*place(row), row["statistics"]), {})
        most = ", ".join(f"{kind} {ms:.0f}" for kind, ms in list(spent.items())[:3])
        alone = base.get((model, batch, 1))
        rows.append(
            [
                f"YOLOv6-{model.upper()}",
                batch,
                gpus,
                row["statistics"],
                f"{row['step_ms']:.0f}",
                f"{row['images_per_second']:.0f}",
                "" if alone is None else f"{alone / row['step_ms']:.2f}",
                ", ".join(f"{loss:.4f}" for loss in row["losses"]),
                f"{sum(spent.values()):.0f}: {most}" if spent else "",
            ]
        )
    head = ["", "images a step", "GPUs", "batch statistics", "a step, ms", "images/s"]
    head += ["times as fast as one", "losses, by epoch", "GPU busy, ms, with most of it"]
    where = (
        f"{data['device']}, {data['cores']} cores, {data['date']}, {data['image_size']} pixels: "
        f"`{data['command']}`. {data.get('note', '')}".strip()
    )
    return f"{where}\n\n{markdown(head, rows)}"


def rep_optimizer() -> str:
    """AP in float and in INT8 by the way a network was trained, as the paper's Tables 15 and 16.

    Until the trainings have been run, a line that says so.
    """
    if not (RESULTS / REP_OPTIMIZER).is_file():
        return "Not measured yet: `python -m benchmarks.rep_optimizer` fills this in.\n"
    data = result(REP_OPTIMIZER)
    rows = []
    for kind, label in NETWORKS.items():
        of_kind = [row for row in data["quantized"] if row["kind"] == kind]
        if not of_kind:
            continue
        aps = [
            statistics.median(row[form]["AP"] or 0.0 for row in of_kind)
            for form in ("float", "INT8 min-max", "INT8 min-max, equalized")
        ]
        spread = statistics.median(row["channel_spread"] for row in of_kind)
        rows.append(
            [
                label,
                len(of_kind),
                *(f"{ap:.4f}" for ap in aps[:2]),
                f"{aps[1] - aps[0]:+.4f}",
                f"{aps[2]:.4f}",
                f"{spread:.1f}",
            ]
        )
    head = [
        f"YOLOv6-{data['model'].upper()}, {data['epochs']} epochs",
        "seeds",
        "FP32 AP",
        "INT8 min-max AP",
        "lost",
        "equalized",
        "channel spread",
    ]
    where = f"Trained on {data['device']} ({data['date']}), INT8 in exact arithmetic on a CPU; "
    where += f"medians over the seeds: `{data['command']}`.\n\n"
    return where + markdown(head, rows)


def tensorrt8_rows(figure: str, superseded: bool = False) -> list[dict[str, Any]]:
    """Return TensorRT 8's rows that have a figure (`ms`, `ap`), of today's forms or former ones."""
    rows = result(TENSORRT8)["rows"]
    return [row for row in rows if row[figure] and ("superseded" in row) == superseded]


def gpu_of(row: Mapping[str, Any]) -> str:
    """Return the GPU of a row of TensorRT 8's, such as H100: its own, or that of the whole file."""
    device: str = row.get("device", result(TENSORRT8)["device"])
    return device.split()[1]


def _fp16_ms(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    """Return the milliseconds of our FP16 graph by network and batch."""
    floats = [row for row in rows if (row["precision"], row["how"]) == ("fp16", "ours")]
    return {(row["network"], row["batch"]): row["ms"] for row in floats}


def _variant(network: str) -> str:
    return network.upper().replace("YOLOV6", "YOLOv6-").replace("RELU", "ReLU")


def tensorrt8_speed() -> str:
    """INT8 against FP16 on TensorRT 8, networks with random weights, a line a network and batch."""
    rows = tensorrt8_rows("ms")
    lines = []
    for row in rows:
        if (row["precision"], row["how"]) == ("int8", "ptq"):
            alike = [r for r in rows if r["date"] == row["date"]]
            fp16 = _fp16_ms(alike).get((row["network"], row["batch"]))
            lines.append(
                [
                    _variant(row["network"]),
                    row["batch"],
                    f"{fp16:.3f}" if fp16 else "",
                    f"{row['ms']:.3f}",
                    picture_tables.number(1e3 * row["batch"] / fp16) if fp16 else "",
                    picture_tables.number(row["fps"]),
                    f"**{fp16 / row['ms']:.2f}**" if fp16 else "",
                    f"{row['int8_convolutions']} of {row['convolutions']}",
                    gpu_of(row),
                    row["date"][:10],
                ]
            )
    head = ["", "batch", "FP16, ms", "INT8, ms", "FP16, images/s", "INT8, images/s"]
    head += ["INT8 to FP16", "convolutions in INT8", "GPU", "measured"]
    return markdown(head, lines)


def tensorrt8_variants(superseded: bool = False) -> str:
    """Other ways to quantize and decode, or former forms of the graph, against FP16 at batch 32."""
    rows = tensorrt8_rows("ms", superseded)
    floats = {**_fp16_ms(tensorrt8_rows("ms")), **_fp16_ms(rows)}
    lines = []
    for row in rows:
        if not superseded and (row["precision"], row["how"]) in (("fp16", "ours"), ("int8", "ptq")):
            continue
        fp16 = row.get("fp16_ms", floats[row["network"], row["batch"]])
        lines.append(
            [
                _variant(row["network"]),
                TENSORRT8_FORMS[row["precision"], row["how"]],
                row["int8_convolutions"],
                f"{row['ms']:.3f}",
                picture_tables.number(row["fps"]),
                f"{fp16 / row['ms']:.2f}",
                row["date"][:10],
                *([row["superseded"]] if superseded else []),
            ]
        )
    head = ["", "form", "INT8 convolutions", "ms", "images/s", "to FP16", "measured"]
    return markdown([*head, "replaced by"] if superseded else head, lines)


def tensorrt8_again() -> str:
    """FP16 and INT8 of the same networks, built and measured again in other runs."""
    runs: dict[tuple[str, str, int, str], dict[str, float]] = {}
    for row in (*tensorrt8_rows("ms"), *result(TENSORRT8)["again"]):
        if row.get("how", "ours") in ("ours", "ptq") and "superseded" not in row:
            gpu = gpu_of(row)
            run = runs.setdefault((row["network"], gpu, row["batch"], row["date"]), {})
            run[row["precision"]] = row["ms"]
    lines = []
    for (network, gpu, batch, date), times in sorted(runs.items()):
        if (
            batch == 32
            and network in ("yolov6n", "yolov6s", "yolov6m")
            and {
                "fp16",
                "int8",
            }
            <= times.keys()
        ):
            fp16, int8 = times["fp16"], times["int8"]
            cells = [f"{fp16:.3f}", f"{int8:.3f}", f"{fp16 / int8:.2f}"]
            lines.append([_variant(network), gpu, date, *cells])
    return markdown(["batch 32", "GPU", "run", "FP16, ms", "INT8, ms", "INT8 to FP16"], lines)


def tensorrt8_accuracy(superseded: bool = False) -> str:
    """AP of trained detectors on TensorRT 8, and of the same files on a CPU."""
    checkpoints = {
        "yolov6n-sample": "sample",
        "yolov6n-authors": "the authors'",
        "yolov6n": "sample of 125 epochs",
    }
    order = list(checkpoints)
    lines = []
    for row in sorted(
        tensorrt8_rows("ap", superseded),
        key=lambda row: (order.index(row["network"]), row["int8_convolutions"], row["precision"]),
    ):
        change = row.get("ap_change")
        agreement = row.get("agreement_with_cpu")
        lines.append(
            [
                checkpoints[row["network"]],
                TENSORRT8_FORMS[row["precision"], row["how"]] + _release(row),
                f"{row['int8_convolutions']} of {row['convolutions']}",
                " and ".join(f"{ap:.4f}" for ap in row.get("ap_of_builds", [row["ap"]])),
                "" if row["ap_cpu"] is None else f"{row['ap_cpu']:.4f}",
                f"{change[0]:+.4f} ({change[1]:+.4f} to {change[2]:+.4f})" if change else "",
                f"{agreement:.3f}" if agreement else "",
                gpu_of(row),
            ]
        )
    head = ["checkpoint", "precision", "convolutions in INT8", "AP on the GPU", "AP on a CPU"]
    return markdown([*head, "difference", "agreement", "GPU"], lines)


def _release(row: Mapping[str, Any]) -> str:
    version: str = row["backend_version"]
    return "" if version == "8.6.0" else f", TensorRT {version}"


def tensorrt8_peers() -> str:
    """Detectors of the paper's Table 1 next to the YOLOv6 of their size, and the paper's ratios."""
    rows = [row for row in result(TENSORRT8)["peers"]["rows"] if "superseded" not in row]
    paper = {detector.name.upper(): detector for detector in TABLE_1}  # YOLOv7-Tiny: the last, 640
    own = {(row["together"], row["date"]): row for row in rows if row["how"] == "ours"}
    lines = []
    for row in rows:
        if row["how"] == "ours":
            continue
        batch = row["batch"]
        ours = own[row["together"], row["date"]]
        theirs = paper[row["network"].upper()]
        same = paper[_variant(ours["network"]).upper()]
        on_t4 = same.fps_32 / theirs.fps_32 if batch == 32 else same.fps_1 / theirs.fps_1
        lines.append(
            [
                theirs.name,
                batch,
                f"{row['ms']:.3f}",
                picture_tables.number(row["fps"]),
                _variant(ours["network"]),
                f"{ours['ms']:.3f}",
                f"**{row['ms'] / ours['ms']:.2f}**",
                f"{on_t4:.2f}",
                row["date"][:10],
            ]
        )
    head = ["detector", "batch", "ms", "images/s", "YOLOv6 of its size", "its ms"]
    return markdown([*head, "times as fast", "paper (T4)", "measured"], lines)


def tensorrt8_others() -> str:
    """ONNX Runtime on the GPU, and TensorRT-RTX, next to TensorRT 8."""
    data = result(TENSORRT8)
    lines = [
        [
            _variant(row["network"]),
            row["precision"].upper(),
            f"{row['how']}, {row['backend_version']}",
            row["batch"],
            f"{row['ms']:.2f}",
            f"{row['ap']:.4f}" if row.get("ap") else "",
            f"{row['ap_cpu']:.4f}" if row.get("ap_cpu") else "",
        ]
        for row in (*data["onnxruntime"], *data["tensorrt_rtx"])
    ]
    return markdown(["", "", "", "batch", "ms", "AP", "AP on a CPU"], lines)


def tensorrt8_forms() -> str:
    """Parts of detectors in several forms on TensorRT 8, alone."""
    rows = []
    for part, forms in result(TENSORRT8)["forms_us"].items():
        if part == "what":
            continue
        for form, time in forms.items():
            label = form.replace("fp16", "FP16").replace("int8", "INT8")
            rows.append([part, label, f"{time:.0f}", f"{forms['fp16'] / time:.2f}"])
    return markdown(["part", "form", "us", "times FP16's speed"], rows)


def summary() -> str:
    """Return the sample's AP and S's speed by precision: the README's one table."""
    accuracy = {
        row["precision"]: row["AP"] for row in result("sample-cpu.json")["rows"] if "how" not in row
    }
    speed = {
        (row["precision"], row["how"]): row["fps"]
        for row in tensorrt8_rows("fps")
        if (row["network"], row["batch"]) == ("yolov6s", 32)
    }
    lines = []
    for form in (("fp32", "ours"), ("fp16", "ours"), ("int8+float6", "ptq"), ("int8", "ptq")):
        line = [TENSORRT8_FORMS[form], f"{accuracy[form[0]]:.4f}", "", ""]
        if form in speed:
            ratio = speed[form] / speed["fp16", "ours"]
            line[2:] = [picture_tables.number(speed[form]), f"{ratio:.2f}"]
        lines.append(line)
    return markdown(["", "AP", "images/s", "to FP16"], lines)


def tensorrt8_layers() -> str:
    """Where the time of an engine goes on TensorRT 8, by the kind of layer."""
    found = result(TENSORRT8)["layers_us"]
    sums: dict[str, dict[str, float]] = {}
    for form, layers in found.items():
        for name, microseconds in layers.items():
            kind = layer_kind(name)
            sums.setdefault(kind, {}).setdefault(form, 0.0)
            sums[kind][form] += microseconds
    lines = [
        [kind, *(f"{times.get(form, 0):.0f}" for form in found)]
        for kind, times in sorted(sums.items(), key=lambda item: -max(item[1].values()))
    ]
    lines.append(["sum", *(f"{sum(layers.values()):.0f}" for layers in found.values())])
    heads = [TENSORRT8_FORMS[form, "ours" if form == "fp16" else "ptq"] for form in found]
    return markdown(["us, YOLOv6-S, batch 32", *heads], lines)


TRITON_CPU, TRITON_GPU = "triton-cpu.json", "triton-gpu.json"
TRITON_ENTRIES = {
    "tensors": "tensors",
    "tensors_alone": "tensors, alone",
    "pictures": "pictures",
    "pictures_alone": "pictures, alone",
}
"""Names of `triton_load`'s entries in the documents."""


_NOT_MEASURED = "Not measured yet.\n"


def triton_where(name: str) -> str:
    """Environment of Triton's figures, and whether its boxes are ours."""
    data = result(name)
    same = data["equal"]
    protocols = " and ".join(
        f"{same[name]['equal_to_detect']} of {same['images']} over {label}"
        for name, label in (("http", "HTTP"), ("grpc", "gRPC"))
    )
    return (
        f"{data['cpu']}, {data['cores']} cores, {data['backend']}, YOLOv6-N, {data['precision']}, "
        f"batches of up to {data['batch']}, {data['date'][:10]}: `{data['command']}`. "
        f"{data.get('remark', '')} Images of the sample whose boxes, scores and classes are those "
        f"of `infer` to the last bit: {protocols}, with {same['objects']} objects.\n"
    )


def triton_load(name: str) -> str:
    """Throughput and latency of each entry by the number of requests at a time."""
    found = {(row["entry"], row["concurrency"]): row for row in result(name)["load"]}
    rows = []
    for count in sorted({count for _, count in found}):
        cells = []
        for entry in TRITON_ENTRIES:
            row = found[entry, count]
            cells.append(
                f"{row['per_second']:.1f}, {1e3 * row['p99']:.0f} ms ({row['mean_batch']:.1f})"
            )
        rows.append([count, *cells])
    head = ["at a time: throughput, p99 (mean batch)", *TRITON_ENTRIES.values()]
    return markdown(head, rows)


def triton_bench(name: str) -> str:
    """Throughput at 16 at a time over that of `bench`, in turns."""
    data = result(name)
    part = data["bench"]
    ratios = sorted(one["ratio"] for one in part["rounds"])
    latency = statistics.median(one["p99"] for one in part["rounds"])
    spent = sorted(one["cpu_ratio"] for one in part["rounds"])
    return (
        f"Tensors at 16 at a time, over `bench` of the same engine at batch {data['batch']} on the "
        f"same cores, alternately: **{part['ratio']:.2f}** times its throughput, the median of "
        f"{len(ratios)} rounds ({ratios[0]:.2f} to {ratios[-1]:.2f}), p99 {1e3 * latency:.0f} ms. "
        "By processor time an image, of server and clients together, it is "
        f"**{part['cpu_ratio']:.2f}** times ({spent[0]:.2f} to {spent[-1]:.2f}).\n"
    )


def triton_soak() -> str:
    """Resources that the server holds during a long load."""
    seen = result(TRITON_CPU)["soak"]
    last = seen[-1]["seconds"]
    rows = []
    for share in (0.1, 0.25, 0.5, 0.75, 1):
        row = min(seen, key=lambda one: abs(one["seconds"] - share * last))
        rows.append(
            [
                row["seconds"],
                *(row[name] for name in ("good", "refused", "gone", "wrong")),
                f"{row['memory'] / 1e6:.0f}",
                f"{row['shared_memory'] / 1e6:.1f}",
                row["files"],
            ]
        )
    head = ["seconds of load", "good requests answered", "bad ones refused", "clients gone"]
    return markdown([*head, "wrong answers", "MB", "MB shared", "open files"], rows)


def ray_on_cpus() -> str:
    """Scaling of `infer --ray` over one-core nodes, and its cost against `infer`."""
    found = result("ray-cpu.json")
    runs = {
        ("nodes", "1"): "1 node of one core",
        ("nodes", "2"): "2 nodes of one core",
        ("plain", "0"): "`infer`",
        ("plain", "1"): "`infer --ray local`",
    }
    rows = []
    for (part, size), label in runs.items():
        data = found[part]
        rates = [one["images_s"] for one in data["rounds"] if str(one["size"]) == size]
        rows.append(
            [
                label,
                data["pictures"],
                f"{data['images_s'][size]:.1f}",
                f"{min(rates):.1f} to {max(rates):.1f}",
                f"{data['times_the_first'][size]:.2f}",
            ]
        )
    head = ["run", "pictures", "images/s", "lowest and highest run", "times the first"]
    return markdown(head, rows)


def ray_on_gpus() -> str:
    """Scaling of `infer --ray` over GPUs of one host."""
    if not (RESULTS / "ray-gpu.json").is_file():
        return _NOT_MEASURED
    data = result("ray-gpu.json")
    first = data["rounds"][0]
    rows = []
    for run in data["rounds"]:
        times = run["images_s_running"] / first["images_s_running"]
        rows.append(
            [
                run["size"],
                data["pictures"],
                f"{run['start_s']:.1f}",
                f"{run['images_s']:.0f}",
                f"{run['images_s_running']:.0f}",
                f"{times:.2f}",
            ]
        )
    head = ["GPUs", "pictures", "start, s", "images/s, start included", "while it runs"]
    return markdown([*head, "times one GPU"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "ray-cpu": ray_on_cpus,
    "summary": summary,
    "tensorrt8-speed": tensorrt8_speed,
    "tensorrt8-variants": tensorrt8_variants,
    "tensorrt8-again": tensorrt8_again,
    "tensorrt8-superseded": functools.partial(tensorrt8_variants, superseded=True),
    "tensorrt8-accuracy": tensorrt8_accuracy,
    "tensorrt8-accuracy-125": functools.partial(tensorrt8_accuracy, superseded=True),
    "tensorrt8-peers": tensorrt8_peers,
    "tensorrt8-others": tensorrt8_others,
    "tensorrt8-layers": tensorrt8_layers,
    "tensorrt8-forms": tensorrt8_forms,
    "int8-steps": int8_steps,
    "int8-real-networks": lambda: int8_real_networks(
        lambda tool: tool == "ours" or not tool.startswith("ours")
    ),
    "int8-real-float-layers": lambda: int8_real_networks(lambda tool: "auto" in tool),
    "int8-real-others": lambda: int8_real_networks(lambda tool: tool in INT8_OTHERS),
    "int8-real-draws": int8_draws,
    "gpu-decoding": gpu_decoding,
    "gpu-fp8": gpu_fp8,
    "gpu-fp8-accuracy": gpu_fp8_accuracy,
    "gpu-streams": gpu_streams,
    "gpu-whole": gpu_whole,
    "gpu-accuracy": gpu_accuracy,
    "gpu-where": gpu_where,
    "pictures-where": lambda: picture_tables.where(result(picture_tables.RESULT)),
    **{name: functools.partial(pictures, name) for name in picture_tables.TABLES},
    "suppression": suppression,
    "suppression-where": suppression_where,
    "cpu-suppression": cpu_suppression,
    "qat-int8": qat_int8,
    "qat-visible": qat_visible,
    "qat-where": qat_where,
    "training": training,
    "training-speed": training_speed,
    "triton-where": lambda: triton_where(TRITON_CPU),
    "triton-load": lambda: triton_load(TRITON_CPU),
    "triton-bench": lambda: triton_bench(TRITON_CPU),
    "triton-gpu-where": lambda: triton_where(TRITON_GPU),
    "triton-gpu-load": lambda: triton_load(TRITON_GPU),
    "triton-gpu-bench": lambda: triton_bench(TRITON_GPU),
    "ray-gpu": ray_on_gpus,
    "triton-soak": triton_soak,
    "rep-optimizer": rep_optimizer,
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def result(name: str) -> Any:
    """Return the content of a committed result."""
    return read_json(RESULTS / name)


def main() -> None:
    """Rewrite the tables, or check them."""
    parser = argparse.ArgumentParser(description="The documents' tables from benchmarks/results/.")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        filled = tables_filled(text)
        if filled == text:
            continue
        if options.check:
            name = document.relative_to(ROOT)
            sys.exit(f"{name} has tables that differ from benchmarks/results/; run this script.")
        write_bytes(document, filled.encode())


if __name__ == "__main__":
    main()
