"""Scores of the ablations: AP of all folds together, and how sure a difference is.

Two intervals of 95 % say how sure. Over images: a bootstrap, paired, of the AP of all detections;
it takes the networks as given. Over folds: Student's t of the five differences of AP, of networks
with the same images and seeds; it knows what training does by chance, from five values.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
import statistics
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ablation_variants import PLAIN, REPEATS, TABLES, VARIANTS, Cell, Table
from benchmarks.folds import (
    FOLDS,
    MeanOf,
    Scorable,
    Truth,
    ap_by_fold,
    ap_of,
    difference,
    load_folds,
    match_all,
    of_class,
    read_truth,
    restored,
    write_folds,
)
from trt_yolov6.common.files import read_json
from trt_yolov6.common.statistics import CONFIDENCE, Interval, student_t
from trt_yolov6.quantization.resampling import MatchedDetections, interval


@dataclass(frozen=True)
class Scored:
    """A variant's networks of all folds, judged with one input."""

    variant: str
    image_size: int
    schedule: float
    """Epochs, over those that the variant asks for of its schedule."""
    by_fold: tuple[float, ...]
    """AP of each fold's network in its own fold, 0..1."""
    matched: MatchedDetections | MeanOf | None
    """Detections of all folds; None where they were lost."""


Scores = Mapping[tuple[str, str], Scored]
"""By variant and input."""


