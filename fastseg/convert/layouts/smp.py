"""segmentation-models-pytorch: DeepLab v3 on ResNet, and the ResNet of its other networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..layout import Layout, Rule, renamed
from .rules import aspp, conv_bn, resnet, stem

TRUNK = (*stem((r"encoder\.conv1", r"encoder\.bn1")), *resnet(r"encoder\."))
SCORE: Rule = (r"segmentation_head\.0\.(\w+)", r"classifier.score.\1")
DEEPLABV3 = Layout(
    "smp_deeplabv3",
    "DeepLab v3 on ResNet of segmentation-models-pytorch",
    marks=(r"encoder\.conv1\.weight", r"decoder\.(aspp|0)\.project\.0\.weight"),
    rules=(
        *TRUNK,
        *aspp(r"decoder\.(?:aspp|0)"),
        *conv_bn("decoder", "classifier.refine", r"\.(?:conv|1)", r"\.(?:bn|2)"),
        SCORE,
    ),
)
# Decoders that are other networks than the papers': only the trunk is of use.
UNET = Layout(
    "smp_unet",
    "ResNet of a U-Net of segmentation-models-pytorch",
    marks=(r"encoder\.conv1\.weight", r"decoder\.blocks\.0\.conv1\.0\.weight"),
    rules=(*TRUNK, (r"(decoder|segmentation_head)\..*", None)),
    trunk=True,
)
PSPNET = Layout(
    "smp_pspnet",
    "ResNet of a PSPNet of segmentation-models-pytorch",
    marks=(r"encoder\.conv1\.weight", r"decoder\.psp\.blocks\.0\.pool\.1\.0\.weight"),
    rules=(*TRUNK, (r"(decoder|segmentation_head)\..*", None)),
    trunk=True,
)
RESNET = Layout(
    "smp_resnet",
    "ResNet of any other network of segmentation-models-pytorch",
    marks=(
        r"encoder\.conv1\.weight",
        r"encoder\.layer4\.0\.conv3\.weight",
        r"segmentation_head\.0\.weight",
    ),
    rules=(*TRUNK, (r"(decoder|segmentation_head|classification_head)\..*", None)),
    trunk=True,
)
LAYOUTS = (DEEPLABV3, UNET, PSPNET, RESNET)


def smp(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """segmentation-models-pytorch's DeepLab v3, or the ResNet of its other networks, in our names.

    DeepLab v3 is our ``deeplabv3_resnet50(variant="smp")`` or 101; its rates are (12, 24, 36) also
    at ``output_stride=16``. That library's U-Net has no
    transposed convolutions and other widths, and its PSPNet pools the undilated map at 1/8 and has
    a 1x1 convolution after the pyramid: neither decoder is the paper's, so only the ResNet results.
    Arguments and errors as :func:`fastseg.convert.torchvision`.
    """
    return renamed(LAYOUTS, state_dict)
