"""The paper's tables that this hardware can show, theirs and ours side by side, never mixed.

    python -m benchmarks.paper_tables --measure 1,20   measures; minutes on two cores
    python -m benchmarks.paper_tables                  writes docs/measurements/paper.md
    python -m benchmarks.paper_tables --check          fails where that is out of date

Tables 1 (counts) and 20 (CPU) are measured here, into results/paper-tables.json; speeds of Tables 1
and 17 come from `benchmarks.gpu` and `benchmarks.tensorrt8`, every AP from `benchmarks.ablations`.
Theirs is COCO, ours is the sample data set, since COCO cannot be trained on here: directions can be
compared, figures cannot. Whether ours agree is written by rule, see `verdict`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ablation_variants, paper
from benchmarks.tables import GPU, RESULTS, ROOT, TENSORRT8, gpu_of, markdown, tensorrt8_rows
from trt_yolov6.common.files import read_json, write_bytes, write_json
from trt_yolov6.common.machine import cpu_model, software_versions, timestamp
from trt_yolov6.comparison.rounds import Round, measure_round, summarize_rounds
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.graph.export import ExportSettings
from trt_yolov6.spec import BatchProfile

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
            sys.exit("Table 20: other processes disturbed too many runs; measure it again later.")
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


MEASURED: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "1": measure_counts,
    "20": measure_cpu,
}

# --- writing ------------------------------------------------------------------------------------


def page() -> str:
    """Return the page: for each table a section, the paper's figures first, ours under them."""
    parts = ["# The paper's tables, and ours\n", INTRODUCTION, how_ours_came_about()]
    for number, section in SECTIONS.items():
        parts.append(f"## Table {number}\n")
        if number in MEASURED and number not in read_json(FILE)["tables"]:
            command = f"python -m benchmarks.paper_tables --measure {number}"
            parts.append(f"Ours is not measured yet: `{command}`.\n")
        else:
            parts.append(section())
    parts += ["## Besides the paper's tables\n", besides()]
    parts += ["## Differences by class\n", by_class()]
    return "\n".join(parts)


INTRODUCTION = """Written by `python -m benchmarks.paper_tables`. The paper's figures are of COCO \
2017 val (arXiv 2209.02976), ours of BCCD (blood cells, 364 images, 3 classes): compare what a \
choice changes, not the figures themselves.
"""

HOW = """Each AP of ours, in percent, is of {folds} networks, trained in five-fold \
cross-validation over all {images} images: each network is evaluated on the fold that it never saw.

- **Intervals** are of 95 %. The first is Student's over the folds, which differ in images and \
seeds: it covers chance in training, from five values. The second is a bootstrap over the images, \
of the AP of all folds' detections together.
- **Differences** are paired: the same folds, seeds and draws. "Agree" means that each interval of \
the difference excludes zero on the paper's side, "contradict" on the other side, and "cannot \
tell" that one includes zero.
- **Seeds.** The seed of a fold is its number. "Two seeds" marks the mean of two trainings, the \
second with that number plus 100. Among these are the networks that others are compared with: \
their luck would otherwise be in every difference. A network that is compared with itself, in INT8 \
or with other inputs, has the same seeds on both sides.
"""


