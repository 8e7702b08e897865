"""`qat`: train a checkpoint with INT8's rounding in place, and write its Q/DQ graph."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from trt_yolov6.backends import BACKENDS
from trt_yolov6.cli import options as common
from trt_yolov6.cli.graphs import (
    calibration_folder,
    calibration_settings,
    check_cache,
    write_scales,
)
from trt_yolov6.cli.output import say, say_next, write_result
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    import torch

    from trt_yolov6.checkpoints.loading import Checkpoint
    from trt_yolov6.engines.build import BuiltEngine
    from trt_yolov6.graph.model import Graph
    from trt_yolov6.training.dataset import TrainingSet
    from trt_yolov6.training.qat.onnx_module import GraphNetwork, Trained
    from trt_yolov6.training.qat.preparation import Start
    from trt_yolov6.training.qat.settings import QatSettings
    from trt_yolov6.training.qat.training import QatResult


_SETTINGS = (
    *("train_split", "on_bad_data", "epochs", "batch", "learning_rate", "scale_learning_rate"),
    *("learn_scales", "distillation", "distill_weight", "temperature", "seed", "precision"),
)
"""Options that are fields of `QatSettings`."""


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    text = "train a checkpoint with INT8's rounding in place (quantization-aware training)"
    parser = common.add_command(commands, "qat", run, text)
    parser.add_argument("--weights", type=Path, metavar="FILE.pt", help="YOLOv6 checkpoint")
    parser.add_argument("--model", metavar="n|t|s|m|l|NAME", help="what it must hold, as a check")
    common.add_training(parser, "runs/qat/<model>")
    parser.set_defaults(train_split="train", val_split="val")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), help="(auto: fp32, on a GPU in TF32)"
    )
    common.add_quiet(parser)
    common.add_json(parser)
    where = parser.add_argument_group("quantization")
    common.add_calibration(where)
    common.add_float_layers(where, "partial training: as in build --int8 (0)")
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
    recipe.add_argument("--epochs", type=common.positive, help="(10)")
    recipe.add_argument("--batch", type=common.positive, metavar="N", help="images a step (16)")
    recipe.add_argument(
        "--lr", dest="learning_rate", type=float, help="of weights, in quantization steps (0.005)"
    )
    recipe.add_argument(
        "--scale-lr",
        dest="scale_learning_rate",
        type=float,
        help="of scales, in steps at their range's end (0.05)",
    )
    recipe.add_argument("--seed", type=int, help="(0)")
    recipe.add_argument(
        "--no-distillation",
        dest="distillation",
        action="store_false",
        help="do without the float network's features",
    )
    recipe.add_argument("--distill-weight", type=float, help="of channel-wise distillation (0.1)")
    recipe.add_argument("--temperature", type=float, help="of channel-wise distillation (1)")


def _add_graph(parser: argparse.ArgumentParser) -> None:
    graph = parser.add_argument_group("what is written")
    common.add_image_size(graph)
    graph.add_argument("--fp16", action="store_true", help="what is not INT8 in half precision")
    common.add_dynamic(graph, "dynamic", "(1,32,32)")
    common.add_ends(graph)
    graph.add_argument(
        "--backend",
        choices=("tensorrt", "tensorrt-rtx", "onnxruntime"),
        default="onnxruntime",
        help="build for it as well (the ONNX file itself is ONNX Runtime's engine)",
    )
    common.add_cache(
        graph,
        "TensorRT up to 10: write the scales there, and the graph without Q/DQ nodes next to the "
        "other",
    )


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("qat trains in one process; start it without torchrun.")
    common.check_training_data(options)

    from trt_yolov6.checkpoints.loading import load_checkpoint
    from trt_yolov6.common.files import write_json
    from trt_yolov6.engines.base import BuildSettings
    from trt_yolov6.engines.build import check_build
    from trt_yolov6.training.distributed import chosen_device
    from trt_yolov6.training.log import write_log
    from trt_yolov6.training.qat.training import train_quantized

    if options.weights is None:
        raise UserError("--weights is missing; name the checkpoint to train.")
    settings = _settings(options)
    check_cache(options)
    device = chosen_device(options.device)
    checkpoint = load_checkpoint(options.weights)
    name = checkpoint.arch.name
    if options.model and name not in (options.model, f"yolov6{options.model}"):
        raise UserError(f"{options.weights} holds {name}, not {options.model}; leave --model out.")
    output = options.output or Path("runs/qat") / name
    plan = output / f"{name}{BACKENDS[options.backend].suffix}"
    check_build(options.backend, plan, BuildSettings())
    state = _state_file(output, output / f"{name}.onnx", options.resume)
    data, start = _start(settings, checkpoint, device, options)
    aps = {
        "AP_float": _ap(start.teacher(device), start, options),
        "AP_ptq": _ap(start.student(device).eval(), start, options),
    }
    write_json(output / "settings.json", settings.to_json())
    result = train_quantized(
        start,
        settings,
        device=device,
        state_file=state,
        progress=not options.quiet,
        data=data,
    )
    aps["AP"] = _ap(result.network, start, options)
    built = _built(start, result.trained, output / name, plan, options)
    write_log(output, result.log)
    _print_result(options, start, settings, result, aps, built)
    # Last of all: as long as it is there, an interrupted run can be resumed to this point.
    state.unlink(missing_ok=True)
    say_next(options, "for another backend", f"build --onnx {built.path} --backend ...")


def _print_result(
    options: argparse.Namespace,
    start: Start,
    settings: QatSettings,
    result: QatResult,
    aps: dict[str, float | None],
    built: BuiltEngine,
) -> None:
    shown = ", ".join(f"{key} {value:.4f}" for key, value in aps.items() if value is not None)
    print(
        f"{built.path}: {shown or 'not evaluated'}; {result.epochs} epochs in "
        f"{result.seconds:.0f} s"
    )
    if options.json:
        placement = start.quantization.placement
        value = {
            **aps,
            "engine": str(built.path),
            "epochs": result.epochs,
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "int8_layers": len(placement.layers),
            "float_layers": list(placement.float_layers),
            "settings": settings.to_json(),
            "log": list(result.log),
        }
        write_result(options.json, value)


def _start(
    settings: QatSettings, checkpoint: Checkpoint, device: torch.device, options: argparse.Namespace
) -> tuple[TrainingSet, Start]:
    """Return the training data, and the network exported and calibrated."""
    from trt_yolov6.pipeline import export, labelled_score
    from trt_yolov6.spec import NmsSettings
    from trt_yolov6.training.qat.preparation import prepare_graph

    graph = export(
        checkpoint,
        image_size=options.image_size,
        batch=options.dynamic,
        nms=NmsSettings() if options.end2end else None,
        uint8_input=options.uint8_input,
    )
    # Bad data is found out before minutes of calibration.
    data = _data(settings, graph, checkpoint, device, options)
    # The budget of automatic float layers is held on the validation split.
    labelled = None if options.val_split == "none" else options.data
    is_auto = options.float_layers == "auto"
    start = prepare_graph(
        graph,
        checkpoint.arch,
        calibration_folder(options.calibration),
        quantization=calibration_settings(options, float_layers=options.float_layers or ()),
        learn_scales=settings.learn_scales,
        score=labelled_score(graph, labelled, options.val_split) if is_auto else None,
    )
    placement = start.quantization.placement
    say(
        f"{len(placement.layers)} of {len(placement.layers) + len(placement.float_layers)} "
        f"convolutions in INT8, {len(start.features)} features distilled"
        if settings.distillation
        else f"{len(placement.layers)} convolutions in INT8, no distillation"
    )
    return data, start


def _built(
    start: Start, trained: Trained, stem: Path, plan: Path, options: argparse.Namespace
) -> BuiltEngine:
    """Write the trained graph, the engine of --backend and the scales of --calibration-cache."""
    from trt_yolov6.graph.export import write_onnx
    from trt_yolov6.pipeline import build
    from trt_yolov6.training.qat.export import rounded_graph, trained_graph

    quantized = trained_graph(start, trained, fp16=options.fp16)
    built = build(quantized, backend="onnxruntime", output=f"{stem}.onnx")
    if options.backend != "onnxruntime":
        built = build(quantized, backend=options.backend, output=plan)
    if options.calibration_cache:
        # The paper's form: a graph without Q/DQ nodes, and the scales next to it.
        float_graph = Path(f"{stem}.float.onnx")
        write_onnx(float_graph, rounded_graph(start, trained))
        write_scales(options.calibration_cache, options.cache_version, trained.amax, float_graph)
    return built


def _settings(options: argparse.Namespace) -> QatSettings:
    from trt_yolov6.training.qat.settings import QatSettings

    if not options.distillation:
        names = "distill_weight", "temperature"
        common.refuse(options, names, "is for distillation; leave --no-distillation out.")
    return QatSettings(data=str(options.data), **common.chosen(options, *_SETTINGS))


def _state_file(output: Path, trained: Path, resume: bool) -> Path:
    """Return where the state goes; there must be a begun training just if it is to be resumed."""
    from trt_yolov6.common.files import check_writable
    from trt_yolov6.training.state import sweep

    state = check_writable(output / "state.pt")
    begun = (output / "settings.json").exists()
    if begun and not resume:
        raise UserError(
            f"{output} holds a training already; give another --output, or --resume to go on."
        )
    if resume and not begun:
        raise UserError(f"{output} holds no interrupted training; leave --resume out.")
    if resume and trained.exists() and not state.is_file():
        raise UserError(f"the training in {output} is over; give another --output.")
    if resume:
        # A kill before the first state leaves nothing to go on from: it starts again.
        sweep(output)
    return state


def _data(
    settings: QatSettings,
    graph: Graph,
    checkpoint: Checkpoint,
    device: torch.device,
    options: argparse.Namespace,
) -> TrainingSet:
    """Return the training split, with the checkpoint's classes; the other must be readable."""
    from trt_yolov6.data.coco import load_coco
    from trt_yolov6.training.dataset import load_training_set
    from trt_yolov6.training.qat.preparation import check_classes

    if options.val_split != "none":
        load_coco(options.data, options.val_split)
    data = load_training_set(
        settings.data,
        settings.train_split,
        max(graph.image_size),
        device,
        on_bad_data=settings.on_bad_data,
        progress=not options.quiet,
        class_names=graph.class_names,
    )
    check_classes(settings.data, len(data.class_names), checkpoint.arch)
    if data.report.problems:
        say(f"{len(data.report.problems)} problems of the data were left out of training")
    return data


def _ap(network: GraphNetwork, start: Start, options: argparse.Namespace) -> float | None:
    """Return a network's AP on the validation split, on the device where it is."""
    from trt_yolov6.training.qat.training import evaluate_network

    if options.val_split == "none":
        return None
    graph = start.graph
    found = evaluate_network(
        network, graph.class_names, max(graph.image_size), options.data, options.val_split
    )
    return found.ap
