"""`compare`: builds missing engines, measures AP and latency of all, and writes the results.

Everything that takes time is a step of `cache.Steps`: an interrupted comparison continues with the
next round, and an unchanged one only reads what was measured.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from trt_yolov6.common.files import check_writable, sha256_file, write_json
from trt_yolov6.common.progress import progress_bar
from trt_yolov6.common.statistics import Interval, ratio_interval
from trt_yolov6.comparison.agreement import agreements
from trt_yolov6.comparison.cache import Steps
from trt_yolov6.comparison.engines import Work, build_case, cases_of
from trt_yolov6.comparison.gate import SAME_ENGINE, check_basis, check_device, matched
from trt_yolov6.comparison.measure import accuracy, data_record, measure_layers, measure_timings
from trt_yolov6.comparison.plan import Plan, settings_of
from trt_yolov6.comparison.records import results_of
from trt_yolov6.comparison.results import FILE, Results
from trt_yolov6.comparison.rounds import Round, measure_round, paired_medians
from trt_yolov6.data.calibration import calibration_images
from trt_yolov6.data.coco import load_coco
from trt_yolov6.engines import load_engine
from trt_yolov6.engines.base import LoadOptions
from trt_yolov6.engines.manifest import read_manifest

_Key: TypeAlias = "tuple[str, int]"
"""An engine's name and a batch size."""

_BAR = {"desc": "compare", "unit": "step", "leave": False}


def compare(
    plan: Plan,
    output: str | Path,
    *,
    again: bool = False,
    baseline: Mapping[str, Any] | None = None,
    other_device: bool = False,
    progress: bool = True,
) -> Results:
    """Compare detectors and write `results.json`.

    `output` also gets `engines/`, `steps/` (the finished steps) and `examples/` (a few images for
    the report). The arguments are those of `api.compare`.

    Returns:
        The content of `results.json`, see `results`.

    Raises:
        UserError: a file is missing or cannot be compared, two engines have one name, a precision
            cannot be built here, the output cannot be written, or the baseline is of other data or
            thresholds (found before anything is built) or of another device (found when a backend's
            first engine is built).
    """
    output = Path(output)
    check_writable(output / FILE)
    work = Work(plan, output, Steps(output / "steps"))
    cases = cases_of(work)
    dataset = load_coco(plan.data, plan.split)
    if any(case.choice is not None and case.choice.quantizes for case in cases):
        calibration_images(plan.calibration)  # refused now, not after the first engines
    data = data_record(dataset)
    if baseline is not None:
        check_basis(data, settings_of(plan), baseline)
    steps = (2 + plan.layers) * len(cases) + plan.rounds
    built, accuracies, layers = [], [], []
    checked = set()
    with progress_bar(steps, shown=progress, **_BAR) as bar:
        for case in cases:
            bar.set_description(f"building {case.name}")
            built.append(build_case(work, case))
            if baseline is not None and not other_device and case.backend not in checked:
                with built[-1].load(plan, built[-1].largest) as engine:
                    check_device(engine.device, baseline)
                checked.add(case.backend)
            bar.update()
        for one in built:
            bar.set_description(f"AP of {one.name}")
            accuracies.append(accuracy(work, one, dataset, data))
            bar.update()
        agreed = agreements(work, dataset, built, accuracies)
        timings = measure_timings(work, built, bar, again=again)
        for one in built if plan.layers else ():
            bar.set_description(f"layers of {one.name}")
            layers.append(measure_layers(work, one))
            bar.update()
    results = results_of(work, dataset, data, built, accuracies, agreed, timings, layers)
    write_json(output / FILE, results)
    return results


def side_by_side(
    results: Mapping[str, Any],
    folder: str | Path,
    baseline: Mapping[str, Any],
    baseline_folder: str | Path,
    plan: Plan,
    *,
    progress: bool = True,
) -> dict[_Key, Interval]:
    """Measure engines and those of a baseline in turns, where both files still exist.

    If a machine's speed drifts, turns give the ratio of two engines far more precisely than two
    separate runs. An engine that is the baseline's own file has the ratio 1.

    Args:
        results, folder: from `compare`, and its output folder.
        baseline, baseline_folder: from `results.read_results`, and that file's folder. Paths of
            engines are relative to these folders.
        plan: rounds, duration, threads and provider.

    Returns:
        The ratio of latencies by engine and batch, without those whose baseline engine is missing,
        was replaced, or ran in another version of its backend, with other threads or elsewhere.
    """
    same, pairs = _paired(results, Path(folder), baseline, Path(baseline_folder))
    labels = {engine["engine"]: engine.get("label") for engine in results["engines"]}
    decoders = {model.label: model.decoder for model in plan.models}
    rounds: dict[_Key, tuple[list[Round], list[Round]]] = {key: ([], []) for key in pairs}
    seconds = plan.duration / plan.rounds
    with progress_bar(plan.rounds, shown=progress and bool(pairs), **_BAR) as bar:
        for turn in range(plan.rounds if pairs else 0):
            bar.set_description(f"with the baseline, round {turn + 1} of {plan.rounds}")
            for (name, batch), paths in pairs.items():
                for index in (0, 1) if turn % 2 == 0 else (1, 0):
                    # A manifest names the family itself.
                    known = read_manifest(paths[index]) is not None
                    decoder = None if known else decoders.get(labels[name])
                    options = LoadOptions(plan.threads, plan.provider, decoder=decoder)
                    load = functools.partial(load_engine, paths[index], options=options)
                    rounds[name, batch][index].append(measure_round(load, batch, seconds))
            bar.update()
    found = dict.fromkeys(same, SAME_ENGINE)
    for key, (own_rounds, other_rounds) in rounds.items():
        mine, theirs = paired_medians(own_rounds, other_rounds)
        if len(mine) >= 3:
            found[key] = ratio_interval(mine, theirs)
    return found


def _paired(
    results: Mapping[str, Any], folder: Path, baseline: Mapping[str, Any], baseline_folder: Path
) -> tuple[list[_Key], dict[_Key, tuple[Path, Path]]]:
    """Return the engines that are the baseline's own, and the pairs of files to time in turns."""
    where = [
        {
            engine["engine"]: [
                *(engine[key] for key in ("backend", "backend_version", "device")),
                *(value["settings"].get(key) for key in ("threads", "provider")),
                # An upgrade of a GPU's driver makes another engine.
                *(gpu.get("driver") for gpu in value.get("environment", {}).get("gpus", ())),
            ]
            for engine in value["engines"]
        }
        for value in (results, baseline)
    ]
    names = {name: before for before, name in matched(results, baseline).items()}
    before = {(item["engine"], item["batch"]): item for item in baseline["timings"]}
    same: list[_Key] = []
    pairs: dict[_Key, tuple[Path, Path]] = {}
    for timing in results["timings"]:
        key = timing["engine"], timing["batch"]
        name = names.get(timing["engine"], "")
        earlier = before.get((name, timing["batch"]))
        if earlier is None or where[0][key[0]] != where[1].get(name):
            continue
        own = folder / timing["engine_file"]
        other = baseline_folder / str(earlier.get("engine_file", ""))
        if timing["engine_sha256"] == earlier.get("engine_sha256"):
            same.append(key)
        elif other.is_file() and sha256_file(other) == earlier.get("engine_sha256"):
            pairs[key] = own, other
    return same, pairs
