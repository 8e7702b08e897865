"""Recognize the network in a file from shapes and class names alone."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trt_yolov6.checkpoints.meituan.tree import Tree
from trt_yolov6.errors import UserError
from trt_yolov6.models.blocks import mbla_rows
from trt_yolov6.models.variants import ActivationName, Architecture, BlockKind, variant_name

_ACTIVATIONS: dict[str, ActivationName] = {"ReLU": "relu", "SiLU": "silu", "Hardswish": "hardswish"}
_BLOCKS: dict[str, BlockKind] = {
    "RepVGGBlock": "repvgg",
    "QARepVGGBlockV2": "qarepvgg",
    "LinearAddBlock": "scaled",
    "RealVGGBlock": "conv",
    "ConvWrapper": "conv",
    "SimConvWrapper": "conv",
    "ConvBNReLU": "conv",
    "ConvBNSiLU": "conv",
}
_STACKS = {"RepBlock": "conv1", "BepC3": "cv3", "MBLABlock": "cv2"}
"""Kinds of stacks, and the last convolution of each."""
ACTIVATION_KEYS = ("nonlinearity", "act", "block.act", "relu")
"""The authors' names for a block's activation."""
# What they call its convolution in each of its forms.
_WEIGHT_KEYS = (
    "rbr_reparam.weight",
    "rbr_dense.conv.weight",
    "conv.weight",
    "block.conv.weight",
    "weight",
)

# Heads of the authors' other tasks predict more than boxes and classes.
_OTHER_TASKS = {
    "faces with landmarks": re.compile(r"face|lmk|ldmk|landm|keypoint|kpt"),
    "segmentation": re.compile(r"seg|proto|mask"),
}


@dataclass(frozen=True)
class Predictions:
    """Names of the head's predictions in a file: those used, and those that only train."""

    classes: str
    boxes: str
    for_training: tuple[str, ...]


def predictions(tree: Tree) -> Predictions:
    """Separate the decoded predictions from those of anchor-aided and distilled training.

    Mind that self-distillation of N and S swapped two names: `reg_preds` is trained with in 0.3.0,
    and is the prediction in 0.4.
    """
    aided = ("cls_preds_ab", "reg_preds_ab")
    if "detect.cls_preds_af" in tree:
        return Predictions("cls_preds_af", "reg_preds_af", aided)
    if "detect.reg_preds_lrtb" in tree:
        return Predictions("cls_preds", "reg_preds_lrtb", (*aided, "reg_preds"))
    return Predictions("cls_preds", "reg_preds", (*aided, "reg_preds_dist"))


def release(tree: Tree) -> str:
    """Return the release that wrote a file, such as `0.3`."""
    if any(origin.endswith(".ConvModule") for origin in tree.origins.values()):
        return "0.4"
    if "detect.obj_preds" in tree:
        return "0.1"
    later = ("neck.Bifusion0", "detect.cls_preds_af", "detect.reg_preds_lrtb")
    if any(name in tree for name in later) or "fuse_P2" in tree.attributes.get("backbone", {}):
        return "0.3"
    return "0.2"


def recognize(tree: Tree) -> Architecture:
    """Return the architecture that a file's shapes and class names imply.

    Raises:
        UserError: it is for another task, or has a part that no release has.
    """
    _refuse_other_tasks(tree)
    arch = _lite(tree) if "backbone.conv_0" in tree else _rep(tree)
    return dataclasses.replace(arch, name=variant_name(arch))


def _refuse_other_tasks(tree: Tree) -> None:
    head = "detect"
    parts = [tree.origins.get(name, "").lower() for name in ("", head)]
    parts += [name.split(".")[1] for name in tree.origins if name.startswith(f"{head}.")]
    for task, words in _OTHER_TASKS.items():
        found = next((part for part in parts if words.search(part)), None)
        if found is not None:
            raise UserError(
                f"{tree.path} is a YOLOv6 for {task} ({found[:60]}), which this version does not "
                "read; give a checkpoint that detects boxes only."
            )


