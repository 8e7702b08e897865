"""The jobs of the ablations' workers: train a variant's network of a fold, or quantize it.

Everything of a job is in a folder of its own, `STATE/<variant>/<fold>`: the training's run, the
detections in the fold's images (`found.npz`) and, last, `result.json`. An interrupted job goes on
from the training's state.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.ablation_variants import (
    FOUND_FILE,
    RESULT_FILE,
    VARIANTS,
    Quantized,
    Variant,
    inputs_of,
)
from benchmarks.folds import (
    Truth,
    calibration_folder,
    match_all,
    pack,
    read_truth,
    stored,
    train_split,
    val_split,
    without_missing_boxes,
)
from benchmarks.packing import serve
from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.common.files import atomic_path, read_json, write_json
from trt_yolov6.data.coco import CocoDataset, load_coco, read_coco_image
from trt_yolov6.detectors.detections import Detections
from trt_yolov6.engines.base import Engine
from trt_yolov6.runtime.predict import process
from trt_yolov6.spec import PredictOptions
from trt_yolov6.training.recipe import (
    ArchitectureOptions,
    TrainSettings,
    recipe_for,
    with_field,
)
from trt_yolov6.training.torch_engine import TorchEngine
from trt_yolov6.training.trainer import LAST_FILE, train

if TYPE_CHECKING:
    from trt_yolov6.models.network import YOLOv6
    from trt_yolov6.training.qat.onnx_module import GraphNetwork
    from trt_yolov6.training.qat.preparation import Start

STATE_SECONDS = 25.0

CUDNN_PLANS = int(os.environ.get("CUDNN_PLANS", "2"))
"""Algorithms that cuDNN tries for a convolution: on a GPU that others use, too, trying takes long
and measures little."""
RUN = "run"

RANKED_IMAGES = 40
"""Training images by whose AP layers are ranked."""


@dataclasses.dataclass(frozen=True)
class Order:
    """A job, as it is sent to a worker."""

    variant: str
    fold: int
    data: str
    """Data set that `folds.write_folds` wrote."""
    state: str
    epochs: int
    image_size: int
    batch: int
    qat_epochs: int
    device: str

    @property
    def folder(self) -> Path:
        """Where all of the job is."""
        return Path(self.state) / self.variant / str(self.fold)

    def checkpoint_of(self, variant: str) -> Path:
        """Return the checkpoint of another variant in the same fold."""
        return Path(self.state) / variant / str(self.fold) / RUN / LAST_FILE


def main() -> None:
    """Do jobs as they come."""
    import cv2

    cv2.setNumThreads(1)
    # Threads that wait for each other, in many workers, keep the cores from all.
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark_limit = CUDNN_PLANS
    _limit_onnxruntime()
    serve(lambda order: do(Order(**order)))


def _limit_onnxruntime() -> None:
    """Give the sessions of this process few threads: many workers share the cores."""
    import onnxruntime

    class Few(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 2

    onnxruntime.SessionOptions = Few


def do(order: Order) -> dict[str, Any]:
    """Do one job and return its result, which is then in its folder, too."""
    done = order.folder / RESULT_FILE
    if done.is_file():
        found: dict[str, Any] = read_json(done)
        return found
    order.folder.mkdir(parents=True, exist_ok=True)
    variant = VARIANTS[order.variant]
    start = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    work = _train if variant.quantized is None else _quantize
    result = {
        "variant": order.variant,
        "fold": order.fold,
        "seed": seed_of(variant, order.fold),
        "epochs": order.epochs if variant.quantized is None else order.qat_epochs,
        "batch": order.batch,
        "image_size": order.image_size,
        **work(order, variant),
    }
    result["seconds"] = time.perf_counter() - start
    if torch.cuda.is_available():
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
        result["device"] = torch.cuda.get_device_name()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the other workers
    write_json(done, result)
    return result


def seed_of(variant: Variant, fold: int) -> int:
    """Return the seed of a training: another one in every fold, the same for all variants."""
    return 100 * variant.seed + fold


# --- training -----------------------------------------------------------------------------------


def settings_of(order: Order, variant: Variant) -> TrainSettings:
    """Return the settings of a variant's training: the recipe, and what the variant changes."""
    others: dict[str, Any] = {}
    scales = None
    if variant.scales is not None:
        scales = load_checkpoint(order.checkpoint_of(variant.scales))
    if variant.teacher is not None:
        others["teacher"] = str(order.checkpoint_of(variant.teacher))
    settings = recipe_for(
        f"yolov6{variant.model}",
        order.data,
        options=ArchitectureOptions(**dict(variant.architecture)),
        scales=scales,
        epochs=order.epochs,
        image_size=order.image_size,
        batch=order.batch,
        seed=seed_of(variant, order.fold),
        train_split=train_split(order.fold),
        val_split=None,
        eval_interval=0,  # nothing to evaluate: or checkpoints and states were written as often
        **others,
    )
    for change in variant.changes:
        settings = with_field(settings, change)
    return settings


