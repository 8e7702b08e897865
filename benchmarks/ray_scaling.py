"""Scaling of `infer --ray` over nodes on separate cores, or over GPUs; its cost against `infer`.

    python -m benchmarks.ray_scaling --engine engines/n.onnx --nodes 1 2 --pictures 2000
    python -m benchmarks.ray_scaling --engine engines/n.trt --gpus 1 2 4 --pictures 20000
    python -m benchmarks.ray_scaling --engine engines/n.onnx --plain --pictures 10000

With --nodes, the head and node 0 are held to the first core, each other node to a core of its own,
so that one node stands for one machine. With --gpus, Ray gets that number of GPUs of
this host. With --plain, both commands run whole, as a user would type them. Rounds are interleaved.
Results of one kind are the same files whatever runs them; that is checked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trt_yolov6.common.files import write_json
from trt_yolov6.common.machine import cpu_model, read_gpus, software_versions, timestamp

ROOT = Path(__file__).resolve().parents[1]


def link_pictures(folder: Path, count: int) -> None:
    """Fill a folder with links to the sample's pictures, in turn."""
    sources = sorted((ROOT / "samples/images/val").glob("*.jpg"))
    folder.mkdir()
    for number in range(count):
        os.symlink(sources[number % len(sources)], folder / f"{number:06d}.jpg")


def digest(output: Path) -> str:
    """Return a hash of what a job found, whatever the order it was written in."""
    lines = sorted(
        line for part in output.glob("part-*.jsonl") for line in part.read_text().splitlines()
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def on_nodes(nodes: int, engine: Path, pictures: Path, output: Path) -> dict[str, Any]:
    """Run the job on a number of one-core nodes of this machine, each pinned to its core."""
    import ray
    from ray.cluster_utils import Cluster

    from trt_yolov6.serving.ray.jobs import RayOptions, infer_on_ray

    cores = sorted(os.sched_getaffinity(0))
    memory = {"object_store_memory": 100 * 2**20}
    try:
        os.sched_setaffinity(0, cores[:1])
        head = {"num_cpus": 0, "include_dashboard": False, **memory}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for number in range(nodes):
            os.sched_setaffinity(0, cores[number : number + 1])
            cluster.add_node(num_cpus=1, **memory)
        os.sched_setaffinity(0, cores[:1])
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        summary = infer_on_ray(engine, pictures, output, RayOptions("auto", progress=False))
        ray.shutdown()
        cluster.shutdown()
    finally:
        os.sched_setaffinity(0, cores)
    return {"seconds": summary.wall_seconds, "start_s": summary.start_seconds}


def on_gpus(gpus: int, engine: Path, pictures: Path, output: Path) -> dict[str, Any]:
    """Run the job on a number of GPUs of this host."""
    import ray

    from trt_yolov6.serving.ray.jobs import RayOptions, infer_on_ray

    ray.init(
        address="local",
        num_gpus=gpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        summary = infer_on_ray(engine, pictures, output, RayOptions("auto", progress=False))
    finally:
        ray.shutdown()
    return {"seconds": summary.wall_seconds, "start_s": summary.start_seconds}


def by_command(with_ray: int, engine: Path, pictures: Path, output: Path) -> dict[str, Any]:
    """Run `infer` as a command, with `--ray local` or without."""
    command = [sys.executable, "-m", "trt_yolov6", "infer", "--engine", str(engine), "--quiet"]
    command += ["--source", str(pictures), "--output", str(output)]
    if with_ray:
        command += ["--ray", "local"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"seconds": time.perf_counter() - start, "start_s": None}


def main() -> int:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", type=Path, required=True)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--nodes", type=int, nargs="+")
    kind.add_argument("--gpus", type=int, nargs="+")
    kind.add_argument("--plain", action="store_true")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all on loopback
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray starts its workers at niceness 15, which is to lose against whatever else runs here.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    run: Callable[[int, Path, Path, Path], dict[str, Any]]
    if options.nodes:
        run, sizes = on_nodes, options.nodes
        if max(sizes) > len(os.sched_getaffinity(0)):
            parser.error(f"--nodes {max(sizes)} needs as many cores")
    elif options.gpus:
        run, sizes = on_gpus, options.gpus
    else:
        run, sizes = by_command, [0, 1]
    lines: list[dict[str, Any]] = []
    digests: set[str] = set()
    with tempfile.TemporaryDirectory() as temporary:
        pictures = Path(temporary) / "pictures"
        link_pictures(pictures, options.pictures)
        for number in range(options.rounds):
            for size in sizes if number % 2 == 0 else sizes[::-1]:
                output = Path(temporary) / f"out-{number}-{size}"
                line = {
                    "size": size,
                    **run(size, options.engine, pictures, output),
                    "load": os.getloadavg()[0],
                }
                line["images_s"] = options.pictures / line["seconds"]
                if line["start_s"]:
                    line["images_s_running"] = options.pictures / (
                        line["seconds"] - line["start_s"]
                    )
                if run is not by_command or size:
                    digests.add(digest(output))
                lines.append(line)
                print(json.dumps(line), flush=True)
    rates = {
        size: statistics.median(line["images_s"] for line in lines if line["size"] == size)
        for size in sizes
    }
    result = {
        "command": " ".join(["python -m benchmarks.ray_scaling", *sys.argv[1:]]),
        "date": timestamp(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [gpu.name for gpu in read_gpus()],
        "versions": software_versions(),
        "what": run.__name__,
        "engine": options.engine.name,
        "pictures": options.pictures,
        "images_s": rates,
        "same_results": len(digests) == 1,
        "times_the_first": {size: rate / rates[sizes[0]] for size, rate in rates.items()},
        "rounds": lines,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=2))
    if options.json:
        write_json(options.json, result)
    if not result["same_results"]:
        print("the runs did not find the same", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
