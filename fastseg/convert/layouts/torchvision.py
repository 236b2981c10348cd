"""torchvision: classifiers, FCN and DeepLab v3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..layout import Layout, Rule, renamed
from .rules import as_conv, aspp, conv_bn, resnet, stem, vgg_convs

FULLY_CONNECTED: tuple[Rule, ...] = (
    (r"classifier\.0\.weight", "head.fc6.weight", as_conv),
    (r"classifier\.3\.weight", "head.fc7.weight", as_conv),
    (r"classifier\.0\.bias", "head.fc6.bias"),
    (r"classifier\.3\.bias", "head.fc7.bias"),
    (r"classifier\.6\.\w+", None),
)
VGG16_BN = Layout(
    "vgg16_bn",
    "torchvision's ImageNet classifier VGG16 with batch norm",
    marks=(r"features\.0\.weight", r"features\.1\.running_mean", r"features\.40\.weight"),
    rules=(
        *(
            rule
            for s, i, n in vgg_convs(batch_norm=True)
            for rule in (
                (rf"features\.{n}\.(\w+)", rf"backbone.stages.{s - 1}.conv{s}_{i}.conv.\1"),
                (rf"features\.{n + 1}\.(\w+)", rf"backbone.stages.{s - 1}.conv{s}_{i}.bn.\1"),
            )
        ),
        *FULLY_CONNECTED,
    ),
    trunk=True,
)
VGG16 = Layout(
    "vgg16",
    "torchvision's ImageNet classifier VGG16",
    marks=(r"features\.0\.weight", r"features\.28\.weight"),
    rules=(
        *(
            (rf"features\.{n}\.(\w+)", rf"backbone.stages.{s - 1}.conv{s}_{i}.\1")
            for s, i, n in vgg_convs()
        ),
        *FULLY_CONNECTED,
    ),
    trunk=True,
)
RESNET = Layout(
    "resnet",
    "torchvision's ImageNet classifier ResNet",
    marks=(r"conv1\.weight", r"layer4\.0\.conv3\.weight"),
    rules=(*stem(("conv1", "bn1")), *resnet(), (r"fc\.\w+", None)),
    trunk=True,
)
TRUNK = (*stem((r"backbone\.conv1", r"backbone\.bn1")), *resnet(r"backbone\."))
AUX = (
    *conv_bn("aux_classifier", "aux_classifier.convs.0"),
    (r"aux_classifier\.4\.(\w+)", r"aux_classifier.score.\1"),
)
FCN = Layout(
    "torchvision_fcn",
    "torchvision's FCN on ResNet",
    marks=(r"backbone\.conv1\.weight", r"classifier\.0\.weight", r"classifier\.4\.weight"),
    rules=(
        *TRUNK,
        *conv_bn("classifier", "classifier.convs.0"),
        (r"classifier\.4\.(\w+)", r"classifier.score.\1"),
        *AUX,
    ),
)
DEEPLABV3 = Layout(
    "torchvision_deeplabv3",
    "torchvision's DeepLab v3 on ResNet",
    marks=(r"backbone\.conv1\.weight", r"classifier\.0\.project\.0\.weight"),
    rules=(
        *TRUNK,
        *aspp(r"classifier\.0"),
        *conv_bn("classifier", "classifier.refine", r"\.1", r"\.2"),
        (r"classifier\.4\.(\w+)", r"classifier.score.\1"),
        *AUX,
    ),
)
LAYOUTS = (DEEPLABV3, FCN, VGG16_BN, VGG16, RESNET)


def torchvision(state_dict: Mapping[str, Any], *, bgr: bool = False) -> dict[str, Tensor]:
    """torchvision's VGG16, VGG16-BN, ResNet, FCN and DeepLab v3 under our names.

    FCN is our ``fcn_resnet50`` or 101, DeepLab v3 our ``deeplabv3_resnet50`` or 101, with
    ``aux=True`` where there is an auxiliary head. The classifiers become ``backbone.*``, and VGG's
    fully connected layers ``head.fc6`` and ``head.fc7``; :func:`fastseg.convert.load` fits those to
    a network.

    Args:
        state_dict: names to tensors, or a checkpoint that contains them.
        bgr: the weights take BGR images (Caffe's VGG16 is also around under torchvision's names):
            turn the first convolution to take RGB.

    Raises:
        ValueError: the names are not torchvision's, or there are more than there should be.
    """
    return renamed(LAYOUTS, state_dict, bgr)
