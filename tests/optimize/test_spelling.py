"""What libraries spell otherwise: resizing layers, sums of stacks, paddings, optional arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.nn.packed import PackedConv2d
from fastseg.nn.pyramid_pooling import GridPool2d
from fastseg.nn.resize import Resize2d

from .test_unharmed import check, randomise


def count(model, *kinds):
    return sum(isinstance(m, kinds) for m in model.modules())


@pytest.mark.parametrize(
    ("layer", "ours"),
    [
        (nn.UpsamplingBilinear2d(scale_factor=4), True),
        (nn.UpsamplingBilinear2d(size=(20, 31)), True),
        (nn.UpsamplingNearest2d(scale_factor=2), True),
        (nn.Upsample(scale_factor=(2, 3), mode="bilinear"), True),
        (nn.Upsample(scale_factor=2), True),
        (nn.Upsample(scale_factor=1.5, mode="bilinear"), False),
        (nn.Upsample(scale_factor=2, mode="bicubic"), False),
    ],
)
@pytest.mark.parametrize("channels", [1, 5, 16])
def test_upsampling_layers(layer, ours, channels):
    model = nn.Sequential(nn.Conv2d(3, channels, 1), layer, nn.Conv2d(channels, 4, 1), layer)
    fast = check(randomise(model), torch.randn(2, 3, 7, 9))
    assert count(fast, Resize2d) == 2 * ours


class Merged(nn.Module):
    def __init__(self, merge):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 8, 3, padding=1) for _ in range(3))
        self.merge = merge

    def forward(self, x):
        return self.merge([conv(x) for conv in self.convs])


@pytest.mark.parametrize(
    ("merge", "added"),
    [
        (lambda maps: torch.stack(maps).sum(dim=0), True),
        (lambda maps: torch.sum(torch.stack(maps, 0), 0), True),
        (lambda maps: torch.stack(maps[:1]).sum(0), False),
        (lambda maps: torch.stack(maps, 1).sum(1), False),
        (lambda maps: torch.stack(maps).sum(0, keepdim=True), False),
        (lambda maps: torch.stack(maps).sum(), False),
    ],
)
def test_sums_of_stacks(merge, added):
    fast = check(randomise(Merged(merge)), torch.randn(2, 3, 7, 9))
    assert (torch.stack not in {node.target for node in fast.graph.nodes}) == added


class Padded(nn.Module):
    def __init__(self, pad, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, **options)
        self.pad = pad

    def forward(self, x):
        return self.conv(self.pad(x))


@pytest.mark.parametrize(
    ("pad", "folded"),
    [
        (nn.ZeroPad2d(1), True),
        (nn.ZeroPad2d((2, 2, 1, 1)), True),
        (lambda x: F.pad(x, (1, 1, 1, 1)), True),
        (lambda x: F.pad(x, [0, 0, 2, 2], "constant", 0), True),
        (nn.ZeroPad2d((0, 1, 0, 1)), False),
        (nn.ZeroPad2d(-1), False),
        (lambda x: F.pad(x, (1, 1, 1, 1), value=1.0), False),
        (lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), False),
    ],
)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}])
def test_paddings(pad, folded, options):
    model = randomise(Padded(pad, **options))
    fast = check(model, torch.randn(2, 3, 9, 11))
    calls = {node.target for node in fast.graph.nodes}
    assert (not calls & {F.pad, "pad"}) == folded
    assert model.conv.padding == options.get("padding", 0) or model.conv.padding == (
        (options.get("padding", 0),) * 2
    )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x, skip=None):
        x = self.body(x)
        return x if skip is None else x + skip


class Decoder(nn.Module):
    """Does not trace, and calls its blocks with what they may do without."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        skips = [x] if x.abs().sum() > 0 else []
        for block in self.blocks:
            x = block(x, *skips)
        return self.blocks[0](x)


def test_blocks_called_with_options():
    fast = check(randomise(Decoder()), torch.randn(2, 8, 9, 11))
    assert all(count(block.own, PackedConv2d) == 1 for block in fast.blocks)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, squeeze):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.squeeze = squeeze
        self.excite = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Sigmoid())

    def forward(self, x):
        x = self.conv(x)
        return x * self.excite(self.squeeze(x))


@pytest.mark.parametrize(
    ("squeeze", "ours"),
    [
        (nn.AdaptiveAvgPool2d(1), True),
        (lambda x: x.mean((2, 3), keepdim=True), True),
        (lambda x: torch.mean(x, [-1, -2], True), True),
        (lambda x: x.mean((2, 3))[..., None, None], False),
        (lambda x: x.mean(1, keepdim=True).expand_as(x), False),
    ],
)
def test_gates(squeeze, ours):
    fast = check(randomise(Gate(squeeze)), torch.randn(2, 3, 9, 11))
    assert count(fast, GridPool2d) == ours
    assert ("averages over grids of side 1" in fastseg.explain(fast)) == ours


class AsksForRank(nn.Module):
    """As timm's norms, between a convolution and what it takes over."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        torch._assert(y.ndim == 4, "expected an image")
        y = F.relu(self.bn(y))
        return self.last(y) * y.dim()


@torch.no_grad()
def test_rank():
    fast = check(randomise(AsksForRank()), torch.randn(2, 3, 7, 9))
    assert count(fast, nn.BatchNorm2d) == 0
    assert "conv: convolution engine" in fastseg.explain(fast)
    assert "activation=relu" in fastseg.explain(fast)