def _rep(tree: Tree) -> Architecture:
    stages = _rep_stages(tree)
    top = stages[-1]
    block = _BLOCKS.get(tree.class_of("backbone.stem"))
    if block is None:
        raise tree.unknown(f"blocks of class {tree.class_of('backbone.stem')}")
    kind = tree.class_of("backbone.ERBlock_2.1")
    if kind not in _STACKS:
        raise tree.unknown(f"stacks of class {kind}")
    laterals = top - 3
    bifusion = "neck.Bifusion0" in tree
    if top == 6 and not bifusion:
        raise tree.lacks("neck.Bifusion0")
    pooling = pooling_prefix(tree, top)
    if tree.attributes.get(f"{pooling}.m", {}).get("kernel_size", 5) != 5:
        raise tree.unknown("another pooling size")
    down_names = [f"neck.downsample{index}" for index in reversed(range(3))][:laterals]
    stack_names = [f"neck.{name}" for name in neck_stacks(top)]
    neck = [f"neck.reduce_layer{index}" for index in range(laterals)]
    for down, stack in zip(down_names, stack_names[laterals:], strict=True):
        neck += [down, f"{stack}.{_STACKS[kind]}"]
    return Architecture(
        name="yolov6-custom",
        stage_channels=(
            _width(tree, "backbone.stem"),
            *(_width(tree, f"backbone.ERBlock_{stage}.0") for stage in stages),
        ),
        neck_channels=tuple(_width(tree, name) for name in neck),
        stage_repeats=tuple(
            _repeats(tree, kind, f"backbone.ERBlock_{stage}.1") for stage in stages
        ),
        neck_repeats=tuple(_repeats(tree, kind, name) for name in stack_names),
        block=block,
        csp_ratio=_csp_ratio(tree, kind),
        activation=activation_of(tree, "backbone.stem"),
        input_channels=_weight(tree, "backbone.stem").shape[1],
        neck="bifusion" if bifusion else "pan",
        pooling="cspsppf" if f"{pooling}.cv7" in tree else "sppf",
        mbla=kind == "MBLABlock",
        **_head_of(tree),
    )


def _rep_stages(tree: Tree) -> list[int]:
    """Return the numbers of the backbone's stages: 2 to 5, or to 6."""
    stages = [2]
    while f"backbone.ERBlock_{stages[-1] + 1}" in tree:
        stages.append(stages[-1] + 1)
    if stages[-1] < 5:
        raise tree.lacks(f"backbone.ERBlock_{stages[-1] + 1}")
    if stages[-1] > 6:
        raise tree.unknown(f"{stages[-1]} stages")
    return stages


def _csp_ratio(tree: Tree, kind: str) -> float | None:
    stack = "backbone.ERBlock_2.1"
    if kind == "BepC3":
        return _width(tree, f"{stack}.cv1") / _width(tree, f"{stack}.cv3")
    if kind == "MBLABlock":
        return _width(tree, f"{stack}.m.0.0.conv1") / _width(tree, f"{stack}.cv2")
    return None


def _repeats(tree: Tree, kind: str, prefix: str) -> int:
    """Return the number of blocks in a stack."""
    if kind == "MBLABlock":
        return _mbla_repeats(tree, prefix)
    chain = f"{prefix}.m" if kind == "BepC3" else prefix
    return 1 + _children(tree, f"{chain}.block")


def _lite(tree: Tree) -> Architecture:
    stages = range(1, 5)
    stem = "backbone.conv_0"
    ends = (stem, *(f"{lite_stage(index)}.0.conv_pw_3" for index in stages))
    channels = tuple(_width(tree, name) for name in ends)
    if any(width % 8 for width in channels):
        raise tree.unknown(f"stages of {channels} channels")
    return Architecture(
        name="yolov6-custom",
        stage_channels=channels,
        neck_channels=(_width(tree, "neck.reduce_layer0"),),
        stage_repeats=tuple(_children(tree, lite_stage(index)) for index in stages),
        neck_repeats=(),
        block="lite",
        csp_ratio=None,
        activation=activation_of(tree, stem),
        input_channels=_weight(tree, stem).shape[1],
        neck="lite",
        pooling="none",
        **_head_of(tree, ("act_1",)),
    )


