"""What the README says: its tables are those of the committed results."""

from __future__ import annotations

from pathlib import Path

from benchmarks.tables import TABLES, markdown, tables_filled


def test_the_tables_are_those_of_the_committed_results(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert tables_filled(text) == text, "run `python -m benchmarks.tables`"


def test_a_table_is_filled_between_its_marks_only() -> None:
    name = next(iter(TABLES))
    text = f"before\n<!-- table: {name} -->\nold\n<!-- end -->\nafter\n"
    filled = tables_filled(text)
    assert filled == f"before\n<!-- table: {name} -->\n{TABLES[name]()}<!-- end -->\nafter\n"
    assert markdown(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
