"""RepOptimizer: a plain network trained as if it had the branches of RepVGG (paper, 2.5.1).

After Ding et al., "Re-parameterizing Your Optimizers rather than Architectures" (arXiv 2205.15242):

    hyper-search network ──scales──▶ initial kernels     of the single-branch network
    (blocks `scaled`)               gradient multipliers of its optimizer

With scales s (3x3), t (1x1) and c (identity) a channel, the branches add up to one kernel
W = s K3 + t K1 + diag(c). A step of SGD on K3, K1 and c, the scales s and t being constants, moves
W by the gradient of W times s² everywhere, plus t² in the centre, plus 1 on the centre's diagonal.
Weight decay shrinks all three parts alike, and so W; momentum is a sum of past steps, and so is
linear too. Hence: multiply the gradient, then apply decay and momentum as usual. The result is the
trajectory of the branches up to rounding, without branches in training or deployment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trt_yolov6.checkpoints.loading import Checkpoint
from trt_yolov6.common.ranges import Checked, Count
from trt_yolov6.errors import UserError
from trt_yolov6.models.blocks import ScaledRepConv
from trt_yolov6.models.network import YOLOv6

_MULTIPLIER = "multiplier"
"""Name of the multipliers in an optimizer's state."""


@dataclass(frozen=True)
class RepOptimizerSettings(Checked):
    """Source of the scales: a finished search, or one that the training begins with."""

    scales: str | None = None
    """Checkpoint of a hyper-search network; None: search for them first."""
    search_epochs: Count | None = None
    """Length of the search; None: as long as the training itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scales is not None and self.search_epochs is not None:
            raise UserError(
                f"the scales are there already, in {self.scales}; leave `search_epochs` out."
            )


def scaled_blocks(model: nn.Module) -> dict[str, ScaledRepConv]:
    """Return the blocks of a hyper-search network that have scales, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, ScaledRepConv)
    }


@torch.no_grad()
def copy_scales(source: nn.Module, target: nn.Module) -> None:
    """Give a hyper-search network the scales of another one of the same blocks."""
    given = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name.endswith("_scale"):
            parameter.copy_(given[name])


def check_scales(checkpoint: Checkpoint) -> None:
    """Raise UserError for a checkpoint that is not a hyper-search network."""
    if checkpoint.arch.block != "scaled":
        raise UserError(
            f"{checkpoint.path} is not a hyper-search network and has no scales; give "
            "`rep_optimizer` without a file to search for them, or a checkpoint trained with "
            "`block` scaled.",
        )


def gradient_multipliers(search: YOLOv6) -> dict[str, Tensor]:
    """Return the factors for the gradients of `models.single_branch(search)`.

    For the kernel of each block, by the parameter's name: (out, in, 3, 3), positive.
    """
    return {
        f"{name}.conv.weight": gradient_multiplier(block)
        for name, block in scaled_blocks(search).items()
    }


def gradient_multiplier(block: ScaledRepConv) -> Tensor:
    """Return the multipliers of one block (arXiv 2205.15242, Section 3): (out, in, 3, 3).

    s² everywhere, plus t² in the centre, plus 1 on the centre's diagonal with an identity branch,
    whose only parameter is its scale.
    """
    with torch.no_grad():
        result = block.dense_scale.square()[:, None, None, None].expand_as(block.dense).clone()
        centre = result[:, :, 1, 1]
        centre += block.pointwise_scale.square()[:, None]
        if block.identity_scale is not None:
            centre.diagonal().add_(1)
    return result


def reparameterize(optimizer: torch.optim.SGD, multipliers: Mapping[nn.Parameter, Tensor]) -> None:
    """Turn plain SGD into RepOptimizer: every step first multiplies the gradients, in place.

    Gradients are what has been added up and averaged over processes by then. The multipliers, of
    the parameters' shapes, are a part of the optimizer's state: saved and restored with it.
    """
    for parameter, value in multipliers.items():
        # In the layout of the parameter, so that one kernel multiplies all gradients.
        optimizer.state[parameter][_MULTIPLIER] = torch.empty_like(parameter).copy_(value).detach()
    optimizer.register_step_pre_hook(_multiply)


@torch.no_grad()
def _multiply(optimizer: torch.optim.Optimizer, _args: Any, _options: Any) -> None:
    gradients, multipliers = [], []
    for parameter, state in optimizer.state.items():
        if _MULTIPLIER in state and parameter.grad is not None:
            gradients.append(parameter.grad)
            multipliers.append(state[_MULTIPLIER])
    if gradients:
        torch._foreach_mul_(gradients, multipliers)
