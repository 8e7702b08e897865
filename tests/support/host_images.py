"""An engine that takes images as one on a GPU does, with all its memory in this machine.

Its letterbox is the GPU's kernel, compiled for the CPU; its decoder is OpenCV, which decodes into
buffers that are overwritten as the GPU's are.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_yolov6.data.images import read_image
from trt_yolov6.data.jpeg import Jpeg
from trt_yolov6.data.letterbox import Letterbox
from trt_yolov6.engines.base import Engine, Run
from trt_yolov6.engines.cuda.jpeg import DecodedBatch
from trt_yolov6.engines.cuda.letterbox import (
    RECORD_BYTES,
    ImageView,
    interleaved,
    upright,
    write_record,
)
from trt_yolov6.spec import NmsSettings, image_size_of

Library = ctypes.CDLL


def run_letterbox(
    library: Library,
    engine_input: NDArray[Any],
    images: Sequence[tuple[ImageView, Letterbox]],
    how: Any,
    size: tuple[int, int],
) -> None:
    """Fill an engine's input with images in this machine's memory by the compiled kernel."""
    rows = len(engine_input)
    records = bytearray(RECORD_BYTES * rows)
    for row, (view, placed) in enumerate(images):
        write_record(records, row, view, placed, how.interpolation)
    floats = ctypes.c_float * 3
    library.run(
        (ctypes.c_char * len(records)).from_buffer(records),
        ctypes.c_void_p(engine_input.ctypes.data),
        rows,
        *size,
        int(how.colour == "bgr"),
        floats(*how.mean),
        floats(*how.std),
    )


class HostDecoder:
    """Decodes as stored into buffers that it reuses; `refused` are names it cannot read."""

    def __init__(self, refused: Sequence[str] = ()) -> None:
        self.refused = refused
        self.batches: set[int] = set()
        """Buffers that were used."""
        self.decoded = 0

    def decode(self, images: Sequence[Jpeg], buffers: DecodedBatch) -> list[ImageView | None]:
        """Decode a batch, see `JpegDecoder.decode`."""
        self.batches.add(id(buffers))
        views: list[ImageView | None] = []
        for index, image in enumerate(images):
            if any(name in image.name for name in self.refused):
                views.append(None)
                continue
            stored = read_image(image.content, as_stored=True)
            while len(buffers.images) <= index:
                buffers.images.append(np.zeros(1 << 20, np.uint8))
            memory = buffers.images[index]
            memory[: stored.size] = stored.reshape(-1)
            view = interleaved(memory.ctypes.data, *stored.shape[:2])
            turned = upright(view, image.header.orientation)
            views.append(dataclasses.replace(turned, owner=memory))
            self.decoded += 1
        return views


class HostImagesEngine(Engine):
    """A wrapped engine that takes images."""

    def __init__(self, inner: Engine, library: Library, decoder: HostDecoder | None = None) -> None:
        names = (
            *("path", "manifest", "backend", "backend_version", "device", "input", "outputs"),
            *("batch", "detector"),
        )
        for name in names:
            setattr(self, name, getattr(inner, name))
        self.in_flight = 2
        self.inner = inner
        self.library = library
        self.host_decoder = decoder
        self.taken: list[int] = []
        """Images of each batch that came as images."""

    def infer(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return self.inner.infer(images)

    def resident_run(self, images: NDArray[Any], streams: int = 1) -> Any:
        return self.inner.resident_run(images, streams)

    def close(self) -> None:
        self.inner.close()

    def takes_images(self) -> bool:
        return True

    def jpeg_decoder(self) -> Any:
        return self.host_decoder

    def start_images(
        self,
        images: Sequence[NDArray[np.uint8] | ImageView],
        placed: Sequence[Letterbox],
        nms: NmsSettings,
        *,
        clip: bool | None = None,
        rows: int | None = None,
        after: Any = None,
        patient: bool = False,
    ) -> Run:
        self.taken.append(len(images))
        return _LateRun(self, images, placed, rows or len(images))


@dataclasses.dataclass
class _LateRun(Run):
    """A run that reads its images when it is waited for, as late as a GPU may."""

    engine: HostImagesEngine
    images: Sequence[NDArray[np.uint8] | ImageView]
    placed: Sequence[Letterbox]
    rows: int

    def wait(self) -> dict[str, NDArray[Any]]:
        engine = self.engine
        batch = engine.inner.empty_input(self.rows)
        views = [
            image
            if isinstance(image, ImageView)
            else interleaved(image.ctypes.data, image.shape[0], image.shape[1])
            for image in self.images
        ]
        pairs = list(zip(views, self.placed, strict=True))
        size = image_size_of(engine.input)
        run_letterbox(engine.library, batch, pairs, engine.preprocessing, size)
        return engine.infer(batch)
