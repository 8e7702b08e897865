"""Code blocks of the documents, and a small workspace in which their commands run.

A fenced block of `bash`, `python` or `yaml` runs in CI unless the line before it says what it
needs: `<!-- needs: gpu -->`. Its `trt-yolov6` commands are parsed even then. A block
whose first line names a file (`# plan.yaml`, `# module.py`) is written to it instead.

The workspace has the files that the documents name, as tiny networks and data sets; everything
else about a command is as written, except for the time it may take (`_SHORTER`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from support import family_graphs
from support.training_data import write_shapes, write_tiny
from trt_yolov6.detectors.families import FAMILIES
from trt_yolov6.detectors.layouts import LAYOUTS
from trt_yolov6.engines import BACKENDS
from trt_yolov6.models.variants import VARIANTS
from trt_yolov6.quantization.settings import QuantizationSettings

NEEDS = ("gpu", "network", "tensorrt-rtx", "triton", "ray", "slurm", "minutes")
LANGUAGES = ("bash", "python", "yaml")
_SMALL = ("--imgsz", "64")
_SHORTER = {
    "build": _SMALL,
    "export": _SMALL,
    "sensitivity": (*_SMALL, "--calibrator", "minmax", "--no-equalize"),
    "bench": ("--duration", "0.05"),
    "compare": (
        *("--duration", "0.05", "--rounds", "3", "--examples", "1", "--no-layers"),
        *("--calibrator", "minmax", *_SMALL),
    ),
    "train": ("--epochs", "1", "--batch", "4", *_SMALL),
    "qat": ("--epochs", "1", "--batch", "4", *_SMALL, "--calibrator", "minmax", "--no-equalize"),
}
_QUICKER = ("--calibrator", "minmax", "--no-equalize", "--no-reconstruct")
"""For `--int8`, whose search has tests of its own."""
_KEPT = {"--onnx", "--resume"}
"""Options of commands that take no others."""

_FENCE = re.compile(r"```(\w*)\n")
_NEEDS = re.compile(r"<!-- needs: ([\w-]+) -->\n")


@dataclass(frozen=True)
class QuickerSettings(QuantizationSettings):
    """The same for `compare`, which searches at its defaults."""

    equalize: bool = False
    reconstruct: bool = False


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    document: Path
    line: int
    """Number of its first line of code, from 1."""
    language: str
    text: str
    needs: str | None

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.document}:{self.line}"

    @property
    def padded_text(self) -> str:
        """Its code at the line numbers that it has in the document, for tracebacks."""
        return "\n" * (self.line - 1) + self.text

    @property
    def name(self) -> str | None:
        """The file that the block is to be written to."""
        found = re.match(r"# ([\w./-]+\.(?:yaml|py))\b", self.text)
        return found[1] if found else None

    @property
    def runs_here(self) -> bool:
        """True where this machine has what the block needs."""
        if self.needs == "tensorrt-rtx":
            return importlib.util.find_spec("tensorrt_rtx") is not None
        return self.needs is None


def blocks(document: Path) -> list[Block]:
    """Return a document's blocks of code in the languages that are checked."""
    found = []
    lines = document.read_text(encoding="utf-8").splitlines(keepends=True)
    number = 0
    while number < len(lines):
        fence = _FENCE.fullmatch(lines[number])
        if fence is None:
            number += 1
            continue
        start = number + 1
        number = lines.index("```\n", start) + 1
        before = _NEEDS.fullmatch(lines[start - 2]) if start >= 2 else None
        if fence[1] in LANGUAGES:
            needs = before[1] if before else None
            assert needs is None or needs in NEEDS, f"{document}:{start}: {needs}"
            code = "".join(lines[start : number - 1])
            found.append(Block(document, start + 1, fence[1], code, needs))
    return found


def commands(block: Block, *, shortened: bool = False) -> list[list[str]]:
    """Return the arguments of each `trt-yolov6` command of a `bash` block.

    Raises:
        ValueError: the block is not marked and has another command.
    """
    if block.language != "bash":
        return []
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "trt-yolov6":
            arguments = words[1:]
        elif "trt_yolov6" in words:  # torchrun -m trt_yolov6
            arguments = words[words.index("trt_yolov6") + 1 :]
        elif block.needs:
            continue
        else:
            raise ValueError(f"{block.place}: {words[0]} does not run here; mark what it needs")
        extra: list[str] = []
        if shortened and not _KEPT & {*arguments}:
            extra += _SHORTER.get(arguments[0], ())
        if shortened and "--int8" in arguments:
            extra += _QUICKER
        found.append([*arguments, *extra])
    return found


def write_workspace(folder: Path) -> Path:
    """Write what the documents name: checkpoints, ONNX files, data sets, calibration images."""
    write_shapes(folder / "bccd", images=4, size=64)
    write_shapes(folder / "samples", images=4, size=64)
    write_shapes(folder / "coco", images=4, size=64)
    for split in ("train", "val"):
        old = folder / "coco" / "annotations" / f"instances_{split}.json"
        old.rename(old.with_name(f"instances_{split}2017.json"))
        (folder / "coco" / "images" / split).rename(folder / "coco" / f"{split}2017")
    (folder / "samples" / "images" / "train").rename(folder / "calib")
    # Of four images, the search for INT8 would make everything twice.
    max((folder / "calib").iterdir()).unlink()
    for name in ("yolov6n.pt", "yolov6s.pt", "samples/yolov6n_bccd.pt"):
        write_tiny(folder / name)
    (folder / "engines").mkdir()
    onnx.save(family_graphs.yolov8(), folder / "yolov8n.onnx")
    onnx.save(family_graphs.yolox(), folder / "yolox_s.onnx")
    return folder


@contextlib.contextmanager
def restored_registries() -> Iterator[None]:
    """Undo what examples add to the package's tables."""
    tables: tuple[dict[object, object], ...] = (VARIANTS, FAMILIES, LAYOUTS, BACKENDS)  # type: ignore[assignment]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
