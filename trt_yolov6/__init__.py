"""trt-yolov6: YOLOv6 from a trained checkpoint to a measured, validated engine."""

__version__ = "0.1.0"
