"""`compare`: builds what must be built, measures AP and latency of all, and writes the results.

Everything that takes time is a step (`steps`): a comparison that was interrupted goes on where it
was, round by round, and one that is run again with nothing changed only reads what is there.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_yolov6 import __version__
from trt_yolov6.comparison.intervals import Interval, ratio_interval
from trt_yolov6.comparison.plan import (
    ModelEntry,
    Plan,
    PrecisionChoice,
    parse_precision,
    settings_of,
)
from trt_yolov6.comparison.results import FILE, KIND, SCHEMA
from trt_yolov6.comparison.steps import Steps
from trt_yolov6.comparison.timing import (
    CPU_DRIFT,
    GPU_DRIFT,
    Round,
    RoundsSummary,
    measure_round,
    paired_medians,
    round_from_json,
    summarize_rounds,
)
from trt_yolov6.data.coco import CocoDataset, load_coco
from trt_yolov6.engines import backend as backend_module
from trt_yolov6.engines import best_backend, load_engine
from trt_yolov6.engines.base import BuildSettings, Engine, LoadOptions
from trt_yolov6.engines.manifest import (
    BatchProfile,
    Manifest,
    manifest_paths,
    read_manifest,
)
from trt_yolov6.environment import (
    cpu_model,
    cpu_wait_seconds,
    describe_cpu,
    package_versions,
    read_cpu_clock,
    read_gpus,
    system_name,
)
from trt_yolov6.errors import UserError
from trt_yolov6.files import check_writable, sha256_file, write_bytes, write_json

if TYPE_CHECKING:
    from trt_yolov6.building import Graph
    from trt_yolov6.roofline import Ceilings, GraphWork

EXAMPLE_SIDE = 640
"""Longer side of the pictures kept for the report, at most, in pixels."""

EXAMPLE_CONFIDENCE = 0.4
"""Score from which on a detection is shown in the report's pictures."""

LAYER_TRIALS = 3
"""Times that layers are measured over, while others keep this process waiting."""

Tell = Callable[[str], None]


