"""Log of a training: one line of JSON per epoch, and TensorBoard's scalars."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trt_yolov6.common.closing import Closing
from trt_yolov6.common.files import write_bytes
from trt_yolov6.errors import UserError

LOG_FILE = "log.jsonl"


class RunLog(Closing):
    """The log of a run, in its folder: `log.jsonl`, and TensorBoard files where that is installed.

    Close it, or use it in a `with` block.
    """

    def __init__(self, folder: Path, *, from_epoch: int = 0) -> None:
        """Open the log.

        Args:
            folder: the run's folder.
            from_epoch: the epoch (from 0) that is written next; later ones of an interrupted run
                are taken out.

        Raises:
            UserError: the folder cannot be written to.
        """
        self.path = folder / LOG_FILE
        kept = [line for line in read_log(folder) if line["epoch"] <= from_epoch]
        write_log(folder, kept)
        self._scalars = _summary_writer(folder, from_epoch)

    def write(self, line: dict[str, Any]) -> None:
        """Add an epoch: `epoch` counts from 1; the numbers in it become scalars."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); free the disk."
            ) from error
        if self._scalars is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "epoch":
                    self._scalars.add_scalar(f"train/{name}", value, line["epoch"])
            self._scalars.flush()

    def close(self) -> None:
        """End TensorBoard's file."""
        if self._scalars is not None:
            self._scalars.close()


def write_log(folder: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a run's whole log at once."""
    write_bytes(folder / LOG_FILE, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the epochs of a run's log; a line that a kill cut short is left out."""
    try:
        text = (folder / LOG_FILE).read_text(encoding="utf-8")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("epoch"), int):
            lines.append(entry)
    return lines


def _summary_writer(folder: Path, from_epoch: int) -> Any:
    """Return TensorBoard's writer, or None where the extra `train` is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=from_epoch + 1 if from_epoch else None)