def how_ours_came_about() -> str:
    """Return how the APs were made, or that they are not."""
    data = _ablations()
    if data is None:
        return f"{NOT_MEASURED}\n"
    parts = [HOW.format(images=data["images"], folds=data["folds"])]
    parts.append("This much is chance: differences between two trainings with other seeds:\n")
    again = [
        [f"`{row['base']}`", _points(row["folds"]), _points(row["images"])]
        for row in data["repeats"]
        if ablation_variants.VARIANTS[row["base"]].quantized is None
    ]
    parts.append(markdown(["Variant", "over folds", "over images"], again))
    calls = data["calls"]
    minutes = sum(call["seconds"] * len(call["gpus"]) for call in calls) / 60
    packs = [call["pack"] for call in calls]
    parts.append(
        f"Made in {minutes:.0f} minutes of one {calls[0]['device']}, {min(packs)} to {max(packs)} "
        f"trainings side by side under MPS, in {len(calls)} calls of `python -m "
        "benchmarks.ablations`, which `benchmarks/results/ablations.json` lists. Of them:\n"
    )
    remarks = [(call["started"], call["remark"]) for call in calls if "remark" in call]
    parts.append("\n".join(f"- {when[:16].replace('T', ' ')}: {text}" for when, text in remarks))
    parts.append("")
    rows = [
        [
            network,
            f"{entry['epochs']}",
            entry["image_size"],
            entry["batch"],
            _interval(found["folds"]),
            _interval(found["images"]),
            f"{entry['seconds']:.0f} s",
        ]
        for network, name in SCHEDULES.items()
        if (entry := data["variants"].get(name)) is not None
        for found in [data["means"].get(name, entry["AP"])["plain"]]
    ]
    head = ["", "epochs", "pixels", "batch", "AP, mean of folds", "AP, all images", "a training"]
    return "\n".join([*parts, markdown(head, rows)])


SCHEDULES = {
    "YOLOv6-N, default recipe, 125 epochs": "n-full",
    "YOLOv6-S, default recipe, 125 epochs": "s-full",
    "YOLOv6-N, default recipe": "n-default",
    "YOLOv6-S, default recipe": "s-default",
    "YOLOv6-N, as the tables compare it": "n",
    "YOLOv6-S": "s",
    "YOLOv6-T": "t",
    "YOLOv6-M": "m",
    "YOLOv6-L": "l",
    "YOLOv6-L, gradients not clipped": "l-unclipped",
    "YOLOv6-L-ReLU": "l-relu",
}

TWO_SEEDS = ", two seeds"
NOT_MEASURED = "Ours is not measured yet: `python -m benchmarks.ablations`."


def grid(number: str) -> str:
    """Return one of Tables 2 to 14: what a choice brings, theirs, ours, and whether they agree."""
    table = ablation_variants.TABLES[number]
    networks, theirs = paper.ABLATIONS[number]
    head = [table.what, *networks]
    parts = [
        "**The paper's** (AP of COCO):\n",
        markdown(head, [[row, *(_blank(ap) for ap in aps)] for row, aps in theirs.items()]),
    ]
    data = _ablations()
    if data is None or not data["tables"][number]:
        parts.append(f"{NOT_MEASURED}\n")
        return "\n".join(parts)
    own = _own_cells(table, data)
    # One AP alone compares nothing.
    shown = [i for i in range(len(networks)) if sum(bool(row[i]) for row in own.values()) > 1]
    rows = [[row, *(cells[index] for index in shown)] for row, cells in own.items()]
    rows = [row for row in rows if any(row[1:])]
    parts.append(f"**Ours** (AP of BCCD; {_schedule(table, data, shown)}):\n")
    parts.append(markdown([table.what, *(networks[index] for index in shown)], rows))
    compared = data["tables"][number]
    lines = []
    for row in compared:
        column = networks.index(row["network"])
        change = _their_change(theirs, row, column)
        lines.append(
            [
                row["network"],
                f"{row['row']} against {row['base']}",
                "" if change is None else f"{change:+.1f}",
                _points(row["folds"]),
                _points(row["images"]),
                "" if change is None else f"**{verdict(change, row)}**",
            ]
        )
    parts.append(markdown(["Network", "Change", "theirs", *_INTERVALS, ""], lines))
    absent = [
        f"{label} in {network[7:]}"
        for column, network in enumerate(networks)
        for label, cells in table.rows.items()
        if (cell := cells[column]) is not None and cell.variant not in data["variants"]
    ]
    parts.append(f"{sentence(theirs, networks, compared)}{_not_run(absent)}\n")
    if number in NOTES:
        parts.append(f"{NOTES[number]}\n")
    apart = broke_away(table, data["variants"])
    if apart:
        parts.append(f"{apart}\n")
    return "\n".join(parts)


