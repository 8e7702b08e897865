"""Options of export, quantization and building turned into typed values for `pipeline`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_yolov6.cli.options import (
    CACHE_VERSION,
    SAMPLE_CALIB,
    SAMPLE_WEIGHTS,
    chosen,
    or_sample,
    preprocess_changes,
    refuse,
)
from trt_yolov6.cli.output import check_kind, say
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    from trt_yolov6.engines.base import ImplicitCalibration
    from trt_yolov6.graph.model import Graph
    from trt_yolov6.pipeline import GraphOptions
    from trt_yolov6.quantization.settings import QuantizationSettings
    from trt_yolov6.spec import Precision


def weights_or_sample(weights: Path | None) -> Path:
    """Return the checkpoint of --weights, or the sample's."""
    return or_sample(weights, "--weights", SAMPLE_WEIGHTS)


def checkpoint_options(options: argparse.Namespace) -> GraphOptions:
    """Return how a checkpoint is exported, as `add_graph_options` lets choose."""
    from trt_yolov6.spec import NmsSettings

    thresholds = "confidence", "iou"
    if not options.end2end:
        refuse(options, thresholds, "belongs to NMS in the graph; add --end2end.")
    return {
        "image_size": options.image_size,
        "batch": options.batch,
        "nms": NmsSettings(**chosen(options, *thresholds)) if options.end2end else None,
        "uint8_input": options.uint8_input,
        "opset": options.opset,
    }


def onnx_options(options: argparse.Namespace) -> GraphOptions:
    """Return how the graph of --onnx is read."""
    refuse(
        options,
        ("end2end", "uint8_input", "opset", "confidence", "iou"),
        "changes how a checkpoint is exported and cannot be applied to --onnx; leave it out, or "
        "give --weights.",
    )
    return {
        "image_size": options.image_size,
        "batch": options.batch,
        "class_names": options.class_names,
        "decoder": options.decoder,
        "preprocess": preprocess_changes(options) or None,
    }


def float_precision(options: argparse.Namespace) -> str | None:
    """Return the precision of --fp32 and --fp16; None without either."""
    return "fp16" if options.fp16 else "fp32" if options.fp32 else None


def quantized_precision(options: argparse.Namespace) -> Precision | None:
    """Return the precision of --int8 or --fp8, --fp16 and --float-layers; None without either."""
    from trt_yolov6.spec import Precision

    _check_quantization(options)
    if not (options.int8 or options.fp8):
        return None
    kept = options.float_layers
    if options.fp8 and kept is not None and not isinstance(kept, tuple) and kept != 0:
        raise UserError(
            f"--float-layers {kept} ranks layers by their sensitivity to INT8; name the layers "
            "with --fp8."
        )
    return Precision(
        "fp8" if options.fp8 else "int8",
        "fp16" if options.fp16 else "fp32",
        0 if kept is None else kept,
    )


def _check_quantization(options: argparse.Namespace) -> None:
    """Refuse options that are only for --int8 and --fp8, or only for automatic float layers."""
    if options.float_layers != "auto":
        budget = "max_ap_drop", "max_slowdown", "data", "split"
        refuse(options, budget, "is for --float-layers auto; add it.")
    if options.int8 or options.fp8:
        return
    if not options.tensorrt_calibrator:
        refuse(options, ("image_limit",), "is for --int8 and --fp8; add one of them.")
    names = (
        *("calibrator", "float_layers", "equalize", "bias_correction"),
        *("reconstruct_minutes", "reconstruct", "adaptive_rounding"),
    )
    refuse(options, names, "is for --int8 and --fp8; add one of them.")
    if options.calibration and not options.onnx and not options.tensorrt_calibrator:
        raise UserError("--calib is for --int8 and --fp8, or for an --onnx file with Q/DQ nodes.")


def calibration_settings(options: argparse.Namespace, **others: Any) -> QuantizationSettings:
    """Return how ranges are found, as `add_calibration` lets choose; `others` are more fields."""
    from trt_yolov6.quantization.settings import QuantizationSettings

    names = "calibrator", "equalize", "image_limit"
    return QuantizationSettings(**chosen(options, *names), **others)


def calibration_folder(calib: Path | None) -> Path:
    """Return the folder of --calib, or the sample images."""
    return or_sample(calib, "--calib", SAMPLE_CALIB)


def implicit_calibration(options: argparse.Namespace) -> ImplicitCalibration | None:
    """Return the settings of --calibration-cache and --tensorrt-calibrator, without images."""
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
                "--calibration-cache goes with the float graph that `export` wrote with it; "
                "give that as --onnx, or have TensorRT calibrate with --tensorrt-calibrator."
            )
        return ImplicitCalibration(cache=cache, fp16=options.fp16)
    return ImplicitCalibration(algorithm=algorithm, new_cache=cache, fp16=options.fp16)


def write_scales(cache: Path, version: str | None, amax: Mapping[str, float], graph: Path) -> None:
    """Write a TensorRT calibration cache, and say how it is used."""
    from trt_yolov6.quantization.tensorrt_cache import write_cache

    version = version or CACHE_VERSION
    write_cache(cache, amax, version)
    say(
        f"{cache}: {len(amax)} scales for TensorRT {version}; build with `--onnx {graph} "
        f"--calibration-cache {cache}`"
    )


def check_cache(options: argparse.Namespace, *others: str) -> None:
    """Refuse a cache that cannot be written, or that no TensorRT of --cache-version reads.

    Without --calibration-cache, `others` are refused: options that go with a cache only.
    """
    from trt_yolov6.common.files import check_writable
    from trt_yolov6.quantization.tensorrt_cache import header_version

    if options.calibration_cache is None:
        names = (*others, "cache_version")
        refuse(options, names, "belongs to --calibration-cache; add it.")
        return
    header_version(options.cache_version or CACHE_VERSION)
    check_writable(options.calibration_cache)
    check_kind("--calibration-cache", options.calibration_cache, "a calibration cache", b"TRT-")


def calibrated(graph: Graph, options: argparse.Namespace) -> tuple[Graph, dict[str, float]]:
    """Return a float graph that is ready to be calibrated, and its tensors' ranges."""
    from dataclasses import replace

    from trt_yolov6.quantization.implicit import implicit_ranges
    from trt_yolov6.quantization.pipeline import quantize

    # Corrected biases would be in the graph with Q/DQ nodes, which this route does without.
    settings = calibration_settings(options, bias_correction=False, shift=False)
    folder = calibration_folder(options.calibration)
    result = quantize(graph, folder, settings)
    graph = replace(graph, model=result.float_model)
    return graph, dict(implicit_ranges(result.table, graph, folder, settings))
