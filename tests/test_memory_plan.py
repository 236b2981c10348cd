"""Results in reused buffers: never one over another, and never one that somebody still holds."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.memory_plan import Concat
from fastseg.nn.packed import PackedConv2d


class Pyramid(nn.Module):
    """Skip connections, a concatenation of convolutions, one of other things, views."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, 2, 1)
        self.branches = nn.ModuleList(nn.Conv2d(16, c, 1) for c in (8, 24, 5))
        self.pooled = nn.Conv2d(16, 24, 1)
        self.project = nn.Conv2d(61, 16, 1)
        self.skip = nn.Conv2d(32, 16, 1)
        self.viewed = nn.Conv2d(16, 16, 1)
        self.score = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        fine = F.relu(self.stem(x))
        y = F.relu(self.down(fine))
        maps = [F.relu(branch(y)) for branch in self.branches]
        mean = self.pooled(y.mean((2, 3), keepdim=True))
        y = self.project(torch.cat([*maps, mean.expand_as(maps[1])], 1))
        maps = [F.relu(branch(y)) for branch in self.branches]
        y = torch.cat([maps[0], maps[1]], 1)[:, :16] + y
        y = F.interpolate(y, fine.shape[-2:], mode="bilinear")
        y = self.skip(torch.cat([fine, self.stem(x)], 1)) + y
        flat = self.viewed(y).flatten(2)  # a view outlives the node it comes from
        return self.score(y), flat


@pytest.fixture
def model():
    return Pyramid().eval()


@torch.no_grad()
def test_results_of_many_sizes(model):
    fast = fastseg.optimize(model)
    held = []
    for size in ((1, 3, 24, 32), (2, 3, 9, 11), (1, 3, 40, 24), (2, 3, 9, 11)):
        x = torch.randn(size)
        held.append((x, fast(x)))
    for x, results in held:  # the first ones have survived the later calls
        for y, expected in zip(results, model(x), strict=True):
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_buffers_are_shared_and_concatenations_in_place():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(8))
            self.last = nn.Conv2d(32, 4, 1)

        def forward(self, x):
            for layer in self.layers:
                x = F.relu(layer(x))
            return self.last(torch.cat([self.layers[0](x), self.layers[1](x)], 1))

    model = Chain().eval()
    fast = fastseg.optimize(model)
    x = torch.randn(1, 16, 7, 9)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)
    packed = [m for m in fast.modules() if isinstance(m, PackedConv2d)]
    assert len({m.place.slot for m in packed if m.place}) == 2  # of the input and of the output
    assert sum(m.place is None for m in packed) == 1  # the result of the network
    assert sum(m.place is not None and m.place.total == 32 for m in packed) == 2
    assert sum(isinstance(m, Concat) for m in fast.modules()) == 1


@torch.no_grad()
def test_threads_and_copies(model):
    fast = fastseg.optimize(model)
    inputs = [torch.randn(1, 3, 20, 28) for _ in range(16)]
    expected = [fast(x)[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for y, alone in zip(pool.map(lambda x: fast(x)[0], inputs), expected, strict=True):
            assert torch.equal(y, alone)
    assert torch.equal(copy.deepcopy(fast)(inputs[0])[0], expected[0])


@torch.no_grad()
def test_mismatched_maps_are_reported():
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)
            self.c = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        fastseg.optimize(Wrong().eval())(torch.randn(1, 4, 8, 8))


class Sums(nn.Module):
    """Sums with a map that nobody reads later, with one that is read again, with the input of the
    convolution, and with a single channel that broadcasts."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.reduce = nn.ModuleList(nn.Conv2d(16, 8, 3, padding=1) for _ in range(3))
        self.expand = nn.ModuleList(nn.Conv2d(8, 16, 1) for _ in range(3))
        self.same = nn.Conv2d(16, 16, 3, padding=1)
        self.narrow = nn.Conv2d(16, 1, 1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        for reduce, expand in zip(self.reduce, self.expand, strict=True):
            x = F.relu(expand(F.relu(reduce(x))) + x)
        y = F.relu(self.same(x)) + x
        z = F.relu(self.same(y) + y)
        return self.last(F.relu(self.same(z) + self.narrow(z))) + self.last(y)


@torch.no_grad()
def test_sums_take_the_place_of_a_summand_that_is_not_read_later():
    model = Sums().eval()
    fast = fastseg.optimize(model)
    for size in ((2, 3, 9, 11), (1, 3, 24, 40), (3, 20, 8)):
        x = torch.randn(size)
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)
    slots = {name: m.place.slot for name, m in fast.named_modules() if getattr(m, "place", None)}
    stem = slots["stem"]
    assert [slots[f"expand.{i}"] for i in range(3)] == [stem] * 3
    assert slots["same"] != stem  # which the same convolution reads
