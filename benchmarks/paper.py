"""The figures of the paper's tables (arXiv 2209.02976v1), for `paper_tables`.

All of it is COCO 2017 val. Speeds are of an NVIDIA T4 in FP16: TensorRT 7.2 in Table 1, 8 in Table
17. Table 20 is OpenCV's DNN module on a 2.6 GHz Intel Core i7 in FP32.
"""

from __future__ import annotations

from typing import NamedTuple


class Detector(NamedTuple):
    """A row of Table 1. AP and AP50 in percent, latency in ms, parameters in M, FLOPs in G."""

    name: str
    size: int
    ap: float
    ap50: float
    fps_1: int
    fps_32: int
    latency: float
    parameters: float
    flops: float


TABLE_1 = (
    Detector("YOLOv5-N", 640, 28.0, 45.7, 602, 735, 1.7, 1.9, 4.5),
    Detector("YOLOv5-S", 640, 37.4, 56.8, 376, 444, 2.7, 7.2, 16.5),
    Detector("YOLOv5-M", 640, 45.4, 64.1, 182, 209, 5.5, 21.2, 49.0),
    Detector("YOLOv5-L", 640, 49.0, 67.3, 113, 126, 8.8, 46.5, 109.1),
    Detector("YOLOX-Tiny", 416, 32.8, 50.3, 717, 1143, 1.4, 5.1, 6.5),
    Detector("YOLOX-S", 640, 40.5, 59.3, 333, 396, 3.0, 9.0, 26.8),
    Detector("YOLOX-M", 640, 46.9, 65.6, 155, 179, 6.4, 25.3, 73.8),
    Detector("YOLOX-L", 640, 49.7, 68.0, 94, 103, 10.6, 54.2, 155.6),
    Detector("PPYOLOE-S", 640, 43.1, 59.6, 327, 419, 3.1, 7.9, 17.4),
    Detector("PPYOLOE-M", 640, 49.0, 65.9, 152, 189, 6.6, 23.4, 49.9),
    Detector("PPYOLOE-L", 640, 51.4, 68.6, 101, 127, 10.1, 52.2, 110.1),
    Detector("YOLOv7-Tiny", 416, 33.3, 49.9, 787, 1196, 1.3, 6.2, 5.8),
    Detector("YOLOv7-Tiny", 640, 37.4, 55.2, 424, 519, 2.4, 6.2, 13.7),
    Detector("YOLOv7", 640, 51.2, 69.7, 110, 122, 9.0, 36.9, 104.7),
    Detector("YOLOv6-N", 640, 35.9, 51.2, 802, 1234, 1.2, 4.3, 11.1),
    Detector("YOLOv6-T", 640, 40.3, 56.6, 449, 659, 2.2, 15.0, 36.7),
    Detector("YOLOv6-S", 640, 43.5, 60.4, 358, 495, 2.8, 17.2, 44.2),
    Detector("YOLOv6-M", 640, 49.5, 66.8, 179, 233, 5.6, 34.3, 82.2),
    Detector("YOLOv6-L-ReLU", 640, 51.7, 69.2, 113, 149, 8.8, 58.5, 144.0),
    Detector("YOLOv6-L", 640, 52.5, 70.0, 98, 121, 10.2, 58.5, 144.0),
)

TABLE_5 = (
    ("YOLOv5-N", 28.0, 672),
    ("+ decoupled head", 29.4, 637),
    ("+ anchor-free", 30.7, 962),
    ("+ EfficientRep and Rep-PAN", 34.3, 1163),
    ("+ hybrid channels in the head", 34.5, 1242),
)
"""Design, AP in percent, FPS at batch 32."""

