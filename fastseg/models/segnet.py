"""SegNet (Badrinarayanan, Kendall, Cipolla; PAMI 2017; arXiv:1511.00561)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn import ConvBNReLU2d, MaxPool2d, MaxUnpool2d
from .common import SegmentationModel, init_conv
from .registry import Paper, register
from .vgg import CONVS, VGG16

PAPER = Paper(
    "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation",
    "Badrinarayanan, Kendall, Cipolla",
    "PAMI",
    2017,
    "https://arxiv.org/abs/1511.00561",
)


class SegNet(SegmentationModel):
    """VGG16 with batch norm and its mirror image, which unpools to where the maxima came from.

    Args:
        num_classes: classes.
        in_channels: channels of the image.
        conv_bias: whether convolutions in front of a batch norm have a bias, as in the release.
        ceil_pool: round pooled sizes up, so that odd borders are not lost.
        dropout: drop rate after the three inner stages of encoder and decoder (Bayesian SegNet).
        width: channels of VGG16's first stage.
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        conv_bias: bool = True,
        ceil_pool: bool = True,
        dropout: float = 0.0,
        width: int = 64,
    ):
        super().__init__()
        pools = [MaxPool2d(2, 2, return_indices=True, ceil_mode=ceil_pool) for _ in CONVS]
        self.backbone = VGG16(
            in_channels, batch_norm=True, conv_bias=conv_bias, pools=pools, width=width
        )
        self.unpool = MaxUnpool2d(2, 2)
        channels = [width, *self.backbone.channels]
        self.decoder = nn.ModuleList()  # coarse to fine, mirroring the encoder
        for s in range(len(CONVS), 0, -1):
            # The last convolution of a stage reduces to the next stage's channels; the classifier
            # takes the place of the very last one.
            outs = [channels[s]] * (CONVS[s - 1] - 1) + ([channels[s - 1]] if s > 1 else [])
            self.decoder.append(
                nn.Sequential(
                    *(ConvBNReLU2d(channels[s], c, 3, padding=1, bias=conv_bias) for c in outs)
                )
            )
        self.classifier = nn.Conv2d(width, num_classes, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        init_conv(self)
        init_bn_shift(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        memory = []
        for s, (stage, pool) in enumerate(
            zip(self.backbone.stages, self.backbone.pools, strict=True)
        ):
            x = stage(x)
            size = x.shape[-2:]
            x, indices = pool(x)  # (N, 64, H/2, W/2), ... (N, 512, H/32, W/32)
            memory.append((indices, size))
            x = self.dropout(x) if s >= 2 else x
        for s, stage in enumerate(self.decoder):
            indices, size = memory.pop()
            x = stage(self.unpool(x, indices, size))  # (N, 512, H/16, W/16), ... (N, 64, H, W)
            x = self.dropout(x) if s < 3 else x
        return {"out": self.classifier(x)}


class SegNetBasic(SegmentationModel):
    """Four 7x7 stages of 64 channels down and four up, without ReLU on the way up.

    Args:
        num_classes: classes.
        in_channels: channels of the image.
        ceil_pool: round pooled sizes up, so that odd borders are not lost.
        width: channels of every convolution.
        kernel_size: of every convolution.
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        ceil_pool: bool = True,
        width: int = 64,
        kernel_size: int = 7,
    ):
        super().__init__()
        k, p = kernel_size, kernel_size // 2
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.encoder = nn.ModuleList(
            ConvBNReLU2d(c, width, k, padding=p, bias=True) for c in (in_channels, *[width] * 3)
        )
        self.pool = MaxPool2d(2, 2, return_indices=True, ceil_mode=ceil_pool)
        self.unpool = MaxUnpool2d(2, 2)
        self.decoder = nn.ModuleList(
            ConvBNReLU2d(width, width, k, padding=p, bias=True, activation="none") for _ in range(4)
        )
        self.classifier = nn.Conv2d(width, num_classes, 1)
        init_conv(self)
        init_bn_shift(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        memory = []
        x = self.norm(x)
        for conv in self.encoder:
            x = conv(x)
            size = x.shape[-2:]
            x, indices = self.pool(x)  # (N, 64, H/2, W/2), ... 1/16
            memory.append((indices, size))
        for conv in self.decoder:
            indices, size = memory.pop()
            x = conv(self.unpool(x, indices, size))  # (N, 64, H/8, W/8), ... (N, 64, H, W)
        return {"out": self.classifier(x)}


def init_bn_shift(model: nn.Module) -> None:
    """Batch-norm shifts of 0.001, as in the released training definitions."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.001)


@register(
    PAPER,
    stride=1,
    voc2012=59.9,
    conditions="as reported on the leaderboard, no CRF; the paper lists 59.1",
    family=SegNet,
)
def segnet_vgg16(num_classes: int = 21, in_channels: int = 3, **options: Any) -> SegNet:
    """SegNet on VGG16 with batch norm, 29.45 M parameters. Options: see :class:`SegNet`."""
    return SegNet(num_classes, in_channels, **options)


@register(PAPER, stride=1, family=SegNetBasic)
def segnet_basic(num_classes: int = 21, in_channels: int = 3, **options: Any) -> SegNetBasic:
    """SegNet-Basic, 1.4 M parameters. Options: see :class:`SegNetBasic`."""
    return SegNetBasic(num_classes, in_channels, **options)
