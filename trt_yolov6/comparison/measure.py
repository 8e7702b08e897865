"""The measuring steps of a comparison: AP, latency in rounds, times of layers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from trt_yolov6.bench.roofline import GraphWork, layer_times, measure_ceilings
from trt_yolov6.bench.sampling import random_input
from trt_yolov6.common.files import sha256_bytes, sha256_file
from trt_yolov6.common.machine import cpu_wait_seconds, timestamp
from trt_yolov6.common.records import Record, as_record
from trt_yolov6.comparison.agreement import packed
from trt_yolov6.comparison.engines import BuiltCase, Work
from trt_yolov6.comparison.machine import clocks, run_inputs
from trt_yolov6.comparison.rounds import Round, measure_round
from trt_yolov6.data.calibration import evenly
from trt_yolov6.data.coco import CocoDataset, read_coco_image
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines.base import Engine
from trt_yolov6.engines.manifest import read_manifest
from trt_yolov6.errors import ClassesDifferError, UserError
from trt_yolov6.graph.cost import Ceilings
from trt_yolov6.runtime.evaluate import evaluate
from trt_yolov6.runtime.predict import detect

if TYPE_CHECKING:
    from tqdm import tqdm

_log = logging.getLogger(__name__)

EXAMPLE_CONFIDENCE = 0.4
"""Score from which on a detection is shown in the report's images, as `infer` draws them."""

LAYER_TRIALS = 3
"""Times that layers are measured over, while others keep this process waiting."""

LAYER_RUNS = 20


# --- accuracy -----------------------------------------------------------------------------------


def data_record(dataset: CocoDataset) -> dict[str, Any]:
    """Return the data set's description in the results."""
    digest = hashlib.sha256()
    for image in dataset.images:
        digest.update(bytes.fromhex(sha256_file(image.path)))
    return {
        "root": str(dataset.root),
        "split": dataset.split,
        "annotations_sha256": _annotations_sha256(dataset),
        "images_sha256": digest.hexdigest(),
        "images": len(dataset.images),
        "class_names": list(dataset.class_names),
    }


