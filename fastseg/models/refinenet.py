"""RefineNet (Lin, Milan, Shen, Reid; CVPR 2017; arXiv:1611.06612)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .common import Backbone, SegmentationModel, init_conv, resize
from .registry import Paper, register
from .resnet import ResNet

PAPER = Paper(
    "RefineNet: Multi-Path Refinement Networks for High-Resolution Semantic Segmentation",
    "Lin, Milan, Shen, Reid",
    "CVPR",
    2017,
    "https://arxiv.org/abs/1611.06612",
)


def conv3x3(in_channels: int, out_channels: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


class RCU(nn.Module):
    """Residual convolution unit: x + conv(relu(conv(relu(x)))), no batch norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = conv3x3(channels, channels, bias=True)
        self.conv2 = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ChainedPooling(nn.Module):
    """relu(x) plus a chain of [5x5 max pool, 3x3 convolution] blocks, every link added.

    ``order`` "pool_conv" is that of the VOC weights, "conv_pool" that of the later ones.
    """

    def __init__(self, channels: int, blocks: int, order: Literal["pool_conv", "conv_pool"]):
        super().__init__()
        if order not in ("pool_conv", "conv_pool"):
            raise ValueError(f"RefineNet: crp_order must be pool_conv or conv_pool, got {order!r}")
        self.order = order
        self.convs = nn.ModuleList(conv3x3(channels, channels) for _ in range(blocks))
        self.pool = nn.MaxPool2d(5, 1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = link = F.relu(x)
        for conv in self.convs:
            link = conv(self.pool(link)) if self.order == "pool_conv" else self.pool(conv(link))
            x = x + link
        return x


class RefineBlock(nn.Module):
    """Adapt a trunk's map, fuse it with the coarser block's result, pool in a chain, refine.

    Args:
        in_channels: channels of the trunk's map.
        channels: channels within and after the block.
        low_channels: channels of the coarser block's result; 0 for the coarsest block.
        pools: links of the chained pooling.
        crp_order: see :class:`ChainedPooling`.
        align_corners: of the resizing of the coarser result.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        low_channels: int,
        *,
        pools: int,
        crp_order: Literal["pool_conv", "conv_pool"],
        align_corners: bool,
    ):
        super().__init__()
        self.align_corners = align_corners
        self.reduce = conv3x3(in_channels, channels)
        self.adapt = nn.Sequential(RCU(channels), RCU(channels))
        self.fuse_high = conv3x3(channels, channels) if low_channels else None
        self.fuse_low = conv3x3(low_channels, channels) if low_channels else None
        self.crp = ChainedPooling(channels, pools, crp_order)
        self.out = nn.Sequential(RCU(channels), RCU(channels), RCU(channels))

    def forward(self, x: Tensor, low: Tensor | None = None) -> Tensor:
        x = self.adapt(self.reduce(x))
        if self.fuse_high is not None and self.fuse_low is not None:
            low = resize(self.fuse_low(low), x.shape[-2:], self.align_corners)
            x = self.fuse_high(x) + low
        return self.out(self.crp(x))


class RefineNet(SegmentationModel):
    """Four refine blocks from the coarsest map of a ResNet to the one at 1/4.

    Batch norm is only in the trunk, and the paper keeps it frozen: ``model.freeze_bn()``.

    Args:
        backbone: returns four maps with their ``channels``.
        num_classes: classes.
        channels: channels of the blocks, of the coarsest and of the others.
        pools: links of each chained pooling: 4 in the released code, 2 in the paper's figure.
        crp_order: see :class:`ChainedPooling`.
        align_corners: of all resizing.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: tuple[int, int] = (512, 256),
        pools: int = 4,
        crp_order: Literal["pool_conv", "conv_pool"] = "pool_conv",
        align_corners: bool = True,
    ):
        super().__init__()
        self.backbone = backbone
        self.align_corners = align_corners
        coarse, fine = channels
        sizes = [(coarse, 0), (fine, coarse), (fine, fine), (fine, fine)]
        self.refine = nn.ModuleList(  # coarse to fine: blocks 4, 3, 2, 1 of the paper
            RefineBlock(
                c, after, low, pools=pools, crp_order=crp_order, align_corners=align_corners
            )
            for c, (after, low) in zip(reversed(backbone.channels), sizes, strict=True)
        )
        self.dropout = nn.Dropout(0.5)
        self.classifier = conv3x3(fine, num_classes, bias=True)
        init_conv(self.refine, std=0.01)
        init_conv(self.classifier, std=0.01)

    def scores(self, x: Tensor) -> dict[str, Tensor]:
        c2, c3, c4, c5 = self.backbone(x)  # 1/4, 1/8, 1/16, 1/32
        y = self.refine[0](self.dropout(c5))  # (N, 512, H/32, W/32)
        y = self.refine[1](self.dropout(c4), y)  # (N, 256, H/16, W/16)
        y = self.refine[2](c3, y)  # (N, 256, H/8, W/8)
        y = self.refine[3](c2, y)  # (N, 256, H/4, W/4)
        return {"out": self.classifier(self.dropout(y))}


def refinenet(
    depth: int | Sequence[int],
    /,
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    pools: int = 4,
    crp_order: Literal["pool_conv", "conv_pool"] = "pool_conv",
    align_corners: bool = True,
    width: int = 64,
) -> RefineNet:
    """RefineNet on a ResNet.

    Args:
        depth: 50, 101 or 152, or blocks per stage.
        num_classes: classes.
        in_channels: channels of the image.
        pools: see :class:`RefineNet`.
        crp_order: see :class:`ChainedPooling`.
        align_corners: of all resizing.
        width: see :class:`ResNet`; the blocks have 8 and 4 times as many channels.
    """
    return RefineNet(
        ResNet(depth, in_channels, width=width),
        num_classes,
        channels=(8 * width, 4 * width),
        pools=pools,
        crp_order=crp_order,
        align_corners=align_corners,
    )


@register(PAPER, stride=4, family=refinenet)
def refinenet_resnet50(num_classes: int = 21, in_channels: int = 3, **options: Any) -> RefineNet:
    """RefineNet on ResNet-50. Options: see :func:`refinenet`."""
    return refinenet(50, num_classes, in_channels, **options)


@register(
    PAPER,
    stride=4,
    voc2012=82.4,
    conditions="COCO images, many scales, dense CRF; as reported on the leaderboard",
    family=refinenet,
)
def refinenet_resnet101(num_classes: int = 21, in_channels: int = 3, **options: Any) -> RefineNet:
    """RefineNet on ResNet-101, 118 M parameters. Options: see :func:`refinenet`."""
    return refinenet(101, num_classes, in_channels, **options)


@register(
    PAPER,
    stride=4,
    voc2012=83.4,
    conditions="COCO images, many scales, dense CRF; later leaderboard entry 84.2",
    family=refinenet,
)
def refinenet_resnet152(num_classes: int = 21, in_channels: int = 3, **options: Any) -> RefineNet:
    """RefineNet on ResNet-152. Options: see :func:`refinenet`."""
    return refinenet(152, num_classes, in_channels, **options)
