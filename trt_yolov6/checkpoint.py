"""Checkpoints in, as networks of `trt_yolov6.models`: the authors' (v0.1 to v0.2.1) and our own.

Our own format is in `trained_checkpoint`; the rest of this file is about the authors'. Theirs is a
pickled tree of modules, in half precision, in training form or fused. It is read
without running any of it (see `inert_pickle`), and what it is follows from its shapes and class
names alone. Nothing outside this file knows the authors' names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from trt_yolov6.coco_names import COCO_NAMES
from trt_yolov6.errors import UserError
from trt_yolov6.inert_pickle import Shell
from trt_yolov6.models.blocks import ConvAct, ConvBN, RepConv, activation
from trt_yolov6.models.network import YOLOv6
from trt_yolov6.models.variants import (
    ActivationName,
    Architecture,
    BlockKind,
    HeadKind,
    variant_name,
)
from trt_yolov6.torch_archive import TorchArchive
from trt_yolov6.trained_checkpoint import Training, is_trained, read_trained

_Conv = TypeVar("_Conv", nn.Conv2d, nn.ConvTranspose2d)

SUPPORTED = "this version reads v0.1 to v0.2.1"


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what its file says about it."""

    model: YOLOv6
    """In eval mode, float32, in the form that the file has."""
    arch: Architecture
    class_names: tuple[str, ...]
    path: Path
    form: Literal["training", "fused", "mixed"]
    """`training`: all batch normalizations are there; `fused`: none is."""
    training: Training | None = None
    """How it was trained, where this package trained it."""


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of this package's training, or of the authors' code, v0.1 to v0.2.1.

    Raises:
        UserError: the file is missing, damaged, hostile or holds something else.
    """
    with TorchArchive(Path(path)) as archive:
        if is_trained(archive.root):
            own, names, training = read_trained(archive)
            return Checkpoint(own, own.arch, names, archive.path, _form(own), training)
        root = _model_shell(archive)
        tree = _flatten(archive, root)
    _refuse_later_releases(tree)
    arch = _recognize(tree)
    model = _convert(tree, arch)
    return Checkpoint(
        model=model,
        arch=arch,
        class_names=_class_names(archive, root, arch.num_classes),
        path=archive.path,
        form=_form(model),
    )


# What the file holds: finding the network in it and flattening its modules.


@dataclass(frozen=True)
class _Tree:
    """A pickled module tree, flattened; keys are dotted paths as in a state dict."""

    path: Path
    tensors: dict[str, Tensor]
    classes: dict[str, str]
    """Class name of each module, without its package."""
    attributes: dict[str, dict[Any, Any]]

    def tensor(self, key: str) -> Tensor:
        """Return a weight, or refuse the file that lacks it."""
        if key not in self.tensors:
            raise UserError(
                f"{self.path} holds no YOLOv6 network that is known: {key} is missing; {SUPPORTED}."
            )
        return self.tensors[key]

    def class_of(self, prefix: str) -> str:
        """Return the class name of a module, or refuse the file that lacks it."""
        if prefix not in self.classes:
            raise UserError(
                f"{self.path} holds no YOLOv6 network that is known: {prefix} is missing; "
                f"{SUPPORTED}."
            )
        return self.classes[prefix]


def _model_shell(archive: TorchArchive) -> Shell:
    """Return the network in the file: the moving average of the weights where there is one."""
    root = archive.root
    candidates = [root]
    if isinstance(root, dict):
        candidates = [root.get("ema"), root.get("model")]
    for candidate in candidates:
        if isinstance(candidate, Shell) and not archive.is_tensor(candidate):
            if candidate.origin.startswith("yolov6."):
                return candidate
            raise UserError(
                f"{archive.path} holds {candidate.origin[:80]}, not a YOLOv6; "
                "give a checkpoint of YOLOv6 v0.1 to v0.2.1."
            )
    values = candidates + (list(root.values()) if isinstance(root, dict) else [])
    values += [item for value in values if isinstance(value, dict) for item in value.values()]
    if any(archive.is_tensor(value) for value in values):
        raise UserError(
            f"{archive.path} holds a state dict, weights without their network; "
            "give the checkpoint that YOLOv6's training or release wrote."
        )
    raise UserError(f"{archive.path} holds no network; give a checkpoint of YOLOv6 v0.1 to v0.2.1.")


def _flatten(archive: TorchArchive, root: Shell) -> _Tree:
    tree = _Tree(archive.path, {}, {}, {})
    pending: list[tuple[str, Any, int]] = [("", root, 0)]
    while pending:
        prefix, shell, depth = pending.pop()
        state = shell.state if isinstance(shell, Shell) else None
        # A hostile tree may contain itself.
        if not isinstance(state, dict) or depth > 16 or len(tree.classes) > 20_000:
            raise UserError(
                f"{tree.path} is damaged: {prefix or 'its network'} is not a module; "
                "copy or download it again."
            )
        assert isinstance(shell, Shell)
        tree.classes[prefix] = shell.origin.rpartition(".")[2]
        tree.attributes[prefix] = state
        for group in ("_parameters", "_buffers"):
            for name, value in _named(state, group):
                key = f"{prefix}.{name}" if prefix else name
                tree.tensors[key] = _finite(tree.path, key, archive.tensor(value))
        for name, child in _named(state, "_modules"):
            pending.append((f"{prefix}.{name}" if prefix else name, child, depth + 1))
    return tree


def _named(state: dict[Any, Any], group: str) -> Iterator[tuple[str, Shell]]:
    """Yield what a module registered under a name; empty places (None) are left out."""
    members = state.get(group)
    if isinstance(members, dict):
        for name, value in members.items():
            if isinstance(name, str) and isinstance(value, Shell):
                yield name, value


def _finite(path: Path, key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{path} has weights that are not finite numbers ({key}); its training diverged or "
            "overflowed half precision: use another checkpoint."
        )
    return tensor


def _class_names(archive: TorchArchive, root: Shell, count: int) -> tuple[str, ...]:
    names = root.state.get("names")
    if names is None and isinstance(archive.root, dict):
        names = archive.root.get("names")
    if isinstance(names, dict):
        names = [names.get(index) for index in range(len(names))]
    if names is None:
        # The authors' releases are trained on COCO and carry no names.
        return COCO_NAMES if count == 80 else tuple(f"class_{index}" for index in range(count))
    if (
        not isinstance(names, list | tuple)
        or len(names) != count
        or not all(isinstance(name, str) for name in names)
    ):
        raise UserError(
            f"{archive.path} is damaged: its class names do not fit its {count} classes; "
            "copy or download it again."
        )
    return tuple(names)


# Which network it is: recognized from shapes and class names.

_LATER_CLASSES = {
    "Lite_EffiBackbone": "YOLOv6-lite",
    "Lite_EffiNeck": "YOLOv6-lite",
    "EfficientRep6": "P6 backbone",
    "CSPBepBackbone_P6": "P6 backbone",
    "BiFusion": "BiFusion neck",
    "RepBiFPANNeck": "BiFusion neck",
    "CSPRepBiFPANNeck": "BiFusion neck",
    "SimCSPSPPF": "SimCSPSPPF",
    "CSPSPPF": "CSPSPPF",
    "MBLABlock": "MBLA blocks",
    "QARepVGGBlock": "QARepVGG blocks",
}
_LATER_KEYS = {
    "detect.reg_preds_dist": "distillation head",
    "detect.cls_preds_ab": "anchor-aided head",
    "detect.reg_preds_ab": "anchor-aided head",
}
_ACTIVATIONS: dict[str, ActivationName] = {"ReLU": "relu", "SiLU": "silu"}
_BLOCKS: dict[str, BlockKind] = {
    "RepVGGBlock": "repvgg",
    "ConvWrapper": "conv",
    "SimConvWrapper": "conv",
    "RealVGGBlock": "conv",
}
# How the authors call the activation of a block, and its convolution while it has branches.
_ACTIVATION_KEYS = ("nonlinearity", "act", "block.act", "relu")
_WEIGHT_KEYS = ("rbr_reparam.weight", "rbr_dense.conv.weight", "conv.weight", "block.conv.weight")


def _refuse_later_releases(tree: _Tree) -> None:
    present = set(tree.classes.values())
    feature = next((_LATER_CLASSES[name] for name in _LATER_CLASSES if name in present), None)
    if feature is None:
        feature = next((_LATER_KEYS[key] for key in _LATER_KEYS if key in tree.classes), None)
    if feature is not None:
        raise UserError(
            f"{tree.path} holds a YOLOv6 0.3+ network ({feature}); {SUPPORTED}: give a checkpoint "
            "of one of these."
        )


def _recognize(tree: _Tree) -> Architecture:
    """Return the architecture that a file's shapes and class names imply."""
    first_stack = "backbone.ERBlock_2.1"
    csp_ratio = None
    if tree.class_of(first_stack) == "BepC3":
        csp_ratio = _out_channels(tree, f"{first_stack}.cv1") / _out_channels(
            tree, f"{first_stack}.cv3"
        )
    regression_channels = tree.tensor("detect.reg_preds.0.weight").shape[0]
    if regression_channels % 4:
        raise _unknown(tree, f"a head with {regression_channels} regression outputs")
    block = _BLOCKS.get(tree.class_of("backbone.stem"))
    if block is None:
        raise _unknown(tree, f"blocks of class {tree.class_of('backbone.stem')}")
    if tree.attributes.get("backbone.ERBlock_5.2.m", {}).get("kernel_size", 5) != 5:
        raise _unknown(tree, "another pooling size")
    head: HeadKind = "offset" if "detect.obj_preds" in tree.classes else "distance"

    def channels(prefix: str) -> int:
        return _out_channels(tree, prefix)

    def stack_channels(name: str) -> int:
        last = f"neck.{name}.cv3" if csp_ratio is not None else f"neck.{name}.conv1"
        return _out_channels(tree, last)

    def repeats(prefix: str) -> int:
        chain = f"{prefix}.m" if csp_ratio is not None else prefix
        block_list = f"{chain}.block."
        return 1 + sum(
            key.startswith(block_list) and "." not in key[len(block_list) :] for key in tree.classes
        )

    arch = Architecture(
        name="yolov6-custom",
        stage_channels=(
            channels("backbone.stem"),
            channels("backbone.ERBlock_2.0"),
            channels("backbone.ERBlock_3.0"),
            channels("backbone.ERBlock_4.0"),
            channels("backbone.ERBlock_5.0"),
        ),
        neck_channels=(
            channels("neck.reduce_layer0"),
            channels("neck.reduce_layer1"),
            channels("neck.downsample2"),
            stack_channels("Rep_n3"),
            channels("neck.downsample1"),
            stack_channels("Rep_n4"),
        ),
        stage_repeats=(
            repeats("backbone.ERBlock_2.1"),
            repeats("backbone.ERBlock_3.1"),
            repeats("backbone.ERBlock_4.1"),
            repeats("backbone.ERBlock_5.1"),
        ),
        neck_repeats=(
            repeats("neck.Rep_p4"),
            repeats("neck.Rep_p3"),
            repeats("neck.Rep_n3"),
            repeats("neck.Rep_n4"),
        ),
        block=block,
        csp_ratio=csp_ratio,
        activation=_activation(tree, "backbone.stem"),
        reg_max=regression_channels // 4 - 1,
        num_classes=tree.tensor("detect.cls_preds.0.weight").shape[0],
        head=head,
        head_activation=_activation(tree, "detect.stems.0"),
        input_channels=_weight(tree, "backbone.stem").shape[1],
    )
    return dataclasses.replace(arch, name=variant_name(arch))


