"""CRF as a recurrent layer on FCN-8s (Zheng et al.; ICCV 2015; arXiv:1502.03240)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..nn import CRFRNN
from .common import SegmentationModel
from .fcn import FCN, fcn_vgg16
from .registry import Paper, register

PAPER = Paper(
    "Conditional Random Fields as Recurrent Neural Networks",
    "Zheng, Jayasumana, Romera-Paredes, Vineet, Su, Du, Huang, Torr",
    "ICCV",
    2015,
    "https://arxiv.org/abs/1502.03240",
)
MEAN = (123.68, 116.779, 103.939)  # of RGB, 0..255


class FCNWithCRF(SegmentationModel):
    """A network whose scores a :class:`fastseg.nn.CRFRNN` refines, trained as one.

    Args:
        fcn: the network.
        num_classes: classes.
        iters: mean-field steps in evaluation.
        train_iters: mean-field steps in training.
        mean: what was subtracted from each channel of the image of 0..255, and ...
        std: ... what it was divided by after that; the CRF needs the image itself. One number for
            all channels, or one each.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        fcn: FCN,
        num_classes: int,
        *,
        iters: int = 10,
        train_iters: int = 5,
        mean: float | Sequence[float] = MEAN,
        std: float | Sequence[float] = 1.0,
    ):
        super().__init__()
        self.fcn = fcn
        self.crf = CRFRNN(num_classes, iters=iters, train_iters=train_iters)
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.fcn(x)["out"]  # (N, classes, H, W)
        return {"out": self.crf(scores, x * self.std + self.mean)}


@register(
    PAPER,
    stride=8,
    voc2012=74.7,
    conditions="as the paper reports, trained with COCO images, single scale; without COCO 72.0",
    family=FCNWithCRF,
)
def crfrnn_fcn8s_vgg16(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width: int = 64,
    hidden: int = 4096,
    mean: float | Sequence[float] | None = None,
    **options: Any,
) -> FCNWithCRF:
    """FCN-8s with the image padded by 100 and learned upsampling, then the CRF.

    Args:
        num_classes: classes.
        in_channels: channels of the image.
        width: channels of VGG16's first stage.
        hidden: channels of fc6 and fc7.
        mean: see :class:`FCNWithCRF`; None is that of VGG16 for three channels, else 0.
        **options: see :class:`FCNWithCRF`.
    """
    fcn = fcn_vgg16(
        8,
        num_classes,
        in_channels,
        padding="caffe",
        upsample="dense",
        upscore_bias=True,
        width=width,
        hidden=hidden,
    )
    if mean is None:
        mean = MEAN if in_channels == 3 else 0.0
    return FCNWithCRF(fcn, num_classes, mean=mean, **options)
