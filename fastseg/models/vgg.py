"""VGG16 (Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556) as a trunk for segmentation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from ..nn import ConvBNReLU2d
from .common import Backbone, init_conv

CONVS = (2, 2, 3, 3, 3)  # 3x3 convolutions per stage


class VGG16(Backbone):
    """The 13 convolutions of VGG16 in five stages, with the pooling that a paper puts after each.

    Args:
        in_channels: channels of the image.
        batch_norm: batch norm after each convolution (SegNet).
        conv_bias: whether convolutions in front of a batch norm have a bias.
        padding: "same", or "valid" for convolutions without padding (Dilated).
        first_padding: padding of conv1_1 (FCN in Caffe: 100); None follows ``padding``.
        dilation5: dilation of conv5_1 to conv5_3.
        pools: the five pooling layers; None is 2x2, stride 2, rounding up.
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.

    Input (N, in_channels, H, W); returns the five pooled maps, finest first: (N, 64, H/2, W/2),
    (N, 128, H/4, W/4), (N, 256, H/8, W/8), (N, 512, H/16, W/16), (N, 512, H/32, W/32).
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        batch_norm: bool = False,
        conv_bias: bool = True,
        padding: Literal["same", "valid"] = "same",
        first_padding: int | None = None,
        dilation5: int = 1,
        pools: Sequence[nn.Module] | None = None,
        width: int = 64,
    ):
        super().__init__()
        self.channels = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        self.stages = nn.ModuleList()
        before = in_channels
        for s, (count, channels) in enumerate(zip(CONVS, self.channels, strict=True), 1):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            dilation = dilation5 if s == 5 else 1
            for i in range(1, count + 1):
                pad = dilation if padding == "same" else 0
                if s == i == 1 and first_padding is not None:
                    pad = first_padding
                if batch_norm:
                    layers[f"conv{s}_{i}"] = ConvBNReLU2d(
                        before, channels, 3, padding=pad, dilation=dilation, bias=conv_bias
                    )
                else:
                    layers[f"conv{s}_{i}"] = nn.Conv2d(
                        before, channels, 3, padding=pad, dilation=dilation
                    )
                    layers[f"relu{s}_{i}"] = nn.ReLU(inplace=True)
                before = channels
            self.stages.append(nn.Sequential(layers))
        self.pools = nn.ModuleList(pools or [nn.MaxPool2d(2, 2, ceil_mode=True) for _ in range(5)])
        init_conv(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        pooled = []
        for stage, pool in zip(self.stages, self.pools, strict=True):
            x = pool(stage(x))
            pooled.append(x)
        return pooled


def vgg_head(
    in_channels: int,
    hidden: int,
    num_classes: int,
    kernel_size: int,
    *,
    dilation: int = 1,
    padding: int | None = None,
) -> nn.Sequential:
    """VGG's fully connected layers as convolutions: fc6 (k x k), fc7 (1x1), score (1x1).

    ``padding`` None keeps the size. The score layer starts Gaussian with std 0.01.
    """
    if padding is None:
        padding = dilation * (kernel_size - 1) // 2
    score = nn.Conv2d(hidden, num_classes, 1)
    head = nn.Sequential(
        OrderedDict[str, nn.Module](
            fc6=nn.Conv2d(in_channels, hidden, kernel_size, padding=padding, dilation=dilation),
            relu6=nn.ReLU(inplace=True),
            drop6=nn.Dropout(0.5),
            fc7=nn.Conv2d(hidden, hidden, 1),
            relu7=nn.ReLU(inplace=True),
            drop7=nn.Dropout(0.5),
            score=score,
        )
    )
    init_conv(head)
    init_conv(score, std=0.01)
    return head
