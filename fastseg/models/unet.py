"""U-Net (Ronneberger, Fischer, Brox; MICCAI 2015; arXiv:1505.04597)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..nn import ConvBNReLU2d
from .common import SegmentationModel, init_conv, reflect_pad, window
from .registry import Paper, register

PAPER = Paper(
    "U-Net: Convolutional Networks for Biomedical Image Segmentation",
    "Ronneberger, Fischer, Brox",
    "MICCAI",
    2015,
    "https://arxiv.org/abs/1505.04597",
)


class UNet(SegmentationModel):
    """Contract by pooling, expand by transposed convolutions, join equal sizes by concatenation.

    Args:
        num_classes: classes.
        in_channels: channels of the image.
        batch_norm: batch norm after each 3x3 convolution (not in the paper).
        padding: of the 3x3 convolutions. "same" pads by zeros; "mirror" mirrors the image by what
            convolutions without padding lose and some, as the paper does at an image's border;
            "valid" is the bare network: 572 x 572 pixels in, 388 x 388 out, and the input must
            have a size of 16 k - 4, which every pooling halves exactly.
        up: "deconv" (2x2, stride 2) or "bilinear" with a 1x1 convolution.
        dropout: drop rate at the end of the contracting path, on its last two levels.
        levels: poolings, 4 in the paper.
        width: channels at full size, doubled by each level.
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        batch_norm: bool = True,
        padding: Literal["same", "mirror", "valid"] = "same",
        up: Literal["deconv", "bilinear"] = "deconv",
        dropout: float = 0.0,
        levels: int = 4,
        width: int = 64,
    ):
        super().__init__()
        if padding not in ("same", "mirror", "valid"):
            raise ValueError(f"UNet: padding must be same, mirror or valid, got {padding!r}")
        if up not in ("deconv", "bilinear"):
            raise ValueError(f"UNet: up must be deconv or bilinear, got {up!r}")
        if levels < 1:
            raise ValueError(f"UNet: levels must be at least 1, got {levels}")
        self.padding = padding
        channels = [width * 2**i for i in range(levels + 1)]
        pad = int(padding == "same")
        self.encoder = nn.ModuleList(
            _block(before, after, batch_norm, pad)
            for before, after in zip([in_channels, *channels], channels, strict=False)
        )
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.ModuleList(_up(c, up) for c in channels[:0:-1])
        self.decoder = nn.ModuleList(_block(c, c // 2, batch_norm, pad) for c in channels[:0:-1])
        self.classifier = nn.Conv2d(width, num_classes, 1)
        init_conv(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = x.shape[-2:]
        if self.padding == "mirror":
            x = self.mirror(x)
        elif self.padding == "valid":
            self.check_valid(size)
        skips: list[Tensor] = []
        for i, block in enumerate(self.encoder):
            x = block(self.pool(x) if i else x)  # (N, 64 * 2^i, H / 2^i, W / 2^i)
            if i >= len(self.encoder) - 2:
                x = self.dropout(x)
            skips.append(x)
        x = skips.pop()
        for up, block, skip in zip(self.up, self.decoder, skips[::-1], strict=True):
            x = up(x)
            if self.padding == "same":  # an odd map was rounded up
                x = window(x, 0, skip.shape[-2:])
            else:
                skip = _center(skip, x.shape[-2:])
            x = block(torch.cat([skip, x], 1))
        x = self.classifier(x)  # (N, classes, H, W)
        return {"out": window(x, 0, size) if self.padding == "mirror" else x}

    def check_valid(self, size: torch.Size) -> None:
        step = 2 ** len(self.up)
        if any((n + 4) % step or n < 12 * step - 4 for n in size):
            raise ValueError(
                f"UNet: padding='valid' needs a height and width of {step} k - 4, at least "
                f"{12 * step - 4}, got {tuple(size)}; padding='mirror' takes any size"
            )

    def mirror(self, x: Tensor) -> Tensor:
        """Extend the image to the next size whose result covers it."""
        step = 2 ** len(self.up)
        margin = 6 * step - 4  # lost on each side: 92 pixels for 4 levels
        H, W = x.shape[-2:]
        return reflect_pad(x, margin, margin + (4 - H) % step, margin, margin + (4 - W) % step)


def _block(before: int, after: int, batch_norm: bool, padding: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with ReLU, with or without batch norm."""
    if batch_norm:
        return nn.Sequential(
            ConvBNReLU2d(before, after, 3, padding=padding),
            ConvBNReLU2d(after, after, 3, padding=padding),
        )
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=padding),
        nn.ReLU(inplace=True),
        nn.Conv2d(after, after, 3, padding=padding),
        nn.ReLU(inplace=True),
    )


def _up(channels: int, up: str) -> nn.Module:
    """Twice the size, half the channels."""
    if up == "deconv":
        return nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)
    # In this order the convolution has a quarter of the pixels, and the result is the same.
    return nn.Sequential(
        nn.Conv2d(channels, channels // 2, 1), nn.Upsample(scale_factor=2, mode="bilinear")
    )


def _center(x: Tensor, size: torch.Size) -> Tensor:
    """The middle of x of the given size."""
    top, left = (x.shape[-2] - size[0]) // 2, (x.shape[-1] - size[1]) // 2
    return x[..., top : top + size[0], left : left + size[1]]


@register(PAPER, stride=1, family=UNet)
def unet(num_classes: int = 21, in_channels: int = 3, **options: Any) -> UNet:
    """U-Net with padded convolutions and batch norm, which keeps the size of any image.

    The paper's network is ``unet(batch_norm=False, padding="mirror")``, or ``padding="valid"`` for
    572 x 572 in and 388 x 388 out. No VOC figure. Options: see :class:`UNet`.
    """
    return UNet(num_classes, in_channels, **options)