def collect(
    folders: Sequence[Path],
    data: Path,
    *,
    limit: int | None = None,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the results of one or several calls.

    Args:
        folders: what `--out` named, in order of time; of a job that is in several, the last counts,
            unless all folds of its variant are in an earlier one and not in that.
        data: BCCD.
        limit: as for `write_folds`.
        earlier: what `collect` returned before; variants that are in none of the folders are taken
            from it. Their detections are not, so a difference between one of them and one of the
            folders' has no interval over images.
    """
    earlier = {} if earlier is None else earlier
    calls: list[dict[str, Any]] = list(earlier.get("calls", []))
    jobs: dict[tuple[str, int], dict[str, Any]] = {}
    found: dict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
    for folder in folders:
        results = read_json(folder / "ablations.json")
        calls += [call for call in map(_told, results["calls"]) if call not in calls]
        fresh = {(job["variant"], job["fold"]): job for job in results["jobs"]}
        for name in {name for name, _ in fresh}:
            if _is_whole(name, jobs) and not _is_whole(name, fresh):
                # Half of a second try: networks that belong together stay together.
                fresh = {key: job for key, job in fresh.items() if key[0] != name}
        jobs |= fresh
        for variant, fold, given, rows in _stored(folder):
            if (variant, fold) in fresh:
                found[variant, given][fold] = rows
    whole = {
        name: own
        for name in VARIANTS
        if len(own := [jobs[name, fold] for fold in range(FOLDS) if (name, fold) in jobs]) == FOLDS
        and len({(job["epochs"], job["image_size"]) for job in own}) == 1
    }
    with tempfile.TemporaryDirectory() as scratch:
        root = write_folds(data.resolve(), Path(scratch), limit=limit)
        truth, class_names = read_truth(root), load_folds(root).class_names
    scores: dict[tuple[str, str], Scored] = {}
    for name, own in whole.items():
        for given in own[0]["AP"]:
            parts = found[name, given]
            together = None
            by_fold = [job["AP"][given] for job in own]
            if sorted(parts) == list(range(FOLDS)):
                together = match_all(truth, np.concatenate([parts[fold] for fold in range(FOLDS)]))
                by_fold = ap_by_fold(truth, together)
            scores[name, given] = Scored(
                name,
                own[0]["image_size"],
                round(own[0]["epochs"] / VARIANTS[name].stretch),
                tuple(by_fold),
                together,
            )
    kept = {
        name: entry
        for name, entry in earlier.get("variants", {}).items()
        if name in VARIANTS and name not in whole
    }
    for name, entry in kept.items():
        schedule = round(entry["epochs"] / VARIANTS[name].stretch)
        for given, figures in entry["AP"].items():
            scores[name, given] = Scored(
                name, entry["image_size"], schedule, tuple(figures["by_fold"]), None
            )
    variants = kept | {name: _entry(name, own, scores) for name, own in whole.items()}
    means = {key: mean for key in scores if (mean := _mean(key, scores)) is not None}
    found_means = {
        name: {given: _figures(one) for (own, given), one in means.items() if own == name}
        for name in dict.fromkeys(name for name, _ in means)
    }
    for name, own_means in found_means.items():
        for given, figures in own_means.items():
            _take_images(figures, earlier.get("means", {}).get(name, {}).get(given))
    compared_pairs: dict[str, list[dict[str, Any]]] = {
        "repeats": _compared_pairs([(again, name) for name, again in REPEATS.items()], scores, {}),
        "pairs": _compared_pairs(PAIRS, scores, means),
        "rep_optimizer": rep_optimizer_gains(scores, means),
    }
    for kind, own_rows in compared_pairs.items():
        _take_rows(own_rows, earlier.get(kind, []))
    tables = {number: _compared_rows(table, scores, means) for number, table in TABLES.items()}
    for number, own_rows in tables.items():
        _take_rows(own_rows, earlier.get("tables", {}).get(number, []))
    classes = _compared_classes(truth, class_names, scores, means)
    scored = {(row["variant"], row["base"]) for row in classes}
    classes += [
        row for row in earlier.get("classes", []) if (row["variant"], row["base"]) not in scored
    ]
    return {
        "images": len(truth.images),
        "folds": FOLDS,
        "calls": calls,
        "variants": {name: variants[name] for name in VARIANTS if name in variants},
        "repeats": compared_pairs["repeats"],
        "means": found_means,
        "tables": tables,
        "pairs": compared_pairs["pairs"],
        "rep_optimizer": compared_pairs["rep_optimizer"],
        "classes": classes,
    }


_NAMES = ("variant", "base", "network", "row")
"""Fields by which a row of differences is known."""


def _take_rows(rows: Iterable[dict[str, Any]], earlier: Iterable[Mapping[str, Any]]) -> None:
    """Give rows of networks that are as before the interval over images that they had."""
    known = {tuple(row.get(name) for name in _NAMES): row for row in earlier}
    for row in rows:
        _take_images(row, known.get(tuple(row.get(name) for name in _NAMES)))


def _take_images(found: dict[str, Any], earlier: Mapping[str, Any] | None) -> None:
    """Take the interval over images of what was scored before, if it was of the same networks."""
    if found["images"] is None and earlier is not None:
        values = (one["folds"]["value"] for one in (found, earlier))
        if math.isclose(*values, rel_tol=0, abs_tol=1e-9):
            found["images"] = earlier["images"]


def _is_whole(name: str, jobs: Mapping[tuple[str, int], Any]) -> bool:
    return all((name, fold) in jobs for fold in range(FOLDS))


def _told(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call without its machine's folders, and with the last line of each traceback."""
    command = re.sub(r"(?<= )/\S*/(?=\S)", "", call["command"])
    failed = {name: text.strip().splitlines()[-1] for name, text in call["failed"].items()}
    return {**call, "command": command, "failed": failed}


def _stored(folder: Path) -> Iterator[tuple[str, int, str, Any]]:
    """Give variant, fold, input and detections of all that is stored in a call's folder."""
    for file in sorted(folder.glob("found-*.zip")):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                variant, fold, _ = name.split("/")
                with np.load(io.BytesIO(archive.read(name))) as arrays:
                    for given in arrays.files:
                        yield variant, int(fold), given, restored(arrays[given])


def _entry(name: str, own: Sequence[dict[str, Any]], scores: Scores) -> dict[str, Any]:
    return {
        "folds": FOLDS,
        "seeds": [job["seed"] for job in own],
        "epochs": own[0]["epochs"],
        "image_size": own[0]["image_size"],
        "batch": own[0]["batch"],
        "epoch_s": _median(job.get("epoch_s") for job in own),
        "seconds": _median(job["seconds"] for job in own),
        "losses": [job["loss"] for job in own if "loss" in job],
        "float_layers": [job["float_layers"] for job in own if job.get("float_layers")],
        "AP": {given: _figures(scores[name, given]) for given in own[0]["AP"]},
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _figures(one: Scored) -> dict[str, Any]:
    return {
        "by_fold": list(one.by_fold),
        "folds": _json(over_folds(one.by_fold)),
        "images": None if one.matched is None else _json(ap_of(one.matched)),
    }


def over_folds(values: Sequence[float]) -> Interval:
    """Return the mean of the folds' values and Student's interval for it."""
    mean = statistics.fmean(values)
    count = len(values)
    half = student_t(CONFIDENCE, count - 1) * statistics.stdev(values) / count**0.5
    return Interval(mean, mean - half, mean + half)


def compared(own: Scored, base: Scored) -> dict[str, Any]:
    """Return how much higher an AP is than another one, with both intervals, 0..1."""
    apart = [one - other for one, other in zip(own.by_fold, base.by_fold, strict=True)]
    images = None
    if own.matched is not None and base.matched is not None:
        images = _json(difference(own.matched, base.matched))
    return {"folds": _json(over_folds(apart)), "images": images}


def _json(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def _alike(own: Scored, base: Scored) -> bool:
    """Return whether two variants were trained by the same schedule."""
    quantized = [VARIANTS[one.variant].quantized is not None for one in (own, base)]
    return own.image_size == base.image_size and (any(quantized) or own.schedule == base.schedule)


def _mean(key: tuple[str, str], scores: Scores) -> Scored | None:
    """Return a variant and its repeat as one, with one input, where both are there."""
    name, given = key
    one, again = scores[key], scores.get((REPEATS.get(name, ""), given))
    if again is None or not _alike(one, again):
        return None
    by_fold = tuple((a + b) / 2 for a, b in zip(one.by_fold, again.by_fold, strict=True))
    known = [own for own in (one.matched, again.matched) if isinstance(own, MatchedDetections)]
    together = MeanOf(tuple(known)) if len(known) == 2 else None
    return dataclasses.replace(one, by_fold=by_fold, matched=together)


def _compared_rows(table: Table, scores: Scores, means: Scores) -> list[dict[str, Any]]:
    """Return the differences from the base of a table, for all that is there."""
    rows = []
    for column, network in enumerate(table.columns):
        for label, cells in table.rows.items():
            base = None if cells[column] is None else table.base_of(label, column)
            if base is None:
                continue
            own, other = (
                _of(cell, table, scores, means)
                for cell in (cells[column], table.rows[base][column])
            )
            if own is not None and other is not None and _alike(own, other):
                found = compared(own, other)
                rows.append({"network": network, "row": label, "base": base, **found})
    return rows


def _of(cell: Cell | None, table: Table, scores: Scores, means: Scores) -> Scored | None:
    if cell is None:
        return None
    key = cell.variant, cell.input
    # Inputs are compared with each other on the same networks.
    inputs = [given for name, given in scores if name == cell.variant]
    if table.is_plain or all((cell.variant, given) in means for given in inputs):
        return means.get(key) or scores.get(key)
    return scores.get(key)


PAIRS = (
    ("s-rep", "s"),
    ("s-ptq", "s"),
    ("s-rep-ptq", "s-rep"),
    ("s-qat-distilled", "s"),
    ("s-rep-qat", "s-rep"),
    ("s-rep-qat-distilled", "s-rep"),
    ("s-rep-partial-distilled", "s-rep"),
    ("s-rep-qat-distilled", "s-rep-qat"),
    ("s-rep-partial-distilled", "s-rep-qat-distilled"),
    *((f"s-rep-six-{metric}", "s-rep-ptq") for metric in ("mse", "cosine", "snr", "ap")),
    *(
        (f"{name}-ptq{tail}", name)
        for name in ("s-objectness", "s-v1-rep")
        for tail in ("", "-per-tensor")
    ),
    ("s-ptq-per-tensor", "s"),
    ("s-rep-ptq-per-tensor", "s-rep"),
    ("s-v1-rep", "s-objectness"),
    ("m-distilled", "m"),
    ("s-full", "n-full"),
    ("n-full", "n"),
    ("s-full", "s"),
    ("n-focal-giou-dfl", "n-focal-giou"),
    ("s-focal-dfl", "s-focal"),
    ("n-focal-giou-objectness", "n-focal-giou"),
    ("s-focal-objectness", "s-focal"),
    ("n-dfl-longer", "n-longer"),
    ("s-csp-longer", "s-longer"),
    ("n-default", "n-full"),
    ("s-default", "s-full"),
    ("s-default", "n-default"),
    ("l-by-kernel", "l-unclipped"),
    ("m-long", "m"),
    ("m-conv-relu-long", "m-long"),
    ("l-wide-neck-long", "l-long"),
    ("l-long", "l"),
    ("l-distilled", "l"),
    ("l", "l-unclipped"),
    ("l", "l-by-kernel"),
)
"""Variants that are compared outside Tables 2 to 14, each with what it is compared with."""


def _compared_pairs(
    pairs: Iterable[tuple[str, str]], scores: Scores, means: Scores
) -> list[dict[str, Any]]:
    rows = []
    for own, base in pairs:
        found = _together((own, base), scores, means)
        if found is not None:
            rows.append({"variant": own, "base": base, **compared(*found)})
    return rows


def _together(names: Sequence[str], scores: Scores, means: Scores) -> list[Scored] | None:
    """Return variants of one network each: the means of two seeds if all of them have one."""
    for known in (means, scores):
        found = [known.get((name, PLAIN)) for name in names]
        there = [one for one in found if one is not None]
        if len(there) == len(names):
            return there
    return None


BY_CLASS = (
    *((f"{model}-dfl", model) for model in "ns"),
    *((f"{model}-objectness", model) for model in "ns"),
    *((f"{model}-csp", model) for model in "ns"),
    ("n-simota", "n"),
    ("s", "n"),
)
"""Variants that are compared class by class: what contradicts the paper is looked into."""


def _compared_classes(
    truth: Truth, class_names: Sequence[str], scores: Scores, means: Scores
) -> list[dict[str, Any]]:
    rows = []
    for names in BY_CLASS:
        known = [means.get((name, PLAIN)) or scores.get((name, PLAIN)) for name in names]
        own, base = (None if one is None else one.matched for one in known)
        if own is None or base is None:
            continue
        for place, label in enumerate(class_names):
            one, other = of_class(own, place), of_class(base, place)
            pairs = zip(ap_by_fold(truth, one), ap_by_fold(truth, other), strict=True)
            apart = [value - before for value, before in pairs]
            rows.append(
                {
                    "variant": names[0],
                    "base": names[1],
                    "class": label,
                    "folds": _json(over_folds(apart)),
                    "images": _json(difference(one, other)),
                }
            )
    return rows


GAINS = {
    "v2.0, min-max": ("s-rep-ptq", "s-rep", "s-ptq", "s"),
    "v2.0, one scale a layer": ("s-rep-ptq-per-tensor", "s-rep", "s-ptq-per-tensor", "s"),
    "v1.0, min-max": ("s-v1-rep-ptq", "s-v1-rep", "s-objectness-ptq", "s-objectness"),
    "v1.0, one scale a layer": (
        *("s-v1-rep-ptq-per-tensor", "s-v1-rep"),
        *("s-objectness-ptq-per-tensor", "s-objectness"),
    ),
}
"""Networks in INT8 and in float, with RepOptimizer and then with branches."""


def rep_optimizer_gains(scores: Scores, means: Scores) -> list[dict[str, Any]]:
    """Return how much less AP RepOptimizer's networks lose in INT8 than those with branches."""
    rows = []
    for label, names in GAINS.items():
        known = _together(names, scores, means)
        if known is None:
            continue
        apart = [
            a - b - (c - d) for a, b, c, d in zip(*(one.by_fold for one in known), strict=True)
        ]
        found = [one.matched for one in known if one.matched is not None]
        images = _json(_spared(*found)) if len(found) == len(names) else None
        rows.append({"row": label, "folds": _json(over_folds(apart)), "images": images})
    return rows


def _spared(
    quantized: Scorable, floating: Scorable, other_quantized: Scorable, other_floating: Scorable
) -> Interval:
    def statistic(draws: NDArray[np.int64]) -> float:
        own = quantized.ap(draws) - floating.ap(draws)
        return own - (other_quantized.ap(draws) - other_floating.ap(draws))

    return interval(statistic, quantized.images)


def summary(result: Mapping[str, Any]) -> str:
    """Return the APs and differences as text."""
    lines = []
    for name, entry in result["variants"].items():
        for given, ap in entry["AP"].items():
            lines.append(
                f"{name:28s} {given:7s} AP over folds {_points(ap['folds'], '')}, over images "
                f"{_points(ap['images'], '')}, {entry['epochs']} epochs at {entry['image_size']}"
            )
    for kind in ("repeats", "pairs"):
        lines += [f"{row['variant']} - {row['base']}: {_both(row)}" for row in result[kind]]
    for number, rows in result["tables"].items():
        lines += [
            f"Table {number}, {row['network']}: {row['row']} - {row['base']}: {_both(row)}"
            for row in rows
        ]
    return "\n".join(lines)


def _both(row: Mapping[str, Any]) -> str:
    return f"over folds {_points(row['folds'])}, over images {_points(row['images'])}"


def _points(found: Mapping[str, float] | None, sign: str = "+") -> str:
    if found is None:
        return "unknown"
    value, low, high = (100 * found[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"
