"""From options to the graph that is exported, quantized, cleaned or built."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_yolov6.cli.engines import thresholds
from trt_yolov6.cli.options import (
    CACHE_VERSION,
    ENGINES,
    SAMPLE_CALIB,
    SAMPLE_WEIGHTS,
    is_given,
    spelled,
)
from trt_yolov6.cli.output import say
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    import onnx

    from trt_yolov6.checkpoints.loading import Checkpoint
    from trt_yolov6.engines.base import BuildSettings, ImplicitCalibration
    from trt_yolov6.graph.export import ExportSettings
    from trt_yolov6.graph.model import Graph
    from trt_yolov6.quantization.search import Candidate
    from trt_yolov6.quantization.settings import QuantizationSettings
    from trt_yolov6.spec import BatchProfile


def exported(options: argparse.Namespace, checkpoint: Checkpoint | None = None) -> Graph:
    """Return the graph of a checkpoint: of that given, of --weights, or of the sample's."""
    from trt_yolov6.checkpoints.loading import load_checkpoint
    from trt_yolov6.graph.export import graph_from_checkpoint

    settings = _export_settings(options)
    checkpoint = checkpoint or load_checkpoint(_weights(options))
    say(f"exporting {checkpoint.arch.name} from {checkpoint.path} to ONNX (some seconds) ...")
    return graph_from_checkpoint(checkpoint, settings)


def onnx_graph(options: argparse.Namespace) -> Graph:
    """Return the graph of --onnx."""
    from trt_yolov6.data.class_names import read_class_names
    from trt_yolov6.graph.onnx_import import graph_from_onnx

    for option in ("end2end", "uint8_input", "opset", "conf", "iou"):
        if is_given(getattr(options, option)):
            raise UserError(
                f"{spelled(option)} changes how a checkpoint is exported and cannot be "
                "applied to --onnx; leave it out, or give --weights."
            )
    graph = graph_from_onnx(
        options.onnx,
        batch=_profile(options),
        image_size=options.imgsz,
        fp16=options.fp16 and not _quantizes(options),
        class_names=read_class_names(options.names) if options.names else None,
        decoder=options.decoder,
        preprocess=options.preprocess or (),
    )
    if options.fp32 and not _quantizes(options) and graph.precision != "fp32":
        raise UserError(
            f"{options.onnx} is {graph.precision} and cannot be made --fp32; leave --fp32 out."
        )
    return graph


def quantization_settings(options: argparse.Namespace) -> QuantizationSettings | None:
    """Return the settings of --int8 or --fp8, or None without either."""
    only_quantized = [
        "calibrator",
        "calib_images",
        "float_layers",
        "no_equalize",
        "no_bias_correction",
        "no_reconstruct",
        "adaptive_rounding",
    ]
    for name in ("max_ap_drop", "max_slowdown", "data", "split"):
        if getattr(options, name) is not None and options.float_layers != "auto":
            raise UserError(f"{spelled(name)} is for --float-layers auto; add it.")
    if not (options.int8 or options.fp8):
        for name in only_quantized:
            of_tensorrt = name == "calib_images" and options.tensorrt_calibrator
            if is_given(getattr(options, name)) and not of_tensorrt:
                raise UserError(f"{spelled(name)} is for --int8 and --fp8; add one of them.")
        if options.calib and not options.onnx and not options.tensorrt_calibrator:
            raise UserError(
                "--calib is for --int8 and --fp8, or for an --onnx file with Q/DQ nodes."
            )
        return None
    from trt_yolov6.quantization.settings import QuantizationSettings, check_settings
    from trt_yolov6.quantization.types import FP8, INT8

    settings = QuantizationSettings(
        quantized=FP8 if options.fp8 else INT8,
        calibrator=options.calibrator or "auto",
        equalize=not options.no_equalize,
        fp16=options.fp16,
        image_limit=options.calib_images,
        float_layers=() if options.float_layers is None else options.float_layers,
        bias_correction=not options.no_bias_correction,
        adaptive_rounding=options.adaptive_rounding,
        reconstruct=not options.no_reconstruct,
        max_ap_drop=_most_ap_drop(options),
        max_slowdown=options.max_slowdown,
    )
    check_settings(settings)
    return settings


def _most_ap_drop(options: argparse.Namespace) -> float | None:
    """Return the budget of --float-layers auto in AP points; None where one in time is given."""
    if options.max_ap_drop is None:
        return None if options.max_slowdown is not None else 0.5
    return float(options.max_ap_drop)


