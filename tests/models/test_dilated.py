import pytest
import torch
import torch.nn.functional as F

from fastseg import models
from fastseg.models.common import reflect_pad
from fastseg.models.dilated import ContextModule

from .reference import Weights, assert_same_network, vgg16, vgg_head

TINY = {"num_classes": 3, "in_channels": 2, "width": 4, "hidden": 6}
THREE_POOLS = [lambda x: F.max_pool2d(x, 2, ceil_mode=True)] * 3 + [lambda x: x] * 2


def context(w: Weights, x, prefix, *, first=False, dilations=(1, 1, 2, 4, 8, 16, 1)):
    if first:
        x = F.pad(x, (33, 33, 33, 33))
    for i, d in enumerate(dilations):
        x = F.relu(w.conv(x, f"{prefix}convs.{i}", padding=0 if first else d, dilation=d))
    return w.conv(x, prefix + "final")


def zoom(y, x):
    """Value at pixel p: linear between cells floor(p / 8) and the next one, if there is one."""
    for axis in (2, 3):
        at = torch.arange(x.shape[axis]) / 8
        low = at.floor().long()
        high = (low + 1).clamp_max(y.shape[axis] - 1)
        part = (at - low).to(y).view((-1, 1) if axis == 2 else (-1,))
        y = y.index_select(axis, low) * (1 - part) + y.index_select(axis, high) * part
    return y


def dilated(w: Weights, x, *, reflect, has_context, **options):
    if reflect:
        H, W = x.shape[-2:]
        image = F.pad(x, (186, 186 + -W % 8, 186, 186 + -H % 8), mode="reflect")
        pooled = vgg16(w, image, padding=0, dilation5=2, pools=THREE_POOLS)
        y = vgg_head(w, pooled[-1], "head", padding=0, dilation=4)
    else:
        pooled = vgg16(w, x, dilation5=2, pools=THREE_POOLS)
        y = vgg_head(w, pooled[-1], "head", padding=12, dilation=4)
    return {"out": zoom(context(w, y, "context.", **options) if has_context else y, x)}


@pytest.mark.parametrize("width", [None, "basic", "large"])
def test_same_padding(width):
    model = models.dilated8_vgg16(**TINY, context=width, padding="same")
    assert_same_network(
        model,
        lambda w, x: dilated(w, x, reflect=False, has_context=width is not None),
        (2, 2, 64, 72),
        (1, 2, 37, 65),
    )


def test_paper_form():
    model = models.dilated8_vgg16(**TINY, context_padding="first")
    assert_same_network(
        model,
        lambda w, x: dilated(w, x, reflect=True, has_context=True, first=True),
        (1, 2, 200, 213),
    )


def test_upsampled_probabilities():
    torch.manual_seed(1)
    scores = models.dilated_frontend_vgg16(**TINY, padding="same").eval()
    torch.manual_seed(1)
    model = models.dilated_frontend_vgg16(**TINY, padding="same", upsample="prob").eval()
    x = torch.randn(1, 2, 40, 33)
    at_cells = scores(x)["out"][..., ::8, ::8].softmax(1)
    torch.testing.assert_close(model(x)["out"].exp(), zoom(at_cells, x))


def test_context_starts_as_identity():
    x = torch.rand(2, 3, 40, 30)
    torch.testing.assert_close(ContextModule(3, noise=0.0)(x), x)
    torch.testing.assert_close(ContextModule(3, width="basic", layers=10)(x), x)
    assert not torch.equal(ContextModule(3)(x), x)


def test_context_receptive_field():
    x = torch.zeros(1, 2, 101, 101, requires_grad=True)
    module = ContextModule(2, width="basic")
    for conv in module.convs:
        torch.nn.init.constant_(conv.weight, 0.1)
        torch.nn.init.constant_(conv.bias, 0.1)
    module(x)[0, 0, 50, 50].backward()
    rows = x.grad[0].abs().sum((0, 2)).nonzero()
    assert (rows.min().item(), rows.max().item()) == (50 - 33, 50 + 33)


def test_reflect_pad():
    x = torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(
        reflect_pad(x, 4, 3, 5, 2), F.pad(x, (5, 2, 4, 3), mode="reflect"), rtol=0, atol=0
    )
    row = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
    long = reflect_pad(row, 2, 0, 5, 4)  # further than the image is wide, and over one row
    assert long[0, 0].tolist() == [[2, 1, 2, 3, 2, 1, 2, 3, 2, 1, 2, 3]] * 3


def test_bad_options():
    with pytest.raises(ValueError, match="padding must be reflect or same, got 'zero'"):
        models.dilated8_vgg16(padding="zero")
    with pytest.raises(ValueError, match="width must be basic or large, got 'huge'"):
        ContextModule(3, width="huge")
