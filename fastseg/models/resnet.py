"""ResNet-50/101/152 (He et al., CVPR 2016, arXiv:1512.03385) as a trunk for segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..nn import ConvBNReLU2d
from .common import Backbone, init_conv

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
STRIDES = {8: (1, 2, 1, 1), 16: (1, 2, 2, 1), 32: (1, 2, 2, 2)}  # of layer1 to layer4
# Channels of the three 3x3 convolutions of a deep stem, in units of the trunk's width.
DEEP_STEMS = {"deep128": (1, 1, 2), "v1c": (0.5, 0.5, 1)}

Stem = Literal["7x7", "deep128", "v1c"]
StrideIn = Literal["3x3", "1x1"]
Dilation = Literal["contract", "full"]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, batch norm after each, plus the shortcut: 4 * width channels.

    ``stride_in`` names the convolution that strides: "3x3" (torchvision) or the first "1x1".
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        project: bool = False,
        stride_in: StrideIn = "3x3",
    ):
        super().__init__()
        self.stride_in = stride_in
        self.conv1 = ConvBNReLU2d(in_channels, width, 1)
        self.conv2 = ConvBNReLU2d(width, width, 3)
        self.conv3 = ConvBNReLU2d(width, 4 * width, 1)
        self.downsample = None
        if project:
            self.downsample = ConvBNReLU2d(in_channels, 4 * width, 1, activation="none")
        self.set_rates(stride, dilation)

    def set_rates(self, stride: int, dilation: int) -> None:
        """Change stride and dilation; the weights stay as they are."""
        strided = self.conv1 if self.stride_in == "1x1" else self.conv2
        strided.conv.stride = (stride, stride)
        self.conv2.conv.dilation = self.conv2.conv.padding = (dilation, dilation)
        if self.downsample is not None:
            self.downsample.conv.stride = (stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.conv3(self.conv2(self.conv1(x)), shortcut)


class ResNet(Backbone):
    """ResNet without its classifier, with every option that segmentation papers use.

    Args:
        depth: 50, 101 or 152, or the number of blocks in each of the four stages.
        in_channels: channels of the image.
        output_stride: 8, 16 or 32; below 32 the last stages dilate instead of striding. May be
            changed later by :meth:`set_output_stride`.
        stem: "7x7" (torchvision); three 3x3: "deep128" (PSPNet), "v1c" (mmsegmentation).
        stride_in: "3x3" (torchvision) or "1x1" (DeepLab v2).
        dilation: "contract" gives the first block of a dilated stage the dilation of the stage
            before (torchvision, mmsegmentation); "full" gives all blocks the same (PSPNet,
            DeepLab v2).
        multi_grid: dilations of the blocks of layer4, multiplied by the stage's (DeepLab v3).
        ceil_pool: round the max pool's output size up (DeepLab v2).
        width: channels of the first stage's 3x3 convolutions, 64 in the paper.

    Input (N, in_channels, H, W); returns [c2, c3, c4, c5]: (N, 256, H/4, W/4), (N, 512, H/8, W/8),
    1024 channels at stride min(16, output_stride) and 2048 at output_stride.
    """

    def __init__(
        self,
        depth: int | Sequence[int] = 50,
        in_channels: int = 3,
        *,
        output_stride: int = 32,
        stem: Stem = "7x7",
        stride_in: StrideIn = "3x3",
        dilation: Dilation = "contract",
        multi_grid: Sequence[int] | None = None,
        ceil_pool: bool = False,
        width: int = 64,
    ):
        super().__init__()
        if isinstance(depth, int):
            if depth not in BLOCKS:
                raise ValueError(f"ResNet: depth must be 50, 101 or 152, got {depth}")
            depth = BLOCKS[depth]
        if stride_in not in ("3x3", "1x1"):
            raise ValueError(f"ResNet: stride_in must be 3x3 or 1x1, got {stride_in!r}")
        if dilation not in ("contract", "full"):
            raise ValueError(f"ResNet: dilation must be contract or full, got {dilation!r}")
        if multi_grid is not None and len(multi_grid) != depth[3]:
            raise ValueError(
                f"ResNet: multi_grid must have one rate for each of the {depth[3]} blocks of "
                f"layer4, got {tuple(multi_grid)}"
            )
        self.dilation = dilation
        self.multi_grid = multi_grid
        self.channels = [4 * width, 8 * width, 16 * width, 32 * width]
        self.stem = _stem(stem, in_channels, width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=ceil_pool)

        before = int(width * DEEP_STEMS[stem][-1]) if stem in DEEP_STEMS else width
        stages = []
        for count, channels in zip(depth, self.channels, strict=True):
            blocks = [Bottleneck(before, channels // 4, project=True, stride_in=stride_in)]
            blocks += [
                Bottleneck(channels, channels // 4, stride_in=stride_in) for _ in range(count - 1)
            ]
            stages.append(nn.Sequential(*blocks))
            before = channels
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.set_output_stride(output_stride)
        init_conv(self)

    @property
    def output_stride(self) -> int:
        return self._output_stride

    def set_output_stride(self, output_stride: int) -> None:
        """Exchange strides for dilations, or back; the weights stay as they are."""
        if output_stride not in STRIDES:
            raise ValueError(f"ResNet: output_stride must be 8, 16 or 32, got {output_stride}")
        self._output_stride = output_stride
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        rate = 1
        for stage, stride, full in zip(stages, STRIDES[output_stride], STRIDES[32], strict=True):
            before, rate = rate, rate * full // stride
            rates = [before if self.dilation == "contract" else rate] + [rate] * (len(stage) - 1)
            if stage is self.layer4 and self.multi_grid is not None:
                rates = [rate * g for g in self.multi_grid]
            block: Any
            for i, block in enumerate(stage):
                block.set_rates(stride if i == 0 else 1, rates[i])

    def forward(self, x: Tensor) -> list[Tensor]:
        c2 = self.layer1(self.maxpool(self.stem(x)))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c2, c3, c4, self.layer4(c4)]


def _stem(stem: str, in_channels: int, width: int) -> nn.Sequential:
    """The convolutions before the max pool: (N, in_channels, H, W) to half the size."""
    if stem == "7x7":
        return nn.Sequential(ConvBNReLU2d(in_channels, width, 7, stride=2, padding=3))
    if stem not in DEEP_STEMS:
        raise ValueError(f"ResNet: stem must be 7x7, deep128 or v1c, got {stem!r}")
    a, b, c = (int(width * factor) for factor in DEEP_STEMS[stem])
    return nn.Sequential(
        ConvBNReLU2d(in_channels, a, 3, stride=2, padding=1),
        ConvBNReLU2d(a, b, 3, padding=1),
        ConvBNReLU2d(b, c, 3, padding=1),
    )
