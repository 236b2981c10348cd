"""How many layers of a bfloat16 network are transformed before they are rounded."""

import copy

import pytest
import torch
from torch import nn

import fastseg
from fastseg.nn.packed import PackedConv2d
from fastseg.nn.packed_sum import PackedConvSum2d
from fastseg.optimize.rounding import decide_rounded
from tests.test_bfloat16 import calibrated, check


def network(widths):
    """3x3 layers from each width to the next."""
    layers = []
    for C, K in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(C, K, 3, padding=1, bias=False), nn.BatchNorm2d(K), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 5, 1))


def packed(model):
    return [m for m in model.modules() if isinstance(m, PackedConv2d)]


def test_largest_layers_stay(fast_products):
    model = network([64, 64, 64, 128, 128, 64, 64, 64]).eval()  # nine layers with the last one
    fast = fastseg.optimize(model, dtype=torch.bfloat16)
    default = [conv.weight.shape[:2] for conv in packed(fast) if conv.accuracy == "default"]
    strict = [conv.weight.shape[:2] for conv in packed(fast) if conv.accuracy == "strict"]
    assert (128, 128) in default
    assert strict == [(64, 64), (64, 64), (128, 64), (64, 128), (64, 64), (64, 64)]
    assert len(decide_rounded(fast)) == 0


def test_layers_among_others(fast_products):
    """Two 3x3 layers in five: of those a quarter of all stays."""
    layers = [nn.Conv2d(64, 64, k, padding=k // 2) for k in (3, 1, 3, 1, 1)] * 2
    fast = fastseg.optimize(nn.Sequential(*copy.deepcopy(layers)).eval(), dtype=torch.bfloat16)
    assert [conv.accuracy for conv in packed(fast)].count("strict") == 4 - 2


def test_largest_products_by_strassen(fast_products):
    """One layer in ten, here a sum of two, which is the largest; of those in float32 all."""
    layers = [nn.Conv2d(512, 512, 1) for _ in range(8)]
    model = nn.Sequential(*layers, Sum(512, 512)).eval()
    for dtype, others in ((torch.bfloat16, 0), (torch.float32, 8)):
        fast = fastseg.optimize(model, dtype=dtype)
        (addition,) = [m for m in fast.modules() if isinstance(m, PackedConvSum2d)]
        assert addition.algorithm((30, 30)).strassen == 1
        x = torch.empty(1, 512, 30, 30, device="meta")
        alone = [c for c in packed(fast) if c not in (addition.first, addition.second)]
        assert sum(conv.algorithm(x).strassen for conv in alone) == others


class Sum(nn.Module):
    def __init__(self, C, K):
        super().__init__()
        self.one, self.other = nn.Conv2d(C, K, 1), nn.Conv2d(C, K, 1)

    def forward(self, x):
        return self.one(torch.relu(x)) + self.other(x)


def test_blocks_are_left(fast_products):
    for widths in ([64], [64, 64], [64] * 7):
        fast = fastseg.optimize(network(widths).eval(), dtype=torch.bfloat16)
        assert {conv.accuracy for conv in packed(fast)} == {"default"}


@pytest.mark.parametrize("accuracy", ["strict", "fast"])
def test_others_are_left(accuracy, fast_products):
    model = network([64] * 10).eval()
    fast = fastseg.optimize(model, dtype=torch.bfloat16, accuracy=accuracy)
    assert {conv.accuracy for conv in packed(fast)} == {accuracy}


def test_float32_is_left(fast_products):
    fast = fastseg.optimize(network([64] * 10).eval())
    assert {conv.accuracy for conv in packed(fast)} == {"default"}


class UNet(nn.Module):
    """Three levels of two 3x3 layers, down and up."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([body(3, 32), body(32, 64), body(64, 128), body(128, 256)])
        self.up = nn.ModuleList([body(384, 128), body(192, 64), body(96, 32)])
        self.pool, self.grow = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.last = nn.Conv2d(32, 5, 1)

    def forward(self, x):
        skips = []
        for level in self.down:
            skips.append(level(self.pool(skips[-1]) if skips else x))
        x = skips.pop()
        for level in self.up:
            x = level(torch.cat([self.grow(x), skips.pop()], 1))
        return self.last(x)


def body(C, K):
    return network([C, K, K])[3:-1]


def test_error(fast_products):
    """No more than torch's, where nearly all layers are 3x3; "fast" is not bound."""
    model, x = calibrated(UNet(), 64), torch.randn(1, 3, 64, 72)
    fast = check(model, x, 1.1)
    assert {conv.accuracy for conv in packed(fast)} == {"default", "strict"}
    with pytest.raises(AssertionError, match="torch"):
        check(model, x, 1.1, accuracy="fast")
