"""A run of `qat`: export, calibrate, train and evaluate a checkpoint, and write the files.

output/ settings.json, state.pt while it trains, log.jsonl, <model>.onnx, an engine if asked for
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trt_yolov6.backends import BACKENDS
from trt_yolov6.checkpoints.loading import Checkpoint
from trt_yolov6.common.files import check_writable, write_bytes, write_json
from trt_yolov6.data.coco import check_objects, load_coco
from trt_yolov6.engines.base import BuildSettings
from trt_yolov6.engines.build import BuiltEngine, check_build
from trt_yolov6.errors import UserError
from trt_yolov6.pipeline import GraphOptions, build, export, settings_for
from trt_yolov6.quantization.implicit import implicit_ranges
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.runtime.sensitivity_report import LabelledAp
from trt_yolov6.training.dataset import DATA_REPORT_FILE, data_notes
from trt_yolov6.training.distributed import chosen_device
from trt_yolov6.training.log import write_log
from trt_yolov6.training.qat.export import rounded_graph, trained_graph
from trt_yolov6.training.qat.onnx_module import GraphNetwork
from trt_yolov6.training.qat.preparation import Start, prepare_graph
from trt_yolov6.training.qat.settings import QatSettings
from trt_yolov6.training.qat.training import QatResult, evaluate_network, load_data, train_quantized
from trt_yolov6.training.state import STATE_FILE, sweep

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QatRun:
    """Result of a run."""

    start: Start
    result: QatResult
    aps: dict[str, float | None]
    """AP on the validation split: of the float network, after PTQ and after training."""
    built: BuiltEngine
    float_graph: Path | None
    """The graph without Q/DQ nodes, which goes with a scales cache."""
    ranges: Mapping[str, float]
    """Range of each tensor of that graph, for the cache; empty without one."""
    state: Path
    """The state of the training; the run can be resumed as long as the file is there."""


def run(
    checkpoint: Checkpoint,
    calib: Path,
    settings: QatSettings,
    output: Path,
    *,
    graph_options: GraphOptions,
    quantization: QuantizationSettings,
    val_split: str | None,
    backend: str = "onnxruntime",
    fp16: bool = False,
    float_graph: bool = False,
    device: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> QatRun:
    """Export and calibrate a checkpoint, train it quantized, and build the result.

    Args:
        checkpoint: the network to train.
        calib: folder of calibration images.
        settings: settings of the training.
        output: the run's folder.
        graph_options: as for `export`.
        quantization: see `prepare_graph`; a budget of automatic float layers is one of AP on the
            validation split.
        val_split: `none`: evaluate nothing.
        backend: backend to build for in addition to ONNX Runtime, whose engine is the ONNX file.
        fp16: half precision for what is not INT8.
        float_graph: also write the graph without Q/DQ nodes.
        device: `cpu`, `cuda` or `cuda:N`; None takes a GPU where there is one.
        resume: continue the interrupted training in `output`.
        progress: see `train_quantized`.

    Raises:
        UserError: an argument cannot be used, or `output` has another run.
    """
    where = chosen_device(device)
    stem = output / checkpoint.arch.name
    onnx_file, plan = (Path(f"{stem}{BACKENDS[one].suffix}") for one in ("onnxruntime", backend))
    check_build(backend, plan, BuildSettings())
    state = _state_file(output, onnx_file, resume)
    graph = export(checkpoint, **graph_options)
    # Bad data is found out before minutes of calibration.
    labelled = None if val_split == "none" else load_coco(settings.data, val_split)
    if labelled is not None:
        check_objects(labelled, "give annotations, or `val_split` none")
    report = output / DATA_REPORT_FILE
    data = load_data(settings, graph, where, progress=progress, report_file=report)
    for note in data_notes(data, report, labelled):
        _log.info(note)
    is_auto = quantization.float_layers == "auto"
    quantization = settings_for(backend, quantization)
    if float_graph:  # for TensorRT, too
        quantization = replace(quantization, shift=False)
    start = prepare_graph(
        graph,
        checkpoint.arch,
        calib,
        quantization=quantization,
        score=LabelledAp(graph, labelled) if labelled and is_auto else None,
    )
    _log.info("%s", _described(start, settings))

    def ap(network: GraphNetwork) -> float | None:
        return evaluate_network(network, start.graph, labelled).ap if labelled else None

    aps = {"AP_float": ap(start.teacher(where)), "AP_ptq": ap(start.student(where).eval())}
    write_json(output / "settings.json", settings.to_json())
    result = train_quantized(
        start, settings, device=where, state_file=state, progress=progress, data=data
    )
    aps["AP"] = ap(result.network)
    quantized = trained_graph(start, result.trained, fp16=fp16)
    built = build(quantized, backend="onnxruntime", output=onnx_file)
    if backend != "onnxruntime":
        built = build(quantized, backend=backend, output=plan)
    without_pairs, ranges = None, dict[str, float]()
    if float_graph:
        without_pairs = Path(f"{stem}.float.onnx")
        plain = replace(start.graph, model=rounded_graph(result.trained))
        write_bytes(without_pairs, plain.model.SerializeToString())
        table = replace(start.quantized.table, amax=result.trained.amax)
        ranges = implicit_ranges(table, plain, calib, quantization)
    write_log(output, result.log)
    return QatRun(start, result, aps, built, without_pairs, ranges, state)


def _described(start: Start, settings: QatSettings) -> str:
    placement = start.quantization.placement
    count = len(placement.layers)
    if not settings.distillation:
        return f"{count} convolutions in INT8, no distillation"
    return (
        f"{count} of {count + len(placement.float_layers)} convolutions in INT8, "
        f"{len(start.features)} features distilled"
    )


def _state_file(output: Path, trained: Path, resume: bool) -> Path:
    """Return where the state goes; there must be a begun training just if it is to be resumed."""
    state = check_writable(output / STATE_FILE)
    begun = (output / "settings.json").exists()
    if begun and not resume:
        raise UserError(
            f"{output} holds a training already; give another `output`, or `resume` to go on."
        )
    if resume and not begun:
        raise UserError(f"{output} holds no interrupted training; leave `resume` out.")
    if resume and trained.exists() and not state.is_file():
        raise UserError(f"the training in {output} is complete; give another `output`.")
    if resume:
        # A kill before the first state leaves nothing to go on from: it starts again.
        sweep(output)
    return state