_BLOCKS = (
    "The paper's have VariFocal loss, GIoU and distribution focal loss here; ours their recipe's "
)
_CLIPPED = "L's gradients are clipped to a norm of 10 here, as `train` does by default."
_MISTAKE = " had GIoU, by a mistake in `train`'s defaults that has been corrected since."
_LOSSES = "The paper's have focal loss and GIoU here, ours VariFocal loss and, in N, SIoU."
NOTES = {
    "2": _BLOCKS + "losses: N and S without the last, N with SIoU; N with CSPStackRep" + _MISTAKE,
    "3": _CLIPPED,
    "4": _BLOCKS + "losses: N without the last, with SIoU; N with SiLU or LReLU" + _MISTAKE,
    "6": _LOSSES,
    "7": _LOSSES,
    "10": _LOSSES + " With the paper's losses: [below](#besides-the-papers-tables).",
    "11": _LOSSES + " With the paper's: [below](#besides-the-papers-tables). With objectness, ours "
    "have the whole head of v0.1: boxes are offsets and logarithms of sizes from a cell's corner, "
    "and every score is multiplied by the objectness.",
    "12": "Ours have 60 epochs in the place of 300, and 80 in that of 400.",
    "13": _CLIPPED,
}
"""By number of the table: in what else our trainings differ from the paper's."""


APART = 1.1
"""A training diverged if its loss ends above this, times the median of its variant's folds."""


def broke_away(table: ablation_variants.Table, variants: Mapping[str, Any]) -> str:
    """Return a sentence on the trainings of a table that diverged; empty where none did."""
    labels = {
        cell.variant: label for label, row in table.rows.items() for cell in row if cell is not None
    }
    repeats = ablation_variants.REPEATS
    again = {repeats[name]: f"{labels[name]}, other seeds" for name in labels if name in repeats}
    names = {name: label for name, label in (labels | again).items() if name in variants}
    found, count = [], 0
    for name, label in names.items():
        losses = variants[name]["losses"]
        count += len(losses)
        for fold, loss in enumerate(losses):
            usual = statistics.median(losses)
            if loss > APART * usual:
                found.append(f"fold {fold} of {label}: {loss:.2f}, not {usual:.2f}")
    if not found:
        return ""
    return (
        f"Of these {count} trainings {len(found)} diverged: the loss ended more than a tenth "
        f"above the median of the five folds ({'; '.join(found)}). What diverged counts as it "
        "came out, and widens the intervals over folds."
    )


def verdict(theirs: float, ours: Mapping[str, Any]) -> str:
    """Return whether a difference agrees with the paper's, by its intervals.

    Args:
        theirs: difference of AP in points.
        ours: intervals over `folds` and, None where it is not known, over `images`, 0..1.
    """
    known = [one for one in (ours["folds"], ours["images"]) if one is not None]
    above = all(one["low"] > 0 for one in known)
    below = all(one["high"] < 0 for one in known)
    if not above and not below:
        return "cannot tell"
    return "agree" if (above and theirs > 0) or (below and theirs < 0) else "contradict"


def sentence(
    theirs: Mapping[str, tuple[float | None, ...]],
    networks: Sequence[str],
    compared: Sequence[dict[str, Any]],
) -> str:
    """Return in words what the comparisons of a table come to, and what they could show."""
    verdicts = []
    for row in compared:
        change = _their_change(theirs, row, networks.index(row["network"]))
        if change is not None:
            verdicts.append((f"{row['row']} in {row['network'][7:]}", verdict(change, row)))
    return _in_words(verdicts, compared)


