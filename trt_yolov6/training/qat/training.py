"""Quantization-aware training: a checkpoint in, the Q/DQ graph that PTQ would give out, trained.

    checkpoint ─ fuse, export, calibrate, place ─▶ GraphNetwork ─ train ─▶ insert_qdq

Paper, Section 2.5.3: all layers quantized, or all but the sensitive ones; held to the float network
by channel-wise distillation. What is trained is the graph that calibration prepared: equalized
where that agreed best, with the same pairs, from the same scales on.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from trt_yolov6.checkpoints.loading import Checkpoint, load_checkpoint
from trt_yolov6.common.progress import is_logged
from trt_yolov6.data.calibration import calibration_images
from trt_yolov6.data.coco import load_coco
from trt_yolov6.errors import UserError
from trt_yolov6.graph.editing import replace_tensor
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.graph.index import GraphIndex, tensor_value
from trt_yolov6.graph.model import Graph
from trt_yolov6.graph.operators import CONVOLUTIONS, layer_names, weight_axis
from trt_yolov6.graph.tail import layers_after
from trt_yolov6.models.variants import Architecture
from trt_yolov6.quantization.calibrators import group_amax
from trt_yolov6.quantization.collect import collect
from trt_yolov6.quantization.fake_quantize import NARROWEST, WIDEST, Levels, activation_levels
from trt_yolov6.quantization.judge import batches_of
from trt_yolov6.quantization.pipeline import QuantizedGraph, quantize
from trt_yolov6.quantization.qdq.insert import activation_scales, insert_qdq
from trt_yolov6.quantization.qdq.placement import Placement
from trt_yolov6.quantization.settings import QuantizationSettings
from trt_yolov6.quantization.types import INT8
from trt_yolov6.runtime.evaluate import Evaluation, evaluate
from trt_yolov6.spec import PredictOptions
from trt_yolov6.training.augmentation import AugmentationSettings
from trt_yolov6.training.data_validation import OnBadData
from trt_yolov6.training.dataset import TrainingSet, load_training_set
from trt_yolov6.training.distributed import chosen_device
from trt_yolov6.training.losses import LossSettings, default_losses, detection_loss
from trt_yolov6.training.qat.distillation import distillation_loss
from trt_yolov6.training.qat.onnx_module import GraphNetwork, Quantization, Trained, feature_tensors
from trt_yolov6.training.schedule import cosine, derived_seed, epoch_order, make_plan
from trt_yolov6.training.torch_engine import TorchEngine

if TYPE_CHECKING:
    import onnx

QatPrecision = Literal["auto", "bf16", "fp32"]
"""Arithmetic of the convolutions; `auto` is fp32, on a GPU in TF32.

Rounding is float32 always, but with `bf16` what it gives an activation goes on as bfloat16, which
has not all of INT8's levels to the last bit.
"""

WARMUP = 0.05
"""Part of the steps over which the learning rate rises."""


@dataclass(frozen=True)
class QatSettings:
    """Settings of a quantization-aware training; docs/measurements/qat.md evaluates them."""

    data: str
    """The data set's folder or `data.yaml`."""
    train_split: str = "train"
    on_bad_data: OnBadData = "refuse"
    epochs: int = 10
    batch: int = 16
    learning_rate: float = 0.005
    """Adam learning rate for weights and biases, in weight quantization steps: a cosine down to
    `final_share`."""
    scale_learning_rate: float = 0.05
    """Adam learning rate for scales, in quantization steps at the end of their range."""
    final_share: float = 0.01
    learn_scales: bool = True
    """Off: the calibrated scales stay."""
    distillation: bool = True
    """Hold the features to the float network's."""
    distill_weight: float = 0.1
    temperature: float = 1.0
    distill_relative: bool = True
    """Count activations in standard deviations of the teacher's channels, so that rescaled channels
    (`channel_divergence`), such as equalization makes, are distilled like others."""
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    """Mosaic and Mixup are off whatever it says, as in the last epochs of training (2.4.3)."""
    seed: int = 0
    precision: QatPrecision = "auto"
    bits: int = WIDEST
    """Bit width of weights and activations. Below 8 there is no export; the first and last layers
    keep 8 then (LSQ, Section 3)."""

    def __post_init__(self) -> None:
        _check(self)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for `json.dumps`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Start:
    """A calibrated network, ready to be trained quantized."""

    arch: Architecture
    quantized: QuantizedGraph
    """Output of PTQ: the float graph, placement, ranges."""
    quantization: Quantization
    features: tuple[str, ...]

    @property
    def graph(self) -> Graph:
        """The graph's description."""
        return self.quantized.graph

    def student(self, device: torch.device | str = "cpu") -> GraphNetwork:
        """Return the fake-quantized network, as calibrated: PTQ without corrected biases."""
        model, features = self.quantized.float_model, self.features
        return _placed(GraphNetwork(model, self.arch, self.quantization, features), device)

    def teacher(self, device: torch.device | str = "cpu") -> GraphNetwork:
        """Return the float network, not to be trained."""
        network = GraphNetwork(self.quantized.float_model, self.arch, None, self.features)
        return _placed(network.eval().requires_grad_(False), device)


