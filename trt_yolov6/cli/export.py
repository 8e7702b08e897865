"""`export`: checkpoint to ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path

from trt_yolov6.cli.graphs import calibrated, exported
from trt_yolov6.cli.options import (
    CACHE_VERSION,
    Commands,
    add_calibration,
    add_command,
    add_graph_options,
    add_quiet,
    spelled,
)
from trt_yolov6.cli.output import profile_text, say_next
from trt_yolov6.errors import UserError


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "export", run, "export a checkpoint to ONNX")
    parser.add_argument("--weights", type=Path, metavar="FILE.pt", help="YOLOv6 checkpoint")
    add_graph_options(parser)
    parser.add_argument("--output", type=Path, help="default: <weights>-<precision>.onnx")
    cache = parser.add_argument_group("INT8 for TensorRT up to 10, without Q/DQ nodes")
    cache.add_argument(
        "--calibration-cache", type=Path, metavar="FILE", help="write the tensors' scales there"
    )
    cache.add_argument(
        "--cache-version", metavar="X.Y.Z", help=f"TensorRT that reads it ({CACHE_VERSION})"
    )
    add_calibration(cache)
    add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    from trt_yolov6.common.files import check_writable
    from trt_yolov6.engines.build import engine_stem, write_graph

    if not options.calibration_cache:
        for name in ("calib", "calibrator", "calib_images", "no_equalize", "cache_version"):
            if getattr(options, name):
                raise UserError(f"{spelled(name)} belongs to --calibration-cache; add it.")
    else:
        from trt_yolov6.quantization.tensorrt_cache import header_version

        # Refuses a version that reads no cache, before the work.
        header_version(options.cache_version or CACHE_VERSION)
    for path in (options.output, options.calibration_cache):
        if path:
            check_writable(path)
    graph = exported(options)
    output = options.output or Path(f"{engine_stem(graph)}.onnx")
    if options.calibration_cache:
        graph = calibrated(graph, options)
    write_graph(graph, output)
    print(
        f"{output}: {graph.name}, {graph.precision}, batch {profile_text(graph.batch)}, "
        f"{len(graph.model.graph.node)} nodes, {output.stat().st_size / 2**20:.1f} MiB"
    )
    cache = f" --calibration-cache {options.calibration_cache}" if options.calibration_cache else ""
    say_next(options, "an engine of it", f"build --onnx {output}{cache}")
