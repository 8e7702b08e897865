"""`bench`: latency and throughput."""

from __future__ import annotations

import argparse
from pathlib import Path

from trt_yolov6.cli import options as common
from trt_yolov6.cli.engines import load, load_options, newest_engine, predict_options
from trt_yolov6.cli.output import say_next, width, write_result


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    parser = common.add_command(commands, "bench", run, "measure latency and throughput")
    parser.add_argument(
        "--engine",
        type=Path,
        nargs="+",
        action="extend",
        help="one or several engines (the newest in engines/)",
    )
    parser.add_argument("--batch", type=common.positive, default=1, help="images per run (1)")
    parser.add_argument(
        "--streams", type=common.positive, default=1, help="batches in flight on a GPU (1)"
    )
    parser.add_argument(
        "--duration",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="longest time to measure each engine (10)",
    )
    parser.add_argument(
        "--layers", action="store_true", help="also time each layer, without a CUDA graph"
    )
    parser.add_argument(
        "--end-to-end",
        action="store_true",
        help="time decoding, letterbox and NMS as well, one after the other",
    )
    parser.add_argument(
        "--stages",
        action="store_true",
        help="time each stage from JPEG to boxes, and their overlap",
    )
    parser.add_argument(
        "--source",
        dest="images",
        type=Path,
        metavar="DIR",
        help=f"images for --end-to-end and --stages ({common.SAMPLE_IMAGES})",
    )
    common.add_thresholds(parser)
    common.add_loading(parser)
    common.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    from trt_yolov6 import api
    from trt_yolov6.bench.text import format_report, layer_report

    if not (options.end_to_end or options.stages):
        names = "confidence", "iou", "max_detections", "images"
        why = "is for --end-to-end and --stages: the engine alone has no such stage."
        common.refuse(options, names, why)
    if options.stages:
        why = "and --stages are separate measurements; give one of them."
        common.refuse(options, ("end_to_end", "layers"), why)
    if options.streams > 1:
        why = "goes with one stream; leave it or --streams out."
        common.refuse(options, ("end_to_end", "stages"), why)
    if options.stages:
        _run_stages(options)
        return
    images = None
    if options.end_to_end:
        images = common.or_sample(options.images, "--source", common.SAMPLE_IMAGES)
    detectors = [load(path, options) for path in options.engine or [newest_engine()]]
    engines = [detector.engine for detector in detectors]
    results = api.benchmark(
        detectors,
        batch=options.batch,
        streams=options.streams,
        images=images,
        predict=predict_options(options) if options.end_to_end else None,
        duration=options.duration,
        warm_up=min(1.0, options.duration),  # no longer than is measured
        progress=not options.quiet,
    )
    print(format_report(results, width()))
    if options.layers:
        options.cuda_graph = False  # which has no layers
        for engine in engines:
            with api.load(engine.path, load_options(options), backend=options.backend) as apart:
                print(layer_report(apart.engine, options.batch))
    if options.json:
        values = [result.to_json() for result in results]
        write_result(options.json, values[0] if len(values) == 1 else values)
    if len(engines) == 1:
        say_next(options, "its AP", "eval", "--engine", engines[0].path)
    else:
        files = (engine.path for engine in engines)
        say_next(options, "with AP and intervals", "compare", *files)


def _run_stages(options: argparse.Namespace) -> None:
    from trt_yolov6.bench.stages import benchmark_stages, format_stages
    from trt_yolov6.data.images import list_images

    images = list_images(common.or_sample(options.images, "--source", common.SAMPLE_IMAGES))
    reports = []
    for path in options.engine or [newest_engine()]:
        with load(path, options) as detector:
            report = benchmark_stages(
                detector.engine,
                images,
                predict_options(options),
                batch=options.batch,
                duration=options.duration,
            )
        reports.append(report)
        print(format_stages(report))
    if options.json:
        values = [report.to_json() for report in reports]
        write_result(options.json, values[0] if len(values) == 1 else values)
    say_next(options, "the engine alone", "bench", "--engine", reports[0].engine)
