"""How many layers of a bfloat16 network may be transformed or summed before they are rounded.

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

Strassen's algorithm from bfloat16 products has twice the error of the plain product and saves some
8 % of its time. It is left to a tenth of all layers, those of the most weights, which are those of
the last stage of a ResNet-50 and most of the time in question. The same errors beside the shares
above, random weights with batch norms that keep the scale, the mean of three seeds:

=============================  ========  ====  ====  ====  ====
share of the layers            autocast     0   0.1  0.25   all
=============================  ========  ====  ====  ====  ====
DeepLab v3, ResNet-50              0.97  0.88  0.99  1.08  1.13
DeepLab v3, ResNet-101             0.97  0.86  0.99  1.11  1.17
torchvision DeepLab v3             0.94  0.83  0.94  1.02  1.06
FCN, ResNet-50                     0.93  0.81  0.92  1.02  1.02
PSPNet, ResNet-50                  0.94  0.80  0.90  0.95  0.97
smp DeepLab v3+, ResNet-50         0.93  0.93  0.98  1.05  1.11
smp UPerNet, ResNet-50             0.98  0.87  0.91  0.93  0.97
smp PAN, ResNet-50                 0.92  0.91  1.02  1.08  1.08
smp FPN, ResNet-50                 0.97  0.88  1.01  1.12  1.12
FCN-32s, VGG16                     1.00  0.89  0.98  0.98  0.98
=============================  ========  ====  ====  ====  ====
"""

from __future__ import annotations

import torch
from torch import nn

from ..nn.packed import PackedConv2d
from ..nn.packed_linear import PackedLinear
from ..nn.packed_sum import PackedConvSum2d
from ..ops.conv_choice import Algorithm

# Of all convolutions of one group. The first costs networks of 1x1 and 3x3 layers no time.
SHARE = 0.25
MANY, SHARE_OF_MANY = 0.4, 0.15  # where there would be more than so many
HALVED = 0.1  # of all layers, by Strassen's algorithm
LEAST = 9  # fewer are a layer or a block, whose error says little of the network around it
SIZE = 65  # of the maps that the choice is tried on


def decide_rounded(network: nn.Module) -> list[PackedConv2d]:
    """The layers that must be neither transformed nor summed before they are rounded, so that few
    enough are: those with the fewest weights, which gain the least."""
    linear = {m.conv for m in network.modules() if isinstance(m, PackedLinear)}
    layers = [m for m in network.modules() if isinstance(m, PackedConv2d) and m.groups == 1]
    algorithms = {layer: _algorithm(layer) for layer in layers}
    weights = {layer: layer.weight.numel() for layer in layers}
    for m in network.modules():
        if isinstance(m, PackedConvSum2d):  # whose accuracy is that of the first one
            algorithms[m.first], algorithms[m.second] = m.algorithm((SIZE, SIZE)), Algorithm(0)
            weights[m.first] += m.second.weight.numel()
    layers.sort(key=weights.__getitem__, reverse=True)
    convs = [layer for layer in layers if layer not in linear]
    rounded = [conv for conv in convs if algorithms[conv][:2] == (4, torch.bfloat16)]
    halved = [layer for layer in layers if algorithms[layer] == (0, torch.bfloat16, 1)]
    share = SHARE if len(rounded) <= MANY * len(convs) else SHARE_OF_MANY
    strict = rounded[int(share * len(convs)) :] if len(convs) >= LEAST else []
    return strict + (halved[int(HALVED * len(layers)) :] if len(layers) >= LEAST else [])


def _algorithm(conv: PackedConv2d) -> Algorithm:
    C = conv.weight.shape[1] * conv.groups
    return conv.algorithm(torch.empty(1, C, SIZE, SIZE, device="meta"))