def _train(order: Order, variant: Variant) -> dict[str, Any]:
    result = train(
        settings_of(order, variant),
        order.folder / RUN,
        device=order.device,
        resume="auto",
        progress=False,
        state_seconds=STATE_SECONDS,
    )
    times = [line["seconds"] for line in result.log]
    checkpoint = load_checkpoint(result.last)
    model: YOLOv6 = checkpoint.model
    if order.device == "cuda":
        model = model.cuda()
    figures = judge(
        order, {name: (model, *given) for name, given in inputs_of(variant, order).items()}
    )
    (order.folder / RUN / "state.pt").unlink(missing_ok=True)
    return {
        **figures,
        "epoch_s": statistics.median(times),
        "train_s": sum(times),
        "loss": result.log[-1]["loss"],
        "losses": [round(line["loss"], 4) for line in result.log],
        "notes": list(result.notes),
    }


# --- judging ------------------------------------------------------------------------------------


def judge(
    order: Order, networks: dict[str, tuple[YOLOv6 | GraphNetwork, int, int]]
) -> dict[str, Any]:
    """Find the objects of the fold's images, store them, and return the AP in this fold.

    Args:
        order: the job.
        networks: by the name of the input: network, side of its input, border inside it.
    """
    dataset = load_coco(order.data, val_split(order.fold))
    truth = read_truth(Path(order.data))
    kept, aps = {}, {}
    for name, (network, side, border) in networks.items():
        from trt_yolov6.models.network import YOLOv6

        half = isinstance(network, YOLOv6) and order.device == "cuda"
        with TorchEngine(network, dataset.class_names, side, half=half, name=LAST_FILE) as engine:
            rows = pack(detect_all(engine, dataset, border))
        kept[name] = stored(without_missing_boxes(truth, rows))
        aps[name] = _fold_ap(truth, order.fold, rows)
    with atomic_path(order.folder / FOUND_FILE) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **kept)  # type: ignore[arg-type]
    return {"AP": aps}


def detect_all(engine: Engine, dataset: CocoDataset, border: int) -> dict[int, Detections]:
    """Return the detections in a data set's images by id, as `evaluate` takes them."""

    def keep(batch: Any, found: list[Detections]) -> list[tuple[int, Detections]]:
        return [(image.id, one) for image, one in zip(batch.items, found, strict=True)]

    steps = process(
        engine,
        dataset.images,
        read_coco_image,
        keep,
        PredictOptions(border=border, batch=16, workers=2, clip=False),
    )
    return dict(pair for step in steps for pair in step.result)


def _fold_ap(truth: Truth, fold: int, rows: Any) -> float:
    own = truth.fold_of == fold
    return match_all(truth, rows).ap(own.astype(np.int64))


# --- quantizing ---------------------------------------------------------------------------------


def _quantize(order: Order, variant: Variant) -> dict[str, Any]:
    from trt_yolov6.training.qat.settings import QatSettings
    from trt_yolov6.training.qat.training import train_quantized

    how = variant.quantized
    assert how is not None
    clock = time.perf_counter()
    start = _started(order, how)
    told: dict[str, Any] = {
        "prepare_s": time.perf_counter() - clock,
        "layers": len(start.quantization.placement.layers),
        "float_layers": list(start.graph.float_layers),
    }
    device = torch.device(order.device)
    if how.per_tensor:
        network = _with_one_weight_scale(start).to(device).eval()
    elif how.trained is None:
        network = start.student(device).eval()
    else:
        result = train_quantized(
            start,
            QatSettings(
                data=order.data,
                train_split=train_split(order.fold),
                epochs=order.qat_epochs,
                seed=seed_of(variant, order.fold),
                distillation=how.trained == "distilled",
            ),
            device=device,
            state_file=order.folder / "qat-state.pt",
            progress=False,
        )
        network = result.network.eval()
        told |= {"train_s": result.seconds, "epoch_s": statistics.median(result.epoch_seconds)}
        (order.folder / "qat-state.pt").unlink(missing_ok=True)
    with _exact():
        figures = judge(order, {"plain": (network, order.image_size, 0)})
    return {**figures, **told}


