"""Pyramid Scene Parsing Network (Zhao, Shi, Qi, Wang, Jia; CVPR 2017; arXiv:1612.01105)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import ConvBNReLU2d, PyramidConv2d, PyramidPooling
from ..nn.conv_bn import is_plain
from ..nn.pyramid_pooling import pyramid_conv, pyramid_weight
from .common import SimpleSegmentationModel
from .fcn import FCNHead
from .registry import Paper, register
from .resnet import Dilation, ResNet, Stem

PAPER = Paper(
    "Pyramid Scene Parsing Network",
    "Zhao, Shi, Qi, Wang, Jia",
    "CVPR",
    2017,
    "https://arxiv.org/abs/1612.01105",
)


class PSPHead(nn.Module):
    """Pyramid pooling, a 3x3 convolution with batch norm and class scores.

    Args:
        in_channels: channels of the map (N, in_channels, h, w).
        num_classes: classes.
        bins: grid sizes of the pyramid.
        align_corners: of the resizing of the grids.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        bins: Sequence[int] = (1, 2, 3, 6),
        align_corners: bool = True,
    ):
        super().__init__()
        channels = in_channels // 4
        self.ppm = PyramidPooling(in_channels, bins, channels, align_corners=align_corners)
        self.bottleneck = ConvBNReLU2d(in_channels + len(bins) * channels, channels, 3, padding=1)
        self.dropout = nn.Dropout2d(0.1)
        self.score = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        conv, bn = self.bottleneck.conv, self.bottleneck.bn
        if not is_plain(conv, nn.Conv2d):  # it has hooks: let them see it
            return self.score(self.dropout(self.bottleneck(self.ppm(x))))
        # The same, with the convolution split into its part on x and its part on the grids, which
        # is all but free before they are resized.
        C, size = x.shape[1], x.shape[-2:]
        grids = self.ppm.grids(x)
        weight = pyramid_weight(conv.weight[:, C:], len(grids))
        y = pyramid_conv(grids, weight, 3, size, self.ppm.align_corners)
        y = F.relu(bn(y + F.conv2d(x, conv.weight[:, :C], padding=1)))  # (N, 512, h, w)
        return self.score(self.dropout(y))  # (N, classes, h, w)

    def inference_form(self) -> nn.Module:
        """The same for :func:`fastseg.optimize`, with the weights of both parts prepared."""
        return _PSPHeadForInference(self)


class _PSPHeadForInference(nn.Module):
    def __init__(self, head: PSPHead):
        super().__init__()
        conv: Any = head.bottleneck.conv
        bn: Any = head.bottleneck.bn
        bins = head.ppm.bins
        channels = conv.in_channels - len(bins) * conv.out_channels
        scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        self.ppm = head.ppm
        self.local = ConvBNReLU2d(channels, conv.out_channels, 3, padding=1, eps=bn.eps).eval()
        self.local.conv.weight = nn.Parameter(conv.weight.detach()[:, :channels].clone())
        self.local.bn = bn
        grid_weight = conv.weight[:, channels:] * scale[:, None, None, None]
        self.grid_conv = PyramidConv2d(grid_weight, bins, head.ppm.align_corners)
        self.score = head.score

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.local(x, self.grid_conv(self.ppm.grids(x), x.shape[-2:])))


def pspnet(
    depth: int | Sequence[int],
    /,
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    aux: bool = False,
    output_stride: int = 8,
    stem: Stem = "7x7",
    dilation: Dilation = "full",
    bins: Sequence[int] = (1, 2, 3, 6),
    align_corners: bool = True,
    width: int = 64,
) -> SimpleSegmentationModel:
    """PSPNet: a dilated ResNet and pyramid pooling.

    Args:
        depth: 50, 101 or 152, or blocks per stage.
        num_classes: classes.
        in_channels: channels of the image.
        aux: add the auxiliary head on layer3; the paper weighs its loss by 0.4.
        output_stride: 8, 16 or 32.
        stem: "7x7" fits torchvision's ImageNet weights; "deep128" is the paper's and semseg's,
            "v1c" mmsegmentation's.
        dilation: "full" as in the paper; "contract" as in mmsegmentation.
        bins: grid sizes of the pyramid.
        align_corners: of all resizing: True as in the paper, False as in mmsegmentation.
        width: see :class:`ResNet`.
    """
    backbone = ResNet(
        depth, in_channels, output_stride=output_stride, stem=stem, dilation=dilation, width=width
    )
    c4, c5 = backbone.channels[-2:]
    return SimpleSegmentationModel(
        backbone,
        PSPHead(c5, num_classes, bins=bins, align_corners=align_corners),
        FCNHead(c4, num_classes) if aux else None,
        align_corners=align_corners,
    )


@register(PAPER, stride=8, family=pspnet)
def pspnet_resnet50(
    num_classes: int = 21, in_channels: int = 3, **options: Any
) -> SimpleSegmentationModel:
    """PSPNet on ResNet-50; VOC val 77.05, 78.02 with many scales. Options: see :func:`pspnet`."""
    return pspnet(50, num_classes, in_channels, **options)


@register(
    PAPER,
    stride=8,
    voc2012=85.4,
    conditions="pretrained on COCO, many scales and mirrored, no CRF; without COCO 82.6",
    family=pspnet,
)
def pspnet_resnet101(
    num_classes: int = 21, in_channels: int = 3, **options: Any
) -> SimpleSegmentationModel:
    """PSPNet on ResNet-101; VOC val 79.07, 79.63 with many scales. Options: see :func:`pspnet`."""
    return pspnet(101, num_classes, in_channels, **options)
