"""Atrous spatial pyramid pooling (DeepLab v3, Chen et al. 2017, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.conv_branches import conv_branches
from .conv_bn import ConvBNReLU2d


class ASPP(nn.Module):
    """One map seen at several rates: a 1x1 convolution, dilated 3x3 convolutions and the mean of
    the image, each with batch norm and ReLU, concatenated and projected.

    The concatenation's order is 1x1, the rates, image pooling, as in torchvision.

    Args:
        in_channels: channels of the map.
        out_channels: channels of each branch and of the result.
        rates: dilations of the 3x3 convolutions; may be changed later by :meth:`set_rates`.
        project_kernel: kernel size of the projection.
        dropout: drop rate after the projection.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, H, W).

    Raises:
        ValueError: in training with a batch of 1, whose pooled 1x1 map cannot be normalised.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        rates: Sequence[int] = (12, 24, 36),
        *,
        project_kernel: int = 1,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([ConvBNReLU2d(in_channels, out_channels, 1)])
        self.branches.extend(ConvBNReLU2d(in_channels, out_channels, 3) for _ in rates)
        self.set_rates(rates)
        self.pool = ConvBNReLU2d(in_channels, out_channels, 1)
        self.project = ConvBNReLU2d(
            (len(rates) + 2) * out_channels,
            out_channels,
            project_kernel,
            padding=project_kernel // 2,
        )
        self.dropout = nn.Dropout(dropout)

    def set_rates(self, rates: Sequence[int]) -> None:
        """Change the dilations; the weights stay as they are."""
        if len(rates) != len(self.branches) - 1:
            raise ValueError(f"ASPP: needs {len(self.branches) - 1} rates, got {tuple(rates)}")
        convs: list[Any] = [branch.conv for branch in self.branches[1:]]
        for conv, rate in zip(convs, rates, strict=True):
            conv.dilation = conv.padding = (rate, rate)

    def forward(self, x: Tensor) -> Tensor:
        check_pooled_batch("ASPP", x, self.pool)
        mean = self.pool(x.mean((2, 3), keepdim=True))  # (N, out_channels, 1, 1)
        if _in_one_launch(x, self.branches):
            branches: list[Any] = list(self.branches)
            weights, biases = zip(*[branch.folded(x) for branch in branches], strict=True)
            rates = [branch.conv.dilation[0] for branch in branches]
            return self.dropout(self.project(conv_branches(x, weights, biases, rates, mean)))
        maps = [branch(x) for branch in self.branches]  # (N, out_channels, H, W) each
        maps.append(mean.expand_as(maps[0]))
        return self.dropout(self.project(torch.cat(maps, 1)))


def _in_one_launch(x: Tensor, branches: Any) -> bool:
    """Whether the branches run as conv_branches: on CUDA, folded, without gradients."""
    return (
        type(x) is Tensor  # not a proxy that is traced
        and x.is_cuda
        and all(isinstance(branch, ConvBNReLU2d) and branch.folds for branch in branches)
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or any(p.requires_grad for p in branches.parameters()))
        )
    )


def check_pooled_batch(name: str, x: Tensor, layer: Any) -> None:
    """A ConvBNReLU2d on the 1x1 map of one image has no variance to normalise by."""
    if layer.bn.training and x.shape[0] == 1:
        raise ValueError(
            f"{name}: batch norm of the 1x1 pooled map needs a batch of at least 2 in training, "
            "got 1; use a larger batch, or freeze the batch norm by model.freeze_bn()"
        )