def _started(order: Order, how: Quantized) -> Start:
    """Return a fold's network, calibrated, with the layers in float that a metric names."""
    from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
    from trt_yolov6.quantization.settings import QuantizationSettings
    from trt_yolov6.training.qat.preparation import prepare_graph

    checkpoint = load_checkpoint(order.checkpoint_of(how.network))
    size = order.image_size
    graph = graph_from_checkpoint(checkpoint, ExportSettings(image_size=(size, size)))
    settings = QuantizationSettings(calibrator="minmax", equalize=False)
    calib = calibration_folder(Path(order.data), order.fold)
    if how.ranked_by is not None:
        names = _ranked(
            order, how, lambda: prepare_graph(graph, checkpoint.arch, calib, quantization=settings)
        )
        settings = dataclasses.replace(settings, float_layers=tuple(names[: how.float_layers]))
    return prepare_graph(graph, checkpoint.arch, calib, quantization=settings)


def _ranked(order: Order, how: Quantized, calibrated: Callable[[], Start]) -> list[str]:
    """Return a network's layers by a metric, the most sensitive first; kept in a file."""
    from trt_yolov6.quantization.judge import batches_of
    from trt_yolov6.quantization.metrics import TENSOR_METRICS
    from trt_yolov6.quantization.sensitivity import layer_distortions, ranked

    file = Path(order.state) / how.network / str(order.fold) / f"ranking-{how.ranked_by}.json"
    if file.is_file():
        names: list[str] = read_json(file)
        return names
    start = calibrated()
    if how.ranked_by == "ap":
        write_json(file, _ranked_by_ap(order, start))
    else:
        quantized = start.quantized
        paths = sorted(calibration_folder(Path(order.data), order.fold).iterdir())
        distortions = layer_distortions(
            quantized.float_model,
            quantized.placement,
            quantized.table.amax,
            batches_of(start.graph, paths),
        )
        for metric in TENSOR_METRICS:
            names = list(ranked(distortions, metric).names)
            write_json(file.with_name(f"ranking-{metric}.json"), names)
    names = read_json(file)
    return names


def _ranked_by_ap(order: Order, start: Start) -> list[str]:
    """Return the layers by the AP of the network in which only that layer runs in INT8.

    Of training images: those to be judged on must not choose.
    """
    from trt_yolov6.quantization.fake_quantize import WIDEST, activation_levels
    from trt_yolov6.quantization.sensitivity import input_scales, only_layer
    from trt_yolov6.training.qat.onnx_module import GraphNetwork

    whole = load_coco(order.data, train_split(order.fold))
    dataset = dataclasses.replace(whole, images=whole.images[:RANKED_IMAGES])
    truth = read_truth(Path(order.data))
    counted = np.isin(np.array(truth.images), [image.id for image in dataset.images])
    given, model = start.quantization, start.quantized.float_model
    scales = input_scales(model, given.placement, start.quantized.table.amax)
    levels = dict.fromkeys(scales, activation_levels(WIDEST))
    aps = {}
    for layer in given.placement.layers:
        placement = only_layer(model, given.placement, layer)
        alone = dataclasses.replace(
            given,
            placement=placement,
            scales=scales,
            levels=levels,
            weight_bits={layer: WIDEST},
        )
        network = GraphNetwork(model, start.arch, alone, ()).to(order.device)
        with (
            _exact(),
            TorchEngine(
                network.eval(), dataset.class_names, order.image_size, half=False
            ) as engine,
        ):
            rows = pack(detect_all(engine, dataset, 0))
        aps[layer] = match_all(truth, rows).ap(counted.astype(np.int64))
    return sorted(aps, key=lambda layer: aps[layer])


def _with_one_weight_scale(start: Start) -> GraphNetwork:
    """Return PTQ's network with one scale for all of a layer's weights, as in v1.0's days."""
    from trt_yolov6.graph.editing import replace_tensor
    from trt_yolov6.graph.index import tensor_value
    from trt_yolov6.graph.operators import CONVOLUTIONS, layer_names
    from trt_yolov6.quantization.types import INT8
    from trt_yolov6.training.qat.onnx_module import GraphNetwork

    model = copy.deepcopy(start.quantized.float_model)
    constants = {item.name: item for item in model.graph.initializer}
    names = layer_names(model)
    for node in model.graph.node:
        if node.op_type not in CONVOLUTIONS:
            continue
        if names[node.output[0]] in start.quantization.placement.layers:
            weights = tensor_value(constants[node.input[1]])
            scale = np.abs(weights).max() / INT8.largest
            replace_tensor(
                constants[node.input[1]], (np.round(weights / scale) * scale).astype(np.float32)
            )
    # The weights are rounded already.
    given = dataclasses.replace(start.quantization, weight_bits={})
    return GraphNetwork(model, start.arch, given, ())


def _exact() -> Any:
    """Compute convolutions in float32 proper while the context lasts."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False)


if __name__ == "__main__":
    main()
