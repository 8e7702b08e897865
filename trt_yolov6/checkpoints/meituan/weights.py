"""Load a file's weights into a network, each block in the form that it has in the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trt_yolov6.checkpoints.inert_pickle import damaged
from trt_yolov6.checkpoints.meituan.recognition import (
    ACTIVATION_KEYS,
    activation_of,
    lite_stage,
    neck_stacks,
    pooling_prefix,
    predictions,
)
from trt_yolov6.checkpoints.meituan.tree import Tree
from trt_yolov6.models.blocks import (
    ACTIVATIONS,
    ConvAct,
    ConvBN,
    QARepConv,
    RepConv,
    ScaledRepConv,
    mbla_rows,
)
from trt_yolov6.models.fusion import fuse_normalization
from trt_yolov6.models.network import YOLOv6, shapes_only
from trt_yolov6.models.variants import Architecture

_BINS = ("detect.proj", "detect.proj_conv.weight")
"""Constants of the head: the distances that its bins stand for. Without DFL they mean nothing."""


class _Unit(NamedTuple):
    """A block or convolution: its name here and the authors'."""

    own: str
    theirs: str
    parts: tuple[str, str, str] | None = None
    """Names of convolution, normalization and activation, where they are not the usual ones."""


def read_network(tree: Tree, arch: Architecture) -> YOLOv6:
    """Return a file's network, in eval mode, without parts that only training needs.

    Raises:
        UserError: weights are missing, or the architecture has no place for some.
    """
    model = shapes_only(arch)
    _check_bins(tree, arch)
    modules = dict(model.named_modules())
    reader = _Reader(tree)
    for unit in _units(tree, arch):
        parent, _, name = unit.own.rpartition(".")
        setattr(modules[parent], name, reader.unit(modules[unit.own], unit))
        if name == "first":
            # A bottleneck's shortcut has a weight.
            bottleneck = unit.theirs.rpartition(".")[0]
            modules[parent].register_parameter("alpha", reader.take(f"{bottleneck}.alpha", (1,)))
    only_trained = tuple(f"detect.{name}." for name in predictions(tree).for_training)
    surplus = sorted(
        key for key in tree.tensors.keys() - reader.used if not key.startswith(only_trained)
    )
    if surplus:
        raise tree.unknown(f"weights that are not known (the first is {surplus[0]})")
    return model.eval()


def _check_bins(tree: Tree, arch: Architecture) -> None:
    for key in _BINS:
        bins = tree.tensors.get(key)
        if arch.reg_max and bins is not None:
            expected = torch.arange(arch.reg_max + 1, dtype=bins.dtype)
            if not torch.equal(bins.flatten(), expected):
                raise tree.unknown(f"other distance bins ({key})")


# Names.


def _units(tree: Tree, arch: Architecture) -> Iterator[_Unit]:
    lite = arch.neck == "lite"
    yield from _lite_units(arch) if lite else _rep_units(tree, arch)
    head = predictions(tree)
    for index in range(len(arch.strides)):
        own = f"head.levels.{index}"
        for name in ("stem", "cls_conv", "reg_conv"):
            unit = _Unit(f"{own}.{name}", f"detect.{name}s.{index}")
            yield from _pair(unit.own, unit.theirs) if lite else (unit,)
        yield _Unit(f"{own}.cls_pred", f"detect.{head.classes}.{index}")
        yield _Unit(f"{own}.reg_pred", f"detect.{head.boxes}.{index}")
        if arch.head == "offset":
            yield _Unit(f"{own}.obj_pred", f"detect.obj_preds.{index}")


_POOLING = {
    "sppf": {"reduce": "cv1", "merge": "cv2"},
    "cspsppf": {
        "reduce": "cv1",
        "side": "cv2",
        "before": "cv3",
        "mix": "cv4",
        "merge": "cv5",
        "after": "cv6",
        "join": "cv7",
    },
}
_BIFUSION = {
    "up": "upsample.upsample_transpose",
    "same": "cv1",
    "finer": "cv2",
    "down": "downsample",
    "merge": "cv3",
}


