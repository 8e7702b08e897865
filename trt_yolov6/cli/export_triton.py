"""`export-triton`: engines into a model repository of Triton Inference Server."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from trt_yolov6.cli import options as common
from trt_yolov6.cli.engines import resolved
from trt_yolov6.cli.output import say
from trt_yolov6.errors import UserError


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    text = "write engines into a model repository of Triton Inference Server"
    parser = common.add_command(commands, "export-triton", run, text)
    parser.add_argument(
        "--engine",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        help="plans or ONNX files, one entry each",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="model repository, new or existing",
    )
    parser.add_argument(
        "--name",
        dest="names",
        nargs="+",
        action="extend",
        help="names of the entries, one per engine (network and precision, such as yolov6n_int8)",
    )
    parser.add_argument(
        "--python-backend",
        dest="python",
        nargs="?",
        const="tensors",
        choices=("tensors", "pictures"),
        help="run the engines by this package in Triton's Python backend, also TensorRT-RTX's: "
        "from tensors to raw outputs (without a value), or from encoded images to boxes, scores "
        "and classes",
    )
    parser.add_argument(
        "--instances", type=common.positive, default=1, help="instances on each GPU (1)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--gpus",
        type=gpu_numbers,
        metavar="N,N",
        help="GPUs to run on (all of the server's; ONNX on the CPU if this machine has no GPU)",
    )
    where.add_argument("--cpu", action="store_true", help="run on the CPU (ONNX only)")
    parser.add_argument(
        "--max-queue-delay-us",
        type=int,
        default=100,
        metavar="US",
        help="microseconds a request may wait to share a batch (100)",
    )
    parser.add_argument(
        "--config",
        dest="extra",
        type=Path,
        help="further fields of Triton's ModelConfig, in its text format, such as a response "
        "cache, priorities or queue limits; they replace fields of the same name",
    )
    common.add_thresholds(parser, confidence=0.4)
    common.add_decoder(parser)
    common.add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    from trt_yolov6.common.files import read_bytes
    from trt_yolov6.common.machine import read_gpus
    from trt_yolov6.engines import LoadOptions
    from trt_yolov6.serving.triton import ServingSettings, export_triton, runs_on_cpu, served_model
    from trt_yolov6.spec import PredictOptions

    predict = PredictOptions(**common.chosen(options, "confidence", "iou", "max_detections"))
    if predict.thresholds() and options.python != "pictures":
        raise UserError(
            "--conf, --iou and --max-detections are for --python-backend pictures: other entries "
            "give raw outputs; leave them out."
        )
    settings = ServingSettings(
        instances=options.instances,
        gpus=() if options.cpu else options.gpus,
        max_queue_delay_us=options.max_queue_delay_us,
        default_cpu=not read_gpus(),
        predict=predict,
        extra="" if options.extra is None else read_bytes(options.extra).decode(errors="replace"),
    )
    engines = [resolved(path) for path in options.engine]
    loading = LoadOptions(decoder=options.decoder, preprocess=common.preprocess_changes(options))
    python = options.python
    folders = export_triton(engines, options.output, settings, loading, options.names, python)
    for path, folder in zip(engines, folders, strict=True):
        model = served_model(path, loading, python)
        size = model.max_batch_size
        batching = f"batches of up to {size}" if size else "requests as they come, not batched"
        runner = model.platform if python is None else f"{python} by {model.backend} in Python"
        print(f"{folder}: {runner}, {batching}")
        on_cpu = runs_on_cpu(model, settings)
        if on_cpu and not options.cpu:
            print("  on the CPU, as this machine has no GPU; --gpus 0 for a server that has one")
        if model.platform == "tensorrt_plan" and "backend" in model.parameters:
            print(f"  for a Triton release with {model.parameters['backend']} and the same GPU")
        if on_cpu and python is None and model.parameters["precision"] == "int8":
            print(
                "  on a CPU without VNNI, ONNX Runtime's INT8 convolutions saturate: Triton does "
                "not switch that off, so that detections may be wrong"
            )
    if not options.quiet:
        place = shlex.quote(str(options.output))
        say(f"next, the server: tritonserver --model-repository {place}")


def gpu_numbers(text: str) -> tuple[int, ...]:
    """Parse numbers of GPUs, with commas."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form N or N,N")
    return tuple(int(part) for part in parts)
