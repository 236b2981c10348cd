"""Pooling, pyramids and resized scores in their own forms: the same outputs, and who gets them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.nn import MaxPool2d, PyramidConv2d
from fastseg.nn.packed import PackedConv2d
from fastseg.nn.pyramid_pooling import GridPool2d
from fastseg.optimize.max_pools import Unpool

from .test_unharmed import check, randomise


class PoolUnpool(nn.Module):
    """SegNet's pair, with the ways to say the size."""

    def __init__(self, kernel=2, stride=None, padding=0, sizes="shape", **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(kernel, stride, padding, return_indices=True, **options)
        self.unpool = nn.MaxUnpool2d(kernel, stride, padding)
        self.sizes = sizes

    def forward(self, x):
        y = torch.relu(self.conv(x))
        z, indices = self.pool(y)
        if self.sizes == "none":
            return self.unpool(z, indices)
        size = y.shape if self.sizes == "shape" else y.shape[-2:]
        return self.unpool(z * 2, indices, output_size=size)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sizes": "none"},
        {"sizes": "last", "ceil_mode": True},
        {"kernel": 3, "stride": 2, "padding": 1},
        {"kernel": (2, 3), "stride": (2, 3), "sizes": "last"},
    ],
)
@pytest.mark.parametrize("size", [(8, 12), (9, 12), (9, 13)])
def test_pool_and_unpool(options, size):
    if options.get("sizes") != "none" or size == (8, 12):
        fast = check(PoolUnpool(**options).eval(), torch.randn(2, 3, *size))
        assert any(isinstance(m, Unpool) for m in fast.modules())
        assert "read by its unpooling" in fastseg.explain(fast)


def test_unpool_to_another_size():
    """Without a size an odd map loses its last row and torch's flat positions shift; so do ours."""
    check(PoolUnpool(sizes="none").eval(), torch.randn(2, 3, 9, 12))


class FunctionalPools(nn.Module):
    def __init__(self, escape=False):
        super().__init__()
        self.escape = escape

    def forward(self, x):
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        z = F.max_unpool2d(y, indices, 2, output_size=x.shape[-2:])
        z = z + F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1)
        return (z, indices) if self.escape else z


def test_functional_pools():
    x = torch.randn(2, 3, 9, 12)
    fast = check(FunctionalPools().eval(), x)
    assert sum(isinstance(m, MaxPool2d) for m in fast.modules()) == 2
    fast = check(FunctionalPools(escape=True).eval(), x)  # somebody wants torch's indices
    assert sum(isinstance(m, MaxPool2d) for m in fast.modules()) == 1


@pytest.mark.parametrize("options", [{"dilation": 2}, {"kernel_size": 17}])
def test_pools_left_to_torch(options):
    pool = nn.MaxPool2d(**{"kernel_size": 2} | options)
    fast = check(nn.Sequential(nn.Conv2d(3, 3, 1), pool).eval(), torch.randn(1, 3, 40, 40))
    assert not any(isinstance(m, MaxPool2d) for m in fast.modules())


class PSP(nn.Module):
    """PSPNet's head as libraries write it."""

    def __init__(self, bins=(1, 2, 3, 6), first=True, kernel=3, align_corners=True, width=64):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(b), nn.Conv2d(16, width, 1, bias=False), nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            )
            for b in bins
        )  # fmt: skip
        self.first = first
        self.align_corners = align_corners
        self.bottleneck = nn.Sequential(
            nn.Conv2d(16 + len(bins) * width, 8, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )

    def forward(self, x):
        h, w = x.shape[-2:]
        maps = [
            F.interpolate(stage(x), (h, w), mode="bilinear", align_corners=self.align_corners)
            for stage in self.stages
        ]
        maps = [x, *maps] if self.first else [*maps, x]
        return self.bottleneck(torch.cat(maps, 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"first": False, "kernel": 1},
        {"bins": (6, 3), "align_corners": False, "kernel": 5, "width": 128},
    ],
)
@pytest.mark.parametrize("size", [(13, 17), (6, 6), (2, 1)])
def test_pyramid(options, size):
    fast = check(randomise(PSP(**options)), torch.randn(2, 16, *size))
    assert sum(isinstance(m, PyramidConv2d) for m in fast.modules()) == 1
    assert sum(isinstance(m, GridPool2d) for m in fast.modules()) == 1


@pytest.mark.parametrize("options", [{"bins": (40,)}, {"width": 3}, {"bins": (1,)}])
def test_pyramids_that_gain_nothing(options):
    fast = check(randomise(PSP(**options)), torch.randn(2, 16, 13, 17))
    assert not any(isinstance(m, PyramidConv2d) for m in fast.modules())


