"""One process of clients that load a Triton server, for `triton_load`: figures come as JSON.

    python -m benchmarks.triton_client '{"address": ..., "model": ..., ...}'

Threads send one request after the other over gRPC. Tensors lie in shared memory, inputs and outputs
alike; pictures travel in the request.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, shared_memory


def main() -> None:
    """Say when ready, wait for a line, load the server for some seconds and print the times."""
    job = json.loads(sys.argv[1])
    ready = threading.Barrier(job["threads"] + 1)
    go = threading.Event()
    latencies: list[float] = []
    failures: list[str] = []
    lock = threading.Lock()

    def work(index: int) -> None:
        name = f"load_{os.getpid()}_{index}"
        opened = pictures(job, index) if job.get("pictures") else tensors(job, name)
        own: list[float] = []
        with opened as send:
            ready.wait()
            go.wait()
            end = time.perf_counter() + job["seconds"]
            while time.perf_counter() < end:
                began = time.perf_counter()
                try:
                    send()
                except InferenceServerException as error:
                    with lock:
                        failures.append(str(error))
                    continue
                own.append(time.perf_counter() - began)
        with lock:
            latencies.extend(own)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(job["threads"])]
    for thread in threads:
        thread.start()
    ready.wait()
    print("ready", flush=True)
    sys.stdin.readline()
    spent = time.process_time()
    go.set()
    for thread in threads:
        thread.join()
    spent = time.process_time() - spent
    print(json.dumps({"latencies": latencies, "failures": failures, "cpu_seconds": spent}))


@contextlib.contextmanager
def tensors(job: dict[str, Any], name: str) -> Iterator[Callable[[], Any]]:
    """Yield what sends a tensor of random numbers through shared memory."""
    with contextlib.closing(triton.InferenceServerClient(job["address"])) as client:
        source = job["input"]
        images: NDArray[Any] = np.random.default_rng(0).random((1, *source["shape"]), np.float32)
        if source["dtype"] == "uint8":
            images = (images * 255).astype(np.uint8)
        images = images.astype(source["dtype"])
        sizes = {"in": images.nbytes}
        for spec in job["outputs"]:
            length = int(np.prod(spec["shape"])) * np.dtype(spec["dtype"]).itemsize
            sizes[spec["name"]] = length
        with contextlib.ExitStack() as stack:
            for part, size in sizes.items():
                region = shared_memory.create_shared_memory_region(
                    f"{name}_{part}", f"/{name}_{part}", size
                )
                stack.callback(shared_memory.destroy_shared_memory_region, region)
                if part == "in":
                    shared_memory.set_shared_memory_region(region, [images])
                client.register_system_shared_memory(f"{name}_{part}", f"/{name}_{part}", size)
                stack.callback(unregister, client, f"{name}_{part}")
            given = triton.InferInput(
                source["name"], list(images.shape), np_to_triton_dtype(images.dtype)
            )
            given.set_shared_memory(f"{name}_in", images.nbytes)
            wanted = []
            for spec in job["outputs"]:
                output = triton.InferRequestedOutput(spec["name"])
                output.set_shared_memory(f"{name}_{spec['name']}", sizes[spec["name"]])
                wanted.append(output)
            yield lambda: client.infer(job["model"], [given], outputs=wanted)


def unregister(client: Any, region: str) -> None:
    """Let the server forget a region; it may still be at the last answer."""
    for _ in range(50):
        try:
            client.unregister_system_shared_memory(region)
        except InferenceServerException:
            time.sleep(0.02)
        else:
            return


@contextlib.contextmanager
def pictures(job: dict[str, Any], index: int) -> Iterator[Callable[[], Any]]:
    """Yield what sends the next picture of a folder."""
    contents = [Path(path).read_bytes() for path in job["pictures"]]
    given = triton.InferInput("picture", [1, 1], "BYTES")
    turn = index

    def send() -> Any:
        nonlocal turn
        turn += 1
        array = np.empty((1, 1), object)
        array[0, 0] = contents[turn % len(contents)]
        given.set_data_from_numpy(array)
        return client.infer(job["model"], [given])

    with contextlib.closing(triton.InferenceServerClient(job["address"])) as client:
        client.is_server_ready()
        yield send


if __name__ == "__main__":
    main()
