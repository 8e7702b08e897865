"""The paper's tables beside ours: what is committed is what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ablations, paper
from benchmarks.paper_tables import FILE, PAGE, page
from trt_yolov6.cli import parser
from trt_yolov6.cli.train import _train_settings
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
    # A slip of the pen in a figure would show: 1000 / FPS at batch 1, but for what they rounded.
    for row in paper.TABLE_1:
        assert 1e3 / row.fps_1 == pytest.approx(row.latency, abs=0.21), row.name


def test_theirs_and_ours_stand_in_tables_of_their_own(root: Path) -> None:
    for section in PAGE.read_text(encoding="utf-8").split("## Table ")[1:]:
        if "Ours is not measured" in section:
            continue
        theirs, ours = section.split("**Ours**")
        assert theirs.count("**The paper's**") == 1
        assert "|" in theirs
        assert "|" in ours


def test_our_choices_are_among_the_papers() -> None:
    for number, (_, rows) in ablations.TABLES.items():
        theirs = {row[0] for row in paper.ABLATIONS[number][1]}
        assert rows.keys() <= theirs, f"Table {number} has other names"


def test_every_row_of_tables_6_to_11_is_something_that_train_takes() -> None:
    for number, (_, rows) in ablations.TABLES.items():
        assert () in rows.values(), f"Table {number} lacks the recipe itself"
        for changes in rows.values():
            options = parser().parse_args(["train", "--data", "bccd", "--model", "n", *changes])
            assert _train_settings(options).variant == "yolov6n"


def test_a_table_of_ablations_takes_medians_of_its_own_rows() -> None:
    runs = [
        {"changes": list(changes), "AP": ap}
        for changes, ap in (
            ((), 0.5),
            ((), 0.7),
            ((), 0.6),
            (("--dfl",), 0.4),
            (("--dfl",), None),
            (("--objectness",), 0.1),
        )
    ]
    assert ablations.rows_of({"runs": runs}, "10") == [("without", 0.6, 3), ("with", 0.4, 1)]
