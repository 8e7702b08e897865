"""`train`: a network from random weights, or from a checkpoint."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trt_yolov6.cli import options as common
from trt_yolov6.cli.output import say, say_next, write_result
from trt_yolov6.common.text import counted
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    from trt_yolov6.checkpoints.loading import Checkpoint
    from trt_yolov6.training.recipe import TrainSettings
    from trt_yolov6.training.rep_optimizer import RepOptimizerSettings


def add(commands: common.Commands) -> None:
    """Add the command to the parser."""
    parser = common.add_command(
        commands, "train", run, "train a network, or fine-tune a checkpoint"
    )
    common.add_training(parser, "runs/train/<model>")
    parser.add_argument(
        "--auto-resume",
        action="store_true",
        help="continue the training in --output, or begin it if there is none: for torchrun, Slurm "
        "and Kubernetes, which repeat the same command",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp16", "fp32"),
        help="arithmetic (auto: bf16 or fp16 on a GPU, fp32 on a CPU)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the network with torch.compile"
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="give the same bits every time on a GPU, too; slower",
    )
    common.add_quiet(parser)
    common.add_json(parser)
    _add_network(parser)
    _add_recipe(parser)
    _add_losses(parser)


def _add_network(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("network (paper, Tables 2 to 4 and 11)")
    model.add_argument(
        "--model",
        nargs="?",
        const="",
        metavar="n|t|s|m|l|NAME",
        help="variant, such as n_v3 (s, or that of --weights); without a value, list all",
    )
    model.add_argument("--weights", type=Path, metavar="FILE.pt", help="checkpoint to fine-tune")
    model.add_argument(
        "--block",
        choices=("repvgg", "qarepvgg", "conv", "scaled"),
        help="building block (the variant's)",
    )
    model.add_argument(
        "--rep-optimizer",
        nargs="?",
        const="",
        metavar="SCALES.pt",
        help="train a single-branch network with RepOptimizer (paper, 2.5.1) and these scales; "
        "without a value, search for scales first, in OUTPUT/search",
    )
    model.add_argument(
        "--search-epochs", type=common.positive, help="epochs of the search (--epochs)"
    )
    model.add_argument(
        "--activation",
        choices=("relu", "silu", "leaky_relu"),
        help="activation function (the variant's)",
    )
    model.add_argument(
        "--csp-ratio",
        type=float,
        help="share of channels inside CSPStackRep; 0: no CSP (the variant's)",
    )
    model.add_argument(
        "--dfl",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="predict boxes as distributions (the variant's)",
    )
    model.add_argument(
        "--objectness",
        action="store_true",
        default=None,
        help="predict objectness, as release 0.1 does",
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=common.positive, help="number of epochs (300)")
    recipe.add_argument("--batch", type=common.positive, help="images per step, over all GPUs (32)")
    recipe.add_argument(
        "--imgsz",
        dest="image_size",
        type=common.positive,
        help="input size, a multiple of 32 (that of --weights' training, else 640; P6 a multiple "
        "of 64, 1280; Lite 320)",
    )
    recipe.add_argument(
        "--lr",
        dest="learning_rate",
        type=float,
        help="learning rate for 32 images (N 0.02, others 0.01; fine-tuning 0.0032)",
    )
    recipe.add_argument("--seed", type=int, help="random seed (0)")
    recipe.add_argument("--mosaic", type=float, help="probability of Mosaic (1)")
    recipe.add_argument("--mixup", type=float, help="probability of Mixup (M and L 0.1, others 0)")
    recipe.add_argument(
        "--plain-epochs",
        type=int,
        help="last epochs without Mosaic and Mixup (15, at most a quarter)",
    )
    recipe.add_argument(
        "--border",
        dest="eval_border",
        type=int,
        help="gray pixels on every side, in training and evaluation (0)",
    )
    recipe.add_argument(
        "--eval-interval", type=int, help="epochs between evaluations; 0: only the last (10)"
    )
    recipe.add_argument(
        "--set",
        dest="assignment",
        action="append",
        metavar="FIELD=VALUE",
        help="any other field of the settings, such as optimizer.momentum=0.9",
    )


def _add_losses(parser: argparse.ArgumentParser) -> None:
    losses = parser.add_argument_group("assignment and losses (paper, Tables 6 to 11)")
    losses.add_argument(
        "--assigner", choices=("tal", "atss", "simota"), help="label assigner (tal)"
    )
    losses.add_argument(
        "--warmup-assigner",
        choices=("tal", "atss", "simota"),
        help="label assigner of the first 4 epochs from random weights (atss)",
    )
    losses.add_argument(
        "--cls-loss",
        dest="classification",
        choices=("varifocal", "focal", "quality_focal", "poly"),
        help="classification loss (varifocal)",
    )
    losses.add_argument(
        "--box-loss",
        dest="box",
        choices=("siou", "giou", "ciou"),
        help="box loss (N and T siou, others giou)",
    )
    losses.add_argument(
        "--distill",
        dest="teacher",
        metavar="TEACHER.pt",
        help="teacher for self-distillation (paper, 2.4.2)",
    )


_RESUMING = ("command", "run", "parser", "resume", "output", "device", "quiet", "json")
"""Options allowed with `train --resume`."""

_RECIPE = (
    *("epochs", "plain_epochs", "image_size", "batch", "seed", "train_split", "eval_interval"),
    *("eval_border", "on_bad_data", "precision", "teacher", "compile", "deterministic"),
)
"""Options that are fields of `TrainSettings`."""


def run(options: argparse.Namespace) -> None:
    """Do what the options ask."""
    if options.model == "":
        print("\n".join(_listed_variants()))
        return
    if not options.resume:
        common.check_training_data(options)
    from trt_yolov6.api import train
    from trt_yolov6.training.trainer import stored_settings

    if options.resume:
        why = "was chosen when the training began; with --resume leave it out."
        common.refuse(options, [name for name in vars(options) if name not in _RESUMING], why)
        if options.output is None:
            raise UserError("--resume needs the folder of the training; name it with --output.")
        settings, output = stored_settings(options.output), options.output
    else:
        settings = _train_settings(options)
        output = options.output or Path("runs/train") / settings.variant
    first = os.environ.get("RANK", "0") == "0"
    result = train(
        settings,
        output,
        device=options.device,
        resume="auto" if options.auto_resume else options.resume,
        progress=not options.quiet,
    )
    if not first:
        return
    for path, ap in ((result.last, result.last_ap), (result.best, result.best_ap)):
        if path is not None:
            of = f", of epoch {result.best_epoch}" if path == result.best else ""
            print(f"{path}: " + ("not evaluated" if ap is None else f"AP {ap:.4f}{of}"))
    print(
        f"{counted(result.epochs, 'epoch')}, {result.epoch_seconds:.2f} s an epoch (median, "
        f"without evaluation), {result.wall_seconds:.0f} s in all"
    )
    if options.json:
        write_result(options.json, result.to_json())
    say_next(options, "an engine of it", "build", "--weights", result.best or result.last)


def _listed_variants() -> Iterator[str]:
    """Yield a line for each variant: its name, what it is built of, the input it is made for."""
    from trt_yolov6.models import VARIANTS, architecture

    for name in VARIANTS:
        arch = architecture(name)
        parts = [f"{arch.block} blocks", f"{arch.neck} neck", f"{arch.image_size} pixels"]
        if arch.block != "lite":
            parts.insert(1, f"{arch.stack} stacks")
        if arch.reg_max:
            parts.insert(-1, "DFL")
        yield f"{name:17} {', '.join(parts)}"


def _train_settings(options: argparse.Namespace) -> TrainSettings:
    """Return the paper's recipe with what the options change."""
    from trt_yolov6.checkpoints.loading import load_checkpoint
    from trt_yolov6.training.recipe import ArchitectureOptions, recipe_for

    weights = load_checkpoint(options.weights) if options.weights else None
    scales, rep_optimizer = _rep_optimizer(options)
    source = weights or scales
    variant = source.arch.name if source else "yolov6s"
    if options.model is not None:
        variant = options.model if options.model.startswith("yolov6") else f"yolov6{options.model}"
    elif source is None:
        say(
            "no --model and no --weights given: training yolov6s, the one of n, t, s, m and l that "
            "the paper's tables are about"
        )
    settings = recipe_for(
        variant,
        str(options.data),
        options=ArchitectureOptions(
            **common.chosen(options, "block", "activation", "csp_ratio", "dfl", "objectness")
        ),
        weights=weights,
        scales=scales,
        rep_optimizer=rep_optimizer,
        **common.chosen(options, *_RECIPE),
    )
    return _changed(settings, options)


