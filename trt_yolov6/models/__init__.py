"""The networks of YOLOv6 0.1 to 0.4: variants, training form, fused form, size."""

from __future__ import annotations

from trt_yolov6.models.complexity import count_flops, count_parameters
from trt_yolov6.models.fusion import fold_shortcuts, fuse, is_fused, single_branch
from trt_yolov6.models.network import YOLOv6
from trt_yolov6.models.variants import STRIDES, VARIANTS, Architecture, architecture

__all__ = [
    "STRIDES",
    "VARIANTS",
    "Architecture",
    "YOLOv6",
    "architecture",
    "count_flops",
    "count_parameters",
    "fold_shortcuts",
    "fuse",
    "is_fused",
    "single_branch",
]
