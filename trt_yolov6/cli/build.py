"""`build`: an engine from a checkpoint or an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trt_yolov6.cli import options as common
from trt_yolov6.cli.graphs import (
    calibration_folder,
    calibration_settings,
    checkpoint_options,
    float_precision,
    implicit_calibration,
    onnx_options,
    quantized_precision,
    weights_or_sample,
)
from trt_yolov6.cli.output import say_next

if TYPE_CHECKING:
    from trt_yolov6.quantization.settings import QuantizationSettings


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    text = "build an engine from a checkpoint or an ONNX file"
    parser = common.add_command(commands, "build", run, text)
    common.add_checkpoint_or_onnx(parser, "a detector's ONNX file")
    common.add_graph_options(parser)
    parser.add_argument(
        "--names",
        dest="class_names",
        type=Path,
        help="class names for --onnx: a text file or COCO JSON",
    )
    common.add_decoder(parser)
    _add_quantization(parser)
    _add_builder(parser)
    common.add_quiet(parser)


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    int8 = parser.add_argument_group("INT8 and FP8")
    types = int8.add_mutually_exclusive_group()
    types.add_argument(
        "--int8",
        action="store_true",
        help="quantize to INT8; the rest is FP32, or FP16 with --fp16",
    )
    types.add_argument(
        "--fp8",
        action="store_true",
        help="quantize to FP8 (E4M3); needs compute capability 8.9 or later",
    )
    common.add_calibration(int8)
    _add_float_layers(int8)
    int8.add_argument(
        "--no-bias-correction",
        dest="bias_correction",
        action="store_false",
        help="do not correct biases; GPTQ, which changes them, too, is not tried then",
    )
    int8.add_argument(
        "--reconstruct",
        dest="reconstruct_minutes",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="--int8: spend this long on learning scales, weights and biases from the float "
        "network on the calibration images; the result is kept if it is clearly better on held-out "
        "ones (0)",
    )
    rounding = int8.add_mutually_exclusive_group()
    rounding.add_argument(
        "--no-reconstruct",
        dest="reconstruct",
        action="store_false",
        help="--int8: do not try GPTQ, which rounds weights for the inputs they meet",
    )
    rounding.add_argument(
        "--adaptive-rounding", action="store_true", help="--int8: use GPTQ without comparing first"
    )
    int8.add_argument(
        "--allow-float",
        action="store_true",
        help="build even if the backend computes all convolutions in float",
    )
    int8.add_argument(
        "--no-surgery",
        dest="clean",
        action="store_false",
        help="leave the Q/DQ nodes of --onnx untouched",
    )
    _add_tensorrt_calibration(int8)


def _add_tensorrt_calibration(int8: argparse._ActionsContainer) -> None:
    int8.add_argument(
        "--calibration-cache",
        type=Path,
        help="TensorRT up to 10: scales for a float --onnx graph, as export writes them",
    )
    int8.add_argument(
        "--tensorrt-calibrator",
        choices=("entropy", "minmax"),
        help="TensorRT up to 10: let TensorRT calibrate the float graph on --calib; its scales go "
        "to --calibration-cache, if given",
    )


def _add_float_layers(int8: argparse._ActionsContainer) -> None:
    common.add_float_layers(
        int8,
        "layers to keep in float: the K most sensitive; auto, as few as --max-ap-drop allows (both "
        "with --int8 only); or names, separated by commas (0)",
    )
    int8.add_argument(
        "--max-ap-drop",
        type=float,
        metavar="POINTS",
        help="--float-layers auto: AP points that INT8 may cost (0.5)",
    )
    int8.add_argument(
        "--max-slowdown",
        type=common.percent,
        metavar="PERCENT",
        help="--float-layers auto: run time, by layer times, that float layers may add, such as "
        "5%% (any); without --max-ap-drop, the most accurate set within it",
    )
    common.add_data(
        int8,
        "--float-layers auto: labelled data to measure the AP drop on (agreement with the float "
        "network on the calibration images)",
    )


def _add_builder(parser: argparse.ArgumentParser) -> None:
    common.add_backend(parser, "the best one that works here")
    parser.add_argument(
        "--target", help="tensorrt-rtx: GPU to build for, such as t4 (this machine's)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write (engines/<weights>-<precision>.onnx or .trt; a size or batch that is "
        "not usual is part of the name)",
    )
    parser.add_argument(
        "--timing-cache", type=Path, help="TensorRT timing cache to use and extend (none)"
    )
    parser.add_argument(
        "--tactic-sources",
        type=lambda text: tuple(part.strip().lower() for part in text.split(",") if part.strip()),
        metavar="NAMES",
        help="TensorRT: libraries it may take kernels from, such as "
        "edge_mask_convolutions,jit_convolutions, which needs neither cuBLAS nor cuDNN (its own "
        "choice)",
    )
    parser.add_argument(
        "--workspace",
        dest="workspace_mib",
        type=common.positive,
        metavar="MIB",
        help="TensorRT: most scratch memory, in MiB (its own limit)",
    )
    parser.add_argument(
        "--optimization-level",
        type=int,
        choices=range(6),
        help="TensorRT: effort of the builder; higher takes longer, for a faster engine (its own)",
    )


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    from trt_yolov6.engines import runs_here
    from trt_yolov6.engines.base import BuildSettings
    from trt_yolov6.engines.build import check_build
    from trt_yolov6.pipeline import build

    settings = BuildSettings(
        **common.chosen(options, "target", "timing_cache", "workspace_mib", "optimization_level"),
        tactic_sources=options.tactic_sources,
        calibration=implicit_calibration(options),
        fp8=options.fp8,
    )
    if not options.onnx:
        names = "class_names", "decoder", "preprocess"
        common.refuse(
            options, names, "is for --onnx: a checkpoint is a YOLOv6 and names its classes."
        )
    precision = quantized_precision(options)
    # Before it is said which samples stand in for what is not given.
    check_build(options.backend, options.output, settings)
    built = build(
        options.onnx or weights_or_sample(options.weights),
        precision=precision or (None if settings.calibration else float_precision(options)),
        calibration=_calibration(options, needed=precision is not None),
        backend=options.backend,
        output=options.output,
        quantization=_quantization(options) if precision or settings.calibration else None,
        data=options.data,
        split=options.split,
        settings=settings,
        clean=options.clean,
        allow_float=options.allow_float,
        progress=not options.quiet,
        **(onnx_options(options) if options.onnx else checkpoint_options(options)),
    )
    manifest = built.manifest
    height, width = manifest.image_size
    print(
        f"{built.path}: {manifest.model}, {manifest.precision}, {height}x{width}, "
        f"batch {manifest.batch}, {manifest.backend} {manifest.backend_version} "
        f"for {manifest.target}, {built.path.stat().st_size / 2**20:.1f} MiB"
    )
    print(f"{built.manifest_path}: its manifest")
    if options.onnx:
        print(manifest.detector)
    if built.quantized_asked:
        label = manifest.precision.upper()
        print(f"in {label}: {_share(manifest.quantized_layers, built.quantized_asked)}")
    if manifest.backend == "onnxruntime" or runs_here(built.path):
        say_next(options, "its AP", "eval", "--engine", built.path)
    else:
        say_next(options, "on the machine it is for", "bench", "--engine", built.path)


def _share(found: int | None, asked: int) -> str:
    """Say how many of the convolutions that the graph has in 8 bits the engine has in them."""
    if found is None:
        return f"{asked} convolutions asked for; the builder does not say how many it has"
    return (
        f"{f'all {asked}' if found == asked else f'{found} of the {asked}'} convolutions asked for"
    )


def _quantization(options: argparse.Namespace) -> QuantizationSettings:
    names = "bias_correction", "adaptive_rounding", "reconstruct", "reconstruct_minutes"
    # A budget in time takes the place of the default one in AP.
    budgets = (
        common.chosen(options, "max_ap_drop")
        if options.max_slowdown is None
        else {"max_ap_drop": options.max_ap_drop, "max_slowdown": options.max_slowdown}
    )
    return calibration_settings(options, **common.chosen(options, *names), **budgets)


def _calibration(options: argparse.Namespace, *, needed: bool) -> Path | None:
    """Return the calibration images; a clean-up of Q/DQ nodes is verified on them too."""
    from trt_yolov6.common.files import read_bytes
    from trt_yolov6.graph.reference import is_quantized

    if needed or options.tensorrt_calibrator:
        return calibration_folder(options.calibration)
    given: Path | None = options.calibration
    if given is None and options.onnx and options.onnx.is_file() and common.SAMPLE_CALIB.is_dir():
        return common.SAMPLE_CALIB if is_quantized(read_bytes(options.onnx)) else None
    return given
