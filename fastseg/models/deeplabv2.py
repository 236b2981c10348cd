"""DeepLab v2 (Chen, Papandreou, Kokkinos, Murphy, Yuille; PAMI 2018; arXiv:1606.00915)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Backbone, SegmentationModel, resize
from .deeplabv1 import deeplab_vgg16
from .registry import Paper, register
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
