"""A PyTorch network as an engine, so that `evaluate` scores a model in training."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trt_yolov6.detectors.candidates import Candidates
from trt_yolov6.detectors.spec import DetectorSpec
from trt_yolov6.engines.base import Engine, FinishedRun, Run, check_images
from trt_yolov6.errors import UserError
from trt_yolov6.models.decode import decode
from trt_yolov6.models.fusion import fuse
from trt_yolov6.models.network import YOLOv6
from trt_yolov6.spec import BatchProfile, NmsSettings, PrecisionName, TensorSpec, two_sides
from trt_yolov6.training.qat.onnx_module import GraphNetwork


class TorchEngine(Engine):
    """A network on the device where its weights are: fused, in half precision on a GPU.

    Takes uint8 images, which are a quarter of the bytes to copy; boxes are decoded in float32.
    """

    backend = "torch"
    manifest = None
    is_checked = is_trusted = True

    def __init__(
        self,
        model: YOLOv6 | GraphNetwork,
        class_names: tuple[str, ...],
        image_size: int | tuple[int, int],
        *,
        half: bool | None = None,
        name: str = "model",
    ) -> None:
        """Copy and fuse a network.

        Args:
            model: in any form, or an exported graph that is being trained; left as it is.
            class_names: in the order of its scores.
            image_size: side of the input in pixels, or height and width; multiples of 32.
            half: compute in half precision; None: on a GPU.
            name: what results call it.
        """
        self.torch_device = next(model.parameters()).device
        on_gpu = self.torch_device.type == "cuda"
        self.half = on_gpu if half is None else half
        network = fuse(model) if isinstance(model, YOLOv6) else copy.deepcopy(model).eval()
        if on_gpu:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._model: YOLOv6 | GraphNetwork | None = network.half() if self.half else network.float()
        self.path = Path(name)
        self.backend_version = torch.__version__
        self.device = (
            torch.cuda.get_device_name(self.torch_device) if on_gpu else self.torch_device.type
        )
        height, width = two_sides(image_size)
        self.input = TensorSpec("images", (None, height, width, 3), np.dtype(np.uint8))
        anchors = sum((height // one) * (width // one) for one in model.arch.strides)
        self.outputs = (
            TensorSpec("boxes", (None, anchors, 4), np.dtype(np.float32)),
            TensorSpec("scores", (None, anchors, len(class_names)), np.dtype(np.float32)),
        )
        self.batch = BatchProfile(1, 32, 1024)
        self.detector = DetectorSpec(class_names, (height, width))

    @property
    def precision(self) -> PrecisionName:
        """`fp32` or `fp16`."""
        return "fp16" if self.half else "fp32"

    def infer(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        boxes, scores = self._detect(images)
        return {"boxes": boxes.cpu().numpy(), "scores": scores.cpu().numpy()}

    def start(self, images: NDArray[Any], nms: NmsSettings | None = None) -> Run:
        if nms is None:
            return super().start(images)
        boxes, scores = self._detect(images)
        image, anchor, label = (scores > nms.confidence).nonzero(as_tuple=True)
        return FinishedRun(
            Candidates(
                images=image.cpu().numpy(),
                classes=label.cpu().numpy(),
                scores=scores[image, anchor, label].cpu().numpy(),
                boxes=boxes[image, anchor].cpu().numpy(),
            )
        )

    def resident_run(self, images: NDArray[Any], streams: int = 1) -> Callable[[], float]:
        if streams > 1:
            raise UserError("a PyTorch network has no streams; leave `streams` out.")
        check_images(self, images)
        resident = torch.from_numpy(images).to(self.torch_device)

        def run() -> float:
            start = time.perf_counter()
            self._forward(resident)
            if self.torch_device.type == "cuda":
                torch.cuda.synchronize(self.torch_device)
            return time.perf_counter() - start

        return run

    def close(self) -> None:
        self._model = None

    def _detect(self, images: NDArray[Any]) -> tuple[Tensor, Tensor]:
        check_images(self, images)
        return self._forward(torch.from_numpy(images).to(self.torch_device))

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self._model is None:
            raise UserError(f"the engine {self.path} is closed; make it again.")
        pixels = images.permute(0, 3, 1, 2).to(torch.float16 if self.half else torch.float32) / 255
        if self.torch_device.type != "cuda":
            pixels = pixels.contiguous()
        levels = [tuple(part.float() for part in level) for level in self._model.raw(pixels)]
        boxes, scores = decode(levels, self._model.arch)
        return boxes.mT, scores.mT
