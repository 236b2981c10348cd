"""The packed layer against the modules it is made of."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.nn.packed import PackedConv2d, unsupported
from fastseg.nn.packed_transposed import PackedConvTranspose2d, unsupported_transposed
from tests.conftest import assert_as_accurate


def batch_norm(channels):
    bn = nn.BatchNorm2d(channels).eval()
    nn.init.uniform_(bn.weight, 0.5, 2)
    nn.init.normal_(bn.bias)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    return bn


@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_folds_batch_norm(padding, bias):
    conv = nn.Conv2d(20, 24, 3, padding=padding, dilation=2, bias=bias)
    bn = batch_norm(24)
    packed = PackedConv2d(conv, bn, activation="leaky_relu", negative_slope=0.2, accuracy="strict")
    x = torch.randn(2, 20, 13, 14)
    plain = nn.functional.leaky_relu(bn(conv(x)), 0.2)
    exact = nn.functional.leaky_relu(copy.deepcopy(bn).double()(conv.double()(x.double())), 0.2)
    assert_as_accurate(packed(x), plain, exact)


@torch.no_grad()
def test_packs_once_per_algorithm():
    packed = PackedConv2d(nn.Conv2d(32, 32, 3, padding=8, dilation=8))
    first = packed(torch.randn(1, 32, 65, 65))
    assert set(packed._packed) == {(4, torch.float32, 0)}
    weights = packed._packed[4, torch.float32, 0].packed
    packed(torch.randn(2, 32, 64, 64))
    assert packed._packed[4, torch.float32, 0].packed is weights
    packed(torch.randn(1, 32, 24, 24))  # sub-grids of three pixels
    assert set(packed._packed) == {(3, torch.float32, 0), (4, torch.float32, 0)}
    assert first.shape == (1, 32, 65, 65)


@torch.no_grad()
def test_chooses_once_per_input_shape(monkeypatch):
    packed = PackedConv2d(nn.Conv2d(16, 16, 3, padding=1))
    small, large = torch.randn(1, 16, 5, 6), torch.randn(2, 16, 30, 31)
    expected = [packed(small), packed(large)]
    monkeypatch.setattr(PackedConv2d, "algorithm", None)
    assert torch.equal(packed(small), expected[0])
    assert torch.equal(packed(large), expected[1])
    assert copy.deepcopy(packed)._prepared == {}


def test_packed_in_inference_mode_runs_outside():
    packed = PackedConv2d(nn.Conv2d(16, 16, 3))
    x = torch.randn(1, 16, 8, 8)
    with torch.inference_mode():
        y = packed(x)
    with torch.no_grad():
        assert torch.equal(packed(x), y)


@pytest.mark.parametrize("shape", [(2, 16, 1, 1), (2, 1, 9, 9), (1, 16, 9, 9)])
@torch.no_grad()
def test_residual_that_broadcasts(shape):
    conv = nn.Conv2d(16, 16, 1)
    x, residual = torch.randn(2, 16, 9, 9), torch.randn(shape)
    packed = PackedConv2d(conv, activation="relu")
    torch.testing.assert_close(packed(x, residual), (conv(x) + residual).relu())


@torch.no_grad()
def test_copies_and_pickles():
    packed = PackedConv2d(nn.Conv2d(16, 8, 1))
    x = torch.randn(1, 16, 3, 3)
    y = packed(x)
    assert torch.equal(copy.deepcopy(packed)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), y)


def test_unsupported():
    assert unsupported(nn.Conv2d(8, 8, 3)) is None
    assert unsupported(nn.Conv2d(8, 8, 3, groups=2)) is None
    assert unsupported(nn.Conv2d(8, 8, 3, padding_mode="reflect")) == "padding mode reflect"
    assert unsupported(nn.Conv2d(8, 8, 2, padding="same")) == "uneven same padding"
    assert "float64" in unsupported(nn.Conv2d(8, 8, 3, dtype=torch.float64))
    assert "own statistics" in unsupported(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="PackedConv2d: padding mode circular"):
        PackedConv2d(nn.Conv2d(8, 8, 3, padding_mode="circular"))


class Mobile(nn.Module):
    """Blocks of MobileNet v3 and of a decoder: every activation, squeeze and excitation, both
    kinds of transposed convolution, a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish())
        self.expand = nn.Sequential(nn.Conv2d(16, 40, 1), nn.BatchNorm2d(40), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(40, 40, 5, 2, 2, groups=40), nn.BatchNorm2d(40), nn.ReLU6(inplace=True)
        )
        self.gate = nn.Sequential(nn.Conv2d(40, 8, 1), nn.ReLU(), nn.Conv2d(8, 40, 1), nn.Sigmoid())
        self.project = nn.Conv2d(40, 24, 1)
        self.up = nn.Sequential(nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.last = nn.ConvTranspose2d(32, 5, 2, 2)

    def forward(self, x):
        skip = self.stem(x)
        y = self.depthwise(self.expand(skip))
        y = self.project(y * self.gate(y.mean((2, 3), keepdim=True)))
        y = F.hardsigmoid(self.up(y) + skip)
        return self.last(torch.cat([y, skip], 1))


def mobile():
    return randomised(Mobile())


def randomised(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mobile_blocks(layout):
    model, x = mobile(), torch.randn(2, 3, 36, 44).contiguous(memory_format=layout)
    fast = fastseg.optimize(model)
    left = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)
    assert not any(isinstance(m, left) for m in fast.modules())
    with torch.no_grad():
        exact = model.double()(x.double())
        for y in (fast(x), fast(x), copy.deepcopy(fast)(x), pickle.loads(pickle.dumps(fast))(x)):
            assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()
        half = fastseg.optimize(model.float(), dtype=torch.bfloat16)(x)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() <= 0.03 * exact.abs().max()


class Grouped(nn.Module):
    """Blocks of ResNeXt and RegNet, a depth multiplier, and a bias that several groups read."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(32, 64, 1, bias=False),
                nn.BatchNorm2d(64),
                nn.ReLU(),
                nn.Conv2d(64, 64, 3, padding=dilation, dilation=dilation, groups=groups),
                nn.BatchNorm2d(64),
                nn.ReLU(),
                nn.Conv2d(64, 32, 1),
                nn.BatchNorm2d(32),
            )
            for groups, dilation in ((16, 1), (8, 1), (4, 2), (2, 1))
        )
        self.down = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1, groups=32), nn.BatchNorm2d(64))
        self.last = nn.Conv2d(64, 20, 1, groups=4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.last(self.down(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_blocks(dtype):
    model, x = randomised(Grouped()), torch.randn(2, 3, 38, 46)
    fast = fastseg.optimize(model, dtype=dtype)
    assert not any(isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)) for m in fast.modules())
    assert "groups=16" in fastseg.explain(fast)
    with torch.no_grad():
        exact = model.double()(x.double())
        for y in (fast(x), fast(x), copy.deepcopy(fast)(x), pickle.loads(pickle.dumps(fast))(x)):
            allowed = 1e-5 if dtype == torch.float32 else 0.03
            assert (y - exact).abs().max() <= allowed * exact.abs().max()


def test_mobile_blocks_of_the_compiler():
    model, x = mobile(), torch.randn(1, 3, 36, 44)
    with torch.no_grad():
        y = torch.compile(model, backend="fastseg")(x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


def test_transposed_layer():
    conv, bn = nn.ConvTranspose2d(16, 8, 3, 2, 1, 1, bias=False), nn.BatchNorm2d(8)
    bn.running_mean.normal_()
    packed = PackedConvTranspose2d(conv, bn.eval(), activation="relu")
    x = torch.randn(2, 16, 5, 7)
    with torch.no_grad():
        expected = F.relu(bn(conv(x)))
        torch.testing.assert_close(packed(x), expected)
        torch.testing.assert_close(packed(x[0]), expected[0])
        residual = torch.randn(1, 8, 1, 1)  # broadcasts
        torch.testing.assert_close(packed(x, residual), F.relu(bn(conv(x)) + residual))
        residual = torch.randn(expected.shape)
        torch.testing.assert_close(packed(x, residual), F.relu(bn(conv(x)) + residual))


def test_transposed_layers_left_to_torch():
    assert unsupported_transposed(nn.ConvTranspose2d(8, 8, 4, 2)) is None
    assert unsupported_transposed(nn.ConvTranspose2d(8, 8, 4, 2, groups=2)) == "2 groups"
    assert unsupported_transposed(nn.ConvTranspose2d(8, 8, 4, dilation=2)) == "dilation"
    assert "smaller" in unsupported_transposed(nn.ConvTranspose2d(8, 8, 1, 2))
    with pytest.raises(ValueError, match="PackedConvTranspose2d: dilation"):
        PackedConvTranspose2d(nn.ConvTranspose2d(8, 8, 4, dilation=2))
