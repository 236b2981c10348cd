import pytest
import torch
import torch.nn.functional as F

from fastseg import models
from fastseg.models.common import BilinearUpsample2d
from fastseg.models.fcn import fcn_resnet, fcn_skip_resnet

from .reference import (
    DEPTH,
    SMALL_RESNET,
    STRIDE_8,
    STRIDE_32,
    Weights,
    assert_same_network,
    fcn_head,
    resnet,
    up,
    vgg16,
    vgg_head,
)


def bilinear_deconv(x, stride):
    """The released nets' upsampling: a transposed convolution with the bilinear kernel."""
    k, n = 2 * stride, x.shape[1]
    ramp = 1 - ((torch.arange(k) - (stride - 0.5)) / stride).abs()
    kernel = (ramp[:, None] * ramp).to(x).expand(n, 1, k, k)
    return F.conv_transpose2d(x, kernel, stride=stride, groups=n)


def crop(x, offset, like):
    H, W = like.shape[-2:]
    return x[:, :, offset : offset + H, offset : offset + W]


def fcn_same(w: Weights, x, stride, up=lambda y, s, name: bilinear_deconv(y, s)):
    _, _, pool3, pool4, pool5 = vgg16(w, x)
    y = vgg_head(w, pool5, "head", padding=3)
    if stride <= 16:
        skip = w.conv(pool4, "score_skips.0")
        y = crop(up(y, 2, "upscores.0"), 1, skip) + skip
    if stride <= 8:
        skip = w.conv(pool3, "score_skips.1")
        y = crop(up(y, 2, "upscores.1"), 1, skip) + skip
    return {"out": crop(up(y, stride, "upscore"), stride // 2, x)}


def fcn8s_caffe(w: Weights, x):
    _, _, pool3, pool4, pool5 = vgg16(w, x, first_padding=100)
    y = bilinear_deconv(vgg_head(w, pool5, "head", padding=0), 2)
    y = bilinear_deconv(y + crop(w.conv(0.01 * pool4, "score_skips.0"), 5, y), 2)
    y = y + crop(w.conv(0.0001 * pool3, "score_skips.1"), 9, y)
    return {"out": crop(bilinear_deconv(y, 8), 31, x)}


TINY = {"num_classes": 3, "in_channels": 2, "width": 4, "hidden": 6}


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_same_padding(stride):
    model = models.create_model(f"fcn{stride}s_vgg16", **TINY)
    assert_same_network(model, lambda w, x: fcn_same(w, x, stride), (2, 2, 64, 64), (1, 2, 37, 65))


@pytest.mark.parametrize("mode", ["grouped", "dense"])
def test_learned_upsampling(mode):
    def up(y, stride, name):
        weight = w[name + ".deconv.weight"]
        bias = w.get(name + ".deconv.bias")
        return F.conv_transpose2d(y, weight, bias, stride, groups=3 if mode == "grouped" else 1)

    def restatement(weights, x):
        nonlocal w
        w = weights
        return fcn_same(w, x, 8, up)

    w = None
    model = models.fcn8s_vgg16(**TINY, upsample=mode, upscore_bias=mode == "dense")
    assert_same_network(model, restatement, (1, 2, 33, 50))


def test_torchvision_form():
    def restatement(w, x):
        _, _, c4, c5 = resnet(w, x, *STRIDE_8)
        out, aux = fcn_head(w, c5, "classifier"), fcn_head(w, c4, "aux_classifier")
        return {"out": up(out, x, False), "aux": up(aux, x, False)}

    model = fcn_resnet(DEPTH, **SMALL_RESNET, aux=True)
    assert_same_network(model, restatement, (2, 2, 64, 64), (1, 2, 33, 65))


def test_mmsegmentation_form():
    def restatement(w, x):
        c5 = resnet(w, x, *STRIDE_8, deep=True)[-1]
        y = w.conv_bn_relu(c5, "classifier.convs.0", padding=1)
        y = w.conv_bn_relu(y, "classifier.convs.1", padding=1)
        y = w.conv_bn_relu(torch.cat([c5, y], 1), "classifier.conv_cat", padding=1)
        return {"out": up(w.conv(y, "classifier.score"), x, False)}

    model = fcn_resnet(DEPTH, **SMALL_RESNET, variant="mmseg")
    assert_same_network(model, restatement, (2, 2, 64, 64), (1, 2, 33, 65))


def test_skips_on_resnet():
    def restatement(w, x):
        _, c3, c4, c5 = resnet(w, x, *STRIDE_32)
        y = w.conv(c5, "head")
        for i, (skip, size) in enumerate([(c4, 2), (c3, 2), (None, 8)]):
            name = f"upscores.{i}" if skip is not None else "upscore"
            weight = w[name + ".deconv.weight"]
            y = F.conv_transpose2d(y, weight, stride=size, groups=3)
            if skip is not None:
                s = w.conv(skip, f"score_skips.{i}")
                y = s + crop(y, 1, s)
        return {"out": crop(y, 4, x)}

    model = fcn_skip_resnet(DEPTH, 8, **SMALL_RESNET)
    assert_same_network(model, restatement, (2, 2, 64, 64), (1, 2, 33, 65))


def test_caffe_padding():
    model = models.fcn8s_vgg16(**TINY, padding="caffe", skip_scale=(0.01, 0.0001))
    assert_same_network(model, fcn8s_caffe, (1, 2, 37, 50))


@pytest.mark.parametrize(("stride", "offset"), [(32, 19), (16, 27)])
def test_caffe_offsets(stride, offset):
    """A map of ones stays one where the cropped upsampling does not reach over the border."""
    model = models.create_model(f"fcn{stride}s_vgg16", **TINY, padding="caffe")
    assert model.last_offset == offset
    assert model(torch.randn(1, 2, 50, 37))["out"].shape == (1, 3, 50, 37)


@pytest.mark.parametrize("stride", [2, 8, 16, 32])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_bilinear_upsampling(stride, n):
    x = torch.randn(2, 3, n, n + 1, dtype=torch.float64)
    fixed, expected = BilinearUpsample2d(3, stride)(x), bilinear_deconv(x, stride)
    torch.testing.assert_close(fixed, expected, rtol=0, atol=1e-6)  # the kernel is float32
    for mode in ("grouped", "dense"):
        learned = BilinearUpsample2d(3, stride, mode).double()
        torch.testing.assert_close(learned(x), expected, rtol=0, atol=1e-6)
    inside = fixed[..., stride // 2 : -(stride // 2), stride // 2 : -(stride // 2)]
    clamped = F.interpolate(x, scale_factor=stride, mode="bilinear")
    r = stride // 2  # clamping and fading out differ in the outer half stride only
    torch.testing.assert_close(inside[..., r:-r, r:-r], clamped[..., r:-r, r:-r])


def test_bad_options():
    with pytest.raises(ValueError, match="padding must be same or caffe, got 'valid'"):
        models.fcn8s_vgg16(padding="valid", width=1, hidden=1)
    with pytest.raises(ValueError, match="upsample must be bilinear, grouped or dense, got 'x'"):
        models.fcn8s_vgg16(upsample="x", width=1, hidden=1)
