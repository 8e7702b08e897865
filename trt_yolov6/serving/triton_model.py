"""An engine of trt-yolov6 in Triton's Python backend; `trt-yolov6 export-triton` wrote this entry.

Triton's Python needs the package: `pip install trt-yolov6` where `tritonserver` runs, or an
execution environment that holds it.
"""

from trt_yolov6.serving.python_backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
