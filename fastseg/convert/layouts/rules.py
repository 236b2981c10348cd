"""Rules that several layouts share."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from ...models.vgg import CONVS
from ..layout import Rule


def vgg_convs(batch_norm: bool = False) -> Iterator[tuple[int, int, int]]:
    """(stage, number in the stage, index in torchvision's ``features``) of VGG16's convolutions."""
    index = 0
    for s, count in enumerate(CONVS, 1):
        for i in range(1, count + 1):
            yield s, i, index
            index += 3 if batch_norm else 2  # convolution, batch norm, ReLU
        index += 1  # pooling


def as_conv(weight: Tensor) -> Tensor:
    """VGG's fully connected layer over 512 x 7 x 7 or 1 x 1 features as a convolution."""
    if weight.dim() == 4:
        return weight
    outs, ins = weight.shape
    k = 1 if ins == outs else 7
    return weight.reshape(outs, ins // k**2, k, k)


def conv_bn(source: str, ours: str, conv: str = r"\.0", bn: str = r"\.1") -> tuple[Rule, ...]:
    """A convolution with its batch norm: by default the first two layers of a Sequential."""
    groups = re.compile(source).groups
    return (
        (source + conv + r"\.weight", ours + ".conv.weight"),
        (source + bn + r"\.(\w+)", ours + rf".bn.\{groups + 1}"),
    )


def stem(*layers: tuple[str, str]) -> tuple[Rule, ...]:
    """ResNet's layers in front of its stages, by the source's (convolution, batch norm)."""
    return tuple(
        rule
        for i, (conv, bn) in enumerate(layers)
        for rule in conv_bn("", f"backbone.stem.{i}", conv, bn)
    )


def resnet(prefix: str = "") -> tuple[Rule, ...]:
    """ResNet's four stages under torchvision's names."""
    block, ours = prefix + r"layer(\d)\.(\d+)", r"backbone.layer\1.\2"
    return (
        (block + r"\.conv(\d)\.weight", ours + r".conv\3.conv.weight"),
        (block + r"\.bn(\d)\.(\w+)", ours + r".conv\3.bn.\4"),
        *conv_bn(block + r"\.downsample", ours + ".downsample"),
    )


def aspp(prefix: str) -> tuple[Rule, ...]:
    """Atrous spatial pyramid pooling under torchvision's names."""
    return (
        *conv_bn(prefix + r"\.convs\.([0-3])", r"classifier.aspp.branches.\1"),
        *conv_bn(prefix + r"\.convs\.4", "classifier.aspp.pool", r"\.1", r"\.2"),
        *conv_bn(prefix + r"\.project", "classifier.aspp.project"),
    )
