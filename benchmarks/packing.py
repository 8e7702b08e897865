"""Many small trainings on few GPUs: worker processes, several a GPU, that take jobs until a time.

Each worker is a process of its own that sees one GPU and does one job after the other, so that
Python, CUDA and cuDNN's choice of algorithms are paid for once a worker. Where NVIDIA's
Multi-Process Service runs, the kernels of a GPU's workers overlap; without it they take turns.
A worker that dies takes nothing with it but its job, which is tried once more.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

MARK = "@@result "
"""Beginning of the line in a worker's output that holds the result of a job."""

CLAIM_FILE = "claim"
TRIES = 2
_POLL = 0.3
_LOOK = 2.0
_LEAVE = 8.0
"""Seconds that a worker has for leaving."""


@dataclass(frozen=True)
class Job:
    """One piece of work."""

    name: str
    """Unique."""
    order: dict[str, Any]
    """Message to the worker, ready for JSON."""
    needs: tuple[str, ...] = ()
    """Jobs that must be done before."""
    memory: float = 4.0
    """GB of GPU memory."""
    seconds: float = 60.0
    """Guess of how long it takes among others."""


class Claims:
    """Claims on the jobs of one folder, so that several drivers on a host do no job twice.

    A claim is a lock on a file in the job's folder. The system gives it up when the driver ends,
    however it ends.
    """

    def __init__(self, root: Path, done: str) -> None:
        """Claim jobs in `root`, where a file named `done` in a job's folder ends the job."""
        self._root = root
        self._done = done
        self._held: dict[str, int] = {}
        self._looked = -math.inf

    def claim(self, job: Job) -> bool:
        """Return whether the job is this driver's now; False: it is done, or another's."""
        folder = self._root / job.name
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / CLAIM_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return False
        if (folder / self._done).is_file():  # done since it was looked at
            os.close(handle)
            return False
        self._held[job.name] = handle
        return True

    def give_up(self, job: Job) -> None:
        """Let other drivers have the job."""
        os.close(self._held.pop(job.name))

    def look(self, jobs: Iterable[Job], done: set[str]) -> None:
        """Add to `done` what any driver has done; not more often than every few seconds."""
        if time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        for job in jobs:
            if job.name not in done and (self._root / job.name / self._done).is_file():
                done.add(job.name)