@dataclass(frozen=True)
class QatResult:
    """A trained network, and what training it took."""

    network: GraphNetwork
    trained: Trained
    epochs: int
    seconds: float
    """Seconds of training alone, without calibration and loading."""
    epoch_seconds: tuple[float, ...]
    peak_bytes: int | None
    """Most memory that was allocated on the GPU; None on a CPU."""
    log: tuple[dict[str, float], ...] = field(repr=False, default=())
    """Mean losses, by epoch."""


def prepare(
    weights: str | Path | Checkpoint,
    calib: str | Path,
    *,
    export: ExportSettings | None = None,
    quantization: QuantizationSettings | None = None,
    bits: int = WIDEST,
    learn_scales: bool = True,
    tell: Callable[[str], None] | None = None,
) -> Start:
    """Fuse, export and calibrate a checkpoint.

    Args:
        weights: in any form that `load_checkpoint` reads.
        calib: folder of calibration images.
        export: the form of the graph that is to come out.
        quantization: calibrator, equalization and float layers, as for `quantize`. Biases are not
            corrected: training does that.
        bits: see `QatSettings`.
        learn_scales: see `QatSettings`.
        tell: called with a line of progress now and then.

    Raises:
        UserError: see `load_checkpoint` and `quantize`; or all layers are to stay in float.
    """
    checkpoint = load_checkpoint(weights) if isinstance(weights, (str, Path)) else weights
    graph = graph_from_checkpoint(checkpoint, export or ExportSettings())
    return prepare_graph(
        graph,
        checkpoint.arch,
        calib,
        quantization=quantization,
        bits=bits,
        learn_scales=learn_scales,
        tell=tell,
    )


