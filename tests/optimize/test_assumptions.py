"""Networks that compare sizes: a graph for the sizes that it assumes, their ``forward`` for all."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.nn.packed_linear import PackedLinear
from fastseg.optimize import Part
from fastseg.optimize.replay import Replayed

from .test_spelling import count
from .test_unharmed import LooksAtSizes, Net, block, check, randomise


class Checks(Net):
    """As segmentation_models_pytorch does."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        h, w = x.shape[-2:]
        if h % 4 != 0 or w % 4 != 0:
            raise RuntimeError(f"sizes must be divisible by 4, got {h}, {w}")
        return F.interpolate(self.head(self.block(x)), scale_factor=2, mode="bilinear")


class Compares(Net):
    def forward(self, x):
        y = F.max_pool2d(self.block(x), 2)
        if y.shape[2:] != x.shape[2:]:
            y = F.interpolate(y, x.shape[2:], mode="bilinear")
        return self.block(y) if y.shape[1] == 8 and x.size(0) > 100 else y


class EitherRank(nn.LayerNorm):
    """As the norm of those encoders, for maps and for tokens."""

    def forward(self, x):
        if x.ndim == 4:
            n, c, h, w = x.shape
            x = super().forward(x.view(n, c, -1).transpose(1, 2))
            return x.transpose(1, 2).view(n, c, h, w)
        return super().forward(x)


@torch.no_grad()
def test_checks():
    model = randomise(Checks())
    fast = check(model, torch.randn(1, 8, 8, 12))
    assert isinstance(fast, Part)
    assert isinstance(fast.traced, Replayed)
    assert "the model: a graph, its forward for sizes" in fastseg.explain(fast)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="divisible by 4, got 8, 13"):
            fast(torch.randn(1, 8, 8, 13))
    x = torch.randn(2, 8, 16, 8)
    for same in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        for _ in range(4):  # until it is replayed
            torch.testing.assert_close(same(x), model(x), rtol=1e-4, atol=1e-4)
        assert "a graph" in fastseg.explain(same)


@torch.no_grad()
def test_other_sizes():
    model = randomise(LooksAtSizes())
    fast = check(model, torch.randn(1, 8, 9, 10))
    assert not fast.declined
    for _ in range(4):
        for shape in ((1, 8, 9, 11), (2, 8, 4, 6), (2, 8, 5, 5)):
            x = torch.randn(shape)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(fast.declined) == 2


@torch.no_grad()
def test_comparisons():
    model = randomise(Compares())
    fast = check(model, torch.randn(2, 8, 9, 10))
    x = torch.randn(101, 8, 4, 4)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_either_rank():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), EitherRank(8), nn.Conv2d(8, 8, 3)).eval()
    fast = check(model, torch.randn(2, 8, 5, 6))
    assert isinstance(fast.get_submodule("1"), Part)
    tokens = nn.Sequential(nn.Linear(8, 8), EitherRank(8), nn.Linear(8, 8)).eval()
    assert count(check(tokens, torch.randn(2, 7, 8)), PackedLinear) == 2


@torch.no_grad()
def test_bfloat16():
    """Both forms: a last resize in float32 in the graph."""
    model, x = randomise(Checks()), torch.randn(1, 8, 16, 16)
    fast = fastseg.optimize(model, dtype=torch.bfloat16)
    assert isinstance(fast.traced, Replayed)
    for odd in (LooksAtSizes(), Checks()):
        model = randomise(odd)
        fast = fastseg.optimize(model, dtype=torch.bfloat16)
        for shape in ((1, 8, 16, 16), (1, 8, 9, 15)):
            x = torch.randn(shape)
            if isinstance(odd, Checks) and shape[-1] % 4:
                continue
            y = fast(x)
            assert y.dtype == torch.float32
            torch.testing.assert_close(y, model(x), rtol=0.05, atol=0.05)
    own = fastseg.optimize(randomise(LooksAtSizes()).bfloat16())
    assert own(torch.randn(1, 8, 4, 5).bfloat16()).dtype == torch.bfloat16


class ChangesFirst(Net):
    def forward(self, x):
        x.add_(1.0)
        return self.block(x) if x.shape[-1] % 2 == 0 else x


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.pads = LooksAtSizes()
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.last(self.pads(x))


@torch.no_grad()
def test_where_nothing_is_assumed():
    """Where inputs have changed already, and about what parts do, which have their own graphs."""
    fast = check(randomise(ChangesFirst()), torch.randn(1, 8, 5, 7))
    assert "the model: keeps its forward, its forward looks at values" in fastseg.explain(fast)
    model = randomise(Inner())
    fast = check(model, torch.randn(1, 8, 5, 6))
    assert isinstance(fast, Replayed | torch.fx.GraphModule)
    assert isinstance(fast.pads, Part)
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


class Collects(nn.Module):
    """As timm's feature extractors: whether a block returned one map or several."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([block(), nn.Conv2d(8, 8, 1)])

    def forward(self, x):
        maps = []
        for part in self.blocks:
            x = part(x)
            maps.append(x[0] if isinstance(x, tuple | list) else x)
        return maps[0] + maps[1]


@torch.no_grad()
def test_results_of_layers_are_tensors():
    fast = check(randomise(Collects()), torch.randn(1, 8, 5, 6))
    assert "keeps its forward" not in fastseg.explain(fast)


@torch.no_grad()
def test_exported():
    model = randomise(Checks())
    fast = fastseg.optimize(model)
    x = torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(
        torch.export.export(fast, (x,)).module()(x), model(x), rtol=1e-4, atol=1e-4
    )
    compiled = torch.compile(fast, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


class Skips(nn.Module):
    """A decoder's block, called with and without what it may add."""

    def __init__(self):
        super().__init__()
        self.first, self.second = block(), block()

    def forward(self, x, skip=None):
        x = self.first(x)
        if skip is not None:
            x = x + skip
        return self.second(x)


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.skips = Skips()

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.skips(self.skips(x, None), skip=None) + self.skips(x, x)


@torch.no_grad()
def test_none_is_no_option():
    fast = check(randomise(Calls()), torch.randn(1, 8, 5, 6))
    assert isinstance(fast.skips, Part)
    used = []
    fast.skips.traced.register_forward_hook(lambda *_: used.append(True))
    fast(torch.randn(1, 8, 5, 6))
    assert len(used) == 2
    with pytest.raises(TypeError):
        fast.skips()
    with pytest.raises(TypeError):
        fast.skips(torch.randn(1, 8, 5, 6), None, None)
    with pytest.raises(TypeError):
        fast.skips(torch.randn(1, 8, 5, 6), x=torch.randn(1, 8, 5, 6))
