"""DeepLab v2 (Chen, Papandreou, Kokkinos, Murphy, Yuille; PAMI 2018; arXiv:1606.00915)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Backbone, SegmentationModel, init_conv, resize
from .deeplabv1 import deeplab_vgg16
from .registry import Paper, register
from .resnet import ResNet
from .vgg import vgg_head

PAPER = Paper(
    "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and "
    "Fully Connected CRFs",
    "Chen, Papandreou, Kokkinos, Murphy, Yuille",
    "PAMI",
    2018,
    "https://arxiv.org/abs/1606.00915",
)
ASPP_L, ASPP_S = (6, 12, 18, 24), (2, 4, 8, 12)


class DeepLabV2(SegmentationModel):
    """A trunk at 1/8 and the sum of parallel dilated branches; optionally the best of many scales.

    Args:
        backbone: its last feature map is classified.
        branches: score maps that are summed: atrous spatial pyramid pooling.
        scales: with more than one, the image is also run at these sizes and the scores' maximum
            taken; the first must be 1. In training each scale's own scores are returned too, as
            "scale0.75" and so on, because the paper adds a loss on each.
        align_corners: True as in Caffe; False as in deeplab-pytorch, which also rounds the scaled
            sizes differently.
    """

    def __init__(
        self,
        backbone: Backbone,
        branches: Sequence[nn.Module],
        *,
        scales: Sequence[float] = (1.0,),
        align_corners: bool = True,
    ):
        super().__init__()
        if scales[0] != 1:
            raise ValueError(f"DeepLabV2: the first scale must be 1, got {tuple(scales)}")
        self.backbone = backbone
        self.branches = nn.ModuleList(branches)
        self.scales = tuple(scales)
        self.align_corners = align_corners

    def score(self, x: Tensor) -> Tensor:
        features = self.backbone(x)[-1]
        return sum(branch(features) for branch in self.branches)  # (N, classes, H/8, W/8)

    def scores(self, x: Tensor) -> dict[str, Tensor]:
        out = self.score(x)
        if len(self.scales) == 1:
            return {"out": out}
        maps = {"scale1": out}
        for scale in self.scales[1:]:
            y = self.score(self.rescale(x, scale))
            maps[f"scale{scale}"] = resize(y, out.shape[-2:], self.align_corners)
        best = torch.stack(list(maps.values())).amax(0)
        return {"out": best, **maps} if self.training else {"out": best}

    def rescale(self, x: Tensor, scale: float) -> Tensor:
        """The image at another size: corners on corners, or floor(n * scale) pixels."""
        if not self.align_corners:
            return F.interpolate(x, scale_factor=scale, mode="bilinear")
        return resize(x, [int((n - 1) * scale) + 1 for n in x.shape[-2:]], True)


@register(
    PAPER,
    stride=8,
    voc2012=72.6,
    conditions="ASPP-L, single scale, dense CRF",
)
def deeplabv2_vgg16(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    rates: Sequence[int] = ASPP_L,
    scales: Sequence[float] = (1.0,),
    align_corners: bool = True,
    width: int = 64,
    hidden: int = 1024,
) -> DeepLabV2:
    """VGG16 at 1/8 and four branches of fc6 (3x3, dilated), fc7 and scores.

    Val 68.96, with dense CRF 71.57.

    Args:
        num_classes: classes.
        in_channels: channels of the image.
        rates: dilations of fc6: (6, 12, 18, 24) is ASPP-L, (2, 4, 8, 12) ASPP-S, (12,) LargeFOV.
        scales: see :class:`DeepLabV2`; the paper's multi-scale form is (1, 0.75, 0.5).
        align_corners: see :class:`DeepLabV2`.
        width: channels of VGG16's first stage.
        hidden: channels of fc6 and fc7.
    """
    backbone = deeplab_vgg16(in_channels, "largefov", width)
    branches = [vgg_head(8 * width, hidden, num_classes, 3, dilation=r) for r in rates]
    return DeepLabV2(backbone, branches, scales=scales, align_corners=align_corners)


def deeplabv2_resnet(
    depth: int | Sequence[int],
    /,
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    rates: Sequence[int] = ASPP_L,
    scales: Sequence[float] = (1.0,),
    align_corners: bool = True,
    width: int = 64,
) -> DeepLabV2:
    """DeepLab v2 on a ResNet: four dilated 3x3 convolutions to class scores, summed.

    The paper trains with frozen batch norm: ``model.freeze_bn()``.

    Args:
        depth: 50, 101 or 152, or blocks per stage.
        num_classes: classes.
        in_channels: channels of the image.
        rates: dilations of the branches: (6, 12, 18, 24), or (12,) for LargeFOV.
        scales: see :class:`DeepLabV2`; the paper's multi-scale form is (1, 0.75, 0.5).
        align_corners: see :class:`DeepLabV2`.
        width: see :class:`ResNet`.
    """
    backbone = ResNet(
        depth,
        in_channels,
        output_stride=8,
        stride_in="1x1",
        dilation="full",
        ceil_pool=True,
        width=width,
    )
    channels = backbone.channels[-1]
    branches = [nn.Conv2d(channels, num_classes, 3, padding=r, dilation=r) for r in rates]
    model = DeepLabV2(backbone, branches, scales=scales, align_corners=align_corners)
    init_conv(model.branches, std=0.01)
    return model


@register(
    PAPER,
    stride=8,
    voc2012=79.7,
    conditions="COCO pretraining, ASPP-L, scales (1, 0.75, 0.5), dense CRF",
    family=deeplabv2_resnet,
)
def deeplabv2_resnet101(num_classes: int = 21, in_channels: int = 3, **options: Any) -> DeepLabV2:
    """DeepLab v2 on ResNet-101: VOC val 76.35, with dense CRF 77.69.

    Options: see :func:`deeplabv2_resnet`.
    """
    return deeplabv2_resnet(101, num_classes, in_channels, **options)
