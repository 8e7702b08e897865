"""JPEG decoding on the GPU by nvImageCodec, by its hardware decoder where there is one.

An optional dependency (extra `gpu-images`). Chroma is interpolated as libjpeg-turbo does
it for OpenCV (`fancy_upsampling`); its inverse DCT rounds differently, by a level or two of 255.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from trt_yolov6.common.machine import nvidia_folders, usable_cpus
from trt_yolov6.data.jpeg import Jpeg
from trt_yolov6.engines.cuda.device import CudaError, Event, Stream
from trt_yolov6.engines.cuda.letterbox import ImageView, upright
from trt_yolov6.errors import MissingDependencyError, install_command

OPTIONS = ":fancy_upsampling=1"
"""Decoder options: chroma is interpolated, not repeated."""

MOST = 256
"""Images of a batch that go to the hardware. nvImageCodec 0.9 never gives it more than a decoder's
first batch had; the others go to a decoder that takes CPU cores, and of whose values one in eighty
is a level or more off. That moves a network's AP by up to 0.001."""


@dataclass
class DecodedBatch:
    """Buffers on the GPU for the images of one batch, reused from batch to batch."""

    images: list[Any] = field(default_factory=list)
    """`nvimgcodec.Image`, each with the memory of the largest image it held."""
    sources: list[Any] = field(default_factory=list)
    """Encoded images, which the hardware may still be reading when `decode` returns."""
    addresses: dict[tuple[int, int], int] = field(default_factory=dict)
    """Where images lie, by their place in `images` and their capacity, which grows if they move.
    nvImageCodec 0.9 leaks a Python integer, 32 bytes, each time it is asked."""
    ready: Event | None = None
    """The event after which the images are there."""


class JpegDecoder:
    """A decoder on the current GPU. One thread at a time may call it.

    Args:
        threads: CPU threads for what is not done in hardware; default: one a core of this process.
        backends: names of `nvimgcodec.BackendKind` to use, best first; default: all there are.
        options: `nvimgcodec.Decoder`'s.

    Raises:
        MissingDependencyError: nvImageCodec is not installed or does not start.
    """

    def __init__(
        self,
        threads: int | None = None,
        *,
        backends: Sequence[str] | None = None,
        options: str = OPTIONS,
    ) -> None:
        codec = nvimgcodec()
        kinds = (
            None
            if backends is None
            else [codec.Backend(getattr(codec.BackendKind, name)) for name in backends]
        )
        self._codec = codec
        try:
            self._stream = Stream()
            # Not at the interpreter's exit either, where images may still be there.
            self._stream.free.atexit = False
            self._decoder = codec.Decoder(
                max_num_cpu_threads=threads or len(usable_cpus()), backends=kinds, options=options
            )
        except (RuntimeError, CudaError) as error:
            raise MissingDependencyError(
                f"nvImageCodec does not start ({error}); install nvidia-nvjpeg, or leave JPEGs to "
                "the CPU."
            ) from error
        # The orientation is applied while resizing, through steps in memory.
        self._params = codec.DecodeParams(
            apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB, allow_any_depth=False
        )
        self._begin()

    def _begin(self) -> None:
        """Decode a first batch of `MOST` small images."""
        content = cv2.imencode(".jpg", np.full((64, 64, 3), 128, np.uint8))[1].tobytes()
        streams = [self._codec.CodeStream(content) for _ in range(MOST)]
        with contextlib.suppress(RuntimeError):
            decoded = self._decoder.decode(
                streams, params=self._params, cuda_stream=self._stream.handle
            )
            keep_for(decoded, self._stream)
            self._stream.wait()
            del decoded  # not earlier: the GPU wrote to it

    def decode(self, images: Sequence[Jpeg], buffers: DecodedBatch) -> list[ImageView | None]:
        """Decode a batch into buffers, on a stream of its own.

        Args:
            images: files that `data.jpeg.open_image` left encoded.
            buffers: where they go; what was there is overwritten, so nothing may read it any more.
                The pixels are there after the event `buffers.ready`.

        Returns:
            A view of each upright image; None for one that this decoder cannot read.
        """
        if not images:
            return []
        codec = self._codec
        found: list[Any] = [None] * len(images)
        streams: dict[int, Any] = {}
        for index, image in enumerate(images):
            # A header that its parser refuses.
            with contextlib.suppress(RuntimeError, ValueError):
                streams[index] = codec.CodeStream(image.content)
        buffers.sources = [*streams.values(), *images]
        kept = buffers.images[: len(streams)]
        reused = {"images": kept} if len(kept) == len(streams) else {}
        decoded = self._decoder.decode(
            list(streams.values()), params=self._params, cuda_stream=self._stream.handle, **reused
        )
        if not reused:
            keep_for(decoded, self._stream)
            buffers.images = [one for one in decoded if one is not None]
            buffers.addresses.clear()
        if buffers.ready is None:
            buffers.ready = Event()
        buffers.ready.record(self._stream)
        for place, (index, one) in enumerate(zip(streams, decoded, strict=True)):
            if one is None:
                continue
            key = place, one.capacity
            address = buffers.addresses.get(key) if reused else None
            if address is None:
                address = int(one.__cuda_array_interface__["data"][0])
                if reused:
                    buffers.addresses[key] = address
            found[index] = _view(one, address, images[index])
        return found