def prepare_graph(
    graph: Graph,
    arch: Architecture,
    calib: str | Path,
    *,
    quantization: QuantizationSettings | None = None,
    bits: int = WIDEST,
    learn_scales: bool = True,
    score: Callable[[onnx.ModelProto], float] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Start:
    """Calibrate a graph that `export_onnx` made of a network of `arch`; see `prepare`.

    `score` is for automatic float layers, see `quantize`.
    """
    settings = quantization or QuantizationSettings()
    if settings.quantized is not INT8 or settings.adaptive_rounding or settings.fp16:
        raise UserError(
            "quantization-aware training starts from plain INT8; leave FP8, adaptive rounding and "
            "fp16 out of the quantization's settings (`trained_graph` takes fp16)."
        )
    settings = dataclasses.replace(settings, bias_correction=False, reconstruct=False)
    # What training will not know is found out before a minute of calibration.
    GraphNetwork(graph.model, arch)
    result = quantize(graph, calib, settings, score=score, tell=tell)
    layers = result.placement.layers
    if not layers:
        raise UserError("all layers are to stay in float; name fewer with --float-layers.")
    placement, model = result.placement, result.float_model
    if bits == WIDEST:
        scales = activation_scales(placement, result.table.amax)
        levels = dict.fromkeys(placement.tensors, activation_levels(bits))
        weight_bits = dict.fromkeys(layers, bits)
    else:
        wide_layers, wide_tensors = _ends(model, placement)
        weight_bits = {name: WIDEST if name in wide_layers else bits for name in layers}
        scales, levels = _narrow(graph, result, calib, settings, bits, wide_tensors)
    made = GraphIndex(model)
    features = tuple(name for name in feature_tensors(graph.model) if made.producer(name))
    given = Quantization(placement, scales, levels, weight_bits, learn_scales)
    return Start(arch, result, given, features)


def train_quantized(
    start: Start,
    settings: QatSettings,
    *,
    image_size: int | None = None,
    device: str | torch.device | None = None,
    state_file: str | Path | None = None,
    progress: bool = True,
    data: TrainingSet | None = None,
    tell: Callable[[str], None] | None = None,
) -> QatResult:
    """Train a calibrated network with its rounding in place.

    Args:
        start: from `prepare`, with the same `bits` and `learn_scales`.
        settings: what decides the result.
        image_size: side of the training images in pixels; None: the graph's.
        device: `cpu`, `cuda` or `cuda:N`; None takes a GPU where there is one.
        state_file: written after each epoch, and gone on from where it is there.
        progress: show a bar on stderr.
        data: the training split, if it is loaded already.
        tell: off a terminal, called with a header and a line an epoch.

    Raises:
        UserError: the data cannot be read, has other classes, or training diverged.
    """
    graph = start.graph
    size = image_size or max(graph.image_size)
    where = chosen_device(None if device is None else str(device))
    if data is None:
        data = load_training_set(
            settings.data,
            settings.train_split,
            size,
            where,
            on_bad_data=settings.on_bad_data,
            progress=progress,
            class_names=graph.class_names,
        )
    check_classes(settings.data, len(data.class_names), start.arch)
    run = _Run(start, settings, data, where)
    done = run.restore(state_file)
    plan = make_plan(
        len(data), batch=settings.batch, epochs=settings.epochs, warmup_epochs=0, accumulate=1
    )
    bar = tqdm(
        total=plan.total_steps,
        initial=done * plan.steps_per_epoch,
        desc="qat",
        unit="step",
        disable=None if progress else True,
    )
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    log_line = tell if is_logged(progress) else None
    if log_line is not None:
        log_line(
            f"qat: {start.arch.name} on {len(data)} images at {size} pixels, {settings.epochs} "
            f"epochs of {plan.steps_per_epoch} steps, batch {plan.batch}, on {where}; a line an "
            "epoch"
        )
    with bar, _convolutions(where, exact=False):
        for epoch in range(done, settings.epochs):
            order = epoch_order(plan, epoch, settings.seed)
            clock = time.perf_counter()
            for index in range(plan.steps_per_epoch):
                step = epoch * plan.steps_per_epoch + index
                place = index * plan.batch
                run.step(order[place : place + plan.batch], step, plan.total_steps)
                bar.update()
            line = run.finish_epoch(plan.steps_per_epoch, time.perf_counter() - clock)
            text = f"epoch {epoch + 1}, loss {line['loss']:.3f}"
            bar.set_postfix_str(text)
            if log_line is not None:
                log_line(f"{text}, {line['seconds']:.2f} s, of {settings.epochs} epochs")
            if state_file is not None:
                run.save(state_file)
    seconds = tuple(line["seconds"] for line in run.log)
    return QatResult(
        network=run.student,
        trained=run.student.eval().trained(),
        epochs=settings.epochs,
        seconds=sum(seconds),
        epoch_seconds=seconds,
        peak_bytes=torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None,
        log=tuple(run.log),
    )


def check_classes(data: str | Path, count: int, arch: Architecture) -> None:
    """Refuse a data set of another number of classes than the network's.

    Raises:
        UserError: there are other classes.
    """
    if count != arch.num_classes:
        raise UserError(
            f"{data} has {count} classes, the checkpoint {arch.num_classes}; give the data set it "
            "was trained on."
        )


def trained_graph(start: Start, trained: Trained, *, fp16: bool = False) -> Graph:
    """Return the Q/DQ graph, ready to be built: PTQ's nodes with trained weights and scales.

    Args:
        start: what was trained.
        trained: what came of it, of 8 bits.
        fp16: everything that is not quantized in half precision, whose scales are rounded up to
            float16.

    Raises:
        UserError: of fewer bits, which Q/DQ pairs of INT8 cannot express.
    """
    narrow = [bits for bits in start.quantization.weight_bits.values() if bits != WIDEST]
    if narrow:
        raise UserError(
            f"a network of {narrow[0]} bits cannot be exported; train with bits={WIDEST} for INT8."
        )
    model = insert_qdq(
        trained.model,
        start.quantization.placement,
        trained.amax,
        fp16=fp16,
        weight_scales=trained.weight_scales,
    )
    said = {**(start.graph.calibration or {}), "rest": "fp16" if fp16 else "fp32"}
    said["quantization_aware_training"] = True
    return dataclasses.replace(start.graph, model=model, calibration=said)


def rounded_weights(start: Start, trained: Trained) -> onnx.ModelProto:
    """Return the graph without Q/DQ nodes whose weights are rounded: goes with a scales cache.

    TensorRT up to 10 then quantizes weights by their largest magnitude, which is what they are
    rounded to unless training made a scale larger than any weight of its channel needs.
    """
    import numpy as np

    from trt_yolov6.quantization.qdq.insert import quantize_weights

    model = copy.deepcopy(trained.model)
    constants = {item.name: item for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in CONVOLUTIONS or node.input[1] not in trained.weight_scales:
            continue
        item, axis = constants[node.input[1]], weight_axis(node.op_type)
        scale = trained.weight_scales[node.input[1]]
        codes, scale = quantize_weights(tensor_value(item), axis, scales=scale)
        shape = [1] * codes.ndim
        shape[axis] = -1
        replace_tensor(item, codes.astype(np.float32) * scale.reshape(shape))
    return model


def evaluate_network(
    network: GraphNetwork,
    class_names: tuple[str, ...],
    image_size: int,
    data: str | Path,
    split: str | None = None,
    *,
    batch: int = 16,
) -> Evaluation:
    """Return the AP of a network on the device where it is, in float32 without TF32."""
    device = next(network.parameters()).device
    with (
        _convolutions(device, exact=True),
        TorchEngine(network, class_names, image_size, half=False, name="qat") as engine,
    ):
        return evaluate(engine, load_coco(data, split), PredictOptions(batch=batch), progress=False)


# --- training -----------------------------------------------------------------------------------


class _Run:
    """The two networks, the optimizer, and what was logged."""

    def __init__(
        self, start: Start, settings: QatSettings, data: TrainingSet, device: torch.device
    ) -> None:
        self.settings = settings
        self._origin = _origin(start, settings, data)
        self.student = start.student(device).train()
        self.log: list[dict[str, float]] = []
        self._data = data
        self._arch = start.arch
        self._device = device
        self._teacher = start.teacher(device) if settings.distillation else None
        self._losses: LossSettings = dataclasses.replace(
            default_losses(start.arch), warmup_epochs=0
        )
        self._rates = (settings.learning_rate, settings.scale_learning_rate)
        groups = [self.student.weight_parameters(), self.student.scale_parameters()]
        self._optimizer = torch.optim.Adam(
            [{"params": group} for group in groups if group], betas=(0.9, 0.99)
        )
        self._sums = torch.zeros(3, device=device)

    def step(self, indices: torch.Tensor, step: int, total: int) -> None:
        """Take one step of the optimizer; nothing in it waits for the device."""
        settings = self.settings
        generator = torch.Generator().manual_seed(derived_seed(settings.seed, "batch", step))
        images, targets = self._data.batch(indices, settings.augmentation, generator, strong=False)
        if self._device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        mixed = torch.autocast(
            self._device.type, torch.bfloat16, enabled=settings.precision == "bf16"
        )
        with mixed:
            levels, features = self.student(images)
            if self._teacher is not None:
                with torch.no_grad():
                    _, guides = self._teacher(images)
        losses = detection_loss(
            levels, self._arch, targets, self._losses, image_size=self._data.image_size
        )
        total_loss = losses.total
        distilled = torch.zeros_like(total_loss)
        if self._teacher is not None:
            distilled = settings.distill_weight * distillation_loss(
                features, guides, settings.temperature, relative=settings.distill_relative
            )
            total_loss = total_loss + distilled
        share = min((step + 1) / max(WARMUP * total, 1.0), 1.0)
        share *= cosine(step / total, settings.final_share)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate * share
        self._optimizer.zero_grad(set_to_none=True)
        total_loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._sums += torch.stack([total_loss.detach(), losses.total.detach(), distilled.detach()])

    def finish_epoch(self, steps: int, seconds: float) -> dict[str, float]:
        """Log the epoch that is over.

        Raises:
            UserError: the loss is not finite any more.
        """
        clock = time.perf_counter()
        total, detection, distilled = (self._sums / steps).tolist()
        self._sums.zero_()
        if not math.isfinite(total):
            raise UserError(
                f"the loss is not a finite number in epoch {len(self.log) + 1}: training "
                "diverged; lower --lr."
            )
        line = {
            "epoch": len(self.log) + 1,
            "loss": total,
            "loss_detection": detection,
            "loss_distill": distilled,
            # `tolist` waited for the device.
            "seconds": seconds + time.perf_counter() - clock,
        }
        self.log.append(line)
        return line

    def save(self, path: str | Path) -> None:
        """Write what going on takes."""
        from trt_yolov6.common.files import atomic_path

        state = {
            "origin": self._origin,
            "network": self.student.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "log": self.log,
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: str | Path | None) -> int:
        """Go on from a file if it is there; return the epochs that are done.

        Raises:
            UserError: it is not such a file, or of other settings.
        """
        if path is None or not Path(path).is_file():
            return 0
        try:
            state = torch.load(path, map_location=self._device, weights_only=True)
            same = state["origin"] == self._origin
            if same:
                self.student.load_state_dict(state["network"])
                self._optimizer.load_state_dict(state["optimizer"])
                self.log = list(state["log"])
        except Exception as error:  # torch.load raises whatever a damaged file makes it raise
            raise UserError(
                f"{path} is not the state of such a training; delete it to start again."
            ) from error
        if not same:
            raise UserError(
                f"{path} is of a training of another network or with other settings; give those it "
                "began with, or another --output."
            )
        return len(self.log)


def _origin(start: Start, settings: QatSettings, data: TrainingSet) -> str:
    """Return all that decides the result: only a training of the same may go on from a state."""
    table = start.quantized.table
    parts = (
        settings.to_json(),
        dataclasses.asdict(table.key),
        table.variant,
        start.quantization.placement.float_layers,
        start.quantization.learn_scales,
        (len(data), data.image_size),
    )
    return json.dumps(parts, sort_keys=True)


@contextlib.contextmanager
def _convolutions(device: torch.device, *, exact: bool) -> Iterator[None]:
    """Choose how cuDNN convolves: TF32 to train, float32 to measure."""
    chosen = torch.backends.cudnn
    before = chosen.benchmark, chosen.allow_tf32
    if device.type == "cuda":
        chosen.benchmark, chosen.allow_tf32 = True, not exact
    try:
        yield
    finally:
        if device.type == "cuda":
            chosen.benchmark, chosen.allow_tf32 = before


def _placed(network: GraphNetwork, device: torch.device | str) -> GraphNetwork:
    where = torch.device(device)
    if where.type != "cuda":
        return network.to(where)
    return network.to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


# --- fewer bits ---------------------------------------------------------------------------------


def _ends(model: onnx.ModelProto, placement: Placement) -> tuple[set[str], set[str]]:
    """Return the layers that read the image or make predictions, and what only they read."""
    names, quantized = layer_names(model), set(placement.tensors)
    graph = GraphIndex(model)
    after = layers_after(graph)
    layers, tensors, others = set(), set[str](), set[str]()
    for node in graph.nodes:
        if node.op_type not in CONVOLUTIONS:
            continue
        before = graph.ancestors([node.input[0]])
        is_first = not before.intersection(names)
        if is_first or not after[node.output[0]]:
            layers.add(names[node.output[0]])
            tensors.add(node.input[0])
        else:
            others.add(node.input[0])
    tensors -= others
    grouped = {name for group in placement.groups for name in group}
    return layers, (tensors & quantized) - grouped


def _narrow(
    graph: Graph,
    result: QuantizedGraph,
    calib: str | Path,
    settings: QuantizationSettings,
    bits: int,
    wide: set[str],
) -> tuple[dict[str, float], dict[str, Levels]]:
    """Return scales of the least squared error for fewer bits, and the levels."""
    placement = result.placement
    paths = calibration_images(calib, settings.image_limit)
    images = batches_of(graph, paths, settings.border)
    statistics = collect(result.float_model, images, placement.tensors)
    scales: dict[str, float] = {}
    levels: dict[str, Levels] = {}
    group_of = {name: group for group in placement.groups for name in group}
    for name in placement.tensors:
        members = group_of.get(name, (name,))
        negative = any(statistics[member].amin < 0 for member in members)
        levels[name] = activation_levels(WIDEST if name in wide else bits, negative=negative)
        kind = dataclasses.replace(INT8, largest=levels[name].high)
        amax = group_amax({m: statistics[m] for m in members}, [members], "mse", kind)
        scales[name] = amax[name] / levels[name].high
    return scales, levels


def _check(settings: QatSettings) -> None:
    rates = (settings.learning_rate, settings.scale_learning_rate)
    checks = [
        (settings.epochs >= 1, f"{settings.epochs} epochs are none; give --epochs 1 or more"),
        (settings.batch >= 1, f"a batch of {settings.batch} is none; give --batch 1 or more"),
        (
            all(math.isfinite(rate) and rate > 0 for rate in rates),
            "a learning rate is out of range; give one above 0",
        ),
        (
            0 < settings.temperature < math.inf,
            f"a temperature of {settings.temperature} is out of range; give --temperature above 0",
        ),
        (
            0 <= settings.distill_weight < math.inf,
            f"a weight of {settings.distill_weight} is out of range; give --distill-weight 0 or "
            "more",
        ),
        (
            NARROWEST <= settings.bits <= WIDEST,
            f"{settings.bits} bits are out of range; give bits={NARROWEST} to {WIDEST}",
        ),
    ]
    for fine, complaint in checks:
        if not fine:
            raise UserError(complaint + ".")