def accuracy(
    work: Work, built: BuiltCase, dataset: CocoDataset, data: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the AP of an engine and what it finds in the example images.

    Of engines for several batch sizes it is that for the largest which is evaluated: they compute
    the same graph.
    """
    plan, batch = work.plan, built.largest
    inputs = {
        "engine": built.sha256[batch],
        "data": [data["annotations_sha256"], data["images_sha256"]],
        "nms": dataclasses.asdict(plan.predict_options.nms()),
        "border": plan.border,
        "examples": plan.examples,
        "reading": _reading(built, batch),
        **run_inputs(plan, built.case.backend, "opencv-python-headless", "pycocotools"),
    }

    def measure() -> Mapping[str, Any]:
        _log.info(f"AP of {built.name} on {len(dataset.images)} images ...")
        with built.load(plan, batch) as engine:
            return {
                **_evaluated(work, engine, built.name, dataset),
                **engine.described(),
                "examples": _examples(work, engine, dataset),
                "date": timestamp(),
            }

    return work.steps.once("accuracy", inputs, measure)


def _evaluated(work: Work, engine: Engine, name: str, dataset: CocoDataset) -> dict[str, Any]:
    """Evaluate an engine and pack its detections; without AP where the classes differ."""
    seen: dict[int, Detections] = {}
    try:
        evaluation = evaluate(
            engine,
            dataset,
            work.plan.predict_options,
            progress=False,
            seen=lambda image, detections: seen.update({image.id: detections}),
        )
    except ClassesDifferError as error:
        _log.info(f"{name} is timed without AP: {error}")
        return {
            **dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl")),
            "images": len(dataset.images),
            "detections": 0,
            "per_class": [],
            "notes": [str(error)],
            "found": None,
        }
    for note in evaluation.notes:
        _log.info(f"{name}: {note}")
    found = packed([seen[image.id] for image in dataset.images])
    return {**evaluation.to_json(), "found": found}


def _reading(built: BuiltCase, batch: int) -> list[Any]:
    """Return how images are prepared and outputs read: the plan says it, or a manifest."""
    entry, manifest = built.case.entry, read_manifest(built.files[batch])
    found = [entry.decoder, list(entry.preprocess)]
    return found if manifest is None else [*found, dataclasses.asdict(manifest.detector)]


def _examples(work: Work, engine: Engine, dataset: CocoDataset) -> list[list[list[float]]]:
    """Return the detections in the example images: lists of x1, y1, x2, y2, score, class."""
    plan = work.plan
    images = [read_coco_image(image) for image in evenly(dataset.images, plan.examples)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluation has said what is odd
        found = detect(engine, images, plan.predict_options)
    return [
        [
            [*(round(value, 1) for value in box), round(score, 3), label]
            for box, score, label in one.as_tuples()
            if score >= EXAMPLE_CONFIDENCE
        ]
        for one in found
    ]


def _annotations_sha256(dataset: CocoDataset) -> str:
    """Return the hash of a COCO file, or of what the many files of other formats say."""
    if dataset.annotation_file.suffix == ".json":
        return sha256_file(dataset.annotation_file)
    content = [list(dataset.class_names), list(dataset.annotations)]
    return sha256_bytes(json.dumps(content, sort_keys=True).encode())


# --- latency ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timings:
    """The rounds of all engines."""

    rounds: Mapping[tuple[str, int], list[Round]]
    """Rounds by engine and batch size; the n-th rounds of all were side by side."""
    clocks: Mapping[str, Any]
    """Clocks after the last round, see `machine.clocks`."""


def measure_timings(
    work: Work, built: Sequence[BuiltCase], bar: tqdm[NoReturn], *, again: bool
) -> Timings:
    """Measure all engines at all batch sizes in rounds, each of which is a step of the bar.

    Every round is kept when it is done, so that an interrupted measurement loses one at most. All
    of them together are one step of the comparison: with another engine among them, or `again`,
    they are measured again.
    """
    plan = work.plan
    inputs = {
        "engines": {
            one.name: {str(batch): sha for batch, sha in one.sha256.items()} for one in built
        },
        "rounds": plan.rounds,
        "duration": plan.duration,
        **{
            backend: run_inputs(plan, backend)
            for backend in sorted({one.case.backend for one in built})
        },
    }
    done: list[dict[str, Any]] = [] if again else list(work.steps.find("timing", inputs) or [])
    bar.update(len(done))
    if 0 < len(done) < plan.rounds:
        _log.info(f"going on with round {len(done) + 1} of {plan.rounds}")
    turns = [(one, batch) for batch in plan.batches for one in built if batch in one.files]
    for number in range(len(done), plan.rounds):
        found: dict[str, Any] = {}
        # Another engine begins each round, and every other round runs backwards.
        shift = number % len(turns)
        order = [*turns[shift:], *turns[:shift]]
        for one, batch in order if number % 2 == 0 else reversed(order):
            bar.set_description(f"latency, round {number + 1} of {plan.rounds}: {one.name}")
            load = functools.partial(one.load, plan, batch)
            measured = measure_round(load, batch, plan.duration / plan.rounds)
            found[_turn_name(one, batch)] = measured.to_json()
        done.append({"rounds": found, "clocks": clocks()})
        work.steps.keep("timing", inputs, done)
        bar.update()
    return Timings(
        {
            (one.name, batch): [
                _kept(work, entry["rounds"][_turn_name(one, batch)], Round) for entry in done
            ]
            for one, batch in turns
        },
        done[-1]["clocks"],
    )


def _kept(work: Work, value: Any, kind: type[Record]) -> Record:
    subject = f"a step kept in {work.steps.folder} is damaged"
    return as_record(value, kind, subject, "remove that folder.")


def _turn_name(built: BuiltCase, batch: int) -> str:
    return f"{built.name}, batch {batch}"


# --- layers -------------------------------------------------------------------------------------


def measure_layers(work: Work, built: BuiltCase) -> Mapping[str, Any]:
    """Return the times of an engine's layers at its smallest batch size.

    Returns:
        batch, computed_in, ceilings and layers, as `results` documents them; or `reason`, why its
        backend does not report it.
    """
    batch = min(built.files)
    inputs = {
        "engine": built.sha256[batch],
        "batch": batch,
        **run_inputs(work.plan, built.case.backend),
    }
    return work.steps.once("layers", inputs, lambda: _layers(work, built, batch))


def _layers(work: Work, built: BuiltCase, batch: int) -> dict[str, Any]:
    _log.info(f"layers of {built.name} ...")
    with built.load(work.plan, batch, cuda_graph=False) as engine:
        try:
            kernels = _kernel_times(engine, batch)
        except UserError as error:
            return {"reason": str(error)}
        ceilings = _ceilings(work, engine)
        device, computed_in = engine.device, engine.computed_in or ""
    known = built.records[batch].get("graph_work") or {"layers": [], "owners": {}}
    graph = _kept(work, known, GraphWork)
    return {
        "batch": batch,
        "computed_in": computed_in,
        "ceilings": {"device": device, **dataclasses.asdict(ceilings)} if ceilings else None,
        "layers": [
            {
                "name": one.name,
                "operator": one.operator,
                "precision": one.precision,
                "ms": one.seconds * 1e3,
                "roofline_ms": None if one.roofline is None else one.roofline * 1e3,
                "bound": one.bound,
            }
            for one in layer_times(kernels, graph, batch, ceilings, computed_in)
        ],
    }


def _kernel_times(engine: Engine, batch: int) -> dict[str, float]:
    """Return seconds by kernel, of the quickest of some trials where others disturb them."""
    images = random_input(engine, batch)
    best: dict[str, float] = {}
    for _ in range(LAYER_TRIALS):
        before = cpu_wait_seconds() or 0.0
        kernels = engine.layer_times(images, LAYER_RUNS)
        waited = (cpu_wait_seconds() or 0.0) - before
        whole = sum(kernels.values())
        if not best or whole < sum(best.values()):
            best = kernels
        if waited < 0.05 * LAYER_RUNS * whole:
            break
    return best


def _ceilings(work: Work, engine: Engine) -> Ceilings | None:
    inputs = {"device": engine.device, **run_inputs(work.plan, engine.backend)}

    def measure() -> dict[str, Any]:
        measured = measure_ceilings(engine)
        return dataclasses.asdict(measured) if measured else {}

    found = work.steps.once("ceilings", inputs, measure)
    return Ceilings(**found) if found else None
