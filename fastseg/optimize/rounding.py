"""How many layers of a bfloat16 network may be transformed before they are rounded.

F(4, 3) from bfloat16 products has four to five times the error of torch's layer, root mean
square, with float32 products 0.7 of it. In networks of 1x1 and 3x3 layers in turn that hardly
shows: DeepLab v3 has 0.9 of torch's error. Where nearly all layers are 3x3, a network had 1.3 to
1.6 of it, the original U-Net 2.2. With a quarter of the layers left to F(4, 3), those of the most
weights, which gain the most by it and lie far from the output, it is 0.6 to 1.0, at up to 1.3 times
the time (U-Nets; DeepLab v3 1.00, U2-Net-p 1.04). Errors of logits over those of torch's eager
bfloat16 network, random weights, batch norms that have seen data, the mean of two seeds:

=============================  ====  ====  =====  ====
share of the layers             all  0.34   0.25     0
=============================  ====  ====  =====  ====
smp U-Net, ResNet-34           1.47  0.75   0.74  0.65
smp U-Net++, ResNet-18         1.54  0.89   0.69  0.57
smp MAnet, ResNet-18           1.40  1.21   0.96  0.59
smp FPN, ResNet-34             1.52  0.74   0.70  0.61
smp Linknet, ResNet-34         1.48  0.92   0.74  0.67
U-Net                          2.16  0.62   0.59  0.56
FCN-8s, VGG16                  1.57  1.00   0.94  0.83
FCN-32s, VGG16                 1.39         0.98  0.82
dilated, VGG16                 1.54         0.96  0.81
DeepLab v2, VGG16              1.46         1.04  0.76
DeepLab v1 LargeFOV, VGG16     1.48  1.24   1.24  0.68
=============================  ====  ====  =====  ====

The last one's error is that of its largest layer, next to the output. Where all layers are alike,
as in eight residual blocks of 64 channels at one resolution, the quarter leaves twice torch's
error.
"""

from __future__ import annotations

import torch
from torch import nn

from ..nn.packed import PackedConv2d

SHARE = 0.25  # of all convolutions
LEAST = 9  # fewer are a layer or a block, whose error says little of the network around it
SIZE = 65  # of the maps that the choice is tried on


def decide_rounded(network: nn.Module) -> list[PackedConv2d]:
    """The layers that must not be transformed and rounded, so that few enough are: those with the
    fewest weights, which gain the least."""
    convs = [m for m in network.modules() if isinstance(m, PackedConv2d)]
    if len(convs) < LEAST:
        return []
    rounded = [conv for conv in convs if _is_rounded(conv)]
    rounded.sort(key=lambda conv: conv.weight.numel(), reverse=True)
    return rounded[int(SHARE * len(convs)) :]


def _is_rounded(conv: PackedConv2d) -> bool:
    C = conv.weight.shape[1] * conv.groups
    algorithm = conv.algorithm(torch.empty(1, C, SIZE, SIZE, device="meta"))
    return algorithm.tile == 4 and algorithm.products == torch.bfloat16
