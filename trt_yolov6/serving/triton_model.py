"""An engine of trt-yolov6 in Triton's Python backend; `trt-yolov6 export-triton` wrote this entry.

Triton's Python needs the package: `pip install` its folder or its wheel where `tritonserver` runs,
or give Triton an execution environment that holds it.
"""

from trt_yolov6.serving.python_backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
