"""Squeeze and excitation: the scale of channels in the convolution that reads them."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastseg
from fastseg.nn.packed import PackedConv2d
from fastseg.nn.packed_scaled import ScaledConv2d
from fastseg.optimize.replay import Replayed

from .test_unharmed import check, randomise


class Excited(nn.Module):
    """A depthwise convolution, squeeze and excitation, and a projection; `kind` says what else."""

    def __init__(self, kind="first", C=24, K=16):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(K, C, 1), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, groups=C), nn.Hardswish())
        self.pool = nn.AdaptiveAvgPool2d(1)
        squeezed = C if kind != "one" else 1
        self.squeeze = nn.Sequential(nn.Conv2d(C, 8, 1), nn.ReLU())
        self.excite = nn.Sequential(nn.Conv2d(8, squeezed, 1), nn.Sigmoid())
        padding = 1 if kind == "padded" else 0
        self.project = nn.Conv2d(C, K, 3 if kind == "wide" else 1, padding=padding)
        self.last = nn.Conv2d(K, 5, 1)
        self.kind = kind

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        pooled = y if self.kind == "map" else self.pool(y)
        scale = self.excite(self.squeeze(pooled))
        product = y * scale if self.kind == "last" else torch.mul(scale, y)
        if self.kind == "changed":
            y.add_(1.0)
        z = self.project(product)
        if self.kind == "read":
            return self.last(z) + product.mean((1, 2, 3), keepdim=True)
        return self.last(z + x if self.kind in ("first", "one") else z)


def scaled(network):
    return [m for m in network.modules() if isinstance(m, ScaledConv2d)]


@pytest.mark.parametrize("kind", ["first", "last", "map", "one"])
@torch.no_grad()
def test_scaled(kind):
    """In either order; a factor for each pixel or for each image is multiplied as torch does."""
    fast = check(randomise(Excited(kind)), torch.randn(3, 16, 9, 14))
    assert len(scaled(fast)) == 1
    assert "project: scales its input by channels" in fastseg.explain(fast)


@pytest.mark.parametrize("kind", ["wide", "padded", "changed", "read"])
@torch.no_grad()
def test_left_alone(kind):
    """No 1x1 convolution, or somebody else sees the product or changes what it is made of."""
    assert not scaled(check(randomise(Excited(kind)), torch.randn(2, 16, 9, 14)))


@torch.no_grad()
def test_bfloat16():
    network = randomise(Excited())
    fast = fastseg.optimize(network, dtype=torch.bfloat16)
    assert len(scaled(fast)) == 1
    x = torch.randn(2, 16, 19, 14)
    exact = copy.deepcopy(network).double()(x.double())
    assert (fast(x) - exact).abs().max() <= 0.02 * exact.abs().max()


@torch.no_grad()
def test_strassen_multiplies_first():
    network = randomise(Excited(C=256, K=256))
    fast = fastseg.optimize(network)
    x = torch.randn(1, 256, 9, 14)
    (layer,) = scaled(fast)
    assert layer.conv.prepare(torch.empty(1, 256, 9, 14))[0].strassen == 1
    exact = copy.deepcopy(network).double()(x.double())
    assert (fast(x) - exact).abs().max() <= 1e-5 * exact.abs().max()


@torch.no_grad()
def test_copies_and_later_calls():
    fast = fastseg.optimize(randomise(Excited()))
    assert isinstance(fast, Replayed)
    x, other = torch.randn(2, 16, 9, 14), torch.randn(2, 16, 9, 14)
    y, z = fast(x), fast(other)
    for network in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        for _ in range(3):  # the third call is of the tape
            assert torch.equal(network(x), y)
            assert torch.equal(network(other), z)
    image = torch.randn(16, 9, 14)
    torch.testing.assert_close(fast(image), fast(image[None])[0])


@torch.no_grad()
def test_layer():
    """What the graph does not show: which is the scale, other shapes, dtypes and numbers."""
    conv = nn.Conv2d(24, 16, 1)
    layer = ScaledConv2d(PackedConv2d(conv))
    x, scale = torch.randn(2, 24, 7, 5), torch.rand(2, 24, 1, 1)
    residual = torch.randn(2, 16, 7, 5)
    expected = conv(x * scale) + residual
    for a, b, r in (
        (x, scale, residual),
        (scale, x, residual),
        (x, scale, residual[:1]),  # broadcast
        (x.double(), scale.double(), residual),
    ):
        y = layer(a, b, r)
        torch.testing.assert_close(y, conv(x * scale) + r, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(scale, scale), conv(scale * scale))
    torch.testing.assert_close(layer(x, 2.0, residual), conv(x * 2) + residual)
    torch.testing.assert_close(layer(x, x, residual), conv(x * x) + residual)
    torch.testing.assert_close(layer(x[:1], scale)[1:], conv(x[:1] * scale)[1:])
    torch.testing.assert_close(layer(x, scale, residual), expected)


@torch.no_grad()
def test_compiled_and_exported():
    network = randomise(Excited())
    fast, x = fastseg.optimize(network), torch.randn(2, 16, 9, 14)
    expected = network(x)
    torch.compiler.reset()
    for program in (torch.compile(fast, fullgraph=True), torch.export.export(fast, (x,)).module()):
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-4)
