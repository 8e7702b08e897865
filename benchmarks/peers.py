"""The detectors that the paper's Table 1 holds YOLOv6 against, from their own code, as skeletons.

    python -m benchmarks.peers --output DIR [--batch 1 32] [NAME ...]

Writes DIR/NAME.b1.onnx and DIR/NAME.b32.onnx: the graph that each one's own ONNX export makes for
TensorRT, for 80 classes and without NMS, its weights emptied (see `benchmarks.skeletons`), since
speed does not depend on them. `load(path)` fills them. Each is checked in ONNX Runtime before it
is written. The packages exclude one another, so make the names of one family in one environment:

    yolov5-*           pip install yolov5 "setuptools<81"
    yolox-*            pip install --no-deps yolox; pip install torchvision loguru tabulate thop
    yolov7*            pip install --no-deps yolov7-wky-package; pip install torchvision seaborn
    ppyoloe-*          pip install paddledet paddlepaddle==2.6.2 paddle2onnx==1.3.1

The second and third ask for versions of onnx that Python 3.12 has no wheels for; what else a module
misses, it names. PP-YOLOE's packages need Python 3.10. All need onnx, onnxruntime, NumPy and this
repository's root on PYTHONPATH. What differs from the original tools: YOLOX and YOLOv7 simplify
their graphs after the export, which is left to TensorRT.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.skeletons import (
    at_batch,
    constants_as_initializers,
    parameters,
    settled,
    skeleton,
    with_random_weights,
)
from trt_yolov6.common.files import write_bytes
from trt_yolov6.errors import MissingDependencyError, UserError
from trt_yolov6.graph.reference import reference_session

CLASSES = 80


@dataclass(frozen=True)
class Peer:
    """A detector of Table 1."""

    name: str
    size: int
    """Height and width of the input."""

    millions: float
    """Parameters in millions, as the paper's Table 1 prints them."""

    export: Callable[[Peer, int], onnx.ModelProto]
    """Makes its graph for a batch size, with the weights that its code starts from."""

    variant: str
    """Name in its own code."""


def yolov5(peer: Peer, batch: int) -> onnx.ModelProto:
    """Export YOLOv5 as its `export --include engine` does: fused, decoded, opset 12.

    Returns:
        A graph with `images` (batch, 3, size, size) and `output0` (batch, anchors, 85).
    """
    package = _package("yolov5", "yolov5")
    folder = Path(package.__file__).parent / "models"
    model = import_module("yolov5.models.yolo").DetectionModel(str(folder / f"{peer.variant}.yaml"))
    model = model.eval().fuse()
    head = model.model[-1]
    head.inplace, head.dynamic, head.export = False, False, True
    return _traced(model, peer, batch, "output0", opset=12)


def yolox(peer: Peer, batch: int) -> onnx.ModelProto:
    """Export YOLOX as its `tools/export_onnx.py` does: boxes left undecoded, opset 11.

    Returns:
        A graph with `images` (batch, 3, size, size) and `output` (batch, anchors, 85).
    """
    _package("yolox", "yolox")
    model = import_module("yolox.exp").get_exp(None, peer.variant).get_model().eval()
    model.head.decode_in_inference = False
    return _traced(model, peer, batch, "output", opset=11)


def yolov7(peer: Peer, batch: int) -> onnx.ModelProto:
    """Export YOLOv7 as its `export.py --grid` does: the deploy form, fused, decoded, opset 12.

    Returns:
        A graph with `images` (batch, 3, size, size) and `output` (batch, anchors, 85).
    """
    models = _package("models", "yolov7-wky-package")
    file = Path(models.__file__).parents[1] / "cfg/deploy" / f"{peer.variant}.yaml"
    model = import_module("models.yolo").Model(str(file), nc=CLASSES).eval().fuse()
    model.model[-1].concat = True
    return _traced(model, peer, batch, "output", opset=12)


