"""Networks with linear layers: transformers' blocks, heads, ConvNeXt's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.nn.packed import PackedConv2d
from fastseg.nn.packed_linear import PackedLinear

from .test_spelling import count
from .test_unharmed import check, randomise


class Block(nn.Module):
    """A block of ConvNeXt, or with ``attention`` of a vision transformer."""

    def __init__(self, attention=False, approximate="none"):
        super().__init__()
        self.depthwise = nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48) if attention else None
        self.mlp = nn.Sequential(
            nn.Linear(16, 64), nn.GELU(approximate), nn.Dropout(0.1), nn.Linear(64, 16)
        )
        self.out = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        if self.qkv is not None:
            q, k, v = self.qkv(y.flatten(1, 2)).chunk(3, -1)
            y = y + F.scaled_dot_product_attention(q, k, v).reshape(y.shape)
        y = y + self.mlp(y)
        return self.out(y.permute(0, 3, 1, 2).contiguous() + x)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@torch.no_grad()
def test_blocks(attention, approximate):
    model = randomise(Block(attention, approximate))
    x = torch.randn(2, 16, 13, 10)
    fast = check(model, x)
    assert count(fast, PackedLinear) == 2 + attention
    assert count(fast, nn.GELU) == 0
    activation = "gelu" if approximate == "none" else "gelu_tanh"
    assert f"mlp.0: convolution engine, 16, 64, activation={activation}" in fastseg.explain(fast)
    for _ in range(3):  # results in buffers that are used again
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    half = fastseg.optimize(model, dtype=torch.bfloat16)(x)
    assert half.dtype == torch.float32
    exact, plain = model(x), copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert (half - exact).norm() < 1.5 * (plain - exact).norm()


@torch.no_grad()
def test_compiled():
    torch.compiler.reset()
    model, x = randomise(Block(True)), torch.randn(2, 16, 13, 10)
    fast = torch.compile(model, backend="fastseg", fullgraph=True)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    model.mlp[0].bias.add_(1.0)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8))
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x):
        y = F.gelu(F.linear(x, self.weight, self.bias), approximate="tanh")
        return F.linear(F.linear(y, self.weight.T), self.weight + 1)


@torch.no_grad()
def test_functions():
    """Those whose weights are parameters; computed ones stay."""
    fast = check(randomise(Functions()), torch.randn(3, 8))
    assert count(fast, PackedLinear) == 1


class Attention(nn.Module):
    """Torch's own layers read the weights of their parts."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 1)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        y = self.conv(x).flatten(2).transpose(1, 2)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.layer(y))


@torch.no_grad()
def test_layers_of_torch_stay():
    fast = check(randomise(Attention()), torch.randn(2, 8, 5, 4))
    assert count(fast, PackedLinear) == 1
    assert count(fast, nn.modules.linear.NonDynamicallyQuantizableLinear) == 2


class Permuted(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.change = change

    def forward(self, x):
        y = x.permute(0, 3, 1, 2)
        z = y.contiguous()
        if self.change == "source":
            y.mul_(2.0)
        if self.change == "copy":
            z.mul_(2.0)
        result = self.second(self.first(z)) + self.second(z)
        return (result, z) if self.change == "result" else result


@pytest.mark.parametrize("change", [None, "source", "copy", "result"])
@torch.no_grad()
def test_copies_for_convolutions(change):
    """``contiguous`` before a convolution, where neither side of it changes or is seen."""
    fast = check(randomise(Permuted(change)), torch.randn(2, 7, 6, 8))
    assert count(fast, PackedConv2d) == 3
    copies = [n for n in fast.graph.nodes if n.target == "contiguous"]
    assert len(copies) == (change is not None)
