"""kill -9 at a chosen step: while a process puts a file in its place, or right after."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
    command = [sys.executable, "-c", _PREPARED.format(kill=kill) + code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=300)
    said = done.stderr.decode()
    assert done.returncode == -signal.SIGKILL, f"{kill} did not come about: {said}"


_PREPARED = """
import os, pathlib, signal
_replace, _left = pathlib.Path.replace, {kill.times}
def _replace_or_die(self, target):
    global _left
    _left -= pathlib.Path(target).name.startswith({kill.file!r})
    if not _left and not {kill.after}:
        os.kill(os.getpid(), signal.SIGKILL)
    result = _replace(self, target)
    if not _left:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
pathlib.Path.replace = _replace_or_die
"""
