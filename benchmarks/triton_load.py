"""Measure docs/measurements/triton.md: the same boxes, throughput and latency by load, and a soak.

    python -m benchmarks.triton_load --json benchmarks/results/NAME.json
    python -m benchmarks.triton_load --only soak --soak-seconds 600 --json FILE

Starts NVIDIA's tritonserver (`scripts/tritonserver.sh`) on loopback with the sample as
`export-triton --python-backend` writes it. Clients are processes of their own on the same machine
(`benchmarks.triton_client`). On a machine with a GPU engines are built for it.

equal  the boxes of all validation images over HTTP and gRPC, against `detect`'s and `infer`'s
load   throughput and latency at 1 to 32 requests at a time, dynamic batching on and off
bench  throughput at 16 at a time over that of `bench` on the same engine and batch, in turns
soak   what the server holds while it is loaded for long, bad requests among the good
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from benchmarks.triton_server import Server, tritonserver
from trt_yolov6.backends import BACKENDS
from trt_yolov6.bench.sampling import random_input
from trt_yolov6.common.files import read_json, write_json
from trt_yolov6.common.machine import cpu_model, read_gpus, software_versions, timestamp
from trt_yolov6.data.images import list_images, read_image
from trt_yolov6.engines import Engine, best_backend, load_engine
from trt_yolov6.engines.build import build_engine
from trt_yolov6.graph.export import ExportSettings, graph_from_checkpoint
from trt_yolov6.runtime.annotate import infer_source
from trt_yolov6.runtime.predict import detect
from trt_yolov6.serving.triton import ServingSettings, export_triton
from trt_yolov6.spec import BatchProfile

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "samples" / "yolov6n_bccd_authors.pt"
IMAGES = ROOT / "samples" / "images" / "val"
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
ENTRIES = {"tensors": "tensors", "tensors_alone": "tensors", "pictures": "pictures",
           "pictures_alone": "pictures"}  # fmt: skip
"""Entries by name, and what they take; those called `alone` do not batch."""


@dataclass(frozen=True)
class Load:
    """Result of a load of some seconds."""

    per_second: float
    median: float
    p99: float
    """Seconds."""
    requests: int
    mean_batch: float
    """Images in a batch, on average: of the server's statistics."""
    failures: int
    cpu_per_image: float
    """Seconds of processor time, of the server's processes and the clients'."""