def _renamed(own: str, theirs: str, names: dict[str, str]) -> Iterator[_Unit]:
    for name, other in names.items():
        yield _Unit(f"{own}.{name}", f"{theirs}.{other}")


def _rep_units(tree: Tree, arch: Architecture) -> Iterator[_Unit]:
    top = len(arch.stage_channels)
    yield _Unit("backbone.stem", "backbone.stem")
    for index, repeats in enumerate(arch.stage_repeats):
        own, theirs = f"backbone.stages.{index}", f"backbone.ERBlock_{index + 2}"
        yield _Unit(f"{own}.downsample", f"{theirs}.0")
        yield from _stack_units(arch, f"{own}.body", f"{theirs}.1", repeats)
    pooling = pooling_prefix(tree, top)
    yield from _renamed("backbone.sppf", pooling, _POOLING[arch.pooling])

    for index, level in enumerate(range(top, 3, -1)):
        yield _Unit(f"neck.lateral{level}", f"neck.reduce_layer{index}")
        if arch.neck == "bifusion":
            yield from _renamed(f"neck.fuse{level}", f"neck.Bifusion{index}", _BIFUSION)
        else:
            yield _Unit(f"neck.up{level}", f"neck.upsample{index}.upsample_transpose")
    for index, level in enumerate(range(3, top)):
        yield _Unit(f"neck.down{level}", f"neck.downsample{2 - index}")
    own_stacks = (
        *(f"neck.topdown{level - 1}" for level in range(top, 3, -1)),
        *(f"neck.bottomup{level + 1}" for level in range(3, top)),
    )
    for own, theirs, repeats in zip(own_stacks, neck_stacks(top), arch.neck_repeats, strict=True):
        yield from _stack_units(arch, own, f"neck.{theirs}", repeats)


def _stack_units(arch: Architecture, own: str, theirs: str, repeats: int) -> Iterator[_Unit]:
    if arch.stack == "plain":
        yield from (_Unit(*names) for names in _chain(own, theirs, repeats))
        return
    if arch.stack == "csp":
        names = {"main": "cv1", "side": "cv2", "merge": "cv3"}
        bottlenecks = list(_chain(f"{own}.bottlenecks", f"{theirs}.m", repeats))
    else:
        names = {"split": "cv1", "merge": "cv2"}
        bottlenecks = [
            (f"{own}.rows.{row}.{index}", f"{theirs}.m.{row}.{index}")
            for row, length in enumerate(mbla_rows(repeats))
            for index in range(length)
        ]
    yield from _renamed(own, theirs, names)
    blocks = {"first": "conv1", "second": "conv2"} | ({"third": "conv3"} if arch.mbla else {})
    for pair in bottlenecks:
        yield from _renamed(*pair, blocks)


def _chain(own: str, theirs: str, repeats: int) -> Iterator[tuple[str, str]]:
    yield f"{own}.0", f"{theirs}.conv1"
    for index in range(1, repeats):
        yield f"{own}.{index}", f"{theirs}.block.{index - 1}"


_EXCITE = {"excite.reduce": "se.conv1", "excite.expand": "se.conv2"}
_LITE_DOWN = {
    "first_depthwise": "conv_dw_1",
    "first_project": "conv_1",
    "expand": "conv_pw_2",
    "depthwise": "conv_dw_2",
    **_EXCITE,
    "project": "conv_2",
    "mix_depthwise": "conv_dw_3",
    "mix": "conv_pw_3",
}
_LITE_BLOCK = {"expand": "conv_pw_1", "depthwise": "conv_dw_1", **_EXCITE, "project": "conv_1"}
_LITE_CSP = {"main": "conv_1", "side": "conv_2", "expand": "blocks.conv_1", "merge": "conv_3"}


