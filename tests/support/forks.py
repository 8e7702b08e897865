"""Python code in other processes, forked from one that has imported what takes longest."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORTED = (
    *("trt_yolov6.training.trainer", "trt_yolov6.pipeline", "onnxruntime", "cv2"),
    "torch._dynamo",  # by the first optimizer
)


@dataclass(frozen=True)
class Fork:
    """A process that runs."""

    process: ForkServerProcess
    words: Path
    """File with its output."""

    def ended(self) -> tuple[int, str]:
        """Return its exit code, negative for a signal, and its words, when it has ended."""
        self.process.join(300)
        status, words = self.process.exitcode, self.words.read_text(errors="replace")
        assert status is not None, f"it has not ended: {words[-2000:]}"
        return status, words


@contextlib.contextmanager
def forked(
    code: str,
    arguments: Sequence[str],
    environment: dict[str, str] | None = None,
    first: Callable[[], None] | None = None,
) -> Iterator[Fork]:
    """Do what `python -c` does in another process, from the root of the repository.

    Args:
        code: the program.
        arguments: in `sys.argv` after the first.
        environment: added to that of this process.
        first: called there before the code.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    with tempfile.NamedTemporaryFile() as words:
        given = (code, [*arguments], environment or {}, first, words.name)
        process = context.Process(target=_run, args=given)
        process.start()
        try:
            yield Fork(process, Path(words.name))
        finally:
            process.kill()


def _run(
    code: str,
    arguments: list[str],
    environment: dict[str, str],
    first: Callable[[], None] | None,
    words: str,
) -> None:
    with open(words, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = ["-c", *arguments]
    if first is not None:
        first()
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


@contextlib.contextmanager
def two_that_share(code: str, arguments: Sequence[str]) -> Iterator[None]:
    """Run code in two processes that find each other as torchrun's do, while the block runs.

    Both must end well.
    """
    with socket.socket() as free, contextlib.ExitStack() as stack:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        forks = [
            stack.enter_context(
                forked(code, arguments, {**common, "RANK": rank, "LOCAL_RANK": rank})
            )
            for rank in "01"
        ]
        yield
        for fork in forks:
            status, words = fork.ended()
            assert status == 0, words[-2000:]
