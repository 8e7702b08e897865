"""A network in training whose passes are CUDA graphs: its kernels in two calls a step.

Without graphs, a step of N or S is bound by the CPU core that launches thousands of small kernels
from Python, whatever the images. A graph launches those of the forward pass in one call, and those
of the backward pass in another, with the same results to the last bit on one GPU. Augmentation,
losses and the optimizer are not captured: their shapes change from step to step.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn


def graphed(
    network: nn.Module, shape: tuple[int, int, int, int], autocast: torch.dtype | None
) -> nn.Module:
    """Capture a network's passes in training, in place; it takes images of that shape from then on.

    Gradients must be zeroed in place between steps (`zero_grad(set_to_none=False)`): a missing one
    would be placed in the graph's own memory, where the next backward pass would overwrite what has
    to be accumulated.

    Args:
        network: on a GPU, in training mode; parameters and buffers must stay where they are. In
            evaluation mode it runs without graphs. To be called before DistributedDataParallel
            wraps it.
        shape: of the images; they are channels-last, as training has them.
        autocast: type that convolutions compute in; None for float32.

    Returns:
        The network, whose parameters have gradients of zero.
    """
    device = next(network.parameters()).device
    # PyTorch waits for the stream of the capture, and warns of that at every start.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    images = torch.rand(shape, device=device).contiguous(memory_format=torch.channels_last)
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.autocast(device.type, autocast, enabled=autocast is not None, cache_enabled=False):
        torch.cuda.make_graphed_callables(network, (images,), allow_unused_input=True)
    # The warm-up before the capture has changed the running statistics.
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(kept[name])
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return network
