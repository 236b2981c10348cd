"""How many layers of a bfloat16 network may be transformed before they are rounded.

F(4, 3) from bfloat16 products has four to five times the error of torch's layer, root mean
square, with float32 products 0.7 of it. In networks of 1x1 and 3x3 layers in turn that hardly
shows: DeepLab v3 has 0.8 to 1.2 of torch's error. Where nearly all layers are 3x3, a network had
1.3 to 1.6 of it, the original U-Net 2.2. So a share of the layers is left to F(4, 3), those of the
most weights, which gain the most by it and mostly lie far from the output. Errors of logits over
those of torch's eager bfloat16 network, random weights, batch norms that have seen data, the mean
of two to four seeds:

=============================  ====  =====  =====  ====
share of the layers             all   0.25   0.15     0
=============================  ====  =====  =====  ====
DeepLab v3, ResNet-50          0.99   0.83   0.71  0.72
FCN, ResNet-50                 0.99   0.84   0.83  0.82
smp U-Net, ResNet-34           1.47   0.74   0.69  0.65
smp U-Net++, ResNet-18         1.54   0.69   0.64  0.57
smp MAnet, ResNet-18           1.40   0.96   0.76  0.59
smp FPN, ResNet-34             1.52   0.70   0.67  0.61
smp Linknet, ResNet-34         1.48   0.74   0.71  0.67
U-Net                          2.16   0.59   0.57  0.56
FCN-8s, VGG16                  1.57   0.94   0.93  0.83
FCN-32s, VGG16                 1.39   0.98   0.88  0.82
dilated, VGG16                 1.54   0.96   0.90  0.81
DeepLab v2, VGG16              1.46   1.04   0.95  0.76
DeepLab v1 LargeFOV, VGG16     1.48   1.24   1.20  0.68
U2-Net-p, eight seeds          1.19   1.08   0.65
=============================  ====  =====  =====  ====

The last but one's error is that of its largest layer, next to the output. Where all layers are
alike, as in eight residual blocks of 64 channels at one resolution, a quarter leaves twice torch's
error.
"""

from __future__ import annotations

import torch
from torch import nn

from ..nn.packed import PackedConv2d
from ..nn.packed_linear import PackedLinear

# Of all convolutions of one group. The first costs networks of 1x1 and 3x3 layers no time.
SHARE = 0.25
MANY, SHARE_OF_MANY = 0.4, 0.15  # where there would be more than so many
LEAST = 9  # fewer are a layer or a block, whose error says little of the network around it
SIZE = 65  # of the maps that the choice is tried on


def decide_rounded(network: nn.Module) -> list[PackedConv2d]:
    """The layers that must not be transformed and rounded, so that few enough are: those with the
    fewest weights, which gain the least."""
    linear = {m.conv for m in network.modules() if isinstance(m, PackedLinear)}
    convs = [m for m in network.modules() if isinstance(m, PackedConv2d)]
    convs = [conv for conv in convs if conv.groups == 1 and conv not in linear]
    rounded = [conv for conv in convs if _is_rounded(conv)]
    if len(convs) < LEAST:
        return []
    share = SHARE if len(rounded) <= MANY * len(convs) else SHARE_OF_MANY
    rounded.sort(key=lambda conv: conv.weight.numel(), reverse=True)
    return rounded[int(share * len(convs)) :]


def _is_rounded(conv: PackedConv2d) -> bool:
    C = conv.weight.shape[1] * conv.groups
    algorithm = conv.algorithm(torch.empty(1, C, SIZE, SIZE, device="meta"))
    return algorithm.tile == 4 and algorithm.products == torch.bfloat16