ABLATIONS: dict[str, tuple[tuple[str, ...], dict[str, tuple[float | None, ...]]]] = {
    "2": (
        ("YOLOv6-N", "YOLOv6-S", "YOLOv6-M", "YOLOv6-L-ReLU"),
        {
            "RepBlock": (35.2, 43.2, 47.9, None),
            "CSPStackRep, 2/3": (None, None, 48.1, 50.1),
            "CSPStackRep, 1/2": (32.7, 43.4, 47.3, 50.1),
        },
    ),
    "3": (
        ("YOLOv6-L",),
        {"wide and shallow": (50.8,), "slender and deep": (51.0,)},
    ),
    "4": (
        ("YOLOv6-N", "YOLOv6-M"),
        {
            "Conv, SiLU": (36.6, 48.9),
            "RepConv, SiLU": (36.5, 48.9),
            "Conv, ReLU": (34.8, 47.7),
            "RepConv, ReLU": (35.2, 48.1),
            "Conv, LReLU": (35.4, 48.0),
            "RepConv, LReLU": (35.6, 48.1),
        },
    ),
    "6": (
        ("YOLOv6-N",),
        {
            "ATSS": (32.5,),
            "SimOTA": (34.5,),
            "TAL": (35.0,),
            "DW": (33.4,),
            "ObjectBox": (30.1,),
        },
    ),
    "7": (
        ("YOLOv6-N",),
        {"as later (TAL)": (34.9,), "ATSS": (35.0,), "SimOTA": (34.9,)},
    ),
    "8": (
        ("YOLOv6-N", "YOLOv6-S", "YOLOv6-M"),
        {
            "focal": (35.0, 42.9, 48.0),
            "poly": (34.0, 41.5, 46.9),
            "quality focal": (35.4, 43.1, 48.0),
            "VariFocal": (35.2, 43.2, 48.1),
        },
    ),
    "9": (
        ("YOLOv6-N", "YOLOv6-S", "YOLOv6-M"),
        {
            "GIoU": (35.1, 43.1, 48.2),
            "CIoU": (35.1, 43.1, 48.3),
            "SIoU": (35.5, 43.3, 48.1),
        },
    ),
    "10": (
        ("YOLOv6-N", "YOLOv6-S", "YOLOv6-M"),
        {
            "without": (35.0, 42.9, 48.0),
            "with": (35.2, 43.0, 48.2),
            "second version": (35.2, 43.0, 48.3),
        },
    ),
    "11": (
        ("YOLOv6-N", "YOLOv6-S", "YOLOv6-M"),
        {"without": (35.0, 42.9, 48.0), "with": (33.9, 41.4, 46.5)},
    ),
    "12": (
        ("YOLOv6-N", "YOLOv6-T", "YOLOv6-S"),
        {"300": (35.9, 40.3, 43.4), "400": (36.3, 40.9, 43.9)},
    ),
    "13": (
        ("YOLOv6-L",),
        {
            "none": (51.0,),
            "classes": (51.4,),
            "classes and boxes": (51.7,),
            "classes and boxes, weight decays": (52.3,),
        },
    ),
    "14": (
        ("YOLOv6-N", "YOLOv6-S", "YOLOv6-M"),
        {
            "+ 16, with fading": (36.2, 43.9, 48.4),
            "+ 0, with fading": (36.0, 43.4, 47.9),
            "- 6 + 3, with fading": (36.2, 43.7, 48.5),
            "+ 16, without fading": (36.0, 43.4, 48.4),
            "+ 0, without fading": (35.6, 42.9, 47.7),
        },
    ),
}
"""Tables 2 to 14, except for 5, by number: networks, and AP in percent by choice and network.

Of Table 14, `+ 16` is the image as it is with 16 gray pixels on every side, `- 6 + 3` the image
shrunk by 6 pixels and 3 gray ones around it; fading: Mosaic is off in the last epochs.
"""

TABLE_15 = (
    ("v1.0", "YOLOv6-S", 42.4, 35.0),
    ("v1.0", "YOLOv6-S with RepOptimizer", 42.4, 40.9),
    ("v2.0", "YOLOv6-S", 43.4, 41.3),
    ("v2.0", "YOLOv6-S with RepOptimizer", 43.1, 42.6),
)
"""Release, model, AP in FP32 and in INT8 by PTQ, in percent."""

TABLE_16 = (
    ("YOLOv6-S, PTQ", 35.0, 556),
    ("with RepOptimizer, partial QAT, channel-wise distillation", 42.3, 503),
    ("with RepOptimizer, full QAT, channel-wise distillation", 42.1, 528),
)
"""Network (v1.0), AP in INT8 in percent, FPS."""

TABLE_17 = (
    ("YOLOv5-S", 36.9, 502, None),
    ("YOLOv6-S (v1.0, by others)", 41.3, 579, None),
    ("YOLOv7-Tiny", 37.0, 512, None),
    ("YOLOv6-S, FP16", 43.4, 377, 541),
    ("YOLOv6-S, their QAT", 43.3, 596, 869),
)
"""Model, AP in percent, FPS at batch 1 and 32; INT8 except for one row."""

TABLE_20 = (
    ("YOLOv5-N", 640, 118.9),
    ("YOLOv5-S", 640, 202.2),
    ("YOLOX-Tiny", 416, 144.2),
    ("YOLOX-S", 640, 164.6),
    ("YOLOX-M", 640, 357.9),
    ("YOLOv7-Tiny", 640, 137.5),
    ("YOLOv6-N", 640, 70.0),
    ("YOLOv6-T", 640, 128.1),
    ("YOLOv6-S", 640, 163.4),
)
"""Model, input size, latency at batch 1 in ms."""

TABLE_21 = (
    ("mse", 41.5),
    ("cosine", 41.1),
    ("snr", 41.1),
    ("ap", 42.0),
)
"""Metric that chose the six layers in float of YOLOv6-S (v1.0), and the AP in percent."""
