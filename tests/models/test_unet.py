import pytest
import torch
import torch.nn.functional as F

from fastseg import models

from .reference import Weights, assert_same_network

TINY = {"num_classes": 3, "in_channels": 2, "width": 4}


def block(w: Weights, x, name, *, bn, padding):
    if bn:
        x = w.conv_bn_relu(x, name + ".0", padding=padding)
        return w.conv_bn_relu(x, name + ".1", padding=padding)
    x = F.relu(w.conv(x, name + ".0", padding=padding))
    return F.relu(w.conv(x, name + ".2", padding=padding))


def unet(w: Weights, x, *, bn=True, padding=1, bilinear=False):
    skips = []
    for i in range(5):
        if i:
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = block(w, x, f"encoder.{i}", bn=bn, padding=padding)
        skips.append(x)
    for i, skip in enumerate(skips[3::-1]):
        if bilinear:
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = w.conv(x, f"up.{i}.0")
        else:
            x = F.conv_transpose2d(x, w[f"up.{i}.weight"], w[f"up.{i}.bias"], stride=2)
        if padding:
            x = x[:, :, : skip.shape[2], : skip.shape[3]]
        else:
            (h, w_), (H, W) = x.shape[2:], skip.shape[2:]
            top, left = (H - h) // 2, (W - w_) // 2
            skip = skip[:, :, top : top + h, left : left + w_]
        x = block(w, torch.cat([skip, x], 1), f"decoder.{i}", bn=bn, padding=padding)
    return {"out": w.conv(x, "classifier")}


@pytest.mark.parametrize("up", ["deconv", "bilinear"])
def test_same_padding(up):
    model = models.unet(**TINY, up=up)
    assert_same_network(
        model, lambda w, x: unet(w, x, bilinear=up == "bilinear"), (2, 2, 32, 48), (1, 2, 37, 45)
    )


def test_original_form():
    model = models.unet(**TINY, batch_norm=False, padding="valid")
    assert_same_network(
        model, lambda w, x: unet(w, x, bn=False, padding=0), (1, 2, 188, 188), (1, 2, 204, 220)
    )
    with torch.device("meta"):
        x = torch.empty(1, 1, 572, 572)
        out = models.unet(2, 1, batch_norm=False, padding="valid", width=4)(x)["out"]
    assert out.shape == (1, 2, 388, 388)


def test_mirrored_border():
    """The result at a pixel is that of the bare network on the mirrored image."""

    def restatement(w, x):
        H, W = x.shape[2:]
        x = F.pad(x, (92, 92 + (4 - W) % 16, 92, 92 + (4 - H) % 16), mode="reflect")
        return {"out": unet(w, x, bn=False, padding=0)["out"][:, :, :H, :W]}

    model = models.unet(**TINY, batch_norm=False, padding="mirror")
    assert_same_network(model, restatement, (1, 2, 120, 109))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_fewer_levels(levels):
    for padding in ("same", "mirror"):
        model = models.unet(**TINY, levels=levels, padding=padding).eval()
        assert model(torch.randn(1, 2, 17, 9))["out"].shape == (1, 3, 17, 9)


@pytest.mark.parametrize("size", [(572, 570), (172, 188)])
def test_size_that_does_not_halve(size):
    model = models.unet(**TINY, batch_norm=False, padding="valid")
    with pytest.raises(ValueError, match=r"of 16 k - 4, at least 188, got \("):
        model(torch.randn(1, 2, *size))


def test_bad_options():
    with pytest.raises(ValueError, match="padding must be same, mirror or valid, got 'zero'"):
        models.unet(padding="zero")
    with pytest.raises(ValueError, match="up must be deconv or bilinear, got 'nearest'"):
        models.unet(up="nearest")
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        models.unet(levels=0)
