"""README and docs/: code blocks run, tables match the committed results, links resolve."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.documents import (
    Block,
    QuickerSettings,
    blocks,
    commands,
    restored_registries,
    write_workspace,
)

from benchmarks import tables
from benchmarks.tables import DOCUMENTS, TABLES, markdown, tables_filled
from trt_yolov6 import cli
from trt_yolov6.common.files import write_json
from trt_yolov6.models.variants import Architecture

ROOT = Path(__file__).parents[1]


def _name(document: Path) -> str:
    return str(document.relative_to(ROOT))


documents = pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
with_code = pytest.mark.parametrize(
    "document", [document for document in DOCUMENTS if blocks(document)], ids=_name
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("workspace"))


@with_code
def test_every_command_has_the_options_that_a_document_gives_it(document: Path) -> None:
    for block in blocks(document):
        for command in commands(block):
            options = cli.parser().parse_args(command)
            assert options.run, f"{block.place}: {command}"


@with_code
def test_code_blocks_run(
    document: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(workspace, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    # As `--imgsz 64` for commands.
    monkeypatch.setattr(Architecture, "image_size", 64)
    # `compare` and Python name no options for this search, which has tests of its own.
    for module in ("comparison.engines", "quantization.settings"):
        monkeypatch.setattr(f"trt_yolov6.{module}.QuantizationSettings", QuickerSettings)
    with restored_registries():
        for block in blocks(document):
            if block.runs_here:
                _run(block)


def _run(block: Block) -> None:
    if block.name:
        Path(block.name).write_text(block.text, encoding="utf-8")
        return
    if block.language == "python":
        exec(compile(block.padded_text, str(block.document), "exec"), {"__name__": "example"})
        return
    for command in commands(block, shortened=True):
        assert cli.main(command) == 0, f"{block.place}: trt-yolov6 {' '.join(command)}"


def test_a_block_that_is_not_marked_has_only_commands_that_can_run(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("text\n```bash\ncurl somewhere\n```\n")
    (block,) = blocks(document)
    with pytest.raises(ValueError, match="curl"):
        commands(block)
    document.write_text("<!-- needs: network -->\n```bash\ncurl somewhere\n```\n")
    (block,) = blocks(document)
    assert commands(block) == []
    assert not block.runs_here


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
