"""Settings of quantization, and which choices go together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from trt_yolov6.common.ranges import Checked
from trt_yolov6.errors import UserError
from trt_yolov6.graph.model import Graph
from trt_yolov6.quantization.calibrators import Method, methods_for
from trt_yolov6.quantization.judge import HARMLESS_NOISE, least_agreement
from trt_yolov6.quantization.mixed_precision import most_sensitive
from trt_yolov6.quantization.qdq.placement import Placement, place_for
from trt_yolov6.quantization.types import INT8, QuantizedType
from trt_yolov6.spec import choice_of_layers

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class QuantizationSettings(Checked):
    """Settings for quantizing a graph."""

    quantized: QuantizedType = INT8
    """Number type of quantized tensors."""
    calibrator: Literal["auto", Method] = "auto"
    """One for all tensors; `auto` takes the one whose detections agree best with the float ones."""
    equalize: bool = True
    """Try rescaled channels as well; off, the graph's weights stay as they are."""
    shift: bool = True
    """Try channels that are moved to the middle of their range as well. Not for TensorRT proper:
    TensorRT 8.6 takes YOLOv6-N so, but borders that are added after convolutions are untried."""
    depthwise: bool = True
    """Quantize depthwise convolutions as well. Not for TensorRT 8, which computes them in half
    precision whatever the graph says. FP8 leaves them in float."""
    bias_correction: bool = True
    """Try biases that take back the mean error of each layer."""
    reconstruct: bool = True
    """Try weights that are rounded for the inputs that they meet, too. INT8's only."""
    reconstruct_minutes: Annotated[float, Meta(ge=0, le=24 * 60)] = 0.0
    """Minutes that scales, weights and biases learn by gradients on the calibration images; what
    comes of it is kept if it agrees clearly better on the held-out ones. INT8's only."""
    adaptive_rounding: bool = False
    """Take such weights without trying. INT8's only."""
    float_layers: tuple[str, ...] | int | Literal["auto"] = ()
    """Layers that stay in float: by name; a number of the most sensitive; or as few as keep the
    accuracy within `max_ap_drop`. FP8's by name only."""
    max_ap_drop: float | None = 0.5
    """Loss that `auto` may cause, in AP points; None: as little as `max_slowdown` allows."""
    max_slowdown: Annotated[float, Meta(gt=0, le=100)] | None = None
    """Per cent of INT8's run time that `auto` may add, by layer times; None leaves that open."""
    fp16: bool = False
    """Everything that is not quantized in half precision."""
    image_limit: int | None = None
    """Calibration images taken, spread evenly over the folder; None for all."""
    border: Annotated[int, Meta(ge=0)] = 0
    """Gray pixels around each image, as in evaluation."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "float_layers", choice_of_layers(self.float_layers))
        super().__post_init__()

    def placement(self, model: onnx.ModelProto, exclude: Collection[str] = ()) -> Placement:
        """Decide what to quantize of a float graph; `exclude` names layers that stay in float."""
        return place_for(self.quantized, model, exclude, depthwise=self.depthwise)


def check_settings(settings: QuantizationSettings) -> None:
    """Raise UserError for choices that contradict each other or that nothing would read."""
    budget = settings.max_ap_drop, settings.max_slowdown
    if settings.float_layers != "auto" and budget != (type(settings).max_ap_drop, None):
        raise UserError("`max_ap_drop` and `max_slowdown` are for `float_layers` auto; give that.")
    if budget == (None, None):
        raise UserError("`float_layers` auto needs a budget; give `max_ap_drop` or `max_slowdown`.")
    quantized = settings.quantized
    methods = methods_for(quantized)
    if settings.calibrator != "auto" and settings.calibrator not in methods:
        raise UserError(
            f"`calibrator` {settings.calibrator} is for INT8, as it assumes a uniform grid; "
            f"choose one of {', '.join(methods)} with {quantized.label}."
        )
    if not quantized.is_floating:
        for name in ("bias_correction", "reconstruct"):
            if settings.adaptive_rounding and not getattr(settings, name):
                raise UserError(
                    f"`adaptive_rounding` does what `{name}` turns off; leave one of them out."
                )
        return
    if settings.reconstruct_minutes:
        raise UserError(
            f"`reconstruct_minutes` is for INT8; leave it out with {quantized.label}, whose "
            "grid is not uniform."
        )
    if settings.adaptive_rounding:
        raise UserError(
            f"`adaptive_rounding` is for INT8; leave it out with {quantized.label}, whose "
            "grid is dense where most weights are."
        )
    if not isinstance(settings.float_layers, tuple) and settings.float_layers != 0:
        raise UserError(
            f"`float_layers` {settings.float_layers} ranks layers by their sensitivity to INT8; "
            f"name the layers with {quantized.label}."
        )


def check_float_layers(graph: Graph, settings: QuantizationSettings) -> None:
    """Raise UserError for a wrong choice of float layers: calibrating takes a minute."""
    requested = settings.float_layers
    if requested == "auto":
        if settings.max_ap_drop is not None:
            least_agreement(settings.max_ap_drop)
        return
    kept = requested if isinstance(requested, tuple) else ()
    layers = settings.placement(graph.model, kept).layers
    chosen = most_sensitive(layers, requested) if isinstance(requested, int) else ()
    if len(chosen) == len(layers):
        raise UserError(
            f"`float_layers` leaves no layer in {settings.quantized.label}; choose fewer."
        )


def described(settings: QuantizationSettings) -> str:
    """Return the choice of float layers as one string."""
    layers = settings.float_layers
    if layers == "auto":
        return f"auto, {settings.max_ap_drop}, {settings.max_slowdown}, noise {HARMLESS_NOISE:g}"
    return ", ".join(layers) if isinstance(layers, tuple) else str(layers)