def _in_words(verdicts: Sequence[tuple[str, str]], compared: Sequence[Mapping[str, Any]]) -> str:
    said: dict[str, list[str]] = {"agree": [], "contradict": [], "cannot tell": []}
    for name, kind in verdicts:
        said[kind].append(name)
    parts = []
    for kind, names in said.items():
        if names:
            what = f"{len(names)} of {sum(map(len, said.values()))} comparisons"
            listed = "" if kind == "cannot tell" else f" ({'; '.join(names)})"
            parts.append(f"{kind} in {what}{listed}")
    ours = f"Ours {'; '.join(parts)}. " if parts else ""
    return ours + smallest(compared)


def smallest(compared: Sequence[Mapping[str, Any]]) -> str:
    """Return the sentence on the smallest difference that comparisons can show."""
    halves = [
        max((one["high"] - one["low"]) / 2 for one in (row["folds"], row["images"]) if one)
        for row in compared
    ]
    most = 100 * statistics.median(halves)
    return f"The smallest difference that this can show is about {most:.1f} points."


def _not_run(names: Sequence[str]) -> str:
    """Return a sentence on what was not run, to follow another one; empty where all was."""
    return f" Not run: {'; '.join(names)}." if names else ""


def _their_change(
    theirs: Mapping[str, tuple[float | None, ...]], row: Mapping[str, Any], column: int
) -> float | None:
    own, base = theirs[row["row"]][column], theirs[row["base"]][column]
    return None if own is None or base is None else own - base


