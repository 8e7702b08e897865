"""NVIDIA's tritonserver on this machine: found, started on loopback, watched and stopped.

For the tests and for `triton_load`. `scripts/tritonserver.sh` fetches it; TRITONSERVER names the
folder of another one, which holds `bin/tritonserver` and `backends/python`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    http: str
    """Host and port, as tritonclient takes them."""
    grpc: str
    process: subprocess.Popen[bytes]
    log: Path
    """Log of the server and its models."""
    region: str
    """Prefix of the names of its shared memory."""

    def stop(self, patience: float = 40.0) -> int:
        """Ask it to end, as a process manager does, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience)

    def processes(self) -> list[int]:
        """Return the server's process and those of its models."""
        return [self.process.pid, *_descendants(self.process.pid)]

    def cpu_seconds(self) -> float:
        """Return the processor time that its processes have taken so far."""
        ticks = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                # After the name, in parentheses: utime and stime are fields 14 and 15 of all.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def used(self) -> dict[str, int]:
        """Return the total resident bytes, open files and bytes of shared memory."""
        private = files = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                lines = (line for line in status.splitlines() if line.startswith("RssAnon"))
                # A process that has ended, but was not waited for, has no such line.
                private += int(next(lines, "RssAnon: 0 kB").split()[1]) * 1024
                files += len(os.listdir(f"/proc/{pid}/fd"))
        regions = SHARED_MEMORY.glob(f"{self.region}*")
        shared = sum(path.stat().st_blocks * 512 for path in regions)
        return {"memory": private, "files": files, "shared_memory": shared}


def find_tritonserver() -> Path:
    """Return the folder with `bin/tritonserver`.

    Raises:
        FileNotFoundError: there is none for this Python, and why.
    """
    named = os.environ.get("TRITONSERVER")
    folder = (
        Path(named) if named else Path(sys.prefix) / "tritonserver" / "pytriton" / "tritonserver"
    )
    if not (folder / "bin" / "tritonserver").is_file():
        raise FileNotFoundError(f"no tritonserver in {folder} (bash scripts/tritonserver.sh)")
    library = sysconfig.get_config_var("INSTSONAME") or ""
    if ".so" not in library:
        raise FileNotFoundError("this Python has no shared library, which Triton's models need")
    return folder


@contextlib.contextmanager
def tritonserver(
    repository: Path, log: Path, options: Sequence[str] = (), patience: float = 120.0
) -> Iterator[Server]:
    """Run a server of a model repository, on loopback alone, until the block ends.

    Args:
        repository: as `export-triton` writes it.
        log: what the server prints goes there.
        options: further ones of `tritonserver`.
        patience: seconds that models may take to load.

    Raises:
        FileNotFoundError: there is no server.
        RuntimeError: it did not start; with the end of its log.
    """
    folder = find_tritonserver()
    http, grpc = _free_ports(2)
    region = f"trt_yolov6_{os.getpid()}_{http}_"
    libraries = [sysconfig.get_config_var("LIBDIR") or "", os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {
        **os.environ,
        # The Python in the models' process finds its environment by the first `python3` there.
        "PATH": os.pathsep.join([str(_programs_of_models(folder)), os.environ["PATH"]]),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
    }
    command = [
        str(folder / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={folder / 'backends'}",
        f"--cache-directory={folder / 'caches'}",
        *(f"--http-address=127.0.0.1 --http-port={http}".split()),
        *(f"--grpc-address=127.0.0.1 --grpc-port={grpc}".split()),
        "--allow-metrics=false",
        f"--backend-config=python,shm-region-prefix-name={region}",
        *options,
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=log.parent
        )
    server = Server(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", process, log, region)
    try:
        _wait_until_ready(server, patience)
        yield server
    finally:
        if process.poll() is None:
            children = server.processes()[1:]
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                for pid in children:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)


def _wait_until_ready(server: Server, patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{server.http}/v2/health/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"tritonserver did not start:\n{server.log.read_text()[-4000:]}")


def _programs_of_models(folder: Path) -> Path:
    """Return `bin` of the environment that `tritonserver.sh` has made for models, or of ours."""
    own = folder.parents[1] / "models" / "bin"
    return own if own.is_dir() else Path(sys.executable).parent


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _descendants(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").glob("*/children"))
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except OSError:
        return []
    return [*children, *(other for child in children for other in _descendants(child))]
