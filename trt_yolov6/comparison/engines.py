"""The engines of a comparison: those that a plan asks for, built if they are missing."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from trt_yolov6.backends import BACKENDS
from trt_yolov6.bench.roofline import graph_work
from trt_yolov6.checkpoints import is_named_as_checkpoint
from trt_yolov6.common.files import sha256_file
from trt_yolov6.common.records import as_record
from trt_yolov6.comparison.cache import Steps
from trt_yolov6.comparison.machine import machine, versions
from trt_yolov6.comparison.plan import ModelEntry, Plan
from trt_yolov6.data.calibration import calibration_images, images_sha256
from trt_yolov6.data.class_names import read_class_names
from trt_yolov6.data.preprocessing import parse_changes
from trt_yolov6.engines import best_backend, load_engine
from trt_yolov6.engines.base import Engine, LoadOptions
from trt_yolov6.engines.manifest import Manifest, manifest_of, read_manifest
from trt_yolov6.errors import UserError
from trt_yolov6.graph.files import graph_precision, read_onnx
from trt_yolov6.graph.inspect import inspect_onnx
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.onnx_import import graph_from_onnx
from trt_yolov6.pipeline import build, export, quantize
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.table import table_path
from trt_yolov6.spec import BatchProfile, Precision

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """State shared by all steps of one comparison."""

    plan: Plan
    output: Path
    steps: Steps
    graphs: dict[Any, Graph] = dataclasses.field(default_factory=dict)
    """Graphs by model, batch profile and precision: exporting one takes seconds."""


@dataclass(frozen=True)
class SourceFile:
    """Facts of a file that is compared."""

    sha256: str
    buildable: bool = False
    """Engines are built from it; otherwise it is one, or a quantized or FP16 graph."""
    precision: str = ""
    """Precision and, below, backend of an engine; empty for a source to build from."""
    backend: str = ""
    batches: tuple[int, ...] = ()
    """Smallest, best and largest batch size of an engine."""
    batch: int | None = None
    """The only batch size that a graph takes; None: any."""
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Facts of its graph, as in `BuiltCase.records`."""


@dataclass(frozen=True)
class Case:
    """One engine of the comparison: a model at a precision on a backend."""

    name: str
    entry: ModelEntry
    choice: Precision | None
    """None: the file is not `buildable` and taken as it is."""
    backend: str
    source: SourceFile

    @property
    def stem(self) -> str:
        """The name, with characters that suit a file name."""
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in self.name)


@dataclass(frozen=True)
class BuiltCase:
    """A case that was built, by batch size; one file may serve several."""

    case: Case
    files: Mapping[int, Path]
    sha256: Mapping[int, str]
    records: Mapping[int, Mapping[str, Any]]
    """Record of the building step: file, build_s, parameters, flops, work, calibration …"""
    left_out: tuple[str, ...] = ()
    """Sentences about batch sizes that it does not take."""

    @property
    def name(self) -> str:
        """The case's name."""
        return self.case.name

    @property
    def largest(self) -> int:
        """The largest batch size."""
        return max(self.files)

    def load(self, plan: Plan, batch: int, *, cuda_graph: bool = True) -> Engine:
        """Load the engine of a batch size, as the plan runs engines."""
        options = LoadOptions(plan.threads, plan.provider, cuda_graph)
        if self.case.choice is None:  # the manifest of a built engine has both
            entry = self.case.entry
            options = dataclasses.replace(
                options, decoder=entry.decoder, preprocess=parse_changes(entry.preprocess)
            )
        backend = self.case.backend if self.case.source.buildable else "auto"
        return load_engine(self.files[batch], backend, options)


def cases_of(work: Work) -> list[Case]:
    """Return the engines that the plan asks for, in its order.

    Raises:
        UserError: a file is missing or damaged, or two engines have one name.
    """
    backends = [best_backend() if name == "auto" else name for name in work.plan.backends]
    several = len(set(backends)) > 1
    cases: list[Case] = []
    for entry in work.plan.models:
        source = _source(work, entry)
        for asked in dict.fromkeys(backends):
            backend = source.backend or asked
            choices: list[Precision | None] = [None]
            if source.buildable:
                texts = entry.precisions or work.plan.precisions
                choices = list(dict.fromkeys(map(Precision.parse, texts)))
            for choice in choices:
                name = f"{entry.label} {choice or source.precision}"
                case = Case(
                    name + (f" {backend}" if several else ""), entry, choice, backend, source
                )
                if case not in cases:
                    cases.append(case)
    names = [case.name for case in cases]
    stems = [case.stem for case in cases]
    for name, stem in zip(names, stems, strict=True):
        if names.count(name) > 1:
            raise UserError(
                f"two engines of the comparison are called {name!r}; give their models names of "
                "their own in a plan (`name:`)."
            )
        if stems.count(stem) > 1:
            raise UserError(
                f"{name!r} and another engine of the comparison would be one file, {stem}; give "
                "their models names in a plan (`name:`) that differ in letters or digits."
            )
    return cases


