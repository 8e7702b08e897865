"""A small part of what `fuzz.py` and `kill.py` do at length: none of it crashes or is left half."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts memory as Linux does")
@pytest.mark.parametrize(
    "arguments", [["fuzz.py", "--count", "20"], ["kill.py", "--count", "12", "--commands", "build"]]
)
def test_mutated_inputs_and_kills_leave_nothing_at_fault(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
