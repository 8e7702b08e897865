"""Training over two machines: torchrun's rendezvous, and a worker that is killed.

The machines are network namespaces, joined by a pair of virtual cards, where the system lets the
test make them; else two groups of processes that meet on loopback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.training_data import read_log, write_shapes, write_tiny

from trt_yolov6.checkpoints.loading import load_checkpoint
from trt_yolov6.errors import UserError
from trt_yolov6.training.recipe import recipe_for
from trt_yolov6.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 8


@dataclass(frozen=True)
class Machine:
    """Where a group of processes runs."""

    prefix: tuple[str, ...]
    """Words before a command that make it run there."""
    card: str
    """Its network card."""
    address: str


LOOPBACK = Machine((), "lo", "127.0.0.1")


@dataclass(frozen=True)
class Machines:
    """Two machines, and where the first answers."""

    pair: tuple[Machine, Machine]
    endpoint: str


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Two network namespaces if this process may make them, else loopback."""
    name = f"yv6{uuid.uuid4().hex[:6]}"
    with contextlib.ExitStack() as stack:
        try:
            for one in "ab":
                _ip("netns", "add", name + one)
                stack.callback(_ip, "netns", "del", name + one)
            _ip("-n", f"{name}a", *("link", "add", f"{name}a", "type", "veth", "peer"), f"{name}b")
            _ip("-n", f"{name}a", "link", "set", f"{name}b", "netns", f"{name}b")
            for number, one in enumerate("ab", start=1):
                space = ("-n", name + one)
                _ip(*space, "addr", "add", f"198.51.100.{number}/24", "dev", name + one)
                _ip(*space, "link", "set", name + one, "up")
                _ip(*space, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError):
            stack.close()
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                endpoint = f"127.0.0.1:{free.getsockname()[1]}"
            yield Machines((LOOPBACK, LOOPBACK), endpoint)
            return
        first, second = (
            Machine(("ip", "netns", "exec", name + one), name + one, f"198.51.100.{number}")
            for number, one in enumerate("ab", start=1)
        )
        yield Machines((first, second), "198.51.100.1:29400")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def worker_of(rank: int, mark: str) -> int | None:
    """Return the process that is a rank's worker now, by its environment."""
    wanted = {f"RANK={rank}", f"YV6_MARK={mark}"}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((folder / "environ").read_text("utf-8", "replace").split("\0")):
                return int(folder.name)
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="workers are found in /proc")
def test_a_killed_worker_is_started_again_and_the_training_goes_on(
    machines: Machines, tmp_path: Path
) -> None:
    data, tiny = write_shapes(tmp_path / "data"), write_tiny(tmp_path / "tiny.pt")
    run, mark = tmp_path / "run", uuid.uuid4().hex
    options = [*("train", "--data", str(data), "--weights", str(tiny), "--imgsz", "96")]
    options += [*("--epochs", str(EPOCHS), "--batch", "4", "--eval-interval", "1")]
    options += ["--device", "cpu", "--output", str(run), "--auto-resume", "--quiet"]
    launched = []
    with contextlib.ExitStack() as stack:
        for number, machine in enumerate(machines.pair):
            launcher = [*machine.prefix, sys.executable, "-m", "torch.distributed.run"]
            launcher += ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2"]
            launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", machines.endpoint]
            launcher += ["--rdzv-id", mark, "--rdzv-conf", f"is_host={int(number == 0)}"]
            launcher += ["--local-addr", machine.address]
            environment = {
                **os.environ,
                "GLOO_SOCKET_IFNAME": machine.card,
                "OMP_NUM_THREADS": "1",
                # Else workers that were started again read addresses of the dead from the store:
                # https://github.com/pytorch/pytorch/issues/135712
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                "YV6_MARK": mark,
            }
            log = stack.enter_context((tmp_path / f"agent{number}.log").open("wb"))
            agent = subprocess.Popen(
                [*launcher, "-m", "trt_yolov6", *options],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(_end, agent)
            launched.append(agent)

        def said() -> str:
            return "\n".join(path.read_text()[-3000:] for path in tmp_path.glob("agent*.log"))

        deadline = time.monotonic() + 240

        def wait_for(done: object) -> None:
            assert callable(done)
            while not done():
                assert all(agent.poll() in (None, 0) for agent in launched), said()
                assert time.monotonic() < deadline, said()
                time.sleep(0.1)

        wait_for(lambda: (run / "state.pt").exists() and len(read_log(run)) >= 2)
        first, victim = worker_of(0, mark), worker_of(1, mark)
        assert first is not None
        assert victim is not None
        before = len(read_log(run))
        assert before < EPOCHS
        os.kill(victim, signal.SIGKILL)
        restarted: list[int | None] = []

        def is_over() -> bool:
            pid = None if restarted else worker_of(0, mark)  # looks at every process there is
            if pid not in (None, first):
                restarted.append(pid)
            return all(agent.poll() is not None for agent in launched)

        wait_for(is_over)
        assert [agent.returncode for agent in launched] == [0, 0], said()
    assert restarted
    lines = read_log(run)
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    # The same training in one process, from the first step to the last without a break.
    settings = recipe_for(
        "yolov6-custom",
        str(data),
        weights=load_checkpoint(tiny),
        epochs=EPOCHS,
        batch=4,
        image_size=96,
        eval_interval=1,
    )
    alone = train(settings, tmp_path / "alone", device="cpu", progress=False)
    losses = [[line["loss"] for line in log] for log in (lines, alone.log)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def _end(agent: subprocess.Popen[bytes]) -> None:
    """End an agent and its workers, if they are still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()


def test_a_training_is_begun_or_gone_on_with_by_the_same_call(tmp_path: Path) -> None:
    data, tiny = write_shapes(tmp_path / "data"), write_tiny(tmp_path / "tiny.pt")
    settings = recipe_for(
        "yolov6-custom",
        str(data),
        weights=load_checkpoint(tiny),
        epochs=1,
        batch=4,
        image_size=96,
        val_split=None,
    )
    run = tmp_path / "run"
    begun = train(settings, run, device="cpu", resume="auto", progress=False)
    learned = begun.last.read_bytes()
    again = train(settings, run, device="cpu", resume="auto", progress=False)
    assert again.log == begun.log
    assert again.last.read_bytes() == learned
    other = dataclasses.replace(settings, seed=1)
    with pytest.raises(UserError, match="another seed"):
        train(other, run, device="cpu", resume="auto", progress=False)
