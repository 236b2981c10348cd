"""Shortcuts with a convolution of their own in the product of the other path."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastseg
from fastseg.nn.packed import PackedConv2d
from fastseg.nn.packed_sum import PackedConvSum2d, summable

from .test_unharmed import check, randomise


def conv_bn(C, K, kernel=1, stride=1, **options):
    layers = nn.Conv2d(C, K, kernel, stride, kernel // 2, bias=False, **options), nn.BatchNorm2d(K)
    return nn.Sequential(*layers)


class Bottleneck(nn.Module):
    """A block that changes its channels and its size; `order` says which path comes first."""

    def __init__(self, stride=2, order="last", C=24, K=64):
        super().__init__()
        self.a, self.b = conv_bn(C, 16), conv_bn(16, 32, 3, stride)
        self.c = conv_bn(32, K)
        self.shortcut = conv_bn(C, K, 1, stride)
        self.last = nn.Conv2d(K, 5, 1)
        self.order = order

    def forward(self, x):
        x = x * 1.5
        identity = self.shortcut(x) if self.order != "last" else None
        if self.order == "changed":
            x.relu_()
        y = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        if identity is None:
            identity = self.shortcut(x)
        y = torch.relu(identity + y if self.order == "first" else y + identity)
        if self.order == "read":
            return self.last(y) + identity.mean((1, 2, 3), keepdim=True)
        return self.last(y)


def sums(network):
    return [m for m in network.modules() if isinstance(m, PackedConvSum2d)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("order", ["first", "last"])
@torch.no_grad()
def test_one_product(order, stride):
    network = randomise(Bottleneck(stride, order))
    fast = check(network, torch.randn(2, 24, 9, 14))
    assert len(sums(fast)) == 1
    names = ("shortcut.0", "c.0") if order == "first" else ("c.0", "shortcut.0")
    assert "{}: summed with {} in one product".format(*names) in fastseg.explain(fast)
    plain = [m for m in fast.modules() if isinstance(m, PackedConv2d)]
    assert len(plain) == 3 + 2  # those of the sum are held for images that it cannot add


@pytest.mark.parametrize("order", ["changed", "read"])
@torch.no_grad()
def test_left_alone(order):
    """The shortcut's input changes behind it, or its result is read elsewhere."""
    assert not sums(check(randomise(Bottleneck(1, order)), torch.randn(2, 24, 9, 14)))


@pytest.mark.parametrize("accuracy", ["default", "strict"])
@torch.no_grad()
def test_strassen(accuracy):
    network = randomise(Bottleneck(1, C=256, K=256))
    fast = fastseg.optimize(network, accuracy=accuracy)
    x = torch.randn(1, 256, 9, 14)
    expected = copy.deepcopy(network).double()(x.double())
    (layer,) = sums(fast)
    error = (fast(x) - expected).abs().max() / expected.abs().max()
    assert error <= 5e-6
    (algorithm,) = layer._packed
    assert algorithm.strassen == (accuracy == "default")


@torch.no_grad()
def test_bfloat16():
    network = randomise(Bottleneck())
    x = torch.randn(2, 24, 9, 14)
    exact = copy.deepcopy(network).double()(x.double())
    fast = fastseg.optimize(network, dtype=torch.bfloat16)
    assert len(sums(fast)) == 1
    plain = copy.deepcopy(network).bfloat16()(x.bfloat16())
    assert (fast(x) - exact).abs().max() <= 1.1 * (plain - exact).abs().max()


@torch.no_grad()
def test_sizes_one_after_the_other():
    """Recorded calls, places that are used again, copies."""
    network = randomise(Bottleneck())
    fast = fastseg.optimize(network)
    copies = [fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    for size in ((1, 24, 9, 14), (3, 24, 5, 4), (1, 24, 9, 14), (1, 24, 9, 14), (1, 24, 9, 14)):
        x = torch.randn(size)
        expected = network(x)
        for f in copies:
            torch.testing.assert_close(f(x), expected, atol=1e-4, rtol=1e-4)
    single = torch.randn(24, 9, 14)
    torch.testing.assert_close(fast(single), network(single[None])[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_results_that_broadcast():
    """Where the sizes differ the sum is torch's, and so are its errors."""
    first = PackedConv2d(nn.Conv2d(8, 16, 1), activation="relu")
    second = PackedConv2d(nn.Conv2d(4, 16, 1))
    layer = PackedConvSum2d(first, second)
    x = torch.randn(2, 8, 5, 6)
    for shape in ((2, 4, 5, 6), (2, 4, 1, 1), (1, 4, 5, 6)):
        other = torch.randn(shape)
        torch.testing.assert_close(layer(x, other), first(x, second(other)))
        torch.testing.assert_close(layer(x[0], other[0]), first(x[0], second(other[0])))
    with pytest.raises(RuntimeError, match="must match the size"):
        layer(x, torch.randn(2, 4, 3, 6))
    with pytest.raises(ValueError, match=r"x must be \(N, 4, H, W\)"):
        layer(x, x)


@torch.no_grad()
def test_one_image_of_another_dtype():
    layers = (PackedConv2d(nn.Conv2d(C, 16, 1), dtype=torch.bfloat16) for C in (8, 4))
    layer = PackedConvSum2d(*layers)
    x, other = torch.randn(8, 5, 6), torch.randn(4, 5, 6)
    y = layer(x, other)
    assert (y.shape, y.dtype) == ((16, 5, 6), torch.bfloat16)
    torch.testing.assert_close(y, layer(x[None], other[None])[0], atol=0.05, rtol=0.02)


def test_summable():
    def layer(*args, groups=1, padding=0, stride=1, **options):
        conv = nn.Conv2d(*args, stride=stride, padding=padding, groups=groups)
        return PackedConv2d(conv, **options)

    first, second = layer(8, 16, 1, activation="relu"), layer(4, 16, 1, stride=2)
    assert summable(first, second)
    assert not summable(second, first)  # the activation of a summand
    assert not summable(first, layer(4, 1, 1))  # it broadcasts
    assert not summable(first, layer(4, 16, 3))
    assert not summable(first, layer(4, 16, 1, padding=1))
    assert not summable(first, layer(16, 16, 1, groups=16))
    assert not summable(layer(8, 16, 1, residual_last=True), second)
    assert not summable(first, layer(4, 16, 1, dtype=torch.bfloat16))
    assert not summable(first, layer(4, 16, 1, accuracy="strict"))


@torch.no_grad()
def test_compiles():
    fast = fastseg.optimize(randomise(Bottleneck()))
    x = torch.randn(1, 24, 9, 14)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), fast(x))