def compare(
    plan: Plan,
    output: str | Path,
    *,
    again: bool = False,
    tell: Tell | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare detectors and write `results.json`.

    `output` also gets `engines/` (what was built), `steps/` (what has been measured so far) and
    `examples/` (a few images for the report).

    Args:
        plan: what is compared and how.
        output: a folder; made if missing. An earlier comparison in it is gone on with.
        again: measure latencies anew, even if they are there.
        tell: called with a line of progress now and then.
        progress: show a progress bar on stderr.

    Returns:
        What was written, see `results`.

    Raises:
        UserError: a file is missing or of no kind that can be compared, two engines have one name,
            a precision cannot be built here, or the output cannot be written.
    """
    output = Path(output)
    check_writable(output / FILE)
    work = _Work(plan, output, Steps(output / "steps"), again, tell or (lambda _: None))
    cases = work.cases()
    dataset = load_coco(plan.data, plan.split)
    bar_steps = 2 * len(cases) + plan.rounds + bool(plan.layers)
    with _bar(bar_steps, progress) as advance:
        built: list[_Engine] = []
        for case in cases:
            advance(f"building {case.name}", 0)
            built.append(work.built(case))
            advance("", 1)
        data = _data_record(dataset)
        accuracies = []
        for engine in built:
            advance(f"AP of {engine.case.name}", 0)
            accuracies.append(work.accuracy(engine, dataset, data))
            advance("", 1)
        rounds = work.timings(built, advance)
        layers: list[dict[str, Any]] = []
        if plan.layers:
            advance("layers", 0)
            layers = [value for engine in built if (value := work.layers(engine)) is not None]
            advance("", 1)
        results = work.results(dataset, data, built, accuracies, rounds, layers)
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
) -> dict[tuple[str, int], Interval]:
    """Measure engines beside those of a baseline, round by round, where both are still there.

    On a machine whose speed drifts, the ratio of two engines in turns is known far better than that
    of two runs. An engine whose file is the baseline's own has the ratio 1. What it cannot show is
    a change of the backend, under which both now run: then it is left to the two runs.

    Args:
        results: from `compare`.
        folder: where it wrote them.
        baseline: from `results.read_results`.
        baseline_folder: where that file lies; its engines' paths are relative to it.
        plan: rounds, duration, threads and provider.

    Returns:
        The ratio of latencies, by engine and batch; those whose baseline engine is gone, was
        replaced, or ran in another version of its backend or elsewhere are left out.
    """
    where = [
        {
            engine["engine"]: [engine[key] for key in ("backend", "backend_version", "device")]
            for engine in value["engines"]
        }
        for value in (results, baseline)
    ]
    before = {(item["engine"], item["batch"]): item for item in baseline["timings"]}
    found: dict[tuple[str, int], Interval] = {}
    pairs: dict[tuple[str, int], tuple[Path, Path]] = {}
    for timing in results["timings"]:
        key = timing["engine"], timing["batch"]
        if key not in before or where[0][key[0]] != where[1].get(key[0]):
            continue
        own = Path(folder) / timing["engine_file"]
        other = Path(baseline_folder) / str(before[key].get("engine_file", ""))
        if timing["engine_sha256"] == before[key].get("engine_sha256"):
            found[key] = Interval(1.0, 1.0, 1.0)
        elif other.is_file() and sha256_file(other) == before[key].get("engine_sha256"):
            pairs[key] = own, other
    rounds: dict[tuple[str, int], tuple[list[Round], list[Round]]] = {
        key: ([], []) for key in pairs
    }
    options = LoadOptions(plan.threads, plan.provider)
    seconds = plan.duration / plan.rounds
    with _bar(plan.rounds, progress and bool(pairs)) as advance:
        for turn in range(plan.rounds if pairs else 0):
            advance(f"beside the baseline, round {turn + 1} of {plan.rounds}", 0)
            for (name, batch), paths in pairs.items():
                order = (0, 1) if turn % 2 == 0 else (1, 0)
                for index in order:
                    load = functools.partial(load_engine, paths[index], options=options)
                    rounds[name, batch][index].append(measure_round(load, batch, seconds))
            advance("", 1)
    for key, (own_rounds, other_rounds) in rounds.items():
        mine, theirs = paired_medians(own_rounds, other_rounds)
        if len(mine) >= 3:
            found[key] = ratio_interval(mine, theirs)
    return found


# --- what is compared ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """One engine of the comparison: a model at a precision on a backend."""

    name: str
    entry: ModelEntry
    choice: PrecisionChoice | None
    """None: the file is an engine, or a graph of its own precision, and taken as it is."""
    backend: str
    source: Mapping[str, Any]
    """What `_Work.source` says of the file."""


@dataclass(frozen=True)
class _Engine:
    """A case that was built. `files` and `sha256` are by batch size; one file may serve several."""

    case: _Case
    files: Mapping[int, Path]
    sha256: Mapping[int, str]
    records: Mapping[int, Mapping[str, Any]]
    """What the building step kept, by batch size."""

    @property
    def largest(self) -> int:
        return max(self.files)


@dataclass
class _Work:
    """What all steps of one comparison share."""

    plan: Plan
    output: Path
    steps: Steps
    again: bool
    tell: Tell
    left_out: list[str] = dataclasses.field(default_factory=list)
    graphs: dict[Any, Graph] = dataclasses.field(default_factory=dict)
    """Graphs by file, batch profile and precision: exporting takes seconds."""
    machine_readings: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    """The clocks after each round."""

    # --- building ---

    def cases(self) -> list[_Case]:
        """Return the engines that the plan asks for, in its order."""
        backends = [best_backend() if name == "auto" else name for name in self.plan.backends]
        several = len(set(backends)) > 1
        cases: list[_Case] = []
        for entry in self.plan.models:
            source = self.source(entry)
            for backend in dict.fromkeys(backends):
                if source["backend"]:
                    backend = source["backend"]
                choices: list[PrecisionChoice | None] = [None]
                if source["buildable"]:
                    texts = entry.precisions or self.plan.precisions
                    choices = [parse_precision(text) for text in dict.fromkeys(texts)]
                for choice in choices:
                    name = f"{entry.label} {choice.name if choice else source['precision']}"
                    name += f" {backend}" if several else ""
                    case = _Case(name, entry, choice, backend, source)
                    if case not in cases:
                        cases.append(case)
        names = [case.name for case in cases]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"two engines of the comparison are called {name!r}; give their models names "
                    "of their own in a plan (`name:`)."
                )
        return cases

    def source(self, entry: ModelEntry) -> Mapping[str, Any]:
        """Say what a file is: whether it can be built from, its precision, its backend."""
        path = entry.path
        if not path.is_file():
            raise UserError(f"{path} does not exist; check the path.")
        manifest_file = next((file for file in manifest_paths(path) if file.is_file()), None)
        inputs = {
            "file": sha256_file(path),
            "suffix": path.suffix,
            "manifest": sha256_file(manifest_file) if manifest_file else None,
            "name": path.name,
        }
        known: Mapping[str, Any] | None = self.steps.find("source", inputs)
        if known is None:
            known = {"sha256": inputs["file"], **_described(path)}
            self.steps.keep("source", inputs, known)
        if entry.precisions and not known["buildable"]:
            self.tell(f"{path} is {known['precision']} already and is taken as it is")
        return known

    def built(self, case: _Case) -> _Engine:
        """Build a case unless it is there; return its engines by batch size."""
        wanted = sorted(set(self.plan.batches))
        if not case.source["buildable"]:
            return self._as_it_is(case, wanted)
        fixed = case.source["batch"]
        if fixed and fixed not in wanted:
            raise UserError(
                f"{case.entry.path} takes batch {fixed} only; add it to --batches, or export it "
                "anew with a free batch axis."
            )
        if fixed:
            self._leave_out(case, [batch for batch in wanted if batch != fixed], f"batch {fixed}")
            profiles = {fixed: BatchProfile(fixed, fixed, fixed)}
        elif case.backend == "onnxruntime":
            # One graph serves all sizes equally well.
            profiles = dict.fromkeys(wanted, BatchProfile(1, max(wanted), max(32, *wanted)))
        else:
            profiles = {batch: BatchProfile(batch, batch, batch) for batch in wanted}
        files, hashes, records = {}, {}, {}
        for batch, profile in profiles.items():
            record = self._built(case, profile)
            files[batch] = self.output / record["file"]
            hashes[batch] = record["engine_sha256"]
            records[batch] = record
        return _Engine(case, files, hashes, records)

    def _as_it_is(self, case: _Case, wanted: Sequence[int]) -> _Engine:
        path, batches = case.entry.path, BatchProfile(*case.source["batches"])
        taken = [batch for batch in wanted if batches.min <= batch <= batches.max]
        if not taken:
            raise UserError(
                f"{path} takes batches of {batches.min} to {batches.max}, of which --batches has "
                "none; add one."
            )
        self._leave_out(
            case,
            [batch for batch in wanted if batch not in taken],
            f"batches of {batches.min} to {batches.max}",
        )
        record = {
            "file": str(path.resolve()),
            "engine_sha256": case.source["sha256"],
            **case.source["record"],
        }
        return _Engine(
            case,
            dict.fromkeys(taken, path),
            dict.fromkeys(taken, case.source["sha256"]),
            dict.fromkeys(taken, record),
        )

    def _leave_out(self, case: _Case, batches: Sequence[int], takes: str) -> None:
        if batches:
            missing = ", ".join(map(str, batches))
            self.left_out.append(f"{case.name} takes {takes}: batch {missing} was not measured.")

    def _built(self, case: _Case, profile: BatchProfile) -> Mapping[str, Any]:
        choice, entry = case.choice, case.entry
        assert choice is not None
        inputs = {
            "source": case.source["sha256"],
            "names": sha256_file(entry.names) if entry.names else None,
            "imgsz": entry.imgsz,
            "precision": choice.name,
            "calibration": self._calibration_key() if choice.quantizes else None,
            "profile": dataclasses.astuple(profile),
            "backend": case.backend,
            "versions": _versions(case.backend, "onnx", "onnxscript", "torch"),
            "machine": None if case.backend == "onnxruntime" else _machine(),
            "label": case.name,
        }
        found: Mapping[str, Any] | None = self.steps.find("build", inputs)
        if found is not None:
            file = self.output / found["file"]
            if file.is_file() and sha256_file(file) == found["engine_sha256"]:
                return found
        record = self._build(case, choice, profile)
        self.steps.keep("build", inputs, record)
        return record

    def _build(
        self, case: _Case, choice: PrecisionChoice, profile: BatchProfile
    ) -> Mapping[str, Any]:
        from trt_yolov6.building import SUFFIXES, build_engine

        self.tell(f"building {case.name} ...")
        stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in case.name)
        stem += f"_b{profile.max}" if profile.is_static else ""
        path = self.output / "engines" / f"{stem}{SUFFIXES[case.backend]}"
        graph = self._graph(case.entry, profile, fp16=choice.base == "fp16")
        if choice.quantizes:
            graph = self._quantized(graph, choice, path)
        built = build_engine(
            graph, backend=case.backend, output=path, settings=BuildSettings(progress=False)
        )
        return {
            "file": str(path.relative_to(self.output)),
            "engine_sha256": built.manifest.plan_sha256,
            "build_s": built.seconds,
            **_graph_record(graph),
            **_manifest_record(built.manifest),
        }

    def _graph(self, entry: ModelEntry, profile: BatchProfile, fp16: bool) -> Graph:
        from trt_yolov6.building import graph_from_checkpoint, graph_from_onnx, read_class_names
        from trt_yolov6.export import ExportSettings

        key = entry, profile, fp16
        if key not in self.graphs:
            if entry.path.suffix == ".pt":
                settings = ExportSettings(
                    image_size=entry.imgsz or (640, 640), batch=profile, fp16=fp16
                )
                self.graphs[key] = graph_from_checkpoint(entry.path, settings)
            else:
                self.graphs[key] = graph_from_onnx(
                    entry.path,
                    batch=profile,
                    image_size=entry.imgsz,
                    fp16=fp16,
                    class_names=read_class_names(entry.names) if entry.names else None,
                )
        return self.graphs[key]

    def _quantized(self, graph: Graph, choice: PrecisionChoice, path: Path) -> Graph:
        from trt_yolov6.quantization.levels import FP8, INT8
        from trt_yolov6.quantization.ptq import QuantizationSettings, quantize
        from trt_yolov6.quantization.table import table_path, write_table

        calibrator: Any = self.plan.calibrator
        settings = QuantizationSettings(
            quantized=FP8 if choice.base == "fp8" else INT8,
            calibrator=calibrator,
            float_layers=choice.float_layers or (),
            fp16=choice.rest_fp16,
            border=self.plan.border,
        )
        table = table_path(path)
        found = quantize(graph, self.plan.calib, settings, table_file=table, tell=self.tell)
        write_table(table, found.table)
        return found.graph

    @functools.cached_property
    def _calibration(self) -> str:
        from trt_yolov6.quantization.images import calibration_images, images_sha256

        return images_sha256(calibration_images(self.plan.calib))

    def _calibration_key(self) -> Mapping[str, Any]:
        return {
            "images": self._calibration,
            "calibrator": self.plan.calibrator,
            "border": self.plan.border,
        }

    # --- accuracy ---

    def load(self, engine: _Engine, batch: int) -> Engine:
        """Load the engine of a batch size."""
        options = LoadOptions(self.plan.threads, self.plan.provider)
        backend = engine.case.backend if engine.case.source["buildable"] else "auto"
        return load_engine(engine.files[batch], backend, options)

    def accuracy(
        self, engine: _Engine, dataset: CocoDataset, data: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return the AP of an engine, and what it finds in the example images."""
        batch = engine.largest
        inputs = {
            "engine": engine.sha256[batch],
            "data": [data["annotations_sha256"], data["images_sha256"]],
            "nms": dataclasses.asdict(self.plan.nms),
            "border": self.plan.border,
            "examples": self.plan.examples,
            **self._run_inputs(engine.case.backend, "opencv-python-headless", "pycocotools"),
        }
        found: Mapping[str, Any] | None = self.steps.find("accuracy", inputs)
        if found is None:
            from trt_yolov6.evaluation import evaluate

            self.tell(f"AP of {engine.case.name} on {len(dataset.images)} images ...")
            with self.load(engine, batch) as loaded:
                evaluation = evaluate(
                    loaded, dataset, nms=self.plan.nms, border=self.plan.border, progress=False
                )
                found = {
                    **evaluation.to_json(),
                    "device": loaded.device,
                    "backend_version": loaded.backend_version,
                    "threads": loaded.threads,
                    "note": loaded.note,
                    "image_size": list(loaded.image_size),
                    "precision": loaded.precision,
                    "examples": self._examples(loaded, dataset),
                    "date": _now(),
                }
            self.steps.keep("accuracy", inputs, found)
        return found

    def _examples(self, engine: Engine, dataset: CocoDataset) -> list[list[list[float]]]:
        from trt_yolov6.data.coco import read_coco_image
        from trt_yolov6.inference import detect

        images = [read_coco_image(image) for image in example_images(dataset, self.plan.examples)]
        found = detect(engine, images, nms=self.plan.nms, border=self.plan.border)
        return [
            [
                [*(round(value, 1) for value in box), round(score, 3), label]
                for box, score, label in zip(
                    one.boxes.tolist(), one.scores.tolist(), one.classes.tolist(), strict=True
                )
                if score >= EXAMPLE_CONFIDENCE
            ]
            for one in found
        ]

    # --- latency ---

    def timings(
        self, engines: Sequence[_Engine], advance: Callable[[str, int], None]
    ) -> dict[tuple[str, int], list[Round]]:
        """Measure all engines at all batch sizes in rounds; each round goes over all of them."""
        plan = self.plan
        inputs = {
            "engines": {
                engine.case.name: {str(batch): sha for batch, sha in engine.sha256.items()}
                for engine in engines
            },
            "rounds": plan.rounds,
            "duration": plan.duration,
            **{
                backend: self._run_inputs(backend)
                for backend in sorted({engine.case.backend for engine in engines})
            },
        }
        done: list[dict[str, Any]] = (
            [] if self.again else list(self.steps.find("timing", inputs) or [])
        )
        advance("", len(done))
        turns = [(engine, batch) for batch in plan.batches for engine in engines]
        turns = [(engine, batch) for engine, batch in turns if batch in engine.files]
        if 0 < len(done) < plan.rounds:
            self.tell(f"going on with round {len(done) + 1} of {plan.rounds}")
        for number in range(len(done), plan.rounds):
            found: dict[str, Any] = {}
            # Another engine begins each round, and every other round runs backwards.
            shift = number % len(turns)
            order = [*turns[shift:], *turns[:shift]]
            for engine, batch in order if number % 2 == 0 else reversed(order):
                advance(f"latency, round {number + 1} of {plan.rounds}: {engine.case.name}", 0)
                load = functools.partial(self.load, engine, batch)
                one = measure_round(load, batch, plan.duration / plan.rounds)
                found[_turn_name(engine, batch)] = one.to_json()
            clock, gpus = read_cpu_clock(), read_gpus()
            found["machine"] = {
                "cpu_clock": dataclasses.asdict(clock),
                "gpus": [dataclasses.asdict(gpu) for gpu in gpus],
            }
            done.append(found)
            self.steps.keep("timing", inputs, done)
            advance("", 1)
        self.machine_readings = [one["machine"] for one in done]
        return {
            (engine.case.name, batch): [
                round_from_json(one[_turn_name(engine, batch)]) for one in done
            ]
            for engine, batch in turns
        }

    # --- layers ---

    def layers(self, engine: _Engine) -> dict[str, Any] | None:
        """Return the times of an engine's layers, or None where its backend does not tell."""
        batch = min(engine.files)
        inputs = {
            "engine": engine.sha256[batch],
            "batch": batch,
            **self._run_inputs(engine.case.backend),
        }
        found: dict[str, Any] | None = self.steps.find("layers", inputs)
        if found is None:
            self.tell(f"layers of {engine.case.name} ...")
            found = self._layers(engine, batch)
            self.steps.keep("layers", inputs, found)
        if "reason" in found:
            self.left_out.append(f"{engine.case.name}: {found['reason']}")
            return None
        return {"engine": engine.case.name, **found}

    def _layers(self, engine: _Engine, batch: int) -> dict[str, Any]:
        from trt_yolov6.benchmarking import random_input
        from trt_yolov6.roofline import layer_times

        options = LoadOptions(self.plan.threads, self.plan.provider, cuda_graph=False)
        with load_engine(engine.files[batch], options=options) as loaded:
            best: tuple[float, dict[str, float]] | None = None
            for _ in range(LAYER_TRIALS):
                before = cpu_wait_seconds()
                try:
                    kernels = loaded.layer_times(random_input(loaded, batch))
                except UserError as error:
                    return {"reason": str(error)}
                waited = (cpu_wait_seconds() or 0.0) - (before or 0.0)
                if best is None or sum(kernels.values()) < sum(best[1].values()):
                    best = waited, kernels
                if waited < 0.05 * 20 * sum(kernels.values()):
                    break
            assert best is not None
            ceilings = self._ceilings(loaded)
            computed_in = "fp32" if loaded.note else ""
            record = engine.records[batch]
            times = layer_times(
                best[1], _work_from(record.get("work")), batch, ceilings, computed_in
            )
            device = loaded.device
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
                for one in times
            ],
        }

    def _ceilings(self, engine: Engine) -> Ceilings | None:
        from trt_yolov6.roofline import Ceilings, measure_ceilings

        inputs = {"device": engine.device, **self._run_inputs(engine.backend)}
        found = self.steps.find("ceilings", inputs)
        if found is None:
            measured = measure_ceilings(engine)
            found = dataclasses.asdict(measured) if measured else {}
            self.steps.keep("ceilings", inputs, found)
        return Ceilings(**found) if found else None

    def _run_inputs(self, backend: str, *packages: str) -> dict[str, Any]:
        """Return what any measurement depends on besides the engine."""
        return {
            "threads": self.plan.threads,
            "provider": self.plan.provider,
            "versions": _versions(backend, "numpy", *packages),
            "machine": _machine(),
        }

    # --- results ---

    def results(
        self,
        dataset: CocoDataset,
        data: Mapping[str, Any],
        engines: Sequence[_Engine],
        accuracies: Sequence[Mapping[str, Any]],
        rounds: Mapping[tuple[str, int], Sequence[Round]],
        layers: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Put everything together, as `results` documents it."""
        timings = []
        ratios = []
        first = engines[0].case.name
        devices = {
            engine.case.name: found["device"]
            for engine, found in zip(engines, accuracies, strict=True)
        }
        for (name, batch), own in rounds.items():
            engine = next(one for one in engines if one.case.name == name)
            drift = CPU_DRIFT if devices[name] == cpu_model() else GPU_DRIFT
            timings.append(self._timing_record(engine, batch, summarize_rounds(own, drift), own))
            if name != first and (first, batch) in rounds:
                mine, theirs = paired_medians(own, rounds[first, batch])
                if len(mine) >= 2:
                    ratio = ratio_interval(mine, theirs)
                    ratios.append(
                        {
                            "engine": name,
                            "to": first,
                            "batch": batch,
                            "ratio": ratio.value,
                            "interval": [ratio.low, ratio.high],
                        }
                    )
        ceilings = [one["ceilings"] for one in layers]
        dates = [one["date"] for one in accuracies] + [one["date"] for one in timings]
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "package": __version__,
            "date": max(dates, key=datetime.datetime.fromisoformat),
            "environment": _environment(self.machine_readings),
            "data": dict(data),
            "settings": settings_of(self.plan),
            "engines": [
                _engine_record(engine, found)
                for engine, found in zip(engines, accuracies, strict=True)
            ],
            "timings": timings,
            "ratios": ratios,
            "ceilings": list({one["device"]: one for one in ceilings if one}.values()),
            "layers": [
                {key: value for key, value in one.items() if key != "ceilings"} for one in layers
            ],
            "examples": self._example_records(dataset, engines, accuracies),
            "left_out": self.left_out,
        }

    def _timing_record(
        self, engine: _Engine, batch: int, summary: RoundsSummary, rounds: Sequence[Round]
    ) -> dict[str, Any]:
        low, high = summary.latency.low, summary.latency.high
        return {
            "engine": engine.case.name,
            "batch": batch,
            "engine_file": str(engine.records[batch]["file"]),
            "engine_sha256": engine.sha256[batch],
            "latency_ms": {
                "median": summary.latency.value * 1e3,
                "interval": [low * 1e3, high * 1e3],
                "mean": summary.mean * 1e3,
                "p90": summary.p90 * 1e3,
                "p99": summary.p99 * 1e3,
                "min": summary.min * 1e3,
                "rounds": [value * 1e3 for value in summary.rounds],
            },
            "throughput_fps": batch / summary.latency.value,
            "throughput_interval": [batch / high, batch / low if low > 0 else None],
            "runs": summary.runs,
            "quiet_runs": summary.quiet_runs,
            "disturbed": summary.disturbed,
            "waited": summary.waited,
            "date": rounds[-1].date,
        }

    def _example_records(
        self,
        dataset: CocoDataset,
        engines: Sequence[_Engine],
        accuracies: Sequence[Mapping[str, Any]],
    ) -> list[dict[str, Any]]:
        records = []
        for index, image in enumerate(example_images(dataset, self.plan.examples)):
            picture = Path("examples") / f"{index}.jpg"
            if not (self.output / picture).is_file() or self.again:
                write_bytes(self.output / picture, _small_jpeg(image))
            classes = {number: index for index, number in enumerate(dataset.category_ids)}
            records.append(
                {
                    "file": image.path.name,
                    "picture": str(picture),
                    "width": image.width,
                    "height": image.height,
                    "annotated": [
                        [x, y, x + width, y + height, 1.0, classes[entry["category_id"]]]
                        for entry in dataset.annotations
                        if entry["image_id"] == image.id
                        for x, y, width, height in [entry["bbox"]]
                    ],
                    "detections": {
                        engine.case.name: found["examples"][index]
                        for engine, found in zip(engines, accuracies, strict=True)
                    },
                }
            )
        return records


# --- records ------------------------------------------------------------------------------------


def example_images(dataset: CocoDataset, count: int) -> list[Any]:
    """Return some images of a data set, spread evenly over it."""
    total = len(dataset.images)
    count = min(count, total)
    return [dataset.images[index * total // count] for index in range(count)]


def _described(path: Path) -> dict[str, Any]:
    """Say what a file to compare is."""
    suffix = path.suffix
    manifest = read_manifest(path)
    if suffix == ".pt":
        return _source(buildable=True)
    if manifest is not None:
        record = {**_manifest_record(manifest), **_onnx_record(path)}
        batches = [manifest.batch.min, manifest.batch.opt, manifest.batch.max]
        return _source(manifest.precision, manifest.backend, batches, record)
    if suffix != ".onnx":
        with load_engine(path) as engine:
            batches = [engine.batch.min, engine.batch.opt, engine.batch.max]
            return _source(engine.precision, engine.backend, batches, {})
    from trt_yolov6.building import graph_from_onnx
    from trt_yolov6.inspection import inspect_file

    details: Any = inspect_file(path).details
    if details.quantize_nodes or "fp16" in details.precisions:
        graph = graph_from_onnx(path)
        record = {"model": graph.name, "output_layout": graph.output_layout, **_onnx_record(path)}
        batches = [graph.batch.min, graph.batch.opt, graph.batch.max]
        return _source(graph.precision, "onnxruntime", batches, record)
    batch = details.inputs[0].shape[0] if details.inputs and details.inputs[0].shape else None
    fixed = batch if isinstance(batch, int) and batch > 0 else None
    return {**_source(buildable=True), "batch": fixed}


def _source(
    precision: str = "",
    backend: str = "",
    batches: Sequence[int] = (),
    record: Mapping[str, Any] | None = None,
    *,
    buildable: bool = False,
) -> dict[str, Any]:
    return {
        "buildable": buildable,
        "precision": precision,
        "backend": backend,
        "batches": list(batches),
        "batch": None,
        "record": dict(record or {}),
    }


def _onnx_record(path: Path) -> dict[str, Any]:
    from trt_yolov6.building import read_onnx

    return _work_record(read_onnx(path)) if path.suffix == ".onnx" else {}


def _graph_record(graph: Graph) -> dict[str, Any]:
    return _work_record(graph.model)


def _work_record(model: Any) -> dict[str, Any]:
    """Return what of an ONNX graph goes into the results and the layers' rooflines."""
    import tempfile

    import onnx

    from trt_yolov6.inspection import inspect_file
    from trt_yolov6.roofline import graph_work

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "graph.onnx")
        details: Any = inspect_file(Path(folder) / "graph.onnx").details
    return {
        "parameters": details.parameters,
        "flops": details.paper_flops,
        "work": dataclasses.asdict(graph_work(model)),
    }