class ASPP(nn.Module):
    """torchvision's, with image pooling."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 8, 3, padding=r, dilation=r), nn.BatchNorm2d(8), nn.ReLU())
            for r in (1, 4, 9)
        )
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU())
        self.project = nn.Conv2d(32, 8, 1)

    def forward(self, x):
        mean = F.interpolate(self.mean(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*(branch(x) for branch in self.branches), mean], 1))


def test_aspp():
    fast = check(randomise(ASPP()), torch.randn(2, 16, 13, 17))
    assert "repeats it" in fastseg.explain(fast)
    assert "project: image pooling is a bias of the image" in fastseg.explain(fast)
    layers = [m for m in fast.modules() if isinstance(m, PackedConv2d)]
    assert sorted(m.weight.shape[1] for m in layers) == [8, 16, 16, 16, 16, 24]


@pytest.mark.parametrize("rates", [(6, 12, 18), (2, 4)])
def test_aspp_of_fastseg(rates):
    model = randomise(fastseg.nn.ASPP(32, 16, rates))
    fast = check(model, torch.randn(3, 32, 9, 11))
    assert "project: image pooling is a bias of the image" in fastseg.explain(fast)
    with torch.inference_mode():
        assert fast(torch.randn(0, 32, 9, 11)).shape == (0, 16, 9, 11)


def test_aspp_that_keeps_image_pooling():
    """The projection's zero border sees the repeated pixel less often."""
    model = randomise(fastseg.nn.ASPP(32, 16, (2, 4), project_kernel=3))
    fast = check(model, torch.randn(2, 32, 9, 11))
    assert "bias of the image" not in fastseg.explain(fast)


class Labels(nn.Module):
    def __init__(self, resize, choose):
        super().__init__()
        self.score = nn.Conv2d(3, 5, 1)
        self.resize, self.choose = resize, choose

    def forward(self, x):
        return self.choose(self.resize(self.score(F.avg_pool2d(x, 4)), x))


RESIZE = {
    "size": lambda y, x: F.interpolate(y, x.shape[-2:], mode="bilinear"),
    "corners": lambda y, x: F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=True),
    "factor": lambda y, x: F.interpolate(y, scale_factor=4, mode="bilinear"),
    "upsample": lambda y, x: nn.Upsample(scale_factor=3, mode="bilinear")(y),
}
CHOOSE = {
    "argmax": lambda y: y.argmax(1),
    "torch.argmax": lambda y: torch.argmax(y, dim=1, keepdim=True),
    "softmax": lambda y: y.softmax(1),
    "F.softmax": lambda y: F.softmax(y, dim=1),
    "module": lambda y: nn.Softmax(dim=1)(y),
}


@pytest.mark.parametrize("choose", CHOOSE)
@pytest.mark.parametrize("resize", RESIZE)
def test_resize_and_choose(resize, choose):
    fast = check(Labels(RESIZE[resize], CHOOSE[choose]).eval(), torch.randn(2, 3, 33, 48))
    assert "in one pass" in fastseg.explain(fast)


@pytest.mark.parametrize(
    "model",
    [
        Labels(RESIZE["size"], lambda y: y.softmax(-1)),
        Labels(RESIZE["size"], lambda y: (y.argmax(1), y)),
        Labels(lambda y, x: F.interpolate(y, x.shape[-2:]), CHOOSE["argmax"]),
        Labels(lambda y, x: F.interpolate(y, scale_factor=1.5, mode="bilinear"), CHOOSE["argmax"]),
    ],
)
def test_resizes_that_stay(model):
    fast = check(model.eval(), torch.randn(2, 3, 33, 48))
    assert "in one pass" not in fastseg.explain(fast)


class Pair(nn.Module):
    """GCN's large kernel: 1 x k and k x 1, twice, summed."""

    def __init__(self):
        super().__init__()
        self.l1, self.l2 = (
            nn.Conv2d(16, 5, (7, 1), padding=(3, 0)),
            nn.Conv2d(5, 5, (1, 7), 1, (0, 3)),
        )
        self.r1, self.r2 = (
            nn.Conv2d(16, 5, (1, 7), padding=(0, 3)),
            nn.Conv2d(5, 5, (7, 1), 1, (3, 0)),
        )

    def forward(self, x):
        return self.l2(self.l1(x)) + self.r2(self.r1(x))


def test_large_kernel():
    fast = check(Pair().eval(), torch.randn(2, 16, 13, 17))
    assert sum(isinstance(m, PackedConv2d) for m in fast.modules()) == 4
    assert sum(len(n.args) == 2 for n in fast.graph.nodes if n.op == "call_module") == 1


class Stored(nn.Module):
    """Adds a map of its own to a result."""

    def __init__(self, shape, parameter=False):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 1)
        stored = torch.randn(shape)
        if parameter:
            self.stored = nn.Parameter(stored)
        else:
            self.register_buffer("stored", stored)

    def forward(self, x):
        return torch.relu(self.stored + self.conv(x))


@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 9, 11), (1, 16, 9, 11), (16, 9, 11), (1, 16, 1, 1), ()])
def test_stored_summand(shape, parameter):
    """It is added by the convolution, laid out once."""
    model = Stored(shape, parameter).eval()
    fast = check(model, torch.randn(2, 8, 9, 11))
    assert "activation=relu" in fastseg.explain(fast)
    images = [b for b in fast.buffers() if b.shape == (*shape[:2], 9, 11)]
    assert len(shape) < 4 or shape[2:] == (1, 1) or images[-1].stride(1) == 1


class Adds(Stored):
    def forward(self, x):
        self.stored += self.conv(x)
        return self.stored * 1


class Remembers(Stored):
    def forward(self, x):
        y = torch.relu(self.conv(x) + self.stored)
        self.stored.copy_(y)
        return y


@pytest.mark.parametrize("kind", [Adds, Remembers])
def test_stored_map_that_changes(kind):
    model = kind((2, 16, 9, 11)).eval()
    fast = fastseg.optimize(model)
    x = torch.randn(2, 8, 9, 11)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)
