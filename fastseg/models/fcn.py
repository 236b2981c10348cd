"""Fully Convolutional Networks (Long, Shelhamer, Darrell; CVPR 2015; arXiv:1411.4038)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..nn import ConvBNReLU2d
from .common import (
    Backbone,
    BilinearUpsample2d,
    SegmentationModel,
    SimpleSegmentationModel,
    Upsample,
    init_conv,
    window,
)
from .registry import Paper, register
from .resnet import Dilation, ResNet, Stem
from .vgg import VGG16, vgg_head

PAPER = Paper(
    "Fully Convolutional Networks for Semantic Segmentation",
    "Long, Shelhamer, Darrell",
    "CVPR",
    2015,
    "https://arxiv.org/abs/1411.4038",
)
# Where Caffe crops after padding the image by 100: each skip, and the last upsampling by stride.
CAFFE_SKIPS, CAFFE_LAST = (5, 9), {32: 19, 16: 27, 8: 31}


class FCN(SegmentationModel):
    """Score at 1/32, upsample by 2, add the scores of finer maps, upsample to the input.

    Args:
        backbone: returns feature maps of which the last three are at 1/8, 1/16 and 1/32, and has
            their ``channels``.
        head: maps the 1/32 features to class scores.
        num_classes: classes.
        stride: 32, 16 or 8: FCN-32s, FCN-16s, FCN-8s.
        upsample: the upsampling kernels: fixed "bilinear", or learned "grouped" or "dense".
        padding: "same", or "caffe" where backbone and head are built for an image padded by 100.
        skip_scale: factors of the 1/16 and 1/8 features before they are scored; FCN-8s "at once"
            uses (0.01, 0.0001).
        upscore_bias: whether the first dense 2x upsampling has a bias (CRF-RNN).
    """

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        num_classes: int,
        *,
        stride: Literal[32, 16, 8] = 8,
        upsample: Upsample = "bilinear",
        padding: Literal["same", "caffe"] = "same",
        skip_scale: Sequence[float] = (1.0, 1.0),
        upscore_bias: bool = False,
    ):
        super().__init__()
        if stride not in CAFFE_LAST:
            raise ValueError(f"FCN: stride must be 32, 16 or 8, got {stride}")
        if padding not in ("same", "caffe"):
            raise ValueError(f"FCN: padding must be same or caffe, got {padding!r}")
        self.backbone = backbone
        self.head = head
        self.padding = padding
        self.skip_scale = tuple(skip_scale)
        skips = {32: (), 16: (-2,), 8: (-2, -3)}[stride]
        self.score_skips = nn.ModuleList(
            nn.Conv2d(backbone.channels[i], num_classes, 1) for i in skips
        )
        self.upscores = nn.ModuleList(
            BilinearUpsample2d(num_classes, 2, upsample, bias=upscore_bias and i == 0)
            for i in range(len(skips))
        )
        self.upscore = BilinearUpsample2d(num_classes, stride, upsample)
        self.last_offset = CAFFE_LAST[stride] if padding == "caffe" else stride // 2
        init_conv(self.score_skips, std=0.01)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        *_, c3, c4, c5 = self.backbone(x)  # (N, ., H/8, W/8), 1/16, 1/32
        y = self.head(c5)  # (N, classes, H/32, W/32)
        layers = zip((c4, c3), self.skip_scale, self.score_skips, self.upscores, strict=False)
        for i, (skip, scale, score, upscore) in enumerate(layers):
            y, s = upscore(y), score(skip if scale == 1 else skip * scale)
            if self.padding == "caffe":  # the skip is the larger map
                y = y + window(s, CAFFE_SKIPS[i], y.shape[-2:])
            else:
                y = s + window(y, 1, s.shape[-2:])  # (N, classes, H/16, W/16), then 1/8
        return {"out": window(self.upscore(y), self.last_offset, x.shape[-2:])}


def fcn_vgg16(
    stride: Literal[32, 16, 8],
    /,
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    upsample: Upsample = "bilinear",
    padding: Literal["same", "caffe"] = "same",
    skip_scale: Sequence[float] = (1.0, 1.0),
    upscore_bias: bool = False,
    width: int = 64,
    hidden: int = 4096,
) -> FCN:
    """FCN on VGG16 with fc6 (7x7) and fc7 as convolutions.

    Args:
        stride: 32, 16 or 8.
        num_classes: classes.
        in_channels: channels of the image.
        upsample: "bilinear" (fixed, as in the released networks), "grouped" or "dense".
        padding: "same", or "caffe": pads the image by 100 pixels, as the released weights need.
        skip_scale: see :class:`FCN`.
        upscore_bias: see :class:`FCN`.
        width: channels of VGG16's first stage.
        hidden: channels of fc6 and fc7.
    """
    caffe = padding == "caffe"
    backbone = VGG16(in_channels, first_padding=100 if caffe else None, width=width)
    return FCN(
        backbone,
        vgg_head(backbone.channels[-1], hidden, num_classes, 7, padding=0 if caffe else None),
        num_classes,
        stride=stride,
        upsample=upsample,
        padding=padding,
        skip_scale=skip_scale,
        upscore_bias=upscore_bias,
    )


@register(PAPER, stride=32, family=fcn_vgg16)
def fcn32s_vgg16(num_classes: int = 21, in_channels: int = 3, **options: Any) -> FCN:
    """FCN-32s: VGG16, class scores at 1/32, one bilinear upsampling by 32.

    63.6 mean IoU on seg11valid (released weights). Options: see :func:`fcn_vgg16`.
    """
    return fcn_vgg16(32, num_classes, in_channels, **options)


@register(PAPER, stride=16, family=fcn_vgg16)
def fcn16s_vgg16(num_classes: int = 21, in_channels: int = 3, **options: Any) -> FCN:
    """FCN-16s: the scores at 1/32, upsampled by 2, plus scores of pool4; then upsampled by 16.

    65.0 mean IoU on seg11valid (released weights). Options: see :func:`fcn_vgg16`.
    """
    return fcn_vgg16(16, num_classes, in_channels, **options)


@register(
    PAPER,
    stride=8,
    voc2012=67.2,
    conditions="released weights, SBD training images, single scale, no CRF; the paper: 62.2",
    family=fcn_vgg16,
)
def fcn8s_vgg16(num_classes: int = 21, in_channels: int = 3, **options: Any) -> FCN:
    """FCN-8s: the fused scores of FCN-16s, upsampled by 2, plus scores of pool3; then by 8.

    65.5 mean IoU on seg11valid (released weights). Options: see :func:`fcn_vgg16`.
    """
    return fcn_vgg16(8, num_classes, in_channels, **options)


def fcn_skip_resnet(
    depth: int | Sequence[int],
    stride: Literal[32, 16, 8],
    /,
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    upsample: Upsample = "grouped",
    stem: Stem = "7x7",
    width: int = 64,
) -> FCN:
    """The skip architecture on an undilated ResNet; in no paper, but the same idea.

    Args:
        depth: 50, 101 or 152, or blocks per stage.
        stride: 32, 16 or 8.
        num_classes: classes.
        in_channels: channels of the image.
        upsample: "bilinear" (fixed), "grouped" or "dense".
        stem: see :class:`ResNet`.
        width: see :class:`ResNet`.
    """
    backbone = ResNet(depth, in_channels, stem=stem, width=width)
    head = nn.Conv2d(backbone.channels[-1], num_classes, 1)
    init_conv(head, std=0.01)
    return FCN(backbone, head, num_classes, stride=stride, upsample=upsample)


class FCNHead(nn.Module):
    """Class scores by 3x3 convolutions with batch norm and a 1x1; also the usual auxiliary head.

    Args:
        in_channels: channels of the map (N, in_channels, h, w).
        num_classes: classes.
        channels: channels of the 3x3 convolutions; None is a quarter of ``in_channels``.
        convs: number of 3x3 convolutions.
        concat: see the map again before the 1x1, through one more 3x3 (mmsegmentation).
        dropout: drop rate before the 1x1.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int | None = None,
        convs: int = 1,
        concat: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        channels = channels or in_channels // 4
        inputs = [in_channels] + [channels] * (convs - 1)
        self.convs = nn.Sequential(*(ConvBNReLU2d(c, channels, 3, padding=1) for c in inputs))
        self.conv_cat = None
        if concat:
            self.conv_cat = ConvBNReLU2d(in_channels + channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs(x)
        if self.conv_cat is not None:
            y = self.conv_cat(torch.cat([x, y], 1))
        return self.score(self.dropout(y))  # (N, classes, h, w)


def fcn_resnet(
    depth: int | Sequence[int],
    /,
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    aux: bool = False,
    variant: Literal["torchvision", "mmseg"] = "torchvision",
    output_stride: int = 8,
    stem: Stem | None = None,
    dilation: Dilation = "contract",
    align_corners: bool = False,
    width: int = 64,
) -> SimpleSegmentationModel:
    """FCN on a dilated ResNet with a 3x3 head, as in torchvision.

    Args:
        depth: 50, 101 or 152, or blocks per stage.
        num_classes: classes.
        in_channels: channels of the image.
        aux: add an auxiliary head on layer3; the usual weight of its loss is 0.5 (mmseg: 0.4).
        variant: "torchvision": one 3x3 convolution; "mmseg": two, a third on their concatenation
            with the map, and the v1c stem.
        output_stride: 8, 16 or 32.
        stem: see :class:`ResNet`; None is the variant's.
        dilation: see :class:`ResNet`.
        align_corners: of the resizing to the input.
        width: see :class:`ResNet`.
    """
    if variant not in ("torchvision", "mmseg"):
        raise ValueError(f"fcn_resnet: variant must be torchvision or mmseg, got {variant!r}")
    mmseg = variant == "mmseg"
    stem = stem or ("v1c" if mmseg else "7x7")
    backbone = ResNet(
        depth, in_channels, output_stride=output_stride, stem=stem, dilation=dilation, width=width
    )
    c4, c5 = backbone.channels[-2:]
    return SimpleSegmentationModel(
        backbone,
        FCNHead(c5, num_classes, convs=2 if mmseg else 1, concat=mmseg),
        FCNHead(c4, num_classes) if aux else None,
        align_corners=align_corners,
    )


@register(PAPER, stride=8, family=fcn_resnet)
def fcn_resnet50(
    num_classes: int = 21, in_channels: int = 3, **options: Any
) -> SimpleSegmentationModel:
    """FCN on ResNet-50 at 1/8, the network of torchvision. Options: see :func:`fcn_resnet`."""
    return fcn_resnet(50, num_classes, in_channels, **options)


@register(PAPER, stride=8, family=fcn_resnet)
def fcn_resnet101(
    num_classes: int = 21, in_channels: int = 3, **options: Any
) -> SimpleSegmentationModel:
    """FCN on ResNet-101 at 1/8, the network of torchvision. Options: see :func:`fcn_resnet`."""
    return fcn_resnet(101, num_classes, in_channels, **options)


@register(PAPER, stride=32, family=fcn_skip_resnet)
def fcn32s_resnet50(num_classes: int = 21, in_channels: int = 3, **options: Any) -> FCN:
    """FCN-32s on ResNet-50. Options: see :func:`fcn_skip_resnet`."""
    return fcn_skip_resnet(50, 32, num_classes, in_channels, **options)


@register(PAPER, stride=16, family=fcn_skip_resnet)
def fcn16s_resnet50(num_classes: int = 21, in_channels: int = 3, **options: Any) -> FCN:
    """FCN-16s on ResNet-50: scores at 1/32 and 1/16. Options: see :func:`fcn_skip_resnet`."""
    return fcn_skip_resnet(50, 16, num_classes, in_channels, **options)


@register(PAPER, stride=8, family=fcn_skip_resnet)
def fcn8s_resnet50(num_classes: int = 21, in_channels: int = 3, **options: Any) -> FCN:
    """FCN-8s on ResNet-50: scores at 1/32, 1/16 and 1/8. Options: see :func:`fcn_skip_resnet`."""
    return fcn_skip_resnet(50, 8, num_classes, in_channels, **options)


@register(PAPER, stride=32, family=fcn_skip_resnet)
def fcn32s_resnet101(num_classes: int = 21, in_channels: int = 3, **options: Any) -> FCN:
    """FCN-32s on ResNet-101. Options: see :func:`fcn_skip_resnet`."""
    return fcn_skip_resnet(101, 32, num_classes, in_channels, **options)


@register(PAPER, stride=16, family=fcn_skip_resnet)
def fcn16s_resnet101(num_classes: int = 21, in_channels: int = 3, **options: Any) -> FCN:
    """FCN-16s on ResNet-101: scores at 1/32 and 1/16. Options: see :func:`fcn_skip_resnet`."""
    return fcn_skip_resnet(101, 16, num_classes, in_channels, **options)


@register(PAPER, stride=8, family=fcn_skip_resnet)
def fcn8s_resnet101(num_classes: int = 21, in_channels: int = 3, **options: Any) -> FCN:
    """FCN-8s on ResNet-101: scores at 1/32, 1/16 and 1/8. Options: see :func:`fcn_skip_resnet`."""
    return fcn_skip_resnet(101, 8, num_classes, in_channels, **options)