def _work_from(value: Any) -> GraphWork:
    from trt_yolov6.roofline import GraphWork, LayerWork

    value = value or {"layers": [], "owners": {}}
    return GraphWork(tuple(LayerWork(**layer) for layer in value["layers"]), value["owners"])


def _manifest_record(manifest: Manifest) -> dict[str, Any]:
    return {
        "model": manifest.model,
        "precision": manifest.precision,
        "image_size": list(manifest.image_size),
        "output_layout": manifest.output_layout,
        "calibration": manifest.calibration,
        "float_layers": list(manifest.float_layers),
    }


def _engine_record(engine: _Engine, found: Mapping[str, Any]) -> dict[str, Any]:
    record = engine.records[engine.largest]
    case = engine.case
    precision = case.choice.name if case.choice else record.get("precision", found["precision"])
    return {
        "engine": case.name,
        "label": case.entry.label,
        "model": record.get("model", case.entry.label),
        "precision": precision,
        "backend": found["backend"],
        "backend_version": found["backend_version"],
        "device": found["device"],
        "threads": found["threads"],
        "note": found["note"],
        "image_size": found["image_size"],
        "source": case.entry.path.name,
        "source_sha256": case.source["sha256"],
        "parameters": record.get("parameters"),
        "flops": record.get("flops"),
        "bytes": engine.files[engine.largest].stat().st_size,
        "calibration": record.get("calibration"),
        "float_layers": record.get("float_layers", []),
        "build_s": record.get("build_s"),
        **{key: found[key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl", "images")},
        "detections": found["detections"],
        "per_class": found["per_class"],
    }


def _data_record(dataset: CocoDataset) -> dict[str, Any]:
    digest = hashlib.sha256()
    for image in dataset.images:
        digest.update(bytes.fromhex(sha256_file(image.path)))
    return {
        "root": str(dataset.root),
        "split": dataset.split,
        "annotations_sha256": sha256_file(dataset.annotation_file),
        "images_sha256": digest.hexdigest(),
        "images": len(dataset.images),
        "class_names": list(dataset.class_names),
    }


def _environment(readings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what machine this is; clocks are those after the last round."""
    last = readings[-1] if readings else {"cpu_clock": None, "gpus": []}
    return {
        "cpu": dataclasses.asdict(describe_cpu()),
        "cpu_clock": last["cpu_clock"],
        "gpus": last["gpus"],
        "system": system_name(),
        "packages": {name: value for name, value in package_versions().items() if value},
    }


@functools.cache
def _machine() -> Mapping[str, Any]:
    """Return what has to be the same for a measurement to be used again."""
    return {
        "cpu": cpu_model(),
        "processors": describe_cpu().threads,
        "gpus": [[gpu.name, gpu.driver] for gpu in read_gpus()],
    }


def _versions(backend: str, *packages: str) -> dict[str, str | None]:
    return {
        "trt-yolov6": __version__,
        backend: backend_module(backend).availability().version,
        **package_versions(packages),
    }


def _turn_name(engine: _Engine, batch: int) -> str:
    return f"{engine.case.name}, batch {batch}"


def _small_jpeg(image: Any) -> bytes:
    import cv2

    from trt_yolov6.data.coco import read_coco_image

    pixels = read_coco_image(image)
    scale = min(1.0, EXAMPLE_SIDE / max(pixels.shape[:2]))
    size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
    _, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 82]
    )
    return bytes(encoded.tobytes())


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[str, int], None]]:
    """Show a bar; what is yielded says what is being done, and counts what is done."""
    from tqdm import tqdm

    with tqdm(
        total=total, desc="compare", unit="step", leave=False, disable=None if shown else True
    ) as bar:

        def advance(text: str, done: int) -> None:
            if text:
                bar.set_description_str(text)
            bar.update(done)

        yield advance
