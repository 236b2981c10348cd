"""hszhao/semseg: PSPNet and its ImageNet classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..layout import Layout, renamed
from .rules import conv_bn, resnet, stem

PSPNET = Layout(
    "semseg_pspnet",
    "hszhao/semseg's PSPNet",
    marks=(r"layer0\.0\.weight", r"ppm\.features\.0\.1\.weight"),
    rules=(
        *stem(*((rf"layer0\.{i}", rf"layer0\.{i + 1}") for i in (0, 3, 6))),
        *resnet(),
        *conv_bn(r"ppm\.features\.(\d)", r"classifier.ppm.branches.\1", r"\.1", r"\.2"),
        *conv_bn("cls", "classifier.bottleneck"),
        (r"cls\.4\.(\w+)", r"classifier.score.\1"),
        *conv_bn("aux", "aux_classifier.convs.0"),
        (r"aux\.4\.(\w+)", r"aux_classifier.score.\1"),
    ),
)
RESNET = Layout(
    "semseg_resnet",
    "hszhao/semseg's ImageNet classifier ResNet with a stem of three convolutions",
    marks=(r"conv3\.weight", r"layer4\.0\.conv3\.weight"),
    rules=(*stem(*((f"conv{i}", f"bn{i}") for i in (1, 2, 3))), *resnet(), (r"fc\.\w+", None)),
    trunk=True,
)
LAYOUTS = (PSPNET, RESNET)


def semseg(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """hszhao/semseg's PSPNet, or its ResNet classifier, under our names.

    PSPNet is our ``pspnet_resnet50`` or 101 with ``stem="deep128"``, and ``aux=True`` where there
    is an auxiliary head. Arguments and errors as :func:`fastseg.convert.torchvision`.
    """
    return renamed(LAYOUTS, state_dict)
