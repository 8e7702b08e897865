"""kill -9 at a chosen step: while a process puts a file in its place, or right after."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.forks import forked


@dataclass(frozen=True)
class Kill:
    """A moment in the life of a process."""

    file: str
    """Start of the name of the file that is written (see `common.files.atomic_path`)."""
    times: int
    """Number of the writing, from 1."""
    after: bool
    """After the new file took the place of the old one; else before, with the new one complete."""


def run_killed(code: str, arguments: Sequence[str], kill: Kill) -> None:
    """Run Python code in another process, from the root of the repository, up to its kill."""
    with forked(code, arguments, first=partial(_prepare, kill)) as fork:
        status, words = fork.ended()
    assert status == -signal.SIGKILL, f"{kill} did not come about: {words}"


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
