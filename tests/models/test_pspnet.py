import pytest
import torch
import torch.nn.functional as F

from fastseg import models
from fastseg.models.pspnet import pspnet

from .reference import (
    DEPTH,
    SMALL_RESNET,
    STRIDE_8,
    STRIDE_8_FULL,
    Weights,
    assert_same_network,
    fcn_head,
    resnet,
    up,
)


def pspnet_plain(w: Weights, x, *, blocks=STRIDE_8_FULL, corners=True, aux=True, deep=False):
    _, _, c4, c5 = resnet(w, x, *blocks, deep=deep)
    maps = [c5]
    for i, size in enumerate((1, 2, 3, 6)):
        y = w.conv_bn_relu(F.adaptive_avg_pool2d(c5, size), f"classifier.ppm.branches.{i}")
        maps.append(up(y, c5, corners))
    y = w.conv_bn_relu(torch.cat(maps, 1), "classifier.bottleneck", padding=1)
    out = {"out": up(w.conv(y, "classifier.score"), x, corners)}
    if aux:
        out["aux"] = up(fcn_head(w, c4, "aux_classifier"), x, corners)
    return out


def test_paper_form():
    model = pspnet(DEPTH, **SMALL_RESNET, aux=True, stem="deep128")
    assert_same_network(
        model, lambda w, x: pspnet_plain(w, x, deep=True), (2, 2, 57, 57), (1, 2, 33, 70)
    )


def test_mmsegmentation_form():
    model = pspnet(DEPTH, **SMALL_RESNET, dilation="contract", align_corners=False, stem="v1c")
    assert_same_network(
        model,
        lambda w, x: pspnet_plain(w, x, blocks=STRIDE_8, corners=False, aux=False, deep=True),
        (1, 2, 64, 48),
    )


def test_one_image_in_training():
    model = pspnet((1, 1, 1, 1), **SMALL_RESNET).train()
    x = torch.randn(1, 2, 40, 40)
    with pytest.raises(ValueError, match="needs a batch of at least 2 in training, got 1"):
        model(x)
    model(torch.randn(2, 2, 40, 40))["out"].sum().backward()
    model.freeze_bn()(x)
    assert models.pspnet_resnet50.__doc__