def _weight(tree: _Tree, prefix: str) -> Tensor:
    """Return the main convolution's weight of a block in any form."""
    for key in _WEIGHT_KEYS:
        if f"{prefix}.{key}" in tree.tensors:
            return tree.tensors[f"{prefix}.{key}"]
    return tree.tensor(f"{prefix}.conv.weight")


def _out_channels(tree: _Tree, prefix: str) -> int:
    return _weight(tree, prefix).shape[0]


def _activation(tree: _Tree, prefix: str) -> ActivationName:
    for key in _ACTIVATION_KEYS:
        name = tree.classes.get(f"{prefix}.{key}")
        if name is not None:
            if name in _ACTIVATIONS:
                return _ACTIVATIONS[name]
            raise _unknown(tree, f"the activation {name}")
    raise _unknown(tree, f"no activation at {prefix}")


def _unknown(tree: _Tree, what: str) -> UserError:
    return UserError(
        f"{tree.path} holds a YOLOv6 with {what[:80]}, which is not supported; {SUPPORTED}."
    )


# Its weights, unit by unit: each block in the form that the file has it in.


_BINS = ("detect.proj", "detect.proj_conv.weight")
"""Constants of the head: the distances that its bins stand for. Without DFL they mean nothing."""


def _convert(tree: _Tree, arch: Architecture) -> YOLOv6:
    with torch.device("meta"):
        model = YOLOv6(arch)
    used = set(_BINS)
    for key in _BINS:
        bins = tree.tensors.get(key)
        if arch.reg_max and bins is not None:
            expected = torch.arange(arch.reg_max + 1, dtype=bins.dtype)
            if not torch.equal(bins.flatten(), expected):
                raise _unknown(tree, f"other distance bins ({key})")
    for own, theirs in _units(arch):
        parent, _, name = own.rpartition(".")
        unit = _read_unit(tree, model.get_submodule(own), theirs, used)
        setattr(model.get_submodule(parent), name, unit)
    for own, theirs in _shortcut_weights(arch):
        alpha = _take(tree, f"{theirs}.alpha", (1,), used)
        model.get_submodule(own).register_parameter("alpha", nn.Parameter(alpha))
    surplus = sorted(tree.tensors.keys() - used)
    if surplus:
        raise _unknown(tree, f"weights that are not known (the first is {surplus[0]})")
    return model.eval()


