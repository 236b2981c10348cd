import pytest
import torch
import torch.nn.functional as F

from fastseg import models
from fastseg.models.deeplabv2 import deeplabv2_resnet

from .reference import (
    DEPTH,
    SMALL_RESNET,
    STRIDE_8_FULL,
    Weights,
    assert_same_network,
    resnet,
    vgg16,
    vgg_head,
)
from .test_deeplabv1 import VARIANTS

TINY = {"num_classes": 3, "in_channels": 2, "width": 4, "hidden": 6}


def up(y, size, align_corners=True):
    return F.interpolate(y, size, mode="bilinear", align_corners=align_corners)


def scores_vgg16(w: Weights, x, rates=(6, 12, 18, 24)):
    pool5 = vgg16(w, x, dilation5=2, pools=VARIANTS["largefov"][0])[-1]
    branches = [
        vgg_head(w, pool5, f"branches.{i}", padding=r, dilation=r) for i, r in enumerate(rates)
    ]
    return torch.stack(branches).sum(0)


def test_vgg16():
    model = models.deeplabv2_vgg16(**TINY)
    assert_same_network(
        model,
        lambda w, x: {"out": up(scores_vgg16(w, x), x.shape[-2:])},
        (2, 2, 65, 65),
        (1, 2, 37, 52),
    )


def test_maximum_over_scales():
    def restatement(w, x):
        out = scores_vgg16(w, x, (2, 4))
        for size in ([49, 60], [33, 40]):  # floor((n - 1) * 0.75) + 1, floor((n - 1) * 0.5) + 1
            y = up(scores_vgg16(w, up(x, size), (2, 4)), out.shape[-2:])
            out = torch.maximum(out, y)
        return {"out": up(out, x.shape[-2:])}

    model = models.deeplabv2_vgg16(**TINY, rates=(2, 4), scales=(1, 0.75, 0.5))
    assert_same_network(model, restatement, (1, 2, 65, 80))


def test_training_returns_each_scale():
    model = models.deeplabv2_vgg16(**TINY, scales=(1, 0.5)).train()
    out = model(torch.randn(2, 2, 40, 33))
    assert set(out) == {"out", "scale1", "scale0.5"}
    assert all(y.shape == (2, 3, 40, 33) for y in out.values())
    assert set(model.eval()(torch.randn(2, 2, 40, 33))) == {"out"}


def test_bad_scales():
    with pytest.raises(ValueError, match=r"the first scale must be 1, got \(0.5, 1\)"):
        models.deeplabv2_vgg16(**TINY, scales=(0.5, 1))


def test_resnet():
    def score(w, x):
        c5 = resnet(w, x, *STRIDE_8_FULL, ceil=True, stride_in=1)[-1]
        return sum(
            w.conv(c5, f"branches.{i}", padding=r, dilation=r)
            for i, r in enumerate((6, 12, 18, 24))
        )

    model = deeplabv2_resnet(DEPTH, **SMALL_RESNET)
    assert_same_network(
        model, lambda w, x: {"out": up(score(w, x), x.shape[-2:])}, (2, 2, 65, 65), (1, 2, 33, 70)
    )

    def half_pixels(w, x):
        """The multi-scale form of deeplab-pytorch."""
        out = score(w, x)
        for scale in (0.5, 0.75):
            small = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            out = torch.maximum(out, up(score(w, small), out.shape[-2:], False))
        return {"out": up(out, x.shape[-2:], False)}

    model = deeplabv2_resnet(DEPTH, **SMALL_RESNET, scales=(1, 0.75, 0.5), align_corners=False)
    assert_same_network(model, half_pixels, (1, 2, 65, 65))
