"""Calibration images: a folder in, the graph's letterboxed inputs out, always in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.images import list_images, read_image
from trt_yolov6.data.loader import load_batches
from trt_yolov6.data.preprocessing import YOLOV6, Preprocessing
from trt_yolov6.engines.base import TensorSpec
from trt_yolov6.errors import UserError

if TYPE_CHECKING:
    import onnx

MINIMUM = 2
"""Images a calibration needs at least: what one image happens to show is no range."""


def calibration_images(folder: str | Path, limit: int | None = None) -> list[Path]:
    """Return the images of a calibration folder, sorted by name.

    Args:
        folder: searched without its subfolders.
        limit: take this many, spread evenly over the names; None for all.

    Raises:
        UserError: the folder is missing, or holds fewer than `MINIMUM` images.
    """
    paths = list_images(folder)
    if len(paths) < MINIMUM:
        raise UserError(
            f"one image is too few to calibrate with ({paths[0]}); give --calib a folder of 32 or "
            "more that look like those the detector will see."
        )
    if limit is None or limit >= len(paths):
        return paths
    if limit < MINIMUM:
        raise UserError(
            f"{limit} calibration images are too few; take {MINIMUM} at least, better 32 or more."
        )
    return [paths[index * len(paths) // limit] for index in range(limit)]


def calibration_batches(
    folder: str | Path | Sequence[Path],
    spec: TensorSpec,
    *,
    limit: int | None = None,
    border: int = 0,
    preprocessing: Preprocessing = YOLOV6,
    workers: int | None = None,
) -> Iterator[NDArray[Any]]:
    """Yield what the graph takes for one calibration image after the other, sorted by name.

    Args:
        folder: a folder, or the list that `calibration_images` made of one.
        spec: the graph's input. One with a fixed batch gets that many images at a time; the first
            images come again to fill the last batch.
        limit: see `calibration_images`.
        border: gray pixels on every side, see `data.letterbox.fit`.
        preprocessing: how images are prepared (`Graph.preprocessing`).
        workers: reader threads; default: one a core.

    Yields:
        float32 (batch, 3, height, width), in 0..1 unless `preprocessing` says otherwise, or uint8
        (batch, height, width, 3), as `spec` has it; batch is 1 where it is free.

    Raises:
        UserError: see `calibration_images`, or an image cannot be read.
    """
    paths = (
        calibration_images(folder, limit)
        if isinstance(folder, (str, Path))
        else list(folder)[:limit]
    )
    batch = spec.shape[0] or 1
    missing = -len(paths) % batch
    paths += [paths[index % len(paths)] for index in range(missing)]
    for loaded in load_batches(
        paths,
        read_image,
        spec,
        batch=batch,
        border=border,
        preprocessing=preprocessing,
        workers=workers,
    ):
        yield loaded.input


def input_spec(model: onnx.ModelProto) -> TensorSpec:
    """Return name, shape and dtype of a graph's one input.

    Raises:
        UserError: it has several, or none.
    """
    import onnx

    constants = {item.name for item in model.graph.initializer}
    inputs = [item for item in model.graph.input if item.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(item.name for item in inputs) or "none"
        raise UserError(
            f"the graph has the inputs {names}; quantization needs a detector with one image input."
        )
    tensor = inputs[0].type.tensor_type
    shape = tuple(dim.dim_value or None for dim in tensor.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorSpec(inputs[0].name, shape, np.dtype(dtype))


def images_sha256(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the images' contents in their order; their names do not count.

    Raises:
        UserError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from error
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