def _units(arch: Architecture) -> Iterator[tuple[str, str]]:
    """Yield, for each block and convolution, its name here and the authors' name."""
    yield "backbone.stem", "backbone.stem"
    for index, repeats in enumerate(arch.stage_repeats):
        own, theirs = f"backbone.stages.{index}", f"backbone.ERBlock_{index + 2}"
        yield f"{own}.downsample", f"{theirs}.0"
        yield from _stack_units(arch, f"{own}.body", f"{theirs}.1", repeats)
    yield "backbone.sppf.reduce", "backbone.ERBlock_5.2.cv1"
    yield "backbone.sppf.merge", "backbone.ERBlock_5.2.cv2"

    yield "neck.lateral5", "neck.reduce_layer0"
    yield "neck.up5", "neck.upsample0.upsample_transpose"
    yield "neck.lateral4", "neck.reduce_layer1"
    yield "neck.up4", "neck.upsample1.upsample_transpose"
    yield "neck.down3", "neck.downsample2"
    yield "neck.down4", "neck.downsample1"
    for own, theirs, repeats in _neck_stacks(arch):
        yield from _stack_units(arch, own, theirs, repeats)

    for index in range(3):
        for own, theirs in _HEAD_UNITS:
            if arch.head == "offset" or own != "obj_pred":
                yield f"head.levels.{index}.{own}", f"detect.{theirs}.{index}"


