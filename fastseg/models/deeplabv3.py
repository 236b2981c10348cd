"""DeepLab v3 (Chen, Papandreou, Schroff, Adam; 2017; arXiv:1706.05587)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from ..nn import ASPP, ConvBNReLU2d
from .common import SimpleSegmentationModel, init_conv
from .fcn import FCNHead
from .registry import Paper, register
from .resnet import Bottleneck, Dilation, ResNet, Stem

PAPER = Paper(
    "Rethinking Atrous Convolution for Semantic Image Segmentation",
    "Chen, Papandreou, Schroff, Adam",
    "arXiv",
    2017,
    "https://arxiv.org/abs/1706.05587",
)
RATES = (6, 12, 18)  # of the ASPP at output stride 16


class DeepLabV3(SimpleSegmentationModel):
    """A dilated ResNet, atrous spatial pyramid pooling and class scores.

    ``model.output_stride = 8`` switches a network trained at 16 to 8 and back: strides, dilations
    and ASPP rates change, the weights do not.
    """

    backbone: ResNet

    @property
    def output_stride(self) -> int:
        return self.backbone.output_stride

    @output_stride.setter
    def output_stride(self, value: int) -> None:
        scale = self.backbone.output_stride / value
        self.backbone.set_output_stride(value)
        aspp: Any = self.classifier.get_submodule("aspp")
        aspp.set_rates([max(1, round(b.conv.dilation[0] * scale)) for b in aspp.branches[1:]])


class DeepLabV3Cascade(SimpleSegmentationModel):
    """A dilated ResNet with copies of its last stage appended, at doubling rates.

    ``model.output_stride = 8`` switches a network trained at 16 to 8 and back.

    Args:
        backbone: the ResNet; its multi-grid is used for the copies too.
        num_classes: classes.
        blocks: number of the last block, 4 (none appended) to 7.
        aux_classifier: see :class:`SimpleSegmentationModel`.
        align_corners: of the resizing to the input.
    """

    backbone: ResNet

    def __init__(
        self,
        backbone: ResNet,
        num_classes: int,
        *,
        blocks: int = 7,
        aux_classifier: nn.Module | None = None,
        align_corners: bool = True,
    ):
        if not 4 <= blocks <= 7:
            raise ValueError(f"DeepLabV3Cascade: blocks must be 4 to 7, got {blocks}")
        channels, count = backbone.channels[-1], len(backbone.layer4)
        classifier: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(5, blocks + 1):
            copies = (Bottleneck(channels, channels // 4) for _ in range(count))
            classifier[f"block{i}"] = nn.Sequential(*copies)
        classifier["score"] = nn.Conv2d(channels, num_classes, 1)
        head = nn.Sequential(classifier)
        init_conv(head)
        super().__init__(backbone, head, aux_classifier, align_corners=align_corners)
        self.output_stride = backbone.output_stride

    @property
    def output_stride(self) -> int:
        return self.backbone.output_stride

    @output_stride.setter
    def output_stride(self, value: int) -> None:
        self.backbone.set_output_stride(value)
        rate = 32 // value  # of layer4
        blocks: Any = list(self.classifier.children())[:-1]
        for block in blocks:
            rate *= 2
            grid = self.backbone.multi_grid or [1] * len(block)
            for bottleneck, g in zip(block, grid, strict=True):
                bottleneck.set_rates(1, rate * g)


# Per variant: stem, dilation style, multi-grid, channels, projection kernel, its dropout, a further
# 3x3 convolution, align_corners, output stride.
VARIANTS: dict[str, tuple] = {
    "torchvision": ("7x7", "contract", None, 256, 1, 0.5, True, False, 8),
    "paper": ("7x7", "contract", (1, 2, 4), 256, 1, 0.0, False, True, 16),
    "mmseg": ("v1c", "contract", None, 512, 3, 0.1, False, False, 8),
    "smp": ("7x7", "full", None, 256, 1, 0.5, True, True, 8),
}


def deeplabv3(
    depth: int | Sequence[int],
    /,
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    aux: bool = False,
    variant: Literal["torchvision", "paper", "mmseg", "smp"] = "torchvision",
    output_stride: int | None = None,
    rates: Sequence[int] | None = None,
    multi_grid: Sequence[int] | None = None,
    stem: Stem | None = None,
    dilation: Dilation | None = None,
    align_corners: bool | None = None,
    width: int = 64,
) -> DeepLabV3:
    """DeepLab v3 with ASPP. What is None follows the variant.

    Args:
        depth: 50, 101 or 152, or blocks per stage.
        num_classes: classes.
        in_channels: channels of the image.
        aux: add an auxiliary head on layer3; the usual weight of its loss is 0.5 (mmseg: 0.4).
        variant: "torchvision"; "paper": multi-grid (1, 2, 4), no further 3x3 convolution, trained
            at stride 16; "mmseg": 512 channels, 3x3 projection, v1c stem; "smp".
        output_stride: 8, 16 or 32; may be changed later by assignment.
        rates: dilations of the ASPP; None is (6, 12, 18) * 16 / output_stride.
        multi_grid: see :class:`ResNet`.
        stem: see :class:`ResNet`.
        dilation: see :class:`ResNet`.
        align_corners: of the resizing to the input.
        width: see :class:`ResNet`.
    """
    if variant not in VARIANTS:
        raise ValueError(f"deeplabv3: variant must be {', '.join(VARIANTS)}, got {variant!r}")
    v_stem, v_dilation, v_grid, channels, kernel, dropout, refine, corners, v_stride = VARIANTS[
        variant
    ]
    output_stride = output_stride or v_stride
    backbone = ResNet(
        depth,
        in_channels,
        output_stride=output_stride,
        stem=stem or v_stem,
        dilation=dilation or v_dilation,
        multi_grid=multi_grid or v_grid,
        width=width,
    )
    c4, c5 = backbone.channels[-2:]
    channels = channels * width // 64
    rates = rates or [max(1, r * 16 // output_stride) for r in RATES]
    head: OrderedDict[str, nn.Module] = OrderedDict()
    head["aspp"] = ASPP(c5, channels, rates, project_kernel=kernel, dropout=dropout)
    if refine:
        head["refine"] = ConvBNReLU2d(channels, channels, 3, padding=1)
    head["score"] = nn.Conv2d(channels, num_classes, 1)
    return DeepLabV3(
        backbone,
        nn.Sequential(head),
        FCNHead(c4, num_classes) if aux else None,
        align_corners=corners if align_corners is None else align_corners,
    )


def deeplabv3_cascade(
    depth: int | Sequence[int],
    /,
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    blocks: int = 7,
    multi_grid: Sequence[int] = (1, 2, 1),
    output_stride: int = 16,
    aux: bool = False,
    stem: Stem = "7x7",
    align_corners: bool = True,
    width: int = 64,
) -> DeepLabV3Cascade:
    """DeepLab v3 with cascaded blocks instead of ASPP.

    Args:
        depth: 50, 101 or 152, or blocks per stage.
        num_classes: classes.
        in_channels: channels of the image.
        blocks: number of the last block, 4 (none appended) to 7 (the paper's best).
        multi_grid: dilations within layer4 and each copy, multiplied by the block's.
        output_stride: 8, 16 or 32; may be changed later by assignment.
        aux: add an auxiliary head on layer3.
        stem: see :class:`ResNet`.
        align_corners: of the resizing to the input.
        width: see :class:`ResNet`.
    """
    backbone = ResNet(
        depth,
        in_channels,
        output_stride=output_stride,
        stem=stem,
        multi_grid=multi_grid,
        width=width,
    )
    aux_classifier = FCNHead(backbone.channels[-2], num_classes) if aux else None
    return DeepLabV3Cascade(
        backbone,
        num_classes,
        blocks=blocks,
        aux_classifier=aux_classifier,
        align_corners=align_corners,
    )


@register(PAPER, stride=8, family=deeplabv3)
def deeplabv3_resnet50(num_classes: int = 21, in_channels: int = 3, **options: Any) -> DeepLabV3:
    """DeepLab v3 on ResNet-50, by default the network of torchvision.

    Options: see :func:`deeplabv3`.
    """
    return deeplabv3(50, num_classes, in_channels, **options)


@register(
    PAPER,
    stride=8,
    voc2012=85.7,
    conditions="paper form: COCO pretraining, stride 8, many scales and mirrored, tuned on "
    "trainval with rare classes doubled, no CRF",
    family=deeplabv3,
)
def deeplabv3_resnet101(num_classes: int = 21, in_channels: int = 3, **options: Any) -> DeepLabV3:
    """DeepLab v3 on ResNet-101, by default the network of torchvision.

    ``variant="paper"`` scores 77.21 on VOC val at stride 16, 78.51 at 8, 79.77 with many scales
    and mirrored. Options: see :func:`deeplabv3`.
    """
    return deeplabv3(101, num_classes, in_channels, **options)


@register(PAPER, stride=16, family=deeplabv3_cascade)
def deeplabv3_cascade_resnet50(
    num_classes: int = 21, in_channels: int = 3, **options: Any
) -> DeepLabV3Cascade:
    """Cascaded DeepLab v3 on ResNet-50. Options: see :func:`deeplabv3_cascade`."""
    return deeplabv3_cascade(50, num_classes, in_channels, **options)


@register(PAPER, stride=16, family=deeplabv3_cascade)
def deeplabv3_cascade_resnet101(
    num_classes: int = 21, in_channels: int = 3, **options: Any
) -> DeepLabV3Cascade:
    """Cascaded DeepLab v3 on ResNet-101: VOC val 76.66, 79.35 at stride 8 with many scales.

    Options: see :func:`deeplabv3_cascade`.
    """
    return deeplabv3_cascade(101, num_classes, in_channels, **options)
