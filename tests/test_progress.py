"""Off a terminal, long work leaves lines in the log; on one it draws a bar."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from support.logs import logged
from support.training_data import write_shapes, write_tiny

from trt_yolov6.cli import main
from trt_yolov6.common import progress
from trt_yolov6.common.progress import a_line_a_minute, is_logged, progress_bar


def test_only_off_a_terminal_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert is_logged()
    assert not is_logged(progress=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert not is_logged()


def test_long_work_says_every_while_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "is_logged", lambda wanted: wanted)
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    with logged() as told, a_line_a_minute("building x.trt"):
        time.sleep(0.3)
    assert 2 <= len(told) <= 6
    assert all(line.startswith("still building x.trt, ") for line in told)
    with logged() as told, a_line_a_minute("x", progress=False):
        time.sleep(0.1)
    assert not told


@pytest.mark.parametrize("wanted", [True, False])
def test_a_bar_off_a_terminal_is_a_line_every_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wanted: bool
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.2)
    start = time.monotonic()
    with logged() as told, progress_bar(10, shown=wanted, desc="eval", unit="image") as bar:
        for _ in range(10):
            bar.update()
            time.sleep(0.11)
    assert (3 <= len(told) <= (time.monotonic() - start) / 0.2) is wanted
    assert all(line.startswith("eval: ") and "image/s" in line for line in told)
    assert not any(capsys.readouterr())


def test_a_bar_of_another_format_keeps_its_words_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "is_logged", lambda wanted: wanted)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with logged() as told, progress_bar(3, shown=True, bar_format="did {bar} {n} of {total}"):
        pass
    assert told[0] == "did 0 of 3"


def test_on_a_terminal_a_line_is_not_glued_to_a_bar() -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    program = """
import logging
from trt_yolov6.cli.output import log_shown
from trt_yolov6.common.progress import progress_bar
with log_shown(), progress_bar(2, shown=True, desc="compare") as bar:
    bar.update()
    logging.getLogger("trt_yolov6.x").info("building one")
    bar.update()
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=follower, stderr=follower)
    assert child.wait(60) == 0
    os.close(follower)
    output = b""
    with contextlib.suppress(OSError):  # Linux's word for the end
        while part := os.read(leader, 4096):
            output += part
    os.close(leader)
    (line,) = (line for line in output.decode().split("\r\n") if "building" in line)
    assert "compare" in line  # the bar was drawn,
    assert line.split("\r")[-1] == "building one"  # and gone by then


def test_a_training_in_a_log_is_a_header_and_a_line_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    write_shapes(tmp_path / "data", images=4, size=64)
    write_tiny(tmp_path / "tiny.pt")
    command = ["train", "--weights", "tiny.pt", "--data", "data", "--imgsz", "64", "--batch", "4"]
    command += ["--epochs", "2", "--val-split", "none", "--device", "cpu"]
    assert main([*command, "--output", "loud"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("train: "))
    assert "4 images at 64 pixels, 2 epochs of 1 step, batch 4, on cpu" in lines[header]
    for epoch in (1, 2):
        line = lines[header + epoch]
        assert line.startswith(f"epoch {epoch}, loss ")
        assert line.endswith("of 2 epochs")
    assert lines[-1] == "next, an engine of it: trt-yolov6 build --weights loud/last.pt"
    assert main([*command, "--output", "quiet", "--quiet"]) == 0
    quiet = capsys.readouterr().out
    assert "epoch 1" not in quiet
    assert "next, " not in quiet
