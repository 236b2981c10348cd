import pytest
import torch.nn.functional as F

from fastseg import models

from .reference import Weights, assert_same_network, vgg16, vgg_head

TINY = {"num_classes": 3, "in_channels": 2, "width": 4, "hidden": 6}


def pools(*sizes):
    """Max pools that round up, as Caffe's do: (kernel, stride, padding)."""
    return [lambda x, a=a: F.max_pool2d(x, *a, ceil_mode=True) for a in sizes]


VARIANTS = {
    "largefov": (pools((3, 2, 1), (3, 2, 1), (3, 2, 1), (3, 1, 1), (3, 1, 1)), 12, 12),
    "7x7": (pools((2, 2, 0), (2, 2, 0), (2, 2, 0), (3, 1, 1), (3, 1, 1)), 4, 12),
    "4x4": (pools((2, 2, 1), (2, 2, 1), (2, 2, 1), (2, 1, 0), (3, 1, 1)), 4, 6),
}


def up(y, x):
    return F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=True)


def deeplabv1(w: Weights, x, variant, multi_scale=False):
    layers, dilation, padding = VARIANTS[variant]
    pooled = vgg16(w, x, dilation5=2, pools=layers)
    pool5 = pooled[-1]
    if variant == "largefov":
        pool5 = F.avg_pool2d(pool5, 3, 1, 1)
    out = up(vgg_head(w, pool5, "head", padding=padding, dilation=dilation), x)
    if multi_scale:
        for i, y in enumerate([x, *pooled[:4]]):
            y = F.relu(w.conv(y, f"branches.{i}.conv", padding=1))
            y = F.relu(w.conv(y, f"branches.{i}.fc"))
            out = out + up(w.conv(y, f"branches.{i}.score"), x)
    return {"out": out}


@pytest.mark.parametrize("variant", VARIANTS)
def test_restatement(variant):
    model = models.create_model(f"deeplabv1_{variant}_vgg16", **TINY)
    assert_same_network(
        model, lambda w, x: deeplabv1(w, x, variant), (2, 2, 65, 65), (1, 2, 37, 52)
    )


def test_multi_scale():
    model = models.deeplabv1_largefov_vgg16(**TINY, multi_scale=True)
    assert_same_network(
        model, lambda w, x: deeplabv1(w, x, "largefov", True), (2, 2, 33, 33), (1, 2, 37, 52)
    )


def test_bad_variant():
    with pytest.raises(ValueError, match="variant must be largefov, 7x7 or 4x4, got '5x5'"):
        models.deeplabv1_largefov_vgg16(variant="5x5")