_HEAD_UNITS = (
    ("stem", "stems"),
    ("cls_conv", "cls_convs"),
    ("reg_conv", "reg_convs"),
    ("cls_pred", "cls_preds"),
    ("reg_pred", "reg_preds"),
    ("obj_pred", "obj_preds"),
)


def _neck_stacks(arch: Architecture) -> Iterator[tuple[str, str, int]]:
    names = (
        ("neck.topdown4", "neck.Rep_p4"),
        ("neck.topdown3", "neck.Rep_p3"),
        ("neck.bottomup4", "neck.Rep_n3"),
        ("neck.bottomup5", "neck.Rep_n4"),
    )
    for (own, theirs), repeats in zip(names, arch.neck_repeats, strict=True):
        yield own, theirs, repeats


def _stack_units(
    arch: Architecture, own: str, theirs: str, repeats: int
) -> Iterator[tuple[str, str]]:
    if arch.csp_ratio is None:
        yield from _chain(own, theirs, repeats)
        return
    yield f"{own}.main", f"{theirs}.cv1"
    yield f"{own}.side", f"{theirs}.cv2"
    yield f"{own}.merge", f"{theirs}.cv3"
    for pair in _chain(f"{own}.bottlenecks", f"{theirs}.m", repeats):
        yield f"{pair[0]}.first", f"{pair[1]}.conv1"
        yield f"{pair[0]}.second", f"{pair[1]}.conv2"


def _chain(own: str, theirs: str, repeats: int) -> Iterator[tuple[str, str]]:
    yield f"{own}.0", f"{theirs}.conv1"
    for index in range(1, repeats):
        yield f"{own}.{index}", f"{theirs}.block.{index - 1}"


def _shortcut_weights(arch: Architecture) -> Iterator[tuple[str, str]]:
    """Yield the bottlenecks, whose shortcut has a weight of its own, under both names."""
    if arch.csp_ratio is None:
        return
    for index, repeats in enumerate(arch.stage_repeats):
        own, theirs = f"backbone.stages.{index}.body", f"backbone.ERBlock_{index + 2}.1"
        yield from _chain(f"{own}.bottlenecks", f"{theirs}.m", repeats)
    for own, theirs, repeats in _neck_stacks(arch):
        yield from _chain(f"{own}.bottlenecks", f"{theirs}.m", repeats)


