"""Global Convolutional Network (Peng, Zhang, Yu, Luo, Sun; CVPR 2017; arXiv:1703.02719)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import GlobalConv2d
from .common import Backbone, SegmentationModel, bilinear_init_, init_conv, resize, window
from .registry import Paper, register
from .resnet import ResNet

PAPER = Paper(
    "Large Kernel Matters: Improve Semantic Segmentation by Global Convolutional Network",
    "Peng, Zhang, Yu, Luo, Sun",
    "CVPR",
    2017,
    "https://arxiv.org/abs/1703.02719",
)

Up = Literal["dense", "grouped", "bilinear"]


class BoundaryRefinement(nn.Module):
    """x + conv(relu(conv(x))), 3x3, no batch norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class Up2(nn.Module):
    """Twice the size, cropped to a target: a transposed convolution (4x4, stride 2) that starts
    bilinear, over all channels ("dense") or each ("grouped"), or "bilinear" resizing."""

    def __init__(self, channels: int, mode: Up):
        super().__init__()
        if mode not in ("dense", "grouped", "bilinear"):
            raise ValueError(f"GCN: upsample must be dense, grouped or bilinear, got {mode!r}")
        self.deconv = None
        if mode != "bilinear":
            groups = 1 if mode == "dense" else channels
            self.deconv = nn.ConvTranspose2d(
                channels, channels, 4, 2, padding=1, groups=groups, bias=False
            )
            bilinear_init_(self.deconv)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if self.deconv is None:
            return resize(x, size, True)
        return window(self.deconv(x), 0, size)


class GCN(SegmentationModel):
    """Large separable kernels score the four maps of an undilated ResNet; a chain of 2x upsamplings
    with boundary refinement joins them up to the image.

    Args:
        backbone: returns four maps with their ``channels``.
        num_classes: classes.
        kernel_size: k of the large kernels, odd: 15 for VOC.
        upsample: see :class:`Up2`.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, *, kernel_size: int = 15, upsample: Up = "dense"
    ):
        super().__init__()
        self.backbone = backbone
        coarse_to_fine = reversed(backbone.channels)
        self.gcn = nn.ModuleList(GlobalConv2d(c, num_classes, kernel_size) for c in coarse_to_fine)
        self.refine = nn.ModuleList(BoundaryRefinement(num_classes) for _ in range(4))
        self.fuse = nn.ModuleList(BoundaryRefinement(num_classes) for _ in range(3))
        self.last = nn.ModuleList(BoundaryRefinement(num_classes) for _ in range(2))
        self.up = nn.ModuleList(Up2(num_classes, upsample) for _ in range(5))
        for layers in (self.gcn, self.refine, self.fuse, self.last):
            init_conv(layers, std=0.01)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(x)[::-1]  # (N, 2048, H/32, W/32), ... (N, 256, H/4, W/4)
        scores = [
            refine(gcn(c)) for c, gcn, refine in zip(maps, self.gcn, self.refine, strict=True)
        ]
        y = scores[0]
        for i, (score, fuse) in enumerate(zip(scores[1:], self.fuse, strict=True)):
            y = fuse(self.up[i](y, score.shape[-2:]) + score)  # 1/16, 1/8, 1/4
        H, W = x.shape[-2:]
        half = ((H + 1) // 2, (W + 1) // 2)
        y = self.last[0](self.up[3](y, half))
        return {"out": self.last[1](self.up[4](y, (H, W)))}


def gcn(
    depth: int | Sequence[int],
    /,
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    kernel_size: int = 15,
    upsample: Up = "dense",
    width: int = 64,
) -> GCN:
    """GCN on a ResNet.

    Args:
        depth: 50, 101 or 152, or blocks per stage.
        num_classes: classes.
        in_channels: channels of the image.
        kernel_size: see :class:`GCN`; the paper tries 3 to 15, and 25 on Cityscapes.
        upsample: see :class:`Up2`.
        width: see :class:`ResNet`.
    """
    backbone = ResNet(depth, in_channels, width=width)
    return GCN(backbone, num_classes, kernel_size=kernel_size, upsample=upsample)


@register(PAPER, stride=4, family=gcn)
def gcn_resnet50(num_classes: int = 21, in_channels: int = 3, **options: Any) -> GCN:
    """GCN on ResNet-50. Options: see :func:`gcn`."""
    return gcn(50, num_classes, in_channels, **options)


@register(PAPER, stride=4, family=gcn)
def gcn_resnet101(num_classes: int = 21, in_channels: int = 3, **options: Any) -> GCN:
    """GCN on ResNet-101. Options: see :func:`gcn`."""
    return gcn(101, num_classes, in_channels, **options)


@register(
    PAPER,
    stride=4,
    voc2012=82.2,
    conditions="COCO images, many scales, dense CRF; later leaderboard entry 83.6",
    family=gcn,
)
def gcn_resnet152(num_classes: int = 21, in_channels: int = 3, **options: Any) -> GCN:
    """GCN on ResNet-152, the paper's: val 80.3, 81.0 with many scales and CRF.

    Options: see :func:`gcn`.
    """
    return gcn(152, num_classes, in_channels, **options)
