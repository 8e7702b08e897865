"""A small part of what `fuzz.py` and `kill.py` do at length: none of it crashes or is left half."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.forks import forked

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts memory as Linux does")
@pytest.mark.parametrize(
    ("program", "options"),
    [("fuzz", ["--count", "20"]), ("kill", ["--count", "12", "--commands", "build"])],
)
def test_mutated_inputs_and_kills_leave_nothing_at_fault(program: str, options: list[str]) -> None:
    code = (
        f"import sys; sys.path.append({str(HERE)!r}); from {program} import main; sys.exit(main())"
    )
    with forked(code, options) as run:
        status, words = run.ended()
    assert status == 0, words
