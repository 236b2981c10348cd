"""kazuto1011/deeplab-pytorch: DeepLab v2 on ResNet-101 and its initialisation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..layout import Layout, Rule, renamed

PARTS = {"reduce": "conv1", "conv3x3": "conv2", "increase": "conv3", "shortcut": "downsample"}
MEAN, STD = (122.675, 116.669, 104.008), (1.0, 1.0, 1.0)
BASE = r"(?:base\.)?"  # the network inside its multi-scale wrapper


def block(found: re.Match[str]) -> str:
    """deeplab-pytorch calls the stem layer1 and counts blocks from 1."""
    stage, number, part, rest = found.groups()
    return f"backbone.layer{int(stage) - 1}.{int(number) - 1}.{PARTS[part]}.{rest}"


TRUNK: tuple[Rule, ...] = (
    (BASE + r"layer1\.conv1\.(.*)", r"backbone.stem.0.\1"),
    (BASE + rf"layer([2-5])\.block(\d+)\.({'|'.join(PARTS)})\.(.*)", block),
)
DEEPLABV2 = Layout(
    "deeplab_pytorch_v2",
    "kazuto1011/deeplab-pytorch's DeepLab v2",
    marks=(BASE + r"layer1\.conv1\.conv\.weight", BASE + r"aspp\.c0\.weight"),
    rules=(*TRUNK, (BASE + r"aspp\.c(\d)\.(\w+)", r"branches.\1.\2")),
    bgr=True,
    mean=MEAN,
    std=STD,
)
RESNET = Layout(
    "deeplab_pytorch_resnet",
    "kazuto1011/deeplab-pytorch's ResNet, such as DeepLab's COCO initialisation",
    marks=(BASE + r"layer1\.conv1\.conv\.weight", BASE + r"fc\.weight"),
    rules=(*TRUNK, (BASE + r"fc\.\w+", None)),
    bgr=True,
    trunk=True,
    mean=MEAN,
    std=STD,
)
LAYOUTS = (DEEPLABV2, RESNET)


def deeplab_pytorch(state_dict: Mapping[str, Any], *, bgr: bool | None = None) -> dict[str, Tensor]:
    """kazuto1011/deeplab-pytorch's DeepLab v2, or its ResNet classifier, under our names.

    DeepLab v2 is our ``deeplabv2_resnet101(align_corners=False)``, with its three scales
    ``scales=(1, 0.5, 0.75)``. The released weights take BGR images; ``bgr`` and errors as
    :func:`fastseg.convert.caffe`. Its DeepLab v3 strides and pools differently from ours; there are
    no weights of it.
    """
    return renamed(LAYOUTS, state_dict, bgr)