def keep_for(decoded: Sequence[Any], stream: Stream) -> None:
    """Have a stream live as long as the images that were decoded on it.

    nvImageCodec frees an image's memory on that stream, whenever that is. If there is no such
    stream any more, the process crashes.
    """
    for one in decoded:
        if one is not None:
            weakref.finalize(one, _nothing, stream).atexit = False


def _nothing(_: Stream) -> None:
    """Do nothing: what is wanted is the reference to the argument."""


def _view(decoded: Any, address: int, image: Jpeg) -> ImageView | None:
    header = image.header
    if tuple(decoded.shape) != (header.height, header.width, 3):
        return None
    down = int(decoded.strides[0])
    stored = ImageView(address, header.height, header.width, down, 3, owner=decoded)
    return stored if header.orientation == 1 else upright(stored, header.orientation)


@functools.cache
def nvimgcodec() -> Any:
    """Return the module.

    Raises:
        MissingDependencyError: it is not installed, or does not load.
    """
    try:
        with _only_nvjpeg():
            from nvidia import nvimgcodec as codec
    except Exception as error:  # a broken installation raises more than ImportError
        raise MissingDependencyError(
            f"nvImageCodec does not import ({error}); install it with "
            f"`{install_command('gpu-images')}`."
        ) from error
    return codec


@contextlib.contextmanager
def _only_nvjpeg() -> Iterator[None]:
    """Have nvImageCodec load its JPEG plugin alone: others print that their libraries are missing.

    It reads its folder of plugins from the environment, once, when it is imported.
    """
    names = {"NVIMGCODEC_EXTENSIONS_PATH": "", "PYNVIMGCODEC_VERBOSITY": "0"}
    roots = nvidia_folders()
    plugins = [
        path for root in roots for path in root.glob("nvimgcodec/extensions/libnvjpeg_ext.so*")
    ]
    if not plugins or any(name in os.environ for name in names):
        yield
        return
    for library in (path for root in roots for path in root.glob("*/lib/libnvjpeg.so.*")):
        # The plugin looks for it from where it lies itself, which will be elsewhere.
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(library))
    with tempfile.TemporaryDirectory() as folder:
        for plugin in plugins:
            Path(folder, plugin.name).symlink_to(plugin)
        os.environ.update(names, NVIMGCODEC_EXTENSIONS_PATH=folder)
        try:
            yield
        finally:
            for name in names:
                os.environ.pop(name, None)
