"""The example notebook: its code runs, and its outputs are those of its code."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "sample.ipynb"


def _code_cells() -> list[dict[str, Any]]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def _printed(cell: dict[str, Any]) -> list[str]:
    texts = ("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
    return "".join(texts).splitlines()


@pytest.mark.slow
def test_every_cell_runs_and_prints_the_accuracy_that_the_notebook_shows(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    matplotlib.use("Agg")
    for name in ("samples", "calib"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    shown: list[str] = []
    for cell in _code_cells():
        # As the documents' code, which is timed for less than a reader would time it.
        source = "".join(cell["source"]).replace("duration=1,", "duration=0.05, warm_up=0,")
        exec(compile(ast.parse(source), str(NOTEBOOK), "exec"), namespace)
        shown += [line for line in _printed(cell) if line.startswith("fp32: AP")]
    printed = capsys.readouterr().out.splitlines()
    assert shown
    assert set(shown) <= set(printed)
