"""Log of a training: one line of JSON per epoch, and TensorBoard's scalars."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trt_yolov6.common.files import write_bytes

LOG_FILE = "log.jsonl"


def write_log(folder: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a run's whole log at once."""
    write_bytes(folder / LOG_FILE, "".join(json.dumps(line) + "\n" for line in lines).encode())


@contextlib.contextmanager
def scalars(folder: Path, from_epoch: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes an epoch's numbers for TensorBoard, where that is installed.

    What an interrupted run wrote of `from_epoch` (from 0) and later ones is taken out.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # without the extra `train`
        yield lambda _: None
        return
    writer: Any = SummaryWriter(str(folder), purge_step=from_epoch + 1)

    def write(line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if isinstance(value, int | float) and name != "epoch":
                writer.add_scalar(f"train/{name}", value, line["epoch"])
        writer.flush()

    with contextlib.closing(writer):
        yield write
