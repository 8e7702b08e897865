"""`export`: checkpoint to ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path

from trt_yolov6.cli import options as common
from trt_yolov6.cli.graphs import (
    calibrated,
    check_cache,
    checkpoint_options,
    float_precision,
    weights_or_sample,
    write_scales,
)
from trt_yolov6.cli.output import say_next
from trt_yolov6.errors import UserError


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    parser = common.add_command(commands, "export", run, "export a checkpoint to ONNX")
    parser.add_argument("--weights", type=Path, metavar="FILE.pt", help=common.WEIGHTS_HELP)
    common.add_graph_options(parser)
    parser.add_argument("--output", type=Path, help="file to write (<weights>-<precision>.onnx)")
    cache = parser.add_argument_group("INT8 for TensorRT up to 10, without Q/DQ nodes")
    common.add_cache(cache, "file to write the tensors' scales to")
    common.add_calibration(cache)
    common.add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    from trt_yolov6.engines.build import check_graph_output, engine_stem, write_graph
    from trt_yolov6.pipeline import export

    cache = options.calibration_cache
    if cache and options.fp16:
        raise UserError(
            "--calibration-cache goes with a float32 graph; leave --fp16 out here, and give it to "
            "`build`."
        )
    check_cache(options, "calibration", "calibrator", "image_limit", "equalize")
    source = weights_or_sample(options.weights)
    check_graph_output(source, options.output)
    graph = export(source, precision=float_precision(options), **checkpoint_options(options))
    output = options.output or Path(f"{engine_stem(graph)}.onnx")
    if cache:
        graph, amax = calibrated(graph, options)
        write_scales(cache, options.cache_version, amax, output)
    write_graph(graph, output)
    print(
        f"{output}: {graph.name}, {graph.precision}, batch {graph.batch}, "
        f"{len(graph.model.graph.node)} nodes, {output.stat().st_size / 2**20:.1f} MiB"
    )
    scales = ("--calibration-cache", cache) if cache else ()
    say_next(options, "an engine of it", "build", "--onnx", output, *scales)
