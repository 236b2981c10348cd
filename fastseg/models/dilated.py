"""Dilated convolutions: front end and context module (Yu, Koltun; ICLR 2016; arXiv:1511.07122)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import SegmentationModel, reflect_pad, resize, window
from .registry import Paper, register
from .vgg import VGG16, vgg_head

PAPER = Paper(
    "Multi-Scale Context Aggregation by Dilated Convolutions",
    "Yu, Koltun",
    "ICLR",
    2016,
    "https://arxiv.org/abs/1511.07122",
)
MARGIN = 186  # pixels that the unpadded front end loses on each side
DILATIONS = (1, 1, 2, 4, 8, 16, 1)  # of the context module's 3x3 layers
WIDTHS = {"basic": (1, 1, 1, 1, 1, 1, 1), "large": (2, 2, 4, 8, 16, 32, 32)}  # in units of C


class ContextModule(nn.Module):
    """Seven 3x3 convolutions of growing dilation and one 1x1 over score maps; starts as identity.

    Args:
        num_classes: C, channels of the score maps (N, C, h, w) in and out.
        width: "basic" keeps C channels, "large" grows them to 32 C.
        layers: 8, or 10 with dilations 32 and 64 added (the paper's Cityscapes network).
        padding: "each" pads every layer by its dilation; "first" pads the first layer by the whole
            receptive field, as the released VOC network does. They differ near the border.
        noise: standard deviation of the weights added to the identity of the large module, in
            units of the identity's own weight; it breaks the symmetry between its copies.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: Literal["basic", "large"] = "large",
        layers: Literal[8, 10] = 8,
        padding: Literal["each", "first"] = "each",
        noise: float = 0.01,
    ):
        super().__init__()
        if width not in WIDTHS:
            raise ValueError(f"ContextModule: width must be basic or large, got {width!r}")
        if layers not in (8, 10):
            raise ValueError(f"ContextModule: layers must be 8 or 10, got {layers}")
        if padding not in ("each", "first"):
            raise ValueError(f"ContextModule: padding must be each or first, got {padding!r}")
        dilations = list(DILATIONS)
        channels = [num_classes * w for w in WIDTHS[width]]
        if layers == 10:
            dilations[6:6] = [32, 64]
            channels[6:6] = [channels[5]] * 2
        self.convs = nn.ModuleList()
        before = num_classes
        for i, (d, after) in enumerate(zip(dilations, channels, strict=True)):
            pad = d if padding == "each" else sum(dilations) if i == 0 else 0
            self.convs.append(nn.Conv2d(before, after, 3, padding=pad, dilation=d))
            before = after
        self.final = nn.Conv2d(before, num_classes, 1)
        for conv in (*self.convs, self.final):
            identity_init_(conv, num_classes, noise if width == "large" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.final(x)  # (N, C, h, w)


def identity_init_(conv: nn.Conv2d, num_classes: int, noise: float) -> None:
    """Make a convolution copy class maps: input channel a goes, at the kernel's centre, to every
    output channel b of the same class, scaled so that the copies of a class sum to its map."""
    outs, ins, k, _ = conv.weight.shape
    class_of_out = torch.arange(outs) * num_classes // outs
    class_of_in = torch.arange(ins) * num_classes // ins
    same = (class_of_out[:, None] == class_of_in).to(conv.weight)
    with torch.no_grad():
        conv.weight.normal_(0, noise * num_classes / outs)
        conv.weight[:, :, k // 2, k // 2] += same * num_classes / outs
        if conv.bias is not None:
            conv.bias.zero_()


class Dilated(SegmentationModel):
    """VGG16 without pool4 and pool5, dilated instead, then optionally the context module.

    Args:
        num_classes: classes.
        in_channels: channels of the image.
        context: None for the front end alone, or "basic" or "large".
        padding: "reflect" mirrors the image by 186 pixels and convolves without padding, as the
            paper does; "same" pads every convolution by zeros, for 4/5 of the work at 512 x 512.
        context_padding: see :class:`ContextModule`.
        upsample: "score" resizes scores, "prob" the probabilities (the released VOC network); the
            result is then their logarithm, so it remains a logit.
        width: channels of VGG16's first stage.
        hidden: channels of fc6 and fc7.
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        context: Literal["basic", "large"] | None = None,
        padding: Literal["reflect", "same"] = "reflect",
        context_padding: Literal["each", "first"] = "each",
        upsample: Literal["score", "prob"] = "score",
        width: int = 64,
        hidden: int = 4096,
    ):
        super().__init__()
        if padding not in ("reflect", "same"):
            raise ValueError(f"Dilated: padding must be reflect or same, got {padding!r}")
        if upsample not in ("score", "prob"):
            raise ValueError(f"Dilated: upsample must be score or prob, got {upsample!r}")
        self.padding = padding
        self.upsample = upsample
        reflect = padding == "reflect"
        pools = [nn.MaxPool2d(2, 2, ceil_mode=True) for _ in range(3)]
        self.backbone = VGG16(
            in_channels,
            padding="valid" if reflect else "same",
            dilation5=2,
            pools=[*pools, nn.Identity(), nn.Identity()],
            width=width,
        )
        self.head = vgg_head(
            8 * width, hidden, num_classes, 7, dilation=4, padding=0 if reflect else None
        )
        self.context: nn.Module = nn.Identity()
        if context is not None:
            self.context = ContextModule(num_classes, width=context, padding=context_padding)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        H, W = x.shape[-2:]
        if self.padding == "reflect":  # up to a multiple of 8, plus what the convolutions eat
            x = reflect_pad(x, MARGIN, MARGIN + -H % 8, MARGIN, MARGIN + -W % 8)
        y = self.context(self.head(self.backbone(x)[-1]))  # (N, classes, H/8, W/8)
        if self.upsample == "prob":
            y = y.softmax(1)
        # Cell i stands for pixel 8 i; the pixels after the last cell take its value.
        h, w = y.shape[-2:]
        y = resize(F.pad(y, (0, 1, 0, 1), mode="replicate"), (8 * h + 1, 8 * w + 1), True)
        y = window(y, 0, (H, W))
        if self.upsample == "prob":
            y = y.clamp_min(torch.finfo(y.dtype).tiny).log()
        return {"out": y}


@register(
    PAPER,
    stride=8,
    voc2012=71.3,
    conditions="trained with COCO images, single scale, no CRF; without COCO 67.6",
    family=Dilated,
)
def dilated_frontend_vgg16(num_classes: int = 21, in_channels: int = 3, **options: Any) -> Dilated:
    """The front end: VGG16 whose conv5 has dilation 2 and fc6 dilation 4, scores at 1/8.

    Options: see :class:`Dilated`.
    """
    return Dilated(num_classes, in_channels, **options)


@register(
    PAPER,
    stride=8,
    voc2012=73.5,
    conditions="large context, trained with COCO images, single scale; 74.7 with a dense CRF, "
    "75.3 with CRF-RNN",
    family=Dilated,
)
def dilated8_vgg16(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    context: Literal["basic", "large"] = "large",
    **options: Any,
) -> Dilated:
    """The front end followed by the context module, whose receptive field is 67 x 67 cells.

    Options: see :class:`Dilated`.
    """
    return Dilated(num_classes, in_channels, context=context, **options)
