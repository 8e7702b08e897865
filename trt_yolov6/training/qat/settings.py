"""Settings of a quantization-aware training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from trt_yolov6.common.ranges import Checked, Count, NotNegative, Positive, Share
from trt_yolov6.training.augmentation import AugmentationSettings
from trt_yolov6.training.data_validation import OnBadData

QatPrecision = Literal["auto", "bf16", "fp32"]
"""Arithmetic of the convolutions; `auto` is fp32, on a GPU in TF32.

Rounding is float32 always, but with `bf16` what it gives an activation goes on as bfloat16, which
has not all of INT8's levels to the last bit.
"""


@dataclass(frozen=True)
class QatSettings(Checked):
    """Settings of a quantization-aware training; docs/measurements/qat.md evaluates them."""

    data: str
    """The data set's folder or `data.yaml`."""
    train_split: str = "train"
    on_bad_data: OnBadData = "refuse"
    epochs: Count = 10
    batch: Count = 16
    learning_rate: Positive = 0.005
    """Adam learning rate for weights and biases, in weight quantization steps: a cosine down to
    `final_share`."""
    scale_learning_rate: Positive = 0.05
    """Adam learning rate for scales, in quantization steps at the end of their range."""
    final_share: Share = 0.01
    learn_scales: bool = True
    """Off: the calibrated scales stay."""
    distillation: bool = True
    """Hold the features to the float network's."""
    distill_weight: NotNegative = 0.1
    temperature: Positive = 1.0
    distill_relative: bool = True
    """Count activations in standard deviations of the teacher's channels, so that rescaled channels
    (`channel_divergence`), such as equalization makes, are distilled like others."""
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    """Mosaic and Mixup are off whatever it says, as in the last epochs of training (2.4.3)."""
    seed: int = 0
    precision: QatPrecision = "auto"

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for `json.dumps`."""
        return dataclasses.asdict(self)
