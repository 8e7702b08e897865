"""Tables and numbers as text."""

from __future__ import annotations

from trt_yolov6.common.text import fitted

HEAD = ("engine", "precision", "ms")


def test_a_table_that_is_too_wide_keeps_all_that_tells_its_rows_apart() -> None:
    rows = [HEAD, ("yolov6n_bccd-fp32", "fp32", "9.1"), ("yolov6n_bccd-int8", "int8", "12.2")]
    whole = [
        "engine             precision    ms",
        "yolov6n_bccd-fp32  fp32        9.1",
        "yolov6n_bccd-int8  int8       12.2",
    ]
    assert fitted(rows, 2, None) == fitted(rows, 2, 34) == whole
    assert fitted(rows, 2, 33) == [
        "yolov6n_bccd-...",
        "engine  precision    ms",
        "fp32    fp32        9.1",
        "int8    int8       12.2",
    ]
    # Names without a word in common, and the name of a single row, stand on lines of their own.
    assert fitted([HEAD, ("yolov6n-cells", "fp32", "9.1"), ("yolox", "fp32", "8.2")], 2, 20) == [
        "  precision   ms",
        "yolov6n-cells",
        "  fp32       9.1",
        "yolox",
        "  fp32       8.2",
    ]
    assert fitted(rows[:2], 2, 20) == ["  precision   ms", "yolov6n_bccd-fp32", "  fp32       9.1"]