def main() -> None:
    """Measure what was asked for and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="equal,load,bench", help="parts, with commas")
    parser.add_argument("--backend", help="of the engine (the best on this machine)")
    parser.add_argument("--batch", type=int, default=8, help="largest batch of the engine (8)")
    parser.add_argument("--uint8", action="store_true", help="an engine with uint8 input")
    parser.add_argument("--fp16", action="store_true", help="half precision")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load (8)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of server and bench (5)")
    parser.add_argument("--imgsz", type=int, default=640, help="side of the input (640)")
    parser.add_argument("--soak-seconds", type=float, default=600.0)
    parser.add_argument("--processes", type=int, default=1, help="processes of clients (1)")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    backend = options.backend or best_backend()
    settings = ExportSettings(
        fp16=options.fp16,
        uint8_input=options.uint8,
        batch=BatchProfile(1, options.batch, options.batch),
        image_size=(options.imgsz, options.imgsz),
    )
    parts = options.only.split(",")
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.triton_load", *sys.argv[1:]]),
        "date": timestamp(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [gpu.name for gpu in read_gpus()],
        "versions": software_versions(),
        "backend": backend,
        "batch": options.batch,
        "image_size": options.imgsz,
        "instances": options.instances,
        "input": "uint8" if options.uint8 else "float32",
        "precision": "fp16" if options.fp16 else "fp32",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / f"yolov6n{BACKENDS[backend].suffix}"
        build_engine(graph_from_checkpoint(WEIGHTS, settings), backend=backend, output=path)
        repository = folder / "models"
        export(path, repository, options.instances, backend == "onnxruntime")
        log = folder / "log"
        try:
            with tritonserver(repository, log) as server, load_engine(path) as engine:
                if "equal" in parts:
                    result["equal"] = equal(server, engine, folder)
                    print(result["equal"], flush=True)
                if "load" in parts:
                    result["load"] = [
                        {"entry": entry, "concurrency": count, **vars(one)}
                        for entry in ENTRIES
                        for count in CONCURRENCIES
                        for one in [load(server, engine, entry, count, options)]
                    ]
                if "bench" in parts:
                    result["bench"] = beside_bench(server, engine, options)
                if "soak" in parts:
                    result["soak"] = soak(server, engine, options)
        except BaseException:
            print(log.read_text()[-3000:], file=sys.stderr)
            raise
    if options.json:
        before = read_json(options.json) if options.json.exists() else {}
        write_json(options.json, {**before, **result})


def export(engine: Path, repository: Path, instances: int, on_cpu: bool) -> None:
    """Write the entries; those called `alone` without dynamic batching."""
    for name, serves in ENTRIES.items():
        settings = ServingSettings(
            instances=instances, gpus=() if on_cpu else None, max_queue_delay_us=1000
        )
        export_triton([engine], repository, settings, names=[name], python=serves)  # type: ignore[arg-type]
        if name.endswith("alone"):
            path = repository / name / "config.pbtxt"
            config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
            config.ClearField("dynamic_batching")
            path.write_text(text_format.MessageToString(config))


def equal(server: Server, engine: Engine, folder: Path) -> dict[str, Any]:
    """Compare the boxes of the validation images, over HTTP and gRPC, with ours to the last bit."""
    paths = list_images(IMAGES)
    expected = detect(engine, [read_image(path) for path in paths])
    summary = infer_source(engine, IMAGES, folder / "inferred", progress=False)
    written = read_json(summary.files[0])
    found: dict[str, Any] = {"images": len(paths), "objects": sum(map(len, expected))}
    for protocol, module in (("http", over_http), ("grpc", over_grpc)):
        address = getattr(server, protocol)

        def ask(path: Path, module: Any = module, address: str = address) -> Any:
            given = module.InferInput("picture", [1, 1], "BYTES")
            array = np.empty((1, 1), object)
            array[0, 0] = path.read_bytes()
            given.set_data_from_numpy(array)
            with contextlib.closing(module.InferenceServerClient(address)) as client:
                return client.infer("pictures", [given])

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, paths))
        same = as_written = 0
        for answer, own, record in zip(answers, expected, written, strict=True):
            boxes, scores, classes = (answer.as_numpy(n)[0] for n in ("boxes", "scores", "classes"))
            same += int(
                np.array_equal(boxes, own.xyxy)
                and np.array_equal(scores, own.confidence)
                and np.array_equal(classes, own.class_id)
            )
            as_written += int(
                [[round(value, 2) for value in box] for box in boxes.tolist()]
                == [item["box"] for item in record["detections"]]
                and [round(score, 4) for score in scores.tolist()]
                == [item["score"] for item in record["detections"]]
            )
        found[protocol] = {"equal_to_detect": same, "equal_to_infer": as_written}
    return found


def load(
    server: Server, engine: Engine, entry: str, concurrency: int, options: argparse.Namespace
) -> Load:
    """Load an entry with a number of concurrent requests, from processes of their own."""
    before = counted(server, entry)
    processes = min(options.processes, concurrency)
    job: dict[str, Any] = {
        "address": server.grpc,
        "model": entry,
        "seconds": options.seconds,
        "input": {
            "name": engine.input.name,
            "shape": list(engine.input.shape[1:]),
            "dtype": engine.input.dtype.name,
        },
        "outputs": [
            {"name": spec.name, "shape": list(spec.shape[1:]), "dtype": spec.dtype.name}
            for spec in engine.outputs
        ],
    }
    if ENTRIES[entry] == "pictures":
        job["pictures"] = [str(path) for path in list_images(IMAGES)]
    shares = [
        concurrency // processes + (index < concurrency % processes) for index in range(processes)
    ]
    clients = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.triton_client", json.dumps({**job, "threads": n})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for n in shares
    ]
    # Clients import and register their memory first.
    for client in clients:
        assert client.stdout is not None
        client.stdout.readline()
    spent = server.cpu_seconds()
    answers = [json.loads(answer) for answer in _answers(clients)]
    spent = server.cpu_seconds() - spent + sum(answer["cpu_seconds"] for answer in answers)
    times = sorted(one for answer in answers for one in answer["latencies"])
    after = counted(server, entry)
    runs = after["execution_count"] - before["execution_count"]
    images = after["inference_count"] - before["inference_count"]
    value = Load(
        # Every thread ends with the request that was under way at the end.
        per_second=concurrency * len(times) / sum(times),
        median=statistics.median(times),
        p99=float(np.percentile(times, 99)),
        requests=len(times),
        mean_batch=images / runs,
        failures=sum(len(answer["failures"]) for answer in answers),
        cpu_per_image=spent / len(times),
    )
    print(
        f"{entry:15s} {concurrency:3d} at a time: {value.per_second:8.1f}/s, "
        f"p50 {value.median * 1e3:8.1f} ms, p99 {value.p99 * 1e3:8.1f} ms, "
        f"batch {value.mean_batch:.2f}, {value.failures} failures",
        flush=True,
    )
    return value


def _answers(clients: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Let clients start at once and return what they print at the end."""
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
    return [client.communicate()[0] for client in clients]


