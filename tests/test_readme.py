"""README and docs/: their tables are those of the committed results, their links lead to files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.tables import DOCUMENTS, TABLES, markdown, tables_filled
from trt_yolov6.common.files import write_json

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@documents
def test_the_tables_are_those_of_the_committed_results(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert tables_filled(text) == text, "run `python -m benchmarks.tables`"


def test_every_table_stands_somewhere() -> None:
    texts = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", texts)) == set(TABLES)


@documents
def test_links_lead_to_files(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_a_table_is_filled_between_its_marks_only() -> None:
    name = next(iter(TABLES))
    text = f"before\n<!-- table: {name} -->\nold\n<!-- end -->\nafter\n"
    filled = tables_filled(text)
    assert filled == f"before\n<!-- table: {name} -->\n{TABLES[name]()}<!-- end -->\nafter\n"
    assert markdown(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_the_table_of_rep_optimizer_waits_for_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "Not measured yet" in TABLES["rep-optimizer"]()
    forms = ("float", "INT8 min-max", "INT8 min-max, equalized")
    rows = [
        {
            "kind": "rep-optimizer",
            "channel_spread": 2.0,
            **{form: {"AP": ap} for form, ap in zip(forms, aps, strict=True)},
        }
        for aps in ((0.5, 0.4, 0.45), (0.7, 0.2, 0.6), (0.6, 0.5, None))
    ]
    heading = {"model": "n", "epochs": 3, "device": "a GPU", "date": "today", "command": "it"}
    write_json(tmp_path / tables.REP_OPTIMIZER, {**heading, "quantized": rows})
    last = TABLES["rep-optimizer"]().splitlines()[-1]
    label = tables.NETWORKS["rep-optimizer"]
    assert last == f"| {label} | 3 | 0.6000 | 0.4000 | -0.2000 | 0.4500 | 2.0 |"
