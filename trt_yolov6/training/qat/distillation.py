"""Channel-wise distillation: each channel's spatial distribution, whatever its magnitude.

Shu et al., "Channel-wise knowledge distillation for dense prediction" (ICCV 2021, arXiv 2011.13256,
equations 2 to 4), which the paper takes for quantization-aware training (Section 2.5.3, Fig. 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

FAINTEST = 0.02
"""Least spread that a channel counts in, as a part of its root mean square: what varies less is
noise of the arithmetic, and would be blown up."""


def channel_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, *, relative: bool = False
) -> Tensor:
    """Return T² KL(p_t || p_s), averaged over images and channels.

    p is the softmax over a channel's positions of activation / T, so the divergence does not see a
    constant added to a channel. The factor keeps the size of gradients as T changes.

    Args:
        student: float (batch, channels, h, w).
        teacher: the same; gets no gradient.
        temperature: T, above zero; a larger one gives weak responses more weight.
        relative: activations count in standard deviations of the teacher's channel over the batch.
            The divergence then is the same however channels are rescaled.

    Returns:
        float32 (), zero or above.
    """
    with torch.autocast(student.device.type, enabled=False):
        own, guide = student.float(), teacher.detach().float()
        if relative:
            axes = (0, 2, 3)
            deviation = guide.std(axes, correction=0, keepdim=True)
            least = FAINTEST * guide.square().mean(axes, keepdim=True).sqrt()
            deviation = torch.maximum(deviation, least)
            deviation = torch.where(deviation > 0, deviation, 1.0)
            own, guide = own / deviation, guide / deviation
        own = (own.flatten(2) / temperature).log_softmax(2)
        guide = (guide.flatten(2) / temperature).log_softmax(2)
        each = (guide.exp() * (guide - own)).sum(2)
        return temperature**2 * each.mean()