@dataclass
class Schedule:
    """Which job is next: the first that can run, in the order given.

    All methods may be called from several threads.
    """

    jobs: Sequence[Job]
    done: set[str]
    """Names of the jobs that are over; grows."""
    memory: float
    """GB that the jobs of a GPU may take together."""
    deadline: float
    """By `time.monotonic`."""
    is_last: bool = False
    """Begin nothing that would not come to its end before the deadline."""
    claims: Claims | None = None
    """Where other drivers do the same jobs."""
    failed: dict[str, str] = field(default_factory=dict)
    _tries: dict[str, int] = field(default_factory=dict)
    _running: dict[str, str] = field(default_factory=dict)
    """Job -> GPU."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, gpu: str) -> Job | None:
        """Return the next job for a GPU, or None where there is none at the moment."""
        with self._lock:
            if self.claims is not None:
                self.claims.look(self.jobs, self.done)
            used = sum(job.memory for job in self.jobs if self._running.get(job.name) == gpu)
            left = self.deadline - time.monotonic()
            for job in self.jobs:
                if (
                    job.name in self.done
                    or job.name in self.failed
                    or job.name in self._running
                    or not set(job.needs) <= self.done
                    or (used and used + job.memory > self.memory)
                    or (self.is_last and job.seconds > left)
                    or not (self.claims is None or self.claims.claim(job))
                ):
                    continue
                self._running[job.name] = gpu
                return job
            return None

    def finish(self, job: Job, error: str | None) -> None:
        """Say that a job is over, or why it is not."""
        with self._lock:
            self._running.pop(job.name, None)
            if self.claims is not None:
                self.claims.give_up(job)
            if error is None:
                self.done.add(job.name)
                return
            self._tries[job.name] = self._tries.get(job.name, 0) + 1
            if self._tries[job.name] >= TRIES:
                self.failed[job.name] = error

    @property
    def is_over(self) -> bool:
        """True where nothing is left to do, now or later."""
        with self._lock:
            if self._running:
                return False
            lost = set(self.failed)
            for job in self.jobs:
                if job.name not in self.done and lost & set(job.needs):
                    lost.add(job.name)
            left = self.deadline - time.monotonic()
            return not any(
                job.name not in self.done
                and job.name not in lost
                and not (self.is_last and job.seconds > left)
                for job in self.jobs
            )


class Worker:
    """A process that does jobs; started again where it died."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._command = command
        self._environment = {**os.environ, **environment}
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._file: IO[str] | None = None

    def run(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Do a job and return its result; `error` in it says why there is none."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith(MARK):
                    result: dict[str, Any] = json.loads(line[len(MARK) :])
                    if "CUDA" in str(result.get("error", "")):
                        self.stop()  # its context may be unusable
                    return result
        except OSError as error:
            self.stop()
            return {"error": f"the worker is gone ({error})"}
        code = process.wait()
        self.stop()
        said = self._log.read_text(errors="replace").strip()[-1500:]
        return {"error": f"the worker ended with {code}: {said}"}

    def stop(self) -> None:
        """End the process, if there is one: so that it can leave the GPU in order, if it does."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=_LEAVE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._log.open("a", encoding="utf-8")
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._file,
                text=True,
                env=self._environment,
            )
        return self._process


def heed_signals() -> None:
    """Leave in order when told to: shells start background processes deaf to SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def serve(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Be a worker: read jobs from stdin, a line each, and write what they came to."""
    import traceback

    heed_signals()
    for line in sys.stdin:
        try:
            result = handle(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            result = {"error": "".join(traceback.format_exception(error))[-3000:]}
        print(MARK + json.dumps(result), flush=True)


def run_jobs(
    schedule: Schedule,
    command: Sequence[str],
    places: Sequence[tuple[str, Mapping[str, str]]],
    logs: Path,
    finished: Callable[[Job, dict[str, Any]], None],
) -> None:
    """Do the jobs of a schedule until all are done or the deadline is reached, and stop.

    Args:
        schedule: what to do.
        command: starts a worker.
        places: a worker each: the GPU's name, and variables of its environment.
        logs: folder of the workers' logs.
        finished: called after every job, one call at a time.
    """
    workers = [
        Worker(command, environment, logs / f"worker-{number}.log")
        for number, (_, environment) in enumerate(places)
    ]
    telling = threading.Lock()
    stopped = threading.Event()

    def work(worker: Worker, gpu: str) -> None:
        while not stopped.is_set() and not schedule.is_over:
            job = schedule.take(gpu)
            if job is None:
                time.sleep(_POLL)
                continue
            start = time.monotonic()
            result = worker.run(job.order)
            if stopped.is_set():
                return
            result["job_s"] = time.monotonic() - start
            with telling:
                finished(job, result)
            schedule.finish(job, result.get("error"))

    threads = [
        threading.Thread(target=work, args=(worker, gpu), daemon=True)
        for worker, (gpu, _) in zip(workers, places, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            if time.monotonic() >= schedule.deadline:
                break
            time.sleep(_POLL)
    finally:
        stopped.set()
        leaving = [threading.Thread(target=worker.stop) for worker in workers]
        for thread in leaving:
            thread.start()
        for thread in leaving:
            thread.join()
    for thread in threads:
        thread.join(timeout=5)


# --- NVIDIA's Multi-Process Service -------------------------------------------------------------


@contextlib.contextmanager
def shared_gpu(gpu: str, *, wanted: bool = True) -> Iterator[dict[str, str]]:
    """Give the variables with which processes share a GPU, through MPS where that works.

    A daemon of its own for each GPU: what breaks in one does not break another, and no process
    that was not told of it connects to it.

    Args:
        gpu: its number.
        wanted: False leaves MPS out.
    """
    alone = {"CUDA_VISIBLE_DEVICES": gpu}
    control = shutil.which("nvidia-cuda-mps-control")
    if not wanted or control is None:
        yield alone
        return
    with tempfile.TemporaryDirectory(prefix=f"mps-{gpu}-") as folder:
        pipes = {
            "CUDA_MPS_PIPE_DIRECTORY": str(Path(folder) / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(Path(folder) / "log"),
        }
        for place in pipes.values():
            Path(place).mkdir()
        own = {**os.environ, **pipes, "CUDA_VISIBLE_DEVICES": gpu}
        subprocess.run([control, "-d"], env=own, capture_output=True, timeout=30)
        # Inside, the GPU is the only one that there is.
        shared = {**pipes, "CUDA_VISIBLE_DEVICES": "0"}
        try:
            yield shared if _works({**os.environ, **shared}) else alone
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([control], input="quit\n", text=True, env=own, timeout=20)


def _works(environment: Mapping[str, str]) -> bool:
    """Return whether a process with these variables can compute on a GPU."""
    script = "import torch; assert float(torch.ones(8, device='cuda').sum()) == 8"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], env=dict(environment), capture_output=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode:
        print(f"no MPS: {done.stderr.decode(errors='replace').strip()[-300:]}", file=sys.stderr)
    return done.returncode == 0