def build_case(work: Work, case: Case) -> BuiltCase:
    """Build a case, unless it has been built.

    Raises:
        UserError: the file takes none of the batch sizes, or no engine can be built from it.
    """
    batches = sorted(set(work.plan.batches))
    if not case.source.buildable:
        return _as_it_is(case, batches)
    fixed = case.source.batch
    left_out: tuple[str, ...] = ()
    if fixed:
        if fixed not in batches:
            raise UserError(
                f"{case.entry.path} takes batch {fixed} only; add it to `batches`, or export it "
                "again with a free batch axis.",
            )
        left_out = _not_taken(
            case, [batch for batch in batches if batch != fixed], f"batch {fixed}"
        )
        profiles = {fixed: BatchProfile.of(fixed)}
    elif case.backend == "onnxruntime":
        # One graph serves all sizes equally well, and is the same whichever are measured.
        most = max(32, *batches)
        profiles = dict.fromkeys(batches, BatchProfile(1, most, most))
    else:
        profiles = {batch: BatchProfile.of(batch) for batch in batches}
    records = {batch: _record(work, case, profile) for batch, profile in profiles.items()}
    return BuiltCase(
        case,
        {batch: work.output / record["file"] for batch, record in records.items()},
        {batch: record["engine_sha256"] for batch, record in records.items()},
        records,
        left_out,
    )


# --- building -----------------------------------------------------------------------------------


def _record(work: Work, case: Case, profile: BatchProfile) -> Mapping[str, Any]:
    choice, entry = case.choice, case.entry
    assert choice is not None
    inputs = {
        "source": case.source.sha256,
        "names": entry.names and list(read_class_names(entry.names)),
        "image_size": entry.image_size,
        "decoder": entry.decoder,
        "preprocess": entry.preprocess,
        "precision": str(choice),
        "calibration": _calibration_inputs(work.plan) if choice.quantizes else None,
        "profile": dataclasses.astuple(profile),
        "backend": case.backend,
        "versions": versions(case.backend, "onnx", "onnxscript", "torch"),
        "machine": None if case.backend == "onnxruntime" else machine(),
        "label": case.name,
    }

    def is_whole(found: Mapping[str, Any]) -> bool:
        file = work.output / found["file"]
        hashes = [found["engine_sha256"], found.get("manifest_sha256")]
        return file.is_file() and _hashes(file) == hashes

    return work.steps.once("build", inputs, lambda: _build(work, case, choice, profile), is_whole)


def _hashes(engine: Path) -> list[str | None]:
    """Return the SHA-256 of an engine and of its manifest, which says how images are prepared."""
    manifest = manifest_of(engine)
    return [sha256_file(engine), sha256_file(manifest) if manifest else None]


def _build(work: Work, case: Case, choice: Precision, profile: BatchProfile) -> Mapping[str, Any]:
    _log.info(f"building {case.name} ...")
    stem = case.stem + (f"_b{profile.max}" if profile.is_static else "")
    path = work.output / "engines" / f"{stem}{BACKENDS[case.backend].suffix}"
    graph = _graph(work, case.entry, profile, choice if choice.base == "fp16" else None)
    if choice.quantizes:
        calibrator: Any = work.plan.calibrator
        graph = quantize(
            graph,
            work.plan.calibration,
            precision=choice,
            settings=QuantizationSettings(calibrator=calibrator, border=work.plan.border),
            table=table_path(path),
            progress=False,
        )
    built = build(graph, backend=case.backend, output=path, progress=False)
    return {
        "file": str(path.relative_to(work.output)),
        "engine_sha256": built.manifest.plan_sha256,
        "manifest_sha256": _hashes(path)[1],
        "build_s": built.seconds,
        **_graph_record(graph.model),
        **_manifest_record(built.manifest),
    }


def _graph(
    work: Work, entry: ModelEntry, profile: BatchProfile | None, precision: Precision | None
) -> Graph:
    key = entry, profile, precision
    if key not in work.graphs:
        work.graphs[key] = export(
            entry.path,
            precision=precision,
            image_size=entry.image_size,
            batch=profile,
            class_names=entry.names,
            decoder=entry.decoder,
            preprocess=parse_changes(entry.preprocess) if entry.preprocess else None,
        )
    return work.graphs[key]


def _calibration_inputs(plan: Plan) -> Mapping[str, Any]:
    return {
        "images": images_sha256(calibration_images(plan.calibration)),
        "calibrator": plan.calibrator,
        "border": plan.border,
    }


def _as_it_is(case: Case, batches: Sequence[int]) -> BuiltCase:
    path, profile = case.entry.path, BatchProfile(*case.source.batches)
    takes = f"batches of {profile.min} to {profile.max}"
    taken = [batch for batch in batches if profile.min <= batch <= profile.max]
    if not taken:
        raise UserError(f"{path} takes {takes}, of which `batches` has none; add one.")
    sha256 = case.source.sha256
    record = {"file": str(path.resolve()), "engine_sha256": sha256, **case.source.record}
    return BuiltCase(
        case,
        dict.fromkeys(taken, path),
        dict.fromkeys(taken, sha256),
        dict.fromkeys(taken, record),
        _not_taken(case, [batch for batch in batches if batch not in taken], takes),
    )