def _lite_units(arch: Architecture) -> Iterator[_Unit]:
    yield _Unit("backbone.stem", "backbone.conv_0")
    for stage, repeats in enumerate(arch.stage_repeats):
        own, theirs = f"backbone.stages.{stage}", lite_stage(stage + 1)
        for index in range(repeats):
            names = _LITE_BLOCK if index else _LITE_DOWN
            yield from _renamed(f"{own}.{index}", f"{theirs}.{index}", names)
    for index in range(3):
        yield _Unit(f"neck.lateral{5 - index}", f"neck.reduce_layer{index}")
    for own, theirs in (
        ("topdown4", "Csp_p4"),
        ("topdown3", "Csp_p3"),
        ("bottomup4", "Csp_n3"),
        ("bottomup5", "Csp_n4"),
    ):
        yield from _renamed(f"neck.{own}", f"neck.{theirs}", _LITE_CSP)
        yield from _pair(f"neck.{own}.pair", f"neck.{theirs}.blocks.conv_2")
    for own, theirs in (
        ("down3", "downsample2"),
        ("down4", "downsample1"),
        ("lateral_down5", "p6_conv_1"),
        ("down5", "p6_conv_2"),
    ):
        yield from _pair(f"neck.{own}", f"neck.{theirs}")


def _pair(own: str, theirs: str) -> Iterator[_Unit]:
    yield _Unit(f"{own}.depthwise", theirs, ("conv_dw_1", "bn_1", "act_1"))
    yield _Unit(f"{own}.pointwise", theirs, ("conv_pw_1", "bn_2", "act_2"))


# Weights.