def _changed(settings: TrainSettings, options: argparse.Namespace) -> TrainSettings:
    """Return a recipe with what the options change of its losses, its optimizer and the data."""
    from dataclasses import replace

    from trt_yolov6.training.recipe import with_field

    augmentation = common.chosen(options, "mosaic", "mixup")
    if options.eval_border is not None:
        augmentation["border"] = options.eval_border
    losses = common.chosen(options, "classification", "box", "assigner", "warmup_assigner")
    settings = replace(
        settings,
        losses=replace(settings.losses, **losses),
        augmentation=replace(settings.augmentation, **augmentation),
        optimizer=replace(settings.optimizer, **common.chosen(options, "learning_rate")),
    )
    if options.val_split is not None:
        split = None if options.val_split == "none" else options.val_split
        settings = replace(settings, val_split=split)
    for assignment in options.assignment or ():
        field = assignment.partition("=")[0].strip()
        name = field.rpartition(".")[2]
        option = common.option_names(options.parser).get("model" if name == "variant" else name)
        settings = with_field(settings, assignment)  # says so if there is no such field
        if option is not None and field not in _APART:
            raise UserError(f"--set {assignment}: give {name} as {option}.")
    _check_use(settings, options)
    return settings


_APART = ("augmentation.border", "distillation.epochs")
"""Fields that are not what the options of their names set."""