def _read_unit(tree: _Tree, expected: nn.Module, theirs: str, used: set[str]) -> nn.Module:
    """Return a block of the file; `expected` (without data) says what belongs in its place."""
    if isinstance(expected, nn.Conv2d):
        return _read_conv(tree, expected, theirs, used, bias=True)
    if isinstance(expected, nn.ConvTranspose2d):
        return _read_conv(tree, expected, theirs, used, bias=True)
    kind = tree.class_of(theirs)
    if isinstance(expected, RepConv):
        if kind != "RepVGGBlock":
            raise _unknown(tree, f"a block of class {kind} at {theirs}")
        act = _read_activation(tree, expected, theirs)
        if f"{theirs}.rbr_reparam" in tree.classes:
            fused = _read_conv(tree, expected.dense.conv, f"{theirs}.rbr_reparam", used, bias=True)
            return ConvAct(fused, act)
        rep = expected
        _read_conv_bn(tree, rep.dense, f"{theirs}.rbr_dense", used)
        _read_conv_bn(tree, rep.pointwise, f"{theirs}.rbr_1x1", used)
        if rep.identity is not None:
            rep.identity = _read_bn(tree, rep.identity, f"{theirs}.rbr_identity", used)
        return rep
    assert isinstance(expected, ConvBN)
    act = _read_activation(tree, expected, theirs)
    inner = f"{theirs}.block" if kind in ("ConvWrapper", "SimConvWrapper") else theirs
    if f"{inner}.bn" not in tree.classes:
        return ConvAct(_read_conv(tree, expected.conv, f"{inner}.conv", used, bias=True), act)
    _read_conv_bn(tree, expected, inner, used)
    return expected


def _read_activation(tree: _Tree, expected: ConvBN | RepConv, theirs: str) -> nn.Module:
    name = _activation(tree, theirs)
    if type(expected.act) is not type(activation(name)):
        raise _unknown(tree, f"several activations in one part (at {theirs})")
    return expected.act


def _read_conv_bn(tree: _Tree, block: ConvBN, theirs: str, used: set[str]) -> None:
    bias = f"{theirs}.conv.bias" in tree.tensors
    block.conv = _read_conv(tree, block.conv, f"{theirs}.conv", used, bias)
    block.bn = _read_bn(tree, block.bn, f"{theirs}.bn", used)


def _read_conv(tree: _Tree, expected: _Conv, theirs: str, used: set[str], bias: bool) -> _Conv:
    """Return a convolution of the kind and geometry of `expected` with the file's weights."""
    stated = tree.attributes.get(theirs, {})
    for name in ("stride", "padding", "dilation", "groups"):
        if name in stated and stated[name] != getattr(expected, name):
            raise _unknown(tree, f"another {name} at {theirs}")
    with torch.device("meta"):
        conv = type(expected)(
            expected.in_channels,
            expected.out_channels,
            expected.kernel_size,  # type: ignore[arg-type]  # PyTorch types it as any tuple
            expected.stride,  # type: ignore[arg-type]
            expected.padding,  # type: ignore[arg-type]
            bias=bias,
        )
    conv.weight = nn.Parameter(_take(tree, f"{theirs}.weight", conv.weight.shape, used))
    if bias:
        conv.bias = nn.Parameter(_take(tree, f"{theirs}.bias", (conv.out_channels,), used))
    return conv


def _read_bn(tree: _Tree, expected: nn.BatchNorm2d, theirs: str, used: set[str]) -> nn.BatchNorm2d:
    stated = tree.attributes.get(theirs, {})
    eps = stated.get("eps", expected.eps)
    momentum = stated.get("momentum", expected.momentum)
    if not all(isinstance(value, float) and 0 < value < 1 for value in (eps, momentum)):
        raise _unknown(tree, f"an odd batch normalization at {theirs}")
    bn = nn.BatchNorm2d(expected.num_features, eps=eps, momentum=momentum)
    shape = (expected.num_features,)
    bn.weight = nn.Parameter(_take(tree, f"{theirs}.weight", shape, used))
    bn.bias = nn.Parameter(_take(tree, f"{theirs}.bias", shape, used))
    bn.running_mean = _take(tree, f"{theirs}.running_mean", shape, used)
    bn.running_var = _take(tree, f"{theirs}.running_var", shape, used)
    assert bn.running_var is not None
    if (bn.running_var < 0).any():
        raise UserError(
            f"{tree.path} is damaged: {theirs} has a negative variance; copy or download it again."
        )
    used.add(f"{theirs}.num_batches_tracked")
    return bn


def _take(tree: _Tree, key: str, shape: tuple[int, ...], used: set[str]) -> Tensor:
    tensor = tree.tensor(key)
    if tuple(tensor.shape) != tuple(shape):
        raise _unknown(tree, f"{key} of shape {tuple(tensor.shape)} in place of {tuple(shape)}")
    used.add(key)
    return tensor


def _form(model: YOLOv6) -> Literal["training", "fused", "mixed"]:
    fused = any(isinstance(module, ConvAct) for module in model.modules())
    normalized = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if fused and normalized:
        return "mixed"
    return "fused" if fused else "training"
