"""`python -m trt_yolov6` is the same as `trt-yolov6`."""

from trt_yolov6.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
