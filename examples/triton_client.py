"""Asks a Triton server for the objects in pictures: `pip install tritonclient[grpc]`, no more.

    trt-yolov6 export-triton --engine yolov6n.onnx --python-backend pictures --output models/
    tritonserver --model-repository models/
    python examples/triton_client.py --model yolov6n_fp32_pictures samples/images/val/*.jpg

Prints a line an object: picture, class, score, and x1, y1, x2, y2 in the picture's own pixels.
Pictures are sent without waiting for one another, so that the server puts them into batches.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def main() -> int:
    """Ask for every picture, and return how many were refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--model", required=True, help="an entry that takes pictures")
    parser.add_argument("--server", default="127.0.0.1:8001", help="its gRPC (127.0.0.1:8001)")
    parser.add_argument("--at-once", type=int, default=16, help="requests under way (16)")
    options = parser.parse_args()

    answers: queue.Queue[tuple[Path, Any, Any]] = queue.Queue()
    refused = 0
    with triton.InferenceServerClient(options.server) as client:
        config = client.get_model_config(options.model).config
        names = json.loads(config.parameters["class_names"].string_value)

        def send(path: Path) -> None:
            content = np.empty((1, 1), object)
            content[0, 0] = path.read_bytes()
            given = triton.InferInput("picture", [1, 1], "BYTES")
            given.set_data_from_numpy(content)
            client.async_infer(
                options.model,
                [given],
                lambda result, error: answers.put((path, result, error)),
                client_timeout=60,
            )

        def receive() -> bool:
            path, result, error = answers.get()
            if error is not None:
                print(f"{path}: {error.message()}", file=sys.stderr)
                return False
            boxes, scores, classes = (
                result.as_numpy(name)[0] for name in ("boxes", "scores", "classes")
            )
            for box, score, label in zip(boxes, scores, classes, strict=True):
                name = names[label] if label < len(names) else label
                print(path, name, f"{score:.4f}", *(f"{side:.2f}" for side in box))
            return True

        under_way = 0
        for path in options.pictures:
            if under_way == options.at_once:
                refused += not receive()
                under_way -= 1
            send(path)
            under_way += 1
        for _ in range(under_way):
            refused += not receive()
    return refused


if __name__ == "__main__":
    try:
        sys.exit(min(main(), 1))
    except InferenceServerException as problem:
        sys.exit(f"the server refuses: {problem.message()}")
