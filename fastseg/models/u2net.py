"""U2-Net (Qin et al., Pattern Recognition 106, 2020; arXiv:2005.09007): a U of small Us."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.nn import ConvBNReLU2d

from .common import SegmentationModel, resize
from .registry import Paper, register

PAPER = Paper(
    "U2-Net: Going Deeper with Nested U-Structure for Salient Object Detection",
    "Qin, Zhang, Huang, Dehghan, Zaiane, Jagersand",
    "Pattern Recognition",
    2020,
    "https://arxiv.org/abs/2005.09007",
)
# Stages as (L of RSU-L or None for RSU-4F, channels inside, channels out): table 1 and section 3.3.
Stage = tuple[int | None, int, int]
ENCODER: tuple[Stage, ...] = (
    (7, 32, 64),
    (6, 32, 128),
    (5, 64, 256),
    (4, 128, 512),
    (None, 256, 512),
    (None, 256, 512),
)
DECODER: tuple[Stage, ...] = (
    (None, 256, 512),
    (4, 128, 256),
    (5, 64, 128),
    (6, 32, 64),
    (7, 16, 64),
)


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, ceil_mode=True)


def _join(x: Tensor, skip: Tensor) -> Tensor:
    """The channels of ``x``, resized to ``skip``, and those of ``skip``."""
    return torch.cat([resize(x, skip.shape[-2:], align_corners=False), skip], 1)


class RSU(nn.Module):
    """Residual U-block: a small U-Net, plus its own first feature map.

    Args:
        levels: L of RSU-L, which pools L - 2 times; None is RSU-4F, whose four levels keep the
            resolution and dilate by 1, 2, 4 and 8 instead.
        in_channels: channels of the input.
        mid_channels: channels inside the U.
        out_channels: channels of the output.
    """

    def __init__(self, levels: int | None, in_channels: int, mid_channels: int, out_channels: int):
        super().__init__()
        self.pools = levels is not None
        rates = [1, 2, 4, 8] if levels is None else [1] * (levels - 1) + [2]
        outer = [out_channels] + [mid_channels] * (len(rates) - 2)  # outside of each level

        def conv(i: int, o: int, rate: int) -> ConvBNReLU2d:
            return ConvBNReLU2d(i, o, 3, padding=rate, dilation=rate)

        *sides, bottom = rates
        self.stem = conv(in_channels, out_channels, 1)
        self.encoder = nn.ModuleList(
            conv(c, mid_channels, rate) for c, rate in zip(outer, sides, strict=True)
        )
        self.bottom = conv(mid_channels, mid_channels, bottom)
        self.decoder = nn.ModuleList(
            conv(2 * mid_channels, c, rate)
            for c, rate in zip(outer[::-1], sides[::-1], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        x = y = self.stem(x)
        skips: list[Tensor] = []
        for conv in self.encoder:
            y = conv(_pool(y) if self.pools and skips else y)
            skips.append(y)
        first, *others = self.decoder
        y = first(torch.cat([self.bottom(y), skips.pop()], 1))
        for conv in others:
            skip = skips.pop()
            y = conv(_join(y, skip) if self.pools else torch.cat([y, skip], 1))
        return y + x


class U2Net(SegmentationModel):
    """Six stages down, five up; each of the last six levels scores, and a 1x1 convolution fuses.

    Args:
        encoder: the stages down.
        decoder: the stages up.
        num_classes: logits; 1 for salient objects, whose probability is the sigmoid.
        in_channels: channels of the image.
    """

    def __init__(
        self,
        encoder: Sequence[Stage] = ENCODER,
        decoder: Sequence[Stage] = DECODER,
        num_classes: int = 1,
        in_channels: int = 3,
    ):
        super().__init__()
        widths = [out for *_, out in encoder]
        inputs = [in_channels, *widths[:-1]]
        self.encoder = nn.ModuleList(
            RSU(levels, i, mid, out) for i, (levels, mid, out) in zip(inputs, encoder, strict=True)
        )
        levels_up = [widths[-1], *(out for *_, out in decoder)]  # coarse to fine, 1/32 to 1
        self.decoder = nn.ModuleList(
            RSU(levels, i + skip, mid, out)
            for i, skip, (levels, mid, out) in zip(
                levels_up[:-1], widths[-2::-1], decoder, strict=True
            )
        )
        self.score = nn.ModuleList(
            nn.Conv2d(c, num_classes, 3, padding=1) for c in reversed(levels_up)
        )
        self.fuse = nn.Conv2d(len(levels_up) * num_classes, num_classes, 1)

    def scores(self, x: Tensor) -> dict[str, Tensor]:
        """Logits: fused under "out", and those of each level, from 1 to 1/32, under "side1" to
        "side6", which training supervises as well."""
        skips: list[Tensor] = []
        for stage in self.encoder:
            x = stage(_pool(x) if skips else x)
            skips.append(x)
        levels = [skips.pop()]  # (N, C, H/32, W/32)
        for stage in self.decoder:
            levels.append(stage(_join(levels[-1], skips.pop())))
        sides = [score(y) for score, y in zip(self.score, reversed(levels), strict=True)]
        finest, *coarse = sides
        full = [finest, *(resize(s, finest.shape[-2:], self.align_corners) for s in coarse)]
        out = self.fuse(torch.cat(full, 1))  # (N, num_classes, H, W)
        return {"out": out, **{f"side{i}": s for i, s in enumerate(sides, 1)}}


@register(PAPER, stride=1)
def u2net(num_classes: int = 1, in_channels: int = 3) -> U2Net:
    """U2-Net, 44.0 million parameters.

    Args:
        num_classes: logits; 1 for salient objects, whose probability is the sigmoid.
        in_channels: channels of the image.
    """
    return U2Net(ENCODER, DECODER, num_classes, in_channels)


@register(PAPER, stride=1)
def u2netp(num_classes: int = 1, in_channels: int = 3) -> U2Net:
    """U2-Net-p, 1.13 million parameters: every stage has 16 channels inside and 64 outside.

    ``weights="shipped"`` are the authors' salient-object weights, trained on DUTS-TR at 320 x 320.
    Their published file has its batch norms folded into the convolutions, so here they hold the
    bias alone (running mean 0, running variance 1 - eps, weight 1): fine-tune with ``freeze_bn()``.

    Args:
        num_classes: logits; 1 for salient objects, whose probability is the sigmoid.
        in_channels: channels of the image.
    """
    encoder, decoder = ([(stage[0], 16, 64) for stage in side] for side in (ENCODER, DECODER))
    return U2Net(encoder, decoder, num_classes, in_channels)
