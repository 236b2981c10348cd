"""DeepLab v1 (Chen, Papandreou, Kokkinos, Murphy, Yuille; ICLR 2015; arXiv:1412.7062)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .common import SegmentationModel, init_conv, resize
from .registry import Paper, register
from .vgg import VGG16, vgg_head

PAPER = Paper(
    "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs",
    "Chen, Papandreou, Kokkinos, Murphy, Yuille",
    "ICLR",
    2015,
    "https://arxiv.org/abs/1412.7062",
)
# fc6 of each variant: kernel, dilation, channels.
FC6 = {"largefov": (3, 12, 1024), "7x7": (7, 4, 4096), "4x4": (4, 4, 4096)}


def deeplab_vgg16(in_channels: int, variant: str, width: int) -> VGG16:
    """VGG16 to 1/8 as in DeepLab v1 and v2: pool4 and pool5 keep their stride at 1.

    ``variant``: "largefov" pools 3x3 everywhere; "7x7" and "4x4" keep VGG's 2x2 where it strides.
    """

    def pool(kernel: int, stride: int, padding: int) -> nn.MaxPool2d:
        return nn.MaxPool2d(kernel, stride, padding=padding, ceil_mode=True)

    first, fourth = {
        "largefov": ((3, 2, 1), (3, 1, 1)),
        "7x7": ((2, 2, 0), (3, 1, 1)),
        "4x4": ((2, 2, 1), (2, 1, 0)),
    }[variant]
    pools: list[nn.Module] = [
        pool(*first),
        pool(*first),
        pool(*first),
        pool(*fourth),
        pool(3, 1, 1),
    ]
    if variant == "4x4":
        pools[3] = nn.Sequential(_AtLeast2x2(), pools[3])
    return VGG16(in_channels, dilation5=2, pools=pools, width=width)


class _AtLeast2x2(nn.Module):
    """Repeats the last row or column of a map that a 2x2 pool without padding would not fit on."""

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        return F.pad(x, (0, max(0, 2 - W), 0, max(0, 2 - H)), mode="replicate")


class DeepLabV1(SegmentationModel):
    """VGG16 at 1/8 by dilation, one dilated fc6, fc7 and class scores.

    Args:
        num_classes: classes.
        in_channels: channels of the image.
        variant: fc6: "largefov" (3x3, dilation 12, 1024 channels), "7x7" or "4x4" (dilation 4, 4096
            channels).
        multi_scale: add the scores of five small branches on the image and the first four pooled
            maps (the paper's MSc).
        width: channels of VGG16's first stage.
        hidden: channels of fc6 and fc7; None is the variant's.
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        variant: Literal["largefov", "7x7", "4x4"] = "largefov",
        multi_scale: bool = False,
        width: int = 64,
        hidden: int | None = None,
    ):
        super().__init__()
        if variant not in FC6:
            raise ValueError(f"DeepLabV1: variant must be largefov, 7x7 or 4x4, got {variant!r}")
        kernel, dilation, channels = FC6[variant]
        self.backbone = deeplab_vgg16(in_channels, variant, width)
        self.pool5a = nn.AvgPool2d(3, 1, padding=1) if variant == "largefov" else nn.Identity()
        self.head = vgg_head(8 * width, hidden or channels, num_classes, kernel, dilation=dilation)
        branch_inputs = [in_channels, *self.backbone.channels[:4]] if multi_scale else []
        self.branches = nn.ModuleList(_branch(c, 2 * width, num_classes) for c in branch_inputs)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        pooled = self.backbone(x)
        y = resize(self.head(self.pool5a(pooled[-1])), x.shape[-2:], True)  # from (H/8, W/8)
        for branch, features in zip(self.branches, [x, *pooled], strict=False):
            y = y + resize(branch(features), x.shape[-2:], True)
        return {"out": y}


def _branch(in_channels: int, channels: int, num_classes: int) -> nn.Sequential:
    """Scores of one map for the multi-scale sum."""
    score = nn.Conv2d(channels, num_classes, 1)
    branch = nn.Sequential(
        OrderedDict[str, nn.Module](
            conv=nn.Conv2d(in_channels, channels, 3, padding=1),
            relu1=nn.ReLU(inplace=True),
            drop1=nn.Dropout(0.5),
            fc=nn.Conv2d(channels, channels, 1),
            relu2=nn.ReLU(inplace=True),
            drop2=nn.Dropout(0.5),
            score=score,
        )
    )
    init_conv(branch)
    init_conv(score, std=0.01)
    return branch


@register(
    PAPER,
    stride=8,
    voc2012=70.3,
    conditions="single scale, dense CRF; 71.6 with multi_scale",
    family=DeepLabV1,
)
def deeplabv1_largefov_vgg16(
    num_classes: int = 21, in_channels: int = 3, **options: Any
) -> DeepLabV1:
    """DeepLab-LargeFOV: fc6 3x3 with dilation 12 and 1024 channels, 20.5 M parameters.

    Val 62.25, with dense CRF 67.64. Options: see :class:`DeepLabV1`.
    """
    return DeepLabV1(num_classes, in_channels, **options)


@register(PAPER, stride=8, voc2012=70.3, conditions="single scale, dense CRF", family=DeepLabV1)
def deeplabv1_7x7_vgg16(num_classes: int = 21, in_channels: int = 3, **options: Any) -> DeepLabV1:
    """DeepLab-7x7: VGG16's own fc6 with dilation 4, 134.3 M parameters.

    Val 64.38, with dense CRF 67.64. Options: see :class:`DeepLabV1`.
    """
    return DeepLabV1(num_classes, in_channels, variant="7x7", **options)


@register(PAPER, stride=8, voc2012=66.4, conditions="single scale, dense CRF", family=DeepLabV1)
def deeplabv1_4x4_vgg16(num_classes: int = 21, in_channels: int = 3, **options: Any) -> DeepLabV1:
    """DeepLab: fc6 subsampled to 4x4 with dilation 4, 65.1 M parameters.

    Val 59.80, with dense CRF 63.74. Options: see :class:`DeepLabV1`.
    """
    return DeepLabV1(num_classes, in_channels, variant="4x4", **options)
