"""Parameters and multiply-accumulates of a network, without computing anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters; buffers such as running means do not count."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, size: tuple[int, int] = (512, 512), in_channels: int = 3) -> int:
    """Multiply-accumulates of all convolutions for one image of ``size`` = (H, W) pixels.

    Transposed convolutions count too; normalisation, pooling and resizing do not. A run on the
    model's device gives the shapes; build it under ``torch.device("meta")`` to make that free.
    """
    macs = 0

    def count(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal macs
        maps = args[0] if isinstance(module, nn.ConvTranspose2d) else output
        macs += maps.numel() * module.weight[0].numel()

    # Fused layers call a convolution that has a hook, so that it is seen.
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    training = model.training
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            model.eval()(torch.empty(1, in_channels, *size, device=device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return macs
