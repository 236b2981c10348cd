"""mmsegmentation: FCN, PSPNet and DeepLab v3 on ResNet and ResNet v1c."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..layout import Layout, Rule, renamed
from .rules import conv_bn, stem
from .torchvision import TRUNK


def module(source: str, ours: str) -> tuple[Rule, ...]:
    """mmcv's ConvModule."""
    return conv_bn(source, ours, r"\.conv", r"\.bn")


def pool_last(weight: Tensor) -> Tensor:
    """Image pooling is the first fifth of mmsegmentation's concatenation and the last of ours."""
    return weight.roll(-(weight.shape[1] // 5), 1)


COMMON: tuple[Rule, ...] = (
    *TRUNK,
    *stem(*((rf"backbone\.stem\.{i}", rf"backbone\.stem\.{i + 1}") for i in (0, 3, 6))),
    *module(r"auxiliary_head\.convs\.0", "aux_classifier.convs.0"),
    (r"auxiliary_head\.conv_seg\.(\w+)", r"aux_classifier.score.\1"),
    (r"decode_head\.conv_seg\.(\w+)", r"classifier.score.\1"),
)
FCN = Layout(
    "mmseg_fcn",
    "mmsegmentation's FCN",
    marks=(r"decode_head\.convs\.0\.conv\.weight", r"decode_head\.conv_seg\.weight"),
    rules=(
        *COMMON,
        *module(r"decode_head\.convs\.(\d)", r"classifier.convs.\1"),
        *module(r"decode_head\.conv_cat", "classifier.conv_cat"),
    ),
)
PSPNET = Layout(
    "mmseg_pspnet",
    "mmsegmentation's PSPNet",
    marks=(r"decode_head\.psp_modules\.0\.1\.conv\.weight",),
    rules=(
        *COMMON,
        *module(r"decode_head\.psp_modules\.(\d)\.1", r"classifier.ppm.branches.\1"),
        *module(r"decode_head\.bottleneck", "classifier.bottleneck"),
    ),
)
ASPP, PROJECT = r"decode_head\.aspp_modules\.", r"decode_head\.bottleneck\."
DEEPLABV3 = Layout(
    "mmseg_deeplabv3",
    "mmsegmentation's DeepLab v3",
    marks=(ASPP + r"0\.conv\.weight", r"decode_head\.image_pool\.1\.conv\.weight"),
    rules=(
        *COMMON,
        *module(ASPP + r"(\d)", r"classifier.aspp.branches.\1"),
        *module(r"decode_head\.image_pool\.1", "classifier.aspp.pool"),
        (PROJECT + r"conv\.weight", "classifier.aspp.project.conv.weight", pool_last),
        (PROJECT + r"bn\.(\w+)", r"classifier.aspp.project.bn.\1"),
    ),
)
LAYOUTS = (DEEPLABV3, PSPNET, FCN)


def mmseg(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """mmsegmentation's FCN, PSPNet and DeepLab v3 on ResNet v1c under our names.

    They are our ``fcn_resnet50(variant="mmseg")``, ``pspnet_resnet50(stem="v1c",
    dilation="contract", align_corners=False)`` and ``deeplabv3_resnet50(variant="mmseg")``, or 101,
    with ``aux=True`` where there is an auxiliary head. Arguments and errors as
    :func:`fastseg.convert.torchvision`.
    """
    return renamed(LAYOUTS, state_dict)