def _not_taken(case: Case, batches: Sequence[int], takes: str) -> tuple[str, ...]:
    if not batches:
        return ()
    missing = ", ".join(map(str, batches))
    return (f"{case.name} takes {takes}: batch {missing} was not measured.",)


def origins(built: Sequence[BuiltCase]) -> list[str]:
    """Return the SHA-256 of each engine's origin: the checkpoint in its manifest.

    Without a checkpoint it is the file that the engine was built from or, if that is an engine of
    the comparison, its origin. Without a manifest it is the engine itself.
    """
    own = [one.sha256[one.largest] for one in built]
    manifests = [read_manifest(one.files[one.largest]) for one in built]
    sources = {
        sha256: source
        for sha256, manifest in zip(own, manifests, strict=True)
        if manifest is not None
        # ONNX Runtime's engine of an engine's file is that file again.
        and (source := manifest.checkpoint_sha256 or manifest.source_sha256) not in ("", sha256)
    }
    found = own
    for _ in sources:
        found = [sources.get(sha256, sha256) for sha256 in found]
    return found


# --- what a file is -----------------------------------------------------------------------------


def _source(work: Work, entry: ModelEntry) -> SourceFile:
    path = entry.path
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist; check the path.")
    if is_named_as_checkpoint(path) and (entry.names or entry.decoder or entry.preprocess):
        raise UserError(
            f"{path} is a checkpoint, which is a YOLOv6 and has its class names itself; leave "
            "`names`, `decoder` and `preprocess` out of its entry."
        )
    file, manifest = _hashes(path)
    inputs = {
        "file": file,
        "name": path.name,
        "manifest": manifest,
        "decoder": entry.decoder,
        "names": str(entry.names) if entry.names else None,
        "image_size": entry.image_size,
        "preprocess": list(entry.preprocess),
    }

    def describe() -> dict[str, Any]:
        return dataclasses.asdict(_described(work, entry, str(file)))

    known = work.steps.once("source", inputs, describe)
    source = as_record(known, SourceFile, f"a step kept in {work.output} is damaged")
    if not source.buildable and entry.names:
        raise UserError(
            f"{path} is {source.precision} already and is taken as it is, with its own class "
            "names; leave `names` out of its entry, or build an engine with them first."
        )
    is_as_asked = (
        (entry.precisions or work.plan.precisions) in (("fp32",), (source.precision,))
        and work.plan.backends in (("auto",), (source.backend,))
        and entry.image_size is None
    )
    if not source.buildable and not is_as_asked:
        _log.info(
            f"{path} is {source.precision} already and is taken as it is, for {source.backend} and "
            "in its own size"
        )
    return source


def _described(work: Work, entry: ModelEntry, sha256: str) -> SourceFile:
    """Return the facts of a file with this hash."""
    path = entry.path
    manifest = read_manifest(path)
    if is_named_as_checkpoint(path):
        from trt_yolov6.checkpoints.loading import load_checkpoint  # needs PyTorch

        load_checkpoint(path)  # refused now, not after others have been built
        return SourceFile(sha256, buildable=True)
    if manifest is not None:
        record = _manifest_record(manifest)
        if path.suffix == ".onnx":
            record |= _graph_record(read_onnx(path))
        return _taken(sha256, manifest.precision, manifest.backend, manifest.batch, record)
    if path.suffix != ".onnx":
        with load_engine(path, options=LoadOptions(decoder=entry.decoder)) as engine:
            return _taken(sha256, engine.precision, engine.backend, engine.batch, {})
    model = read_onnx(path)
    if graph_precision(model) != "fp32":
        graph = graph_from_onnx(path, decoder=entry.decoder)
        record = {"model": graph.name, **_graph_record(model)}
        return _taken(sha256, graph.precision, "onnxruntime", graph.batch, record)
    batch = _graph(work, entry, None, None).batch  # refused now, not after others have been built
    return SourceFile(sha256, buildable=True, batch=batch.min if batch.is_static else None)


def _taken(
    sha256: str, precision: str, backend: str, batch: BatchProfile, record: Mapping[str, Any]
) -> SourceFile:
    return SourceFile(sha256, False, precision, backend, dataclasses.astuple(batch), record=record)


def _graph_record(model: onnx.ModelProto) -> dict[str, Any]:
    """Return an ONNX graph's part of the results and of the layers' rooflines."""
    details = inspect_onnx(model)
    return {
        "parameters": details.parameters,
        "flops": details.paper_flops,
        "graph_work": dataclasses.asdict(graph_work(model)),
    }


def _manifest_record(manifest: Manifest) -> dict[str, Any]:
    return {
        "model": manifest.model,
        "precision": manifest.precision,
        "calibration": manifest.calibration,
        "float_layers": list(manifest.float_layers),
    }