def _check_use(settings: TrainSettings, options: argparse.Namespace) -> None:
    """Refuse options that the rest of the settings leaves without effect."""
    losses = settings.losses
    if options.mixup and not settings.augmentation.mosaic:
        raise UserError("--mixup blends mosaics; give --mosaic above 0, or leave --mixup out.")
    if options.warmup_assigner is not None and not losses.warmup_epochs:
        raise UserError(
            "--warmup-assigner is for trainings from random weights; leave it out, or add --set "
            "losses.warmup_epochs=4."
        )
    begins = losses.warmup_epochs if losses.assigner != losses.warmup_assigner else 0
    if options.assigner is not None and begins >= settings.epochs:
        raise UserError(
            f"--assigner {losses.assigner} would begin after {counted(begins, 'epoch')}, and "
            f"there are {settings.epochs}; give more --epochs, or --set losses.warmup_epochs=0."
        )
    needs = {
        "losses.poly_epsilon": (losses.classification == "poly", "--cls-loss poly"),
        "losses.dfl_weight": (losses.use_dfl, "--dfl"),
        "losses.objectness_weight": (losses.objectness, "--objectness"),
        "distillation.box_weight": (losses.use_dfl, "--dfl"),
        "distillation.box_temperature": (losses.use_dfl, "--dfl"),
    }
    for assignment in options.assignment or ():
        used, option = needs.get(assignment.partition("=")[0].strip(), (True, ""))
        if not used:
            raise UserError(
                f"--set {assignment} has no effect without {option}; leave it out, or add that."
            )


def _rep_optimizer(
    options: argparse.Namespace,
) -> tuple[Checkpoint | None, RepOptimizerSettings | None]:
    """Return the checkpoint that --rep-optimizer names, or the settings of a search."""
    from trt_yolov6.checkpoints.loading import load_checkpoint
    from trt_yolov6.training.rep_optimizer import RepOptimizerSettings, check_scales

    if options.rep_optimizer is None:
        if options.search_epochs is not None:
            raise UserError("--search-epochs is for --rep-optimizer; add it.")
        return None, None
    if options.rep_optimizer == "":
        return None, RepOptimizerSettings(search_epochs=options.search_epochs)
    if options.search_epochs is not None:
        raise UserError(
            f"the scales are there already, in {options.rep_optimizer}; leave --search-epochs out."
        )
    scales = load_checkpoint(options.rep_optimizer)
    check_scales(scales)
    return scales, None
