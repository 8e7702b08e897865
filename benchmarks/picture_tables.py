"""The tables of the way from pictures to boxes, from what `picture_pipeline` measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

RESULT = "h100-pictures.json"


def where(result: dict[str, Any]) -> str:
    """Where and when it was measured."""
    gpu = result["gpu"] or {}
    return (
        f"{gpu.get('name')}, driver {gpu.get('driver')}, {result['cores']} cores, "
        f"{result['backend']} {result['backend_version']}, {result['date'][:10]}: "
        f"`{result['command']}`. {result.get('note', '')}\n"
    )


def single(result: dict[str, Any]) -> list[list[Any]]:
    """One image to its boxes, against the engine."""
    rows = result["parts"]["single"]
    head = ["network, confidence", *dict.fromkeys(row["what"] for row in rows)]
    lines: list[list[Any]] = [head]
    for key in dict.fromkeys((row["network"], row["confidence"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["confidence"]) == key]
        cells = [f"{row['ms']:.3f} ms, {row['to_engine']:.2f}" for row in mine]
        lines.append([f"{key[0]}, {key[1]:g}", cells[0].split(",")[0], *cells[1:]])
    return lines


def batches(result: dict[str, Any]) -> list[list[Any]]:
    """Batches of images in ordinary memory to boxes, and JPEGs in memory to boxes."""
    lines: list[list[Any]] = [
        [
            "batch 32, confidence",
            "engine alone",
            "images to boxes",
            "to the engine",
            "JPEG to boxes",
        ]
    ]
    lines[0] += ["slowest stage alone", "to it", "cores busy"]
    jpegs = {(row["network"], row["confidence"]): row for row in result["parts"]["jpeg"]}
    rows = result["parts"]["batches"]
    for key in dict.fromkeys((row["network"], row["confidence"]) for row in rows):
        mine = {row["what"]: row for row in rows if (row["network"], row["confidence"]) == key}
        best, jpeg = mine["process"], jpegs[key]
        slowest = jpeg["slowest_stage"]
        lines.append(
            [
                f"{key[0]}, {key[1]:g}",
                number(mine["engine"]["fps"]),
                number(best["fps"]),
                f"{best['to_engine']:.2f}",
                number(jpeg["whole_fps"]),
                f"{slowest}: {number(jpeg[slowest + '_fps'])}",
                f"{jpeg['to_slowest_stage']:.2f}",
                f"{jpeg['cores']:.1f}",
            ]
        )
    return lines


def stages(result: dict[str, Any], part: str = "stages") -> list[list[Any]]:
    """Milliseconds of each stage of a batch of 32, and images a second alone."""
    reports = result["parts"][part]
    lines: list[list[Any]] = [
        ["stage", "place", *(f"{report['network']}, {report['precision']}" for report in reports)]
    ]
    for index, stage in enumerate(reports[0]["stages"]):
        cells = [
            f"{one['ms']:.3f} ms, {number(one['fps'])}"
            for one in (report["stages"][index] for report in reports)
        ]
        lines.append([stage["name"], stage["place"], *cells])
    whole = [f"{number(one['fps'])}, {one['to_slowest_place']:.2f} of it" for one in reports]
    lines.append(["all together, to the slowest place", "", *whole])
    return lines


def decoding(result: dict[str, Any]) -> list[list[Any]]:
    """JPEG decoding alone: rates by batch size, and how far pixels are from OpenCV's."""
    sizes = (1, 8, 32, 64)
    lines: list[list[Any]] = [
        ["decoder", *(f"images/s, {size} at a time" for size in sizes), "mean difference, levels"]
    ]
    lines[0].append("largest")
    for row in result["parts"]["decoding"]:
        if "mean_levels" not in row:
            lines.append([row["decoder"], "not on this GPU", *[""] * (len(sizes) + 1)])
            continue
        rates = [number(row[f"fps_{size}"]) if f"fps_{size}" in row else "" for size in sizes]
        lines.append([row["decoder"], *rates, f"{row['mean_levels']:.3f}", row["most_levels"]])
    return lines


def accuracy(result: dict[str, Any]) -> list[list[Any]]:
    """AP with pictures prepared on the CPU, and how far it is from that otherwise."""
    rows = result["parts"]["accuracy"]
    lines: list[list[Any]] = [["checkpoint, engine", "AP, pictures on the CPU"]]
    lines[0] += [
        "letterbox on the GPU",
        "JPEG decoder too",
        "as many values off at random, on the CPU",
    ]
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        cpu, letterbox, decoder, *draws = [row["AP_to_CPU"] for row in mine]
        cells = [f"{mine[0]['AP'] + cpu:.5f}", f"{letterbox:+.5f}", f"{decoder:+.5f}"]
        lines.append([network, *cells, f"{min(draws):+.5f} to {max(draws):+.5f}"])
    return lines


def gpus(result: dict[str, Any]) -> list[list[Any]]:
    """The JPEG pipeline on several GPUs."""
    lines: list[list[Any]] = [["GPUs", "JPEGs", "images a second", "to one"]]
    for row in result["parts"]["gpus"]:
        lines.append([row["gpus"], row["way"], number(row["fps"]), f"{row['to_one']:.2f}"])
    return lines


def one_image(result: dict[str, Any]) -> list[list[Any]]:
    """Microseconds of the steps of one image, on the GPU and on the host."""
    rows = result["parts"]["steps"]
    heads = [f"{row['network'].split(',')[0]}, {row['confidence']:g}" for row in rows]
    lines: list[list[Any]] = [["us", *heads]]
    for step in (key for key in rows[0] if key not in ("network", "confidence")):
        lines.append([step, *(f"{row[step]:.0f}" for row in rows)])
    return lines


def kernels(result: dict[str, Any]) -> list[list[Any]]:
    """Microseconds that each kernel of the suppression adds to a graph, of one image of N."""
    steps = ("find", "rank", "compare", "suppress", "all")
    lines: list[list[Any]] = [
        ["confidence, kernels", "machine", *steps, "page-locked image to boxes, to the engine"]
    ]
    for row in sorted(result["parts"]["kernels"], key=lambda row: row["confidence"]):
        lines.append(
            [
                f"{row['confidence']:g}, {row['revision']}",
                row["lease"],
                *(f"{row[step]:.1f}" for step in steps),
                f"{row['page_locked_to_engine']:.2f}",
            ]
        )
    return lines


def number(value: float) -> str:
    """Return a rate with a thin gap between thousands."""
    return f"{value:,.0f}".replace(",", " ")


TABLES: dict[str, Callable[[dict[str, Any]], list[list[Any]]]] = {
    "pictures-single": single,
    "pictures-batches": batches,
    "pictures-stages": stages,
    "pictures-int8": functools.partial(stages, part="stages_tensorrt8"),
    "pictures-gpus": gpus,
    "pictures-one": one_image,
    "pictures-kernels": kernels,
    "pictures-decoding": decoding,
    "pictures-accuracy": accuracy,
}
