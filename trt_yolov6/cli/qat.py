"""`qat`: train a checkpoint with INT8's rounding in place, and write its Q/DQ graph."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from trt_yolov6.cli import options as common
from trt_yolov6.cli.graphs import (
    calibration_folder,
    calibration_settings,
    check_cache,
    write_scales,
)
from trt_yolov6.cli.output import say_next, write_result
from trt_yolov6.common.files import sole_writer
from trt_yolov6.common.text import counted
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    from trt_yolov6.training.qat.run import QatRun
    from trt_yolov6.training.qat.settings import QatSettings


_SETTINGS = (
    *("train_split", "on_bad_data", "epochs", "batch", "learning_rate", "scale_learning_rate"),
    *("learn_scales", "distillation", "distill_weight", "temperature", "seed", "precision"),
)
"""Options that are fields of `QatSettings`."""


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    text = "fine-tune a checkpoint for INT8 (quantization-aware training)"
    parser = common.add_command(commands, "qat", run, text)
    parser.add_argument("--weights", type=Path, metavar="FILE.pt", help="YOLOv6 checkpoint")
    parser.add_argument(
        "--model", metavar="n|t|s|m|l|NAME", help="refuse a checkpoint of another variant"
    )
    common.add_training(parser, "runs/qat/<model>")
    parser.set_defaults(train_split="train", val_split="val")
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        help="arithmetic (auto: fp32, TF32 on a GPU)",
    )
    common.add_quiet(parser)
    common.add_json(parser)
    where = parser.add_argument_group("quantization")
    common.add_calibration(where)
    common.add_float_layers(where, "layers to keep in float, as in build --int8 (0)")
    where.add_argument(
        "--fixed-scales",
        dest="learn_scales",
        action="store_false",
        help="keep the calibrated scales",
    )
    _add_recipe(parser)
    _add_graph(parser)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=common.positive, help="number of epochs (10)")
    recipe.add_argument("--batch", type=common.positive, help="images per step (16)")
    recipe.add_argument(
        "--lr",
        dest="learning_rate",
        type=float,
        help="learning rate of weights, in quantization steps (0.005)",
    )
    recipe.add_argument(
        "--scale-lr",
        dest="scale_learning_rate",
        type=float,
        help="learning rate of scales, in steps at the end of the range (0.05)",
    )
    recipe.add_argument("--seed", type=int, help="random seed (0)")
    recipe.add_argument(
        "--no-distillation",
        dest="distillation",
        action="store_false",
        help="train on the detection loss alone, without the float network's features",
    )
    recipe.add_argument(
        "--distill-weight", type=float, help="weight of the distillation loss (0.1)"
    )
    recipe.add_argument("--temperature", type=float, help="temperature of the distillation (1)")


def _add_graph(parser: argparse.ArgumentParser) -> None:
    graph = parser.add_argument_group("exported graph")
    common.add_image_size(graph)
    graph.add_argument("--fp16", action="store_true", help="half precision for the rest")
    common.add_dynamic(
        graph, "dynamic", "smallest batch size, the one to tune for, and the largest (1,32,32)"
    )
    common.add_ends(graph)
    graph.add_argument(
        "--backend",
        choices=("tensorrt", "tensorrt-rtx", "onnxruntime"),
        default="onnxruntime",
        help="backend to build an engine for as well (onnxruntime: the ONNX file is the engine)",
    )
    common.add_cache(
        graph,
        "TensorRT up to 10: file to write the scales to; the graph without Q/DQ nodes is written "
        "next to the other",
    )


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("qat trains in one process; start it without torchrun.")
    common.check_training_data(options)

    from trt_yolov6.checkpoints.loading import load_checkpoint
    from trt_yolov6.spec import NmsSettings
    from trt_yolov6.training.qat.run import run as run_training
    from trt_yolov6.training.qat.settings import QatSettings

    if options.weights is None:
        raise UserError("--weights is missing; name the checkpoint to train.")
    if not options.distillation:
        names = "distill_weight", "temperature"
        common.refuse(options, names, "is for distillation; leave --no-distillation out.")
    if not options.learn_scales:
        why = "is for learned scales; leave --fixed-scales out."
        common.refuse(options, ["scale_learning_rate"], why)
    settings = QatSettings(data=str(options.data), **common.chosen(options, *_SETTINGS))
    check_cache(options)
    checkpoint = load_checkpoint(options.weights)
    name = checkpoint.arch.name
    if options.model and name not in (options.model, f"yolov6{options.model}"):
        raise UserError(f"{options.weights} holds {name}, not {options.model}; leave --model out.")
    output = options.output or Path("runs/qat") / name
    with sole_writer(output):
        done = run_training(
            checkpoint,
            calibration_folder(options.calibration),
            settings,
            output,
            graph_options={
                "image_size": options.image_size,
                "batch": options.dynamic,
                "nms": NmsSettings() if options.end2end else None,
                "uint8_input": options.uint8_input,
            },
            quantization=calibration_settings(options, float_layers=options.float_layers or ()),
            val_split=options.val_split,
            backend=options.backend,
            fp16=options.fp16,
            float_graph=options.calibration_cache is not None,
            device=options.device,
            resume=options.resume,
            progress=not options.quiet,
        )
    if done.float_graph:
        cache, version = options.calibration_cache, options.cache_version
        write_scales(cache, version, done.ranges, done.float_graph)
    _print_result(options, settings, done)
    # Last of all: as long as it is there, an interrupted run can be resumed to this point.
    done.state.unlink(missing_ok=True)
    say_next(options, "for another backend", "build", "--onnx", done.built.path, "--backend", "...")


def _print_result(options: argparse.Namespace, settings: QatSettings, done: QatRun) -> None:
    aps, result = done.aps, done.result
    shown = ", ".join(f"{key} {value:.4f}" for key, value in aps.items() if value is not None)
    print(
        f"{done.built.path}: {shown or 'not evaluated'}; {counted(result.epochs, 'epoch')} in "
        f"{result.seconds:.0f} s"
    )
    if options.json:
        placement = done.start.quantization.placement
        value = {
            **aps,
            "engine": str(done.built.path),
            "epochs": result.epochs,
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "int8_layers": len(placement.layers),
            "float_layers": list(placement.float_layers),
            "settings": settings.to_json(),
            "log": list(result.log),
        }
        write_result(options.json, value)
