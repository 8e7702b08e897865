"""The paper's tables next to ours: the committed pages say what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import paper
from benchmarks.paper_tables import FILE, PAGE, page
from trt_yolov6.common.files import read_json


def test_the_page_is_that_of_the_committed_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m benchmarks.paper_tables`"


def test_our_counts_are_the_papers_but_for_the_last_digit() -> None:
    theirs = {row.name: row for row in paper.TABLE_1}
    names = {"n": "N", "t": "T", "s": "S", "m": "M", "l": "L", "l_relu": "L-ReLU"}
    for row in read_json(FILE)["tables"]["1"]["rows"]:
        expected = theirs[f"YOLOv6-{names[row['variant'].removeprefix('yolov6')]}"]
        assert row["parameters"] / 1e6 == pytest.approx(expected.parameters, abs=0.05)
        assert row["flops"] / 1e9 == pytest.approx(expected.flops, abs=0.1)


def test_the_papers_latency_is_that_of_its_throughput() -> None:
    # A slip of the pen in a figure would show: 1000 / FPS at batch 1, except for what they rounded.
    for row in paper.TABLE_1:
        assert 1e3 / row.fps_1 == pytest.approx(row.latency, abs=0.21), row.name


def test_theirs_and_ours_stand_in_tables_of_their_own(root: Path) -> None:
    for section in PAGE.read_text(encoding="utf-8").split("## Table ")[1:]:
        if "Ours is not measured" in section or "**Ours**" not in section:
            continue
        theirs, ours = section.split("**Ours**")
        assert theirs.count("**The paper's**") == 1
        assert "|" in theirs
        assert "|" in ours