def tried_table(candidates: Sequence[Candidate]) -> str:
    """Return what a quantization tried as a table for the terminal."""
    rows = [("decision", "tried", "agreement", "slower", "seconds")]
    for item in candidates:
        what = {
            "graph and ranges": f"{item.variant}, {item.method}",
            "weights": item.weights,
            "float layers": f"{len(item.float_layers)} in float",
        }[item.decides]
        slower = f"{item.slowdown:.1%}" if item.float_layers else ""
        cells = (f"{item.agreement:.3f}", slower, f"{item.seconds:.1f}")
        rows.append((item.decides, what, *cells))
    widths = [max(len(row[place]) for row in rows) for place in range(5)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def quantized(graph: Graph, options: argparse.Namespace, settings: QuantizationSettings) -> Graph:
    """Return a graph with Q/DQ nodes; its ranges are written beside the output."""
    from dataclasses import replace

    from trt_yolov6.engines.build import engine_stem
    from trt_yolov6.quantization.pipeline import quantize
    from trt_yolov6.quantization.table import table_path, write_table

    folder = calibration_folder(options)
    # Named as the engine will be, which the float graph's precision is not a part of.
    named = replace(graph, precision="fp8" if options.fp8 else "int8")
    output = options.output or ENGINES / f"{engine_stem(named, options.target)}.onnx"
    automatic = options.float_layers == "auto"
    score = labelled_score(graph, options.data, options.split) if automatic else None
    result = quantize(graph, folder, settings, table_file=table_path(output), score=score, tell=say)
    write_table(table_path(output), result.table)
    placement = result.placement
    if result.candidates:
        print(tried_table(result.candidates))
    say(
        f"{len(placement.layers)} of {len(placement.layers) + len(placement.float_layers)} "
        f"convolutions in {settings.quantized.label}; ranges in {table_path(output)}"
    )
    return result.graph


def calibrated(graph: Graph, options: argparse.Namespace) -> Graph:
    """Write a TensorRT calibration cache; return the float graph whose tensors it names."""
    from dataclasses import replace

    from trt_yolov6.quantization.implicit import implicit_ranges
    from trt_yolov6.quantization.pipeline import quantize
    from trt_yolov6.quantization.settings import QuantizationSettings
    from trt_yolov6.quantization.tensorrt_cache import write_cache

    version = options.cache_version or CACHE_VERSION
    settings = QuantizationSettings(
        calibrator=options.calibrator or "auto",
        equalize=not options.no_equalize,
        # Corrected biases would be in the graph with Q/DQ nodes, which this route does without.
        bias_correction=False,
        image_limit=options.calib_images,
    )
    folder = calibration_folder(options)
    result = quantize(graph, folder, settings, tell=say)
    amax = implicit_ranges(result, replace(graph, model=result.float_model), folder, settings)
    write_cache(options.calibration_cache, amax, version)
    print(
        f"{options.calibration_cache}: {len(amax)} scales for TensorRT {version}; build with "
        "`--onnx ... --calibration-cache ...`"
    )
    return replace(graph, model=result.float_model)


def implicit_calibration(options: argparse.Namespace) -> ImplicitCalibration | None:
    """Return what --calibration-cache and --tensorrt-calibrator ask for; images come later."""
    from trt_yolov6.engines.base import ImplicitCalibration

    cache, algorithm = options.calibration_cache, options.tensorrt_calibrator
    if cache is None and algorithm is None:
        return None
    if options.int8 or options.fp8:
        raise UserError(
            "--calibration-cache and --tensorrt-calibrator are for a graph without Q/DQ nodes; "
            "leave --int8 and --fp8 out."
        )
    if algorithm is None:
        if not options.onnx:
            raise UserError(
                "--calibration-cache goes with the float graph that `export` wrote beside it; "
                "give that as --onnx, or have TensorRT calibrate with --tensorrt-calibrator."
            )
        return ImplicitCalibration(cache=cache, fp16=options.fp16)
    return ImplicitCalibration(algorithm=algorithm, new_cache=cache, fp16=options.fp16)


def calibrated_by_tensorrt(
    graph: Graph, options: argparse.Namespace, settings: BuildSettings
) -> tuple[Graph, BuildSettings]:
    """Return a float graph as the INT8 one it becomes, and the settings with images for it."""
    from dataclasses import replace

    from trt_yolov6.data.calibration import calibration_images
    from trt_yolov6.quantization.judge import batches_of

    calibration = settings.calibration
    assert calibration is not None
    if graph.precision != "fp32":
        raise UserError(
            f"{graph.source} is {graph.precision}, and TensorRT calibrates float32 graphs; give "
            "one without Q/DQ nodes and casts."
        )
    how: dict[str, Any] = {"cache": str(calibration.cache)}
    if calibration.cache is None:
        paths = list(calibration_images(calibration_folder(options), options.calib_images))
        calibration = replace(calibration, images=lambda: batches_of(graph, paths))
        how = {"tensorrt": calibration.algorithm, "images": len(paths)}
    graph = replace(graph, precision="int8", calibration=how)
    return graph, replace(settings, calibration=calibration)


def cleaned(graph: Graph, options: argparse.Namespace) -> Graph:
    """Take surplus Q/DQ nodes out of a graph that came with some, and prove it on images."""
    from collections import Counter
    from dataclasses import replace

    from trt_yolov6.data.calibration import calibration_batches, input_spec
    from trt_yolov6.quantization.qdq.cleanup import clean, verify_clean

    model, removals = clean(graph.model)
    if not removals:
        say("surgery: no Q/DQ node of the graph is surplus")
        return graph
    for kind, count in Counter(removal.kind for removal in removals).items():
        first = next(removal for removal in removals if removal.kind == kind)
        say(f"surgery: {count} x {kind.replace('_', ' ')}, such as {first}")
    folder = options.calib or (SAMPLE_CALIB if SAMPLE_CALIB.is_dir() else None)
    if folder is None:
        say("surgery: not verified; --calib DIR compares the outputs on its images")
        return replace(graph, model=model)
    images = calibration_batches(
        folder, input_spec(model), limit=8, preprocessing=graph.preprocessing
    )
    for shift in verify_clean(graph.model, model, images):
        say(
            f"surgery: {shift.output} moved by {shift.moved:.3g} (RMS); quantization itself moves "
            f"it by {shift.quantization:.3g}"
        )
        if not shift.explained:
            raise UserError(
                f"surgery on {graph.source} moved {shift.output} more than quantization explains; "
                "build it with --no-surgery and please report the file."
            )
    return replace(graph, model=model)


def labelled_score(
    graph: Graph, data: Path | None, split: str | None
) -> Callable[[onnx.ModelProto], float] | None:
    """Return a function for the AP on a data set; None without one."""
    if data is None:
        return None
    from trt_yolov6.data.coco import load_coco
    from trt_yolov6.runtime.sensitivity_report import ap_on

    return ap_on(graph, load_coco(data, split))


def calibration_folder(options: argparse.Namespace) -> Path:
    """Return the folder of --calib, or the sample images."""
    if options.calib is not None:
        folder: Path = options.calib
        return folder
    say(f"no --calib given: calibrating on {SAMPLE_CALIB}/")
    return SAMPLE_CALIB


def _weights(options: argparse.Namespace) -> Path:
    weights: Path | None = options.weights
    if weights is not None:
        return weights
    if not SAMPLE_WEIGHTS.is_file():
        raise UserError(
            f"neither --weights nor --onnx is given and the sample {SAMPLE_WEIGHTS} is not here; "
            "name a checkpoint with --weights."
        )
    say(f"no --weights given: taking the sample checkpoint {SAMPLE_WEIGHTS}")
    return SAMPLE_WEIGHTS


def _export_settings(options: argparse.Namespace) -> ExportSettings:
    from trt_yolov6.graph.export import DEFAULT_OPSET, ExportSettings
    from trt_yolov6.spec import NmsSettings

    if not options.end2end and (options.conf is not None or options.iou is not None):
        raise UserError("--conf and --iou belong to NMS in the graph; add --end2end.")
    return ExportSettings(
        image_size=options.imgsz,
        batch=_profile(options) or _default_profile(),
        # Quantization starts from float32; the rest becomes half precision with the Q/DQ pairs.
        fp16=options.fp16 and not _quantizes(options),
        nms=thresholds(options, NmsSettings()) if options.end2end else None,
        uint8_input=options.uint8_input,
        opset=options.opset or DEFAULT_OPSET,
    )


def _quantizes(options: argparse.Namespace) -> bool:
    names = ("int8", "fp8", "calibration_cache", "tensorrt_calibrator")
    return any(getattr(options, name, None) for name in names)


def _profile(options: argparse.Namespace) -> BatchProfile | None:
    from trt_yolov6.spec import BatchProfile

    if options.batch is not None:
        return BatchProfile(options.batch, options.batch, options.batch)
    return BatchProfile(*options.dynamic) if options.dynamic else None


def _default_profile() -> BatchProfile:
    from trt_yolov6.spec import BatchProfile

    return BatchProfile()
