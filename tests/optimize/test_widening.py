"""Which layers of a bfloat16 network make float32 results: those whose maps only leave it."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.nn.packed import PackedConv2d

pytestmark = pytest.mark.usefixtures("fast_products")


def layer(C, K, kernel=3):
    return nn.Conv2d(C, K, kernel, padding=kernel // 2)


class Network(nn.Module):
    """Some layers and what ``ends`` makes of them."""

    def __init__(self, ends):
        super().__init__()
        self.first, self.inside = layer(8, 32), layer(32, 32)
        self.head, self.second_head = layer(32, 5, 1), layer(32, 7)
        self.ends = ends

    def forward(self, x):
        return self.ends(self, F.relu(self.inside(F.relu(self.first(x)))))


def one(net, x):
    return net.head(x)


def resized(net, x):
    return F.interpolate(net.head(x), scale_factor=2, mode="bilinear")


def two_in_a_dict(net, x):
    return OrderedDict(out=net.head(x), aux=net.second_head(x))


def with_features(net, x):
    return net.head(x), x


def read_again(net, x):
    scores = net.second_head(x)
    return scores, scores.mean()


def called_twice(net, x):
    return net.head(F.relu(net.inside(x))) + net.head(x)


def from_a_dict(net, x):
    features = OrderedDict(out=net.head(x))
    return features["out"] * features["out"]


@pytest.mark.parametrize(
    ("ends", "widening"),
    [
        (one, {"head"}),
        (resized, {"head"}),
        (two_in_a_dict, {"head", "second_head"}),
        (with_features, {"head"}),
        (read_again, set()),
        (called_twice, set()),
        (from_a_dict, set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_which(ends, widening):
    model = Network(ends).eval()
    fast = fastseg.optimize(model, dtype=torch.bfloat16)
    layers = {n.split(".")[-1]: m for n, m in fast.named_modules() if isinstance(m, PackedConv2d)}
    assert {name for name, m in layers.items() if m.widens} == widening
    own = fastseg.optimize(copy.deepcopy(model).bfloat16())  # its results are bfloat16
    assert not any(m.widens for m in own.modules() if isinstance(m, PackedConv2d))

    x = torch.randn(2, 8, 9, 10)
    with torch.no_grad():
        exact, results = (torch.utils._pytree.tree_leaves(net(x)) for net in (model, fast))
        again = torch.utils._pytree.tree_leaves(copy.deepcopy(fast)(x))
    for y, same, right in zip(results, again, exact, strict=True):
        assert y.dtype == torch.float32
        assert torch.equal(y, same)
        assert (y - right).abs().max() <= 0.05 * right.abs().max()


@pytest.mark.parametrize("wrap", [lambda conv: conv, nn.Sequential], ids=["conv", "network"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_one_layer(wrap, kernel):
    """It is not rounded at its end."""
    torch.manual_seed(0)
    conv = layer(32, 48, kernel)
    fast = fastseg.optimize(wrap(conv).eval(), dtype=torch.bfloat16)
    x = torch.randn(1, 32, 9, 10)
    with torch.no_grad():
        for _ in range(4):  # the later ones are replayed
            y = fast(x)
            assert y.dtype == torch.float32
            assert not torch.equal(y, y.bfloat16().float())
    exported = torch.export.export(fast, (x,)).module()
    assert torch.equal(exported(x), y)


def test_where_float32_multiplies():
    """Then a result is rounded first, as torch's is."""
    fastseg._C.set_bf16_products(False)
    fast = fastseg.optimize(layer(32, 48).eval(), dtype=torch.bfloat16)
    y = fast(torch.randn(1, 32, 9, 10))
    assert y.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float())
