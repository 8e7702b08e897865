"""kill -9 at a chosen step: while a process puts a file in its place, or right after."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORTED = ("trt_yolov6.training.trainer", "trt_yolov6.pipeline", "onnxruntime", "cv2")
"""What the processes use, imported once for all of them: that takes longer than the rest."""


@dataclass(frozen=True)
class Kill:
    """A moment in the life of a process."""

    file: str
    """How the name of the file begins that is written (see `common.files.atomic_path`)."""
    times: int
    """Which of the writings, from 1."""
    after: bool
    """After the new file took the place of the old one; else before, with the new one complete."""


def run_killed(code: str, arguments: Sequence[str], kill: Kill) -> None:
    """Run Python code in another process, from the root of the repository, up to its kill."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    with tempfile.NamedTemporaryFile() as said:
        process = context.Process(target=_run, args=(code, [*arguments], kill, said.name))
        process.start()
        process.join(300)
        status = process.exitcode
        if status is None:
            process.kill()
        words = said.read().decode()
    assert status == -signal.SIGKILL, f"{kill} did not come about: {words}"


def _run(code: str, arguments: list[str], kill: Kill, said: str) -> None:
    """Do what `python -c` does, with the kill prepared and everything said in a file."""
    with open(said, "wb") as words:
        os.dup2(words.fileno(), 1)
        os.dup2(words.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = ["-c", *arguments]
    _prepare(kill)
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def _prepare(kill: Kill) -> None:
    replace, left = Path.replace, kill.times

    def replace_or_die(self: Path, target: str | os.PathLike[str]) -> Path:
        nonlocal left
        left -= Path(target).name.startswith(kill.file)
        if not left and not kill.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = replace(self, target)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.replace = replace_or_die  # type: ignore[assignment, method-assign]
