"""Printing and writing, shared by the commands."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from trt_yolov6.errors import UserError


def say(text: str) -> None:
    """Print a line at once."""
    # On standard output: standard error is for what went wrong.
    print(text, flush=True)


@contextlib.contextmanager
def log_shown() -> Iterator[None]:
    """Print what the package logs of its progress, as long as the block runs."""
    import logging  # not for `--help`, which answers at once

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with _no_bar():
                say(record.getMessage())

    log = logging.getLogger("trt_yolov6")
    handler, level = Lines(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


def _no_bar() -> contextlib.AbstractContextManager[object]:
    """Take the bars off a terminal for a block: a line would be glued to them."""
    if sys.stderr.isatty() and "tqdm" in sys.modules:
        from tqdm import tqdm

        without: contextlib.AbstractContextManager[object] = tqdm.external_write_mode()
        return without
    return contextlib.nullcontext()


def width() -> int | None:
    """Return how many columns the terminal has; None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def say_next(options: argparse.Namespace, what: str, *words: object) -> None:
    """Print the one line that says what to do next, ready for a shell, unless --quiet.

    `words` are the command's, one by one.
    """
    if not options.quiet:
        say(f"next, {what}: trt-yolov6 {shlex.join(map(str, words))}")


def check_json(path: Path | None) -> None:
    """Refuse a --json that cannot be written, or is something else already, before the work."""
    if path is None:
        return
    from trt_yolov6.common.files import check_writable
    from trt_yolov6.engines.manifest import manifest_owner

    check_writable(path)
    owner = manifest_owner(path)
    if owner is not None:
        raise UserError(f"--json {path} is the manifest of {owner}; choose another file.")
    check_kind("--json", path, "JSON", b"{", b"[")


def check_kind(option: str, path: Path, kind: str, *beginnings: bytes) -> None:
    """Refuse to write over a file that is not empty and does not begin as its kind does."""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(max(map(len, beginnings)))
        if start and not start.startswith(beginnings):
            raise UserError(f"{option} {path} is there and is not {kind}; choose another file.")


def write_result(path: Path, value: object) -> None:
    """Write what --json asks for."""
    from trt_yolov6.common.files import write_json

    write_json(path, value)
    say(f"{path}: written")