class _Reader:
    """Fills modules that have no data yet with a file's weights, and notes which it used."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.used = set(_BINS)

    def unit(self, expected: nn.Module, unit: _Unit) -> nn.Module:
        """Return a block of the file; `expected` says what belongs in its place."""
        theirs = unit.theirs
        match expected:
            case nn.Conv2d() | nn.ConvTranspose2d():
                self._convolution(expected, theirs, bias=True)
                return expected
            case RepConv():
                self._check_block(expected.act, theirs, "RepVGGBlock")
                return self._rep(expected, theirs)
            case QARepConv():
                self._check_block(expected.act, theirs, "QARepVGGBlockV2")
                return self._qarep(expected, theirs)
            case ScaledRepConv():
                self._check_block(expected.act, theirs, "LinearAddBlock")
                return self._scaled(expected, theirs)
        assert isinstance(expected, ConvBN)
        if unit.parts is not None:
            conv, bn, act = unit.parts
            self._check_activation(expected.act, theirs, (act,))
            return self._conv_bn(expected, theirs, conv, bn)
        self._check_activation(expected.act, theirs)
        inner = f"{theirs}.block" if f"{theirs}.block.conv" in self._tree else theirs
        return self._conv_bn(expected, inner)

    def take(self, key: str, shape: Sequence[int]) -> nn.Parameter:
        """Return a weight of the shape given, or refuse the file."""
        return nn.Parameter(self._tensor(key, shape))

    def _rep(self, block: RepConv, theirs: str) -> nn.Module:
        merged = f"{theirs}.rbr_reparam"
        if merged in self._tree:
            self._convolution(block.dense.conv, merged, bias=True)
            return ConvAct(block.dense.conv, block.act)
        assert isinstance(block.dense, ConvBN)
        assert isinstance(block.pointwise, ConvBN)
        # The authors' 0.4 first folds the normalization of these two branches, then merges.
        block.dense = self._conv_bn(block.dense, f"{theirs}.rbr_dense")
        block.pointwise = self._conv_bn(block.pointwise, f"{theirs}.rbr_1x1")
        if block.identity is not None:
            self._normalization(block.identity, f"{theirs}.rbr_identity")
        return block

    def _qarep(self, block: QARepConv, theirs: str) -> nn.Module:
        self._normalization(block.bn, f"{theirs}.bn")
        merged = f"{theirs}.rbr_reparam"
        if merged in self._tree:
            # The authors leave the normalization of the sum after the merged convolution.
            conv = block.dense.conv
            self._convolution(conv, merged, bias=True)
            return fuse_normalization(conv, block.bn, block.act)
        assert isinstance(block.dense, ConvBN)
        block.dense = self._conv_bn(block.dense, f"{theirs}.rbr_dense")
        self._convolution(block.pointwise, f"{theirs}.rbr_1x1", bias=False)
        return block

    def _scaled(self, block: ScaledRepConv, theirs: str) -> nn.Module:
        names = {
            "dense": "conv",
            "pointwise": "conv_1x1",
            "dense_scale": "scale_conv",
            "pointwise_scale": "scale_1x1",
            "identity_scale": "scale_identity",
        }
        for own, expected in list(block.named_parameters(recurse=False)):
            weight = self.take(f"{theirs}.{names[own]}.weight", expected.shape)
            block.register_parameter(own, weight)
        self._normalization(block.bn, f"{theirs}.bn")
        return block

    def _conv_bn(
        self, block: ConvBN, theirs: str, conv: str = "conv", bn: str = "bn"
    ) -> ConvBN | ConvAct:
        """Read a convolution and its normalization, or one that has it folded in.

        A bias before a normalization has no effect, and releases differ in having one. The
        architecture decides: a superfluous bias is merged into the mean, a missing one is zero.
        """
        conv, bn = f"{theirs}.{conv}", f"{theirs}.{bn}"
        bias = f"{conv}.bias" in self._tree.tensors
        if bn not in self._tree:
            self._convolution(block.conv, conv, bias=True)
            return ConvAct(block.conv, block.act)
        needs_bias = block.conv.bias is not None
        self._convolution(block.conv, conv, bias=bias)
        self._normalization(block.bn, bn)
        if bias and not needs_bias:
            assert block.conv.bias is not None
            assert block.bn.running_mean is not None
            block.bn.running_mean -= block.conv.bias.detach()
            block.conv.bias = None
        elif needs_bias and not bias:
            block.conv.bias = nn.Parameter(torch.zeros(block.conv.out_channels))
        return block

    def _convolution(
        self, conv: nn.Conv2d | nn.ConvTranspose2d, theirs: str, *, bias: bool
    ) -> None:
        stated = self._tree.attributes.get(theirs, {})
        for name in ("stride", "padding", "dilation", "groups"):
            if name in stated and stated[name] != getattr(conv, name):
                raise self._tree.unknown(f"another {name} at {theirs}")
        conv.weight = self.take(f"{theirs}.weight", conv.weight.shape)
        conv.bias = self.take(f"{theirs}.bias", (conv.out_channels,)) if bias else None

    def _normalization(self, bn: nn.BatchNorm2d, theirs: str) -> None:
        stated = self._tree.attributes.get(theirs, {})
        bn.eps = stated.get("eps", bn.eps)
        bn.momentum = stated.get("momentum", bn.momentum)
        if not all(isinstance(value, float) and 0 < value < 1 for value in (bn.eps, bn.momentum)):
            raise self._tree.unknown(f"an odd batch normalization at {theirs}")
        shape = (bn.num_features,)
        bn.weight = self.take(f"{theirs}.weight", shape)
        bn.bias = self.take(f"{theirs}.bias", shape)
        bn.running_mean = self._tensor(f"{theirs}.running_mean", shape)
        bn.running_var = self._tensor(f"{theirs}.running_var", shape)
        bn.num_batches_tracked = torch.tensor(0)
        if bn.running_var.min() < 0:
            raise damaged(self._tree.path, f"{theirs} has a negative variance")

    def _tensor(self, key: str, shape: Sequence[int]) -> Tensor:
        tensor = self._tree.tensor(key)
        if tuple(tensor.shape) != tuple(shape):
            raise self._tree.unknown(
                f"{key} of shape {tuple(tensor.shape)} in place of {tuple(shape)}"
            )
        self.used.add(key)
        return tensor

    def _check_block(self, act: nn.Module, theirs: str, expected: str) -> None:
        kind = self._tree.class_of(theirs)
        if kind != expected:
            raise self._tree.unknown(f"a block of class {kind} at {theirs}")
        self._check_activation(act, theirs)

    def _check_activation(
        self, expected: nn.Module, theirs: str, keys: tuple[str, ...] = ACTIVATION_KEYS
    ) -> None:
        if isinstance(expected, nn.Identity):
            if any(f"{theirs}.{key}" in self._tree for key in keys):
                raise self._tree.unknown(f"an activation at {theirs}")
            return
        name = activation_of(self._tree, theirs, keys)
        if not isinstance(expected, ACTIVATIONS[name]):
            raise self._tree.unknown(f"another activation at {theirs} ({name})")