def counted(server: Server, entry: str) -> dict[str, Any]:
    """Return the server's statistics of an entry."""
    with contextlib.closing(over_http.InferenceServerClient(server.http)) as client:
        return dict(client.get_inference_statistics(entry)["model_stats"][0])


def beside_bench(server: Server, engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """Take turns between what `bench` runs and a load of 16 at a time, both at the same batch.

    Where other programs want the cores too, the server's more numerous threads get more of them
    than `bench`, so the processor time of an image is compared as well.
    """
    run = engine.resident_run(random_input(engine, options.batch))
    rounds = []
    for _ in range(options.rounds):
        halves = []
        spent = 0.0
        for _ in range(2):
            spent -= time.process_time()
            end = time.perf_counter() + options.seconds / 2
            times = []
            while time.perf_counter() < end:
                times.append(run())
            spent += time.process_time()
            halves.append(times)
            if len(halves) == 1:
                served = load(server, engine, "tensors", 16, options)
        both = halves[0] + halves[1]
        alone = options.batch / statistics.median(both)
        bench_cpu = spent / (options.batch * len(both))
        rounds.append(
            {
                **vars(served),
                "bench": alone,
                "bench_cpu_per_image": bench_cpu,
                "ratio": served.per_second / alone,
                "cpu_ratio": bench_cpu / served.cpu_per_image,
            }
        )
        one = rounds[-1]
        print(
            f"  bench {alone:.1f}/s, ratio {one['ratio']:.3f}, by processor time "
            f"{one['cpu_ratio']:.3f}",
            flush=True,
        )
    middle = {
        name: statistics.median(one[name] for one in rounds) for name in ("ratio", "cpu_ratio")
    }
    return {**middle, "rounds": rounds}


def soak(server: Server, engine: Engine, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Load tensors and pictures for long, with bad requests and clients that go away; look on."""
    end = time.time() + options.soak_seconds
    paths = list_images(IMAGES)
    seen: list[dict[str, Any]] = []
    counts = {"good": 0, "refused": 0, "gone": 0, "wrong": 0}
    images = random_input(engine, 1)
    lock = threading.Lock()

    def count(what: str) -> None:
        with lock:
            counts[what] += 1

    def good(worker: int) -> None:
        module = (over_http, over_grpc)[worker % 2]
        address = (server.http, server.grpc)[worker % 2]
        kinds = {"float32": "FP32", "uint8": "UINT8"}
        turn = worker
        while time.time() < end:
            # A client of its own now and then: connections come and go.
            with contextlib.closing(module.InferenceServerClient(address)) as client:
                for _ in range(20):
                    turn += 1
                    entry, name = ("tensors", engine.input.name)
                    array: Any = images
                    kind = kinds.get(images.dtype.name, "")
                    bad = turn % 10 == 0
                    if turn % 3:
                        entry, name, kind = "pictures", "picture", "BYTES"
                        array = np.empty((1, 1), object)
                        array[0, 0] = (
                            b"no picture" if bad else paths[turn % len(paths)].read_bytes()
                        )
                    elif bad:
                        array = images[..., :-1]
                    given = module.InferInput(name, list(array.shape), kind)
                    given.set_data_from_numpy(array)
                    try:
                        client.infer(entry, [given])
                        count("wrong" if bad else "good")
                    except Exception:  # the clients' exceptions share no base
                        count("refused" if bad else "wrong")

    def gone() -> None:
        host, port = server.http.split(":")
        head = "POST /v2/models/tensors/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        while time.time() < end:
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head.encode() + b"{" * 5000)
            count("gone")
            time.sleep(0.2)

    with ThreadPoolExecutor(9) as pool:
        tasks = [pool.submit(good, worker) for worker in range(8)] + [pool.submit(gone)]
        began = time.time()
        while not all(task.done() for task in tasks):
            time.sleep(min(15.0, options.soak_seconds / 20))
            seen.append({"seconds": round(time.time() - began), **server.used(), **counts})
            print(seen[-1], flush=True)
        for task in tasks:
            task.result()
    time.sleep(5)
    seen.append({"seconds": round(time.time() - began), **server.used(), **counts})
    print(seen[-1], flush=True)
    return seen


if __name__ == "__main__":
    main()