def ppyoloe(peer: Peer, batch: int) -> onnx.ModelProto:
    """Export PP-YOLOE as its `export_model.py` does with `trt=True exclude_nms=True`, opset 11.

    Its RepVGG blocks are in deploy form. Widths and depths are those of its configurations
    (`ppyoloe_crn_s`, `_m`, `_l`); the package holds none.

    Returns:
        A graph with `image` (batch, 3, size, size) and `scale_factor` (batch, 2), whose outputs
        are boxes (batch, anchors, 4) and scores (batch, 80, anchors).
    """
    # Before paddle: the other way round, importing it ends in a segmentation fault.
    _package("ppdet", "paddledet paddlepaddle==2.6.2 paddle2onnx==1.3.1")
    paddle = _package("paddle", "paddledet paddlepaddle==2.6.2 paddle2onnx==1.3.1")
    modeling = import_module("ppdet.modeling")
    # Parameters are named by a count; start it again, so that every export has the same names.
    paddle.utils.unique_name.switch()
    depth, width = {"s": (0.33, 0.5), "m": (0.67, 0.75), "l": (1.0, 1.0)}[peer.variant]
    scaled = {"depth_mult": depth, "width_mult": width, "trt": True}
    backbone = modeling.CSPResNet(
        layers=[3, 6, 6, 3],
        channels=[64, 128, 256, 512, 1024],
        return_idx=[1, 2, 3],
        use_large_stem=True,
        **scaled,
    )
    neck = modeling.CustomCSPPAN(
        in_channels=[shape.channels for shape in backbone.out_shape],
        out_channels=[768, 384, 192],
        stage_num=1,
        block_num=3,
        act="swish",
        spp=True,
        **scaled,
    )
    head = modeling.PPYOLOEHead(
        in_channels=[shape.channels for shape in neck.out_shape],
        num_classes=CLASSES,
        fpn_strides=[32, 16, 8],
        eval_size=[peer.size, peer.size],
        exclude_nms=True,
        trt=True,
        nms=None,
    )
    model = modeling.YOLOv3(backbone, neck, head, post_process=None)
    model.eval()
    for layer in model.sublayers():
        if hasattr(layer, "convert_to_deploy"):
            layer.convert_to_deploy()
    inputs = {
        "image": [batch, 3, peer.size, peer.size],
        "scale_factor": [batch, 2],
    }
    spec = [{name: paddle.static.InputSpec(shape, name=name) for name, shape in inputs.items()}]
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "model"
        paddle.jit.save(paddle.jit.to_static(model, input_spec=spec), str(stem))
        import_module("paddle2onnx").export(
            f"{stem}.pdmodel", f"{stem}.pdiparams", f"{stem}.onnx", opset_version=11
        )
        return constants_as_initializers(onnx.load(f"{stem}.onnx"))


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("yolov5-n", 640, 1.9, yolov5, "yolov5n"),
        Peer("yolov5-s", 640, 7.2, yolov5, "yolov5s"),
        Peer("yolov5-m", 640, 21.2, yolov5, "yolov5m"),
        Peer("yolov5-l", 640, 46.5, yolov5, "yolov5l"),
        Peer("yolox-tiny", 416, 5.1, yolox, "yolox-tiny"),
        Peer("yolox-s", 640, 9.0, yolox, "yolox-s"),
        Peer("yolox-m", 640, 25.3, yolox, "yolox-m"),
        Peer("yolox-l", 640, 54.2, yolox, "yolox-l"),
        Peer("ppyoloe-s", 640, 7.9, ppyoloe, "s"),
        Peer("ppyoloe-m", 640, 23.4, ppyoloe, "m"),
        Peer("ppyoloe-l", 640, 52.2, ppyoloe, "l"),
        Peer("yolov7-tiny-416", 416, 6.2, yolov7, "yolov7-tiny"),
        Peer("yolov7-tiny", 640, 6.2, yolov7, "yolov7-tiny"),
        Peer("yolov7", 640, 36.9, yolov7, "yolov7"),
    )
}


def load(path: str | Path, seed: int = 0) -> onnx.ModelProto:
    """Read a skeleton and fill it with random weights, always the same for the same seed."""
    return with_random_weights(onnx.load(str(path)), seed)


def skeletons(peer: Peer, batches: Sequence[int]) -> dict[int, onnx.ModelProto]:
    """Export a peer and return its skeleton for each batch size.

    Raises:
        MissingDependencyError: its package is not installed.
    """
    one = peer.export(peer, 1)
    onnx.checker.check_model(one)
    two = peer.export(peer, 2) if set(batches) - {1} else one
    settled_one = settled(one)
    return {
        batch: skeleton(settled_one if batch == 1 else at_batch(settled_one, two, batch))
        for batch in batches
    }


def largest_output(model: onnx.ModelProto, seed: int = 0) -> float:
    """Run a model once on a random image and return its outputs' largest magnitude.

    Raises:
        UserError: an output is not finite.
    """
    session = reference_session(model)
    generator = np.random.default_rng(seed)
    outputs = session.run(
        None,
        {
            item.name: generator.random(item.shape, np.float32)
            if len(item.shape) == 4
            else np.ones(item.shape, np.float32)
            for item in session.get_inputs()
        },
    )
    if not all(np.isfinite(output).all() for output in outputs):
        raise UserError("the graph's outputs are not finite; draw its weights with another seed.")
    return max(float(np.abs(output).max()) for output in outputs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the skeletons of the peers named; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {list(PEERS)}")
    parser.add_argument("--output", type=Path, required=True, help="folder for the skeletons")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="(1 32)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in PEERS]
    if unknown:
        print(f"peers: there is no {unknown[0]!r}; take some of {list(PEERS)}.", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in options.names or PEERS:
        peer = PEERS[name]
        try:
            made = skeletons(peer, options.batch)
            for batch, graph in made.items():
                filled = with_random_weights(graph)
                onnx.checker.check_model(filled)
                largest = largest_output(filled) if batch == min(options.batch) else None
                write_bytes(options.output / f"{name}.b{batch}.onnx", graph.SerializeToString())
                checked = "" if largest is None else f", outputs up to {largest:.3g}"
                print(
                    f"{name}, batch {batch}: {parameters(graph) / 1e6:.2f} M parameters (paper "
                    f"{peer.millions}), {len(graph.graph.node)} nodes, opset "
                    f"{graph.opset_import[0].version}, {graph.ByteSize() / 1024:.0f} KiB{checked}",
                    flush=True,
                )
        except UserError as error:
            failed = True
            print(f"peers: {name}: {error}", file=sys.stderr)
    return 2 if failed else 0


def _package(module: str, requirement: str) -> Any:
    if find_spec(module) is None:
        raise MissingDependencyError(
            f"the module {module!r} is not installed; pip install {requirement}, in an environment "
            "of its own."
        )
    return import_module(module)


def _traced(model: Any, peer: Peer, batch: int, output: str, opset: int) -> onnx.ModelProto:
    """Export a PyTorch model by tracing, as all three families' tools do."""
    import torch

    images = torch.zeros(batch, 3, peer.size, peer.size)
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.no_grad(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        path = Path(folder) / "peer.onnx"
        model(images[:1])  # heads remember their grids
        torch.onnx.export(
            model,
            (images,),
            path,
            input_names=["images"],
            output_names=[output],
            opset_version=opset,
            do_constant_folding=True,
            dynamo=False,
        )
        return onnx.load(path)


if __name__ == "__main__":
    sys.exit(main())