def _head_of(tree: Tree, keys: tuple[str, ...] = ACTIVATION_KEYS) -> dict[str, Any]:
    """Return the fields of `Architecture` about the head, and the neck's activation."""
    head = predictions(tree)
    return {
        "reg_max": _reg_max(tree, head),
        "num_classes": _width(tree, f"detect.{head.classes}.0"),
        "head": "offset" if "detect.obj_preds" in tree else "distance",
        "head_activation": activation_of(tree, "detect.stems.0", keys),
        "neck_activation": activation_of(tree, "neck.reduce_layer0"),
    }


def lite_stage(index: int) -> str:
    """Return the name of one of Lite's stages, 1 to 4."""
    return f"backbone.lite_effiblock_{index}"


def neck_stacks(top: int) -> tuple[str, ...]:
    """Return the names of the neck's stacks along the neck, of a network with `top` stages."""
    if top == 5:
        return "Rep_p4", "Rep_p3", "Rep_n3", "Rep_n4"
    return "Rep_p5", "Rep_p4", "Rep_p3", "Rep_n4", "Rep_n5", "Rep_n6"


def pooling_prefix(tree: Tree, top: int) -> str:
    """Return the name of the module with the pooling's convolutions; 0.4 wraps it."""
    outer = f"backbone.ERBlock_{top}.2"
    inner = (f"{outer}.{name}" for name in ("sppf", "cspsppf"))
    return next((name for name in inner if name in tree), outer)


def activation_of(
    tree: Tree, prefix: str, keys: tuple[str, ...] = ACTIVATION_KEYS
) -> ActivationName:
    """Return the activation of a block, or refuse the file."""
    for key in keys:
        if f"{prefix}.{key}" in tree:
            name = tree.class_of(f"{prefix}.{key}")
            if name in _ACTIVATIONS:
                return _ACTIVATIONS[name]
            raise tree.unknown(f"the activation {name}")
    raise tree.unknown(f"no activation at {prefix}")


def _reg_max(tree: Tree, head: Predictions) -> int:
    """Return the largest distance bin; the file's own `reg_max` says 16 without any, too."""
    outputs = _width(tree, f"detect.{head.boxes}.0")
    if outputs % 4:
        raise tree.unknown(f"a head with {outputs} regression outputs")
    return outputs // 4 - 1


def _mbla_repeats(tree: Tree, prefix: str) -> int:
    lengths = tuple(
        _children(tree, f"{prefix}.m.{index}") for index in range(_children(tree, f"{prefix}.m"))
    )
    repeats = lengths[-1] if lengths else 0
    if not repeats or lengths != mbla_rows(repeats):
        raise tree.unknown(f"rows of {lengths} bottlenecks in {prefix}")
    return repeats


def _children(tree: Tree, prefix: str) -> int:
    """Return the number of numbered modules in a list; 0 without a list."""
    count = 0
    while f"{prefix}.{count}" in tree:
        count += 1
    return count


def _width(tree: Tree, prefix: str) -> int:
    """Return the number of output channels of a block."""
    return _weight(tree, prefix).shape[0]


def _weight(tree: Tree, prefix: str) -> Tensor:
    """Return the main convolution's weight of a block in any form: (out, in, height, width)."""
    keys = (f"{prefix}.{key}" for key in _WEIGHT_KEYS)
    key = next((key for key in keys if key in tree.tensors), f"{prefix}.conv.weight")
    weight = tree.tensor(key)
    if weight.ndim != 4 or not weight.numel():
        raise tree.unknown(f"{key} of shape {tuple(weight.shape)}")
    return weight
