"""Progress of long work: a bar on a terminal; off one (nohup, Slurm, CI), lines in the log."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm

_log = logging.getLogger(__name__)

SECONDS = 60.0
"""Seconds between two lines."""


def progress_bar(total: float | None, *, shown: bool, **others: Any) -> tqdm[NoReturn]:
    """Return a bar on stderr, for a `with` block; off a terminal a line a minute in the log.

    Args:
        total: steps in all; None where that is not known.
        shown: False shows nothing and logs nothing.
        others: as `tqdm.tqdm` takes them, such as `desc` and `unit`.
    """
    from tqdm import tqdm

    if is_logged(shown):
        others["file"] = _Lines()
        if "bar_format" in others:
            others["bar_format"] = others["bar_format"].replace("{bar} ", "")
        else:
            others["ncols"] = 0  # no bar, and tqdm's own format
    return tqdm(total=total, disable=None if shown else True, **others)


class _Lines:
    """File of a bar off a terminal: what it shows becomes a line of the log, if one is due."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def write(self, text: str) -> None:
        now = time.monotonic()
        if text.startswith("\r") and text.strip() and now - self._last >= SECONDS:
            self._last = now
            _log.info("%s", text.strip())

    def flush(self) -> None:
        pass


def is_logged(progress: bool = True) -> bool:
    """Return whether to log progress: if it is on and stderr is not a terminal."""
    return progress and not sys.stderr.isatty()


@contextlib.contextmanager
def a_line_a_minute(what: str, *, progress: bool = True) -> Iterator[None]:
    """Log every minute that a block is still running; on a terminal, nothing.

    Args:
        what: the work, such as `building engines/yolov6s-int8.trt`.
        progress: False logs nothing.
    """
    if not is_logged(progress):
        yield
        return
    start = time.monotonic()
    done = threading.Event()

    def log() -> None:
        while not done.wait(SECONDS):
            _log.info("still %s, %.0f min so far", what, (time.monotonic() - start) / 60)

    logger = threading.Thread(target=log, name="a line a minute", daemon=True)
    logger.start()
    try:
        yield
    finally:
        done.set()
        logger.join()