def _own_cells(table: ablation_variants.Table, data: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return our APs as text by row, empty where there is none."""
    rows = {}
    for label, cells in table.rows.items():
        texts = []
        for cell in cells:
            entry = None if cell is None else data["variants"].get(cell.variant)
            found, mark = None, ""
            if entry is not None and cell is not None:
                found = entry["AP"].get(cell.input)
                means = data["means"].get(cell.variant, {})
                if cell.input in means and (table.is_plain or means.keys() == entry["AP"].keys()):
                    found, mark = means[cell.input], TWO_SEEDS
            texts.append("" if found is None else _ap(found) + mark)
        rows[label] = texts
    return rows


def _schedule(
    table: ablation_variants.Table, data: Mapping[str, Any], columns: Sequence[int]
) -> str:
    """Return epochs, size, folds and seeds of the trainings in a table's columns in words."""
    epochs: dict[str, list[str]] = {}
    sizes = set()
    for column in columns:
        network = table.columns[column]
        cells = [row[column] for row in table.rows.values()]
        names = [cell.variant for cell in cells if cell is not None]
        own = [data["variants"][name] for name in names if name in data["variants"]]
        if own:
            text = " or ".join(str(value) for value in sorted({entry["epochs"] for entry in own}))
            epochs.setdefault(text, []).append(network[7:])
            sizes |= {entry["image_size"] for entry in own}
    if len(epochs) == 1:
        lengths = f"{next(iter(epochs))} epochs"
    else:
        lengths = ", ".join(f"{text} epochs of {' and '.join(own)}" for text, own in epochs.items())
    return (
        f"{lengths} at {' or '.join(map(str, sorted(sizes)))} pixels, {data['folds']} folds, a "
        f"seed each, {data['images']} images"
    )


def _ablations() -> dict[str, Any] | None:
    path = RESULTS / ABLATIONS
    if not path.is_file():
        return None
    data: dict[str, Any] = read_json(path)
    return data


_INTERVALS = ("ours, over folds", "over images")


def _ap(found: Mapping[str, Any]) -> str:
    """Return an AP as text: of all images, else the mean of the folds."""
    return _interval(found["images"] or found["folds"])


def _interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{100 * found['value']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def _points(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def _blank(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


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
    enterprise = read_json(RESULTS / TENSORRT8)
    weak = {
        (row["network"], row["precision"]): row
        for row in tensorrt8_rows("fps")
        if row["batch"] == 32 and row["how"] in ("ours", "ptq")
    }
    rows = []
    for row in _measured("1"):
        fps = [speeds.get((row["variant"], batch)) for batch in (1, 32)]
        name = row["variant"].replace("_", "-")
        engines = [weak[name, precision] for precision in ("fp16", "int8")]
        fps += [engine["fps"] for engine in engines]
        rows.append(
            [
                NAMES[row["variant"]],
                *("" if value is None else f"{value:.0f}" for value in fps),
                gpu_of(engines[0]),
                "" if fps[0] is None else f"{1e3 / fps[0]:.3f}",
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['flops'] / 1e9:.1f}",
            ]
        )
    head = ["Method", "FPS (b1)", "FPS (b32)", "TensorRT 8, FP16 (b32)", "TensorRT 8, INT8 (b32)"]
    head += ["TensorRT 8, GPU", "ms (b1)", "Params, M", "FLOPs, G"]
    version = f"TensorRT {enterprise['rows'][0]['backend_version']} on the GPU that a row names"
    return _beside(
        "T4, TensorRT 7.2, FP16",
        theirs,
        f"{_gpu()}, FP16; {version}; random weights; counted on our networks, fused",
        markdown(head, rows),
    )


def variants_table(
    rows: Mapping[str, str],
    pairs: Mapping[tuple[str, str], float | None],
    *,
    both_seeds: bool = False,
    speeds: Mapping[str, str] | None = None,
) -> str:
    """Return a table of variants' AP and one of differences; or that they are not measured.

    Args:
        rows: label -> variant.
        pairs: variants and what each is compared with -> the paper's difference in points, None
            where it has none.
        both_seeds: show the mean of two trainings, where there are two.
        speeds: precision, as in TensorRT's results, by label: its speed stands next to the AP.
    """
    data = _ablations()
    there = {} if data is None else data["variants"]
    if data is None or there.keys().isdisjoint(rows.values()):
        return f"{NOT_MEASURED}\n"
    labels = {name: label for label, name in rows.items()}
    means = data["means"] if both_seeds else {}
    cells = []
    for label, name in rows.items():
        if name in means:
            cells.append([label, _ap(means[name]["plain"]) + TWO_SEEDS])
        elif name in there:
            cells.append([label, _ap(there[name]["AP"]["plain"])])
    head = ["YOLOv6-S", "AP"]
    if speeds is not None:
        fps = int8_speeds()
        head.append("FPS (b32), TensorRT 8 on H100, 640 pixels")
        for row in cells:
            row.append(f"{fps[speeds[row[0]]][32]:.0f}")
    text = markdown(head, cells)
    compared = [row for row in data["pairs"] if (row["variant"], row["base"]) in pairs]
    if compared:
        lines, verdicts = [], []
        for row in compared:
            change = pairs[row["variant"], row["base"]]
            said = None if change is None else verdict(change, row)
            if said is not None:
                verdicts.append((labels[row["variant"]], said))
            lines.append(
                [
                    f"{labels[row['variant']]} against {labels[row['base']]}",
                    "" if change is None else f"{change:+.1f}",
                    _points(row["folds"]),
                    _points(row["images"]),
                    "" if said is None else f"**{said}**",
                ]
            )
        text += "\n" + markdown(["Change", "theirs", *_INTERVALS, ""], lines)
        absent = [label for label, name in rows.items() if name not in there]
        text += f"\n{_in_words(verdicts, compared)}{_not_run(absent)}\n"
    return text


INT8_ROWS = {
    "float": "s",
    "INT8, min-max": "s-ptq",
    "RepOptimizer, float": "s-rep",
    "RepOptimizer, INT8, min-max": "s-rep-ptq",
    "INT8, one scale a layer": "s-ptq-per-tensor",
    "RepOptimizer, INT8, one scale a layer": "s-rep-ptq-per-tensor",
    "head of v0.1, float": "s-objectness",
    "head of v0.1, INT8, min-max": "s-objectness-ptq",
    "head of v0.1, INT8, one scale a layer": "s-objectness-ptq-per-tensor",
    "head of v0.1, RepOptimizer, float": "s-v1-rep",
    "head of v0.1, RepOptimizer, INT8, min-max": "s-v1-rep-ptq",
    "head of v0.1, RepOptimizer, INT8, one scale a layer": "s-v1-rep-ptq-per-tensor",
}
QAT_ROWS = {
    "INT8, min-max": "s-ptq",
    "QAT, distilled": "s-qat-distilled",
    "RepOptimizer, INT8, min-max": "s-rep-ptq",
    "RepOptimizer, QAT": "s-rep-qat",
    "RepOptimizer, QAT, distilled": "s-rep-qat-distilled",
    "RepOptimizer, partial QAT, distilled": "s-rep-partial-distilled",
    "float": "s",
    "RepOptimizer, float": "s-rep",
}
FLOAT_ROWS = {
    "none in float": "s-rep-ptq",
    "mse": "s-rep-six-mse",
    "cosine": "s-rep-six-cosine",
    "snr": "s-rep-six-snr",
    "ap": "s-rep-six-ap",
    "all in float": "s-rep",
}


def exact() -> str:
    """Return in words what the APs of INT8 are of: networks, epochs, folds, seeds and images."""
    data = _ablations()
    if data is None:
        return "YOLOv6-S on BCCD, exact INT8 arithmetic"
    trained, tuned = data["variants"]["s"], data["variants"]["s-rep-qat"]
    return (
        f"YOLOv6-S on BCCD, exact INT8 arithmetic; {trained['epochs']} epochs, of QAT "
        f"{tuned['epochs']} more, at {trained['image_size']} pixels, {data['folds']} folds, a seed "
        f"each, {data['images']} images"
    )


def table_15() -> str:
    """Return the cost of plain PTQ with and without RepOptimizer."""
    theirs = markdown(["Release", "Model", "FP32 AP", "INT8 AP"], [list(r) for r in paper.TABLE_15])
    pairs: dict[tuple[str, str], float | None] = {
        (name, name.split("-ptq")[0]): None for name in INT8_ROWS.values() if "-ptq" in name
    }
    # Of v2.0, and with the head of v0.1 of v1.0.
    pairs |= {("s-rep", "s"): -0.3, ("s-ptq", "s"): -2.1, ("s-rep-ptq", "s-rep"): -0.5}
    pairs |= {
        ("s-v1-rep", "s-objectness"): 0.0,
        ("s-objectness-ptq", "s-objectness"): -7.4,
        ("s-v1-rep-ptq", "s-v1-rep"): -1.5,
    }
    data = _ablations()
    known = {} if data is None else data["means"]
    both = {"s", "s-ptq", "s-rep", "s-rep-ptq"} <= known.keys()
    ours = variants_table(INT8_ROWS, pairs, both_seeds=both) + _rep_optimizer_gains()
    return _beside("YOLOv6-S", theirs, exact(), ours)


def _rep_optimizer_gains() -> str:
    """Return the table of what RepOptimizer saves in INT8; empty where nothing is measured."""
    data = _ablations()
    if data is None or not data["rep_optimizer"]:
        return ""
    # What INT8 costs in Table 15, without RepOptimizer and with it.
    theirs = {"v2.0, min-max": 2.1 - 0.5, "v1.0, min-max": 7.4 - 1.5}
    rows, verdicts = [], []
    for row in data["rep_optimizer"]:
        change = theirs.get(row["row"])
        own = [_points(row["folds"]), _points(row["images"])]
        if change is None:
            rows.append([row["row"], "", *own, ""])
        else:
            verdicts.append((row["row"], verdict(change, row)))
            rows.append([row["row"], f"{change:+.1f}", *own, f"**{verdicts[-1][1]}**"])
    head = ["AP that RepOptimizer saves in INT8", "theirs", *_INTERVALS, ""]
    return f"\n{markdown(head, rows)}\n{_in_words(verdicts, data['rep_optimizer'])}\n"


def table_16() -> str:
    """Return the share of INT8's loss that training recovers."""
    theirs = markdown(["Network", "INT8 AP", "FPS"], [list(row) for row in paper.TABLE_16])
    # Their network in float has an AP of 42.4 (Table 15).
    pairs = {
        ("s-qat-distilled", "s"): None,
        ("s-rep-qat", "s-rep"): None,
        ("s-rep-qat-distilled", "s-rep"): -0.3,
        ("s-rep-partial-distilled", "s-rep"): -0.1,
        ("s-rep-qat-distilled", "s-rep-qat"): None,
        ("s-rep-partial-distilled", "s-rep-qat-distilled"): 0.2,
    }
    speeds = dict.fromkeys(QAT_ROWS, "int8") | {
        "RepOptimizer, partial QAT, distilled": "int8+float6",
        "float": "fp16",
        "RepOptimizer, float": "fp16",
    }
    ours = variants_table(QAT_ROWS, pairs, speeds=speeds)
    return _beside("YOLOv6-S (v1.0), T4", theirs, exact(), ours) + SAME_GRAPH


SAME_GRAPH = """
Speeds are those of Table 17, of random weights: all weights make the same graph, and \
RepOptimizer's network is that with branches once fused.
"""


def int8_speeds() -> dict[str, dict[int, float]]:
    """Return images/s of YOLOv6-S in TensorRT by precision and batch."""
    speeds: dict[str, dict[int, float]] = {}
    for row in tensorrt8_rows("fps"):
        if row["network"] == "yolov6s" and row["how"] in ("ours", "ptq"):
            speeds.setdefault(row["precision"], {})[row["batch"]] = row["fps"]
    return speeds


def table_17() -> str:
    """Return speed of quantized engines."""
    theirs = markdown(
        ["Model", "AP", "FPS (b1)", "FPS (b32)"],
        [["" if cell is None else cell for cell in row] for row in paper.TABLE_17],
    )
    data = read_json(RESULTS / TENSORRT8)
    speeds = int8_speeds()
    batches = sorted({batch for fps in speeds.values() for batch in fps})
    rows = [
        [
            precision.upper().replace("+FLOAT6", ", six layers in float"),
            *(f"{fps[batch]:.0f}" if batch in fps else "" for batch in batches),
        ]
        for precision, fps in speeds.items()
    ]
    where = f"{data['device']}, TensorRT {data['rows'][0]['backend_version']}, random weights"
    ours = markdown(["YOLOv6-S", *(f"FPS (b{batch})" for batch in batches)], rows)
    text = _beside("T4, TensorRT 8", theirs, where, ours)
    return f"{text}\n{_faster(speeds)} The AP of INT8 is in Table 16.\n"


def _faster(speeds: Mapping[str, Mapping[int, float]]) -> str:
    """Return in words by how much INT8 is faster than FP16 at batch 32, theirs and ours."""
    rows = {row[0]: row[3] for row in paper.TABLE_17}
    floating, quantized = rows["YOLOv6-S, FP16"], rows["YOLOv6-S, their QAT"]
    assert floating is not None
    assert quantized is not None
    own = speeds["int8"][32] / speeds["fp16"][32]
    kind = "agree" if own > 1 else "contradict"
    return (
        f"Ours {kind}: INT8 is {own:.2f} times as fast as FP16 at batch 32, theirs "
        f"{quantized / floating:.2f} times; one measurement each, without an interval."
    )


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
    # Without any layer in float, theirs has an AP of 40.9 (Table 15).
    pairs = {(f"s-rep-six-{metric}", "s-rep-ptq"): ap - 40.9 for metric, ap in paper.TABLE_21}
    return _beside(
        "YOLOv6-S (v1.0) with RepOptimizer",
        theirs,
        f"{exact()}; RepOptimizer, min-max; `ap` of training images",
        variants_table(FLOAT_ROWS, pairs),
    )


def table_5() -> str:
    """Return the gain of each design of the network."""
    theirs = markdown(["Network", "AP", "FPS (b32)"], [list(row) for row in paper.TABLE_5])
    return (
        f"**The paper's** (T4, FP16):\n\n{theirs}\nOurs is not measured: the steps lead from "
        "YOLOv5's anchors, backbone and neck, which `train` does not build.\n"
    )


BESIDE = {
    ("s-full", "n-full"): "S against N, 125 epochs at 640 pixels",
    ("s-default", "n-default"): "S against N, the default 300 epochs at 640 pixels",
    ("n-default", "n-full"): "N, the default 300 epochs at 640 pixels against 125",
    ("s-default", "s-full"): "S, the default 300 epochs at 640 pixels against 125",
    ("m-distilled", "m"): "M with M as its teacher against M without, 40 epochs",
    ("m-conv-relu-long", "m-long"): "M of Conv against M of RepConv, both with ReLU, 100 epochs",
    ("m-long", "m"): "M, 100 epochs against 40",
    ("l-wide-neck-long", "l-long"): "L with a wide and shallow neck against L, 100 epochs",
    ("l-long", "l"): "L, 100 epochs against 40",
    ("l", "l-unclipped"): "L with gradients clipped to 10, the default, against L without",
    ("l", "l-by-kernel"): "L with gradients clipped against L without, kernel by kernel",
    ("l-by-kernel", "l-unclipped"): "L without, kernel by kernel against L without, by CUDA graphs",
    **{
        (f"{base}-{what}", base): f"{base[0].upper()} with {loss}, as the paper's Table {number} "
        "has it (focal loss, GIoU)"
        for what, loss, number in (
            ("dfl", "distribution focal loss", 10),
            ("objectness", "objectness", 11),
        )
        for base in ("n-focal-giou", "s-focal")
    },
    ("n-dfl-longer", "n-longer"): "N with distribution focal loss against N without, 80 epochs",
    ("s-csp-longer", "s-longer"): "S of CSPStackRep against S of RepBlock, 80 epochs",
}
"""Comparisons that no table of the paper has, of variants and what each is compared with."""


def besides() -> str:
    """Return the comparisons that stand in no table of the paper."""
    data = _ablations()
    if data is None:
        return f"{NOT_MEASURED}\n"
    known = {(row["variant"], row["base"]): row for row in data["pairs"]}
    rows = [
        [text, _points(known[names]["folds"]), _points(known[names]["images"])]
        for names, text in BESIDE.items()
        if names in known
    ]
    shown = [known[names] for names in BESIDE if names in known]
    made = (
        f"Trained as in the tables above, 60 epochs at 320 pixels (L 40), unless a row says "
        f"otherwise; {data['folds']} folds, {data['images']} images.\n"
    )
    return f"{made}\n{markdown(['Change', *_INTERVALS], rows)}\n{smallest(shown)}\n"


def by_class() -> str:
    """Return the table of differences class by class."""
    data = _ablations()
    if data is None or not data["classes"]:
        return f"{NOT_MEASURED}\n"
    rows = []
    for row in data["classes"]:
        names = [f"`{row['variant']}`", f"`{row['base']}`", row["class"]]
        rows.append([*names, _points(row["folds"]), _points(row["images"])])
    return (
        "Classes count alike in AP, however many objects they have: of 13 in an image, 11 are red "
        "cells (RBC), one is a white cell (WBC), one a platelet. Networks are those of the "
        f"tables above: 60 epochs at 320 pixels, {data['folds']} folds, {data['images']} images."
        "\n\n"
        + markdown(["Variant", "against", "class", *_INTERVALS], rows)
        + f"\n{smallest(data['classes'])}\n"
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "1": table_1,
    **{number: functools.partial(grid, number) for number in ("2", "3", "4")},
    "5": table_5,
    **{number: functools.partial(grid, number) for number in map(str, range(6, 15))},
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
