"""Optimised networks against the networks they were made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.nn.packed import PackedConv2d
from tests.conftest import assert_as_accurate


class Residual(nn.Module):
    """A block in the form of torchvision's ResNet: in-place addition and a shared ReLU."""

    def __init__(self, channels, width, project):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 32, 3, padding=2, dilation=2, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if project:
            self.downsample = nn.Sequential(nn.Conv2d(channels, 32, 1), nn.BatchNorm2d(32))

    def forward(self, x):
        identity = x
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            identity = self.downsample(x)
        y += identity
        return self.relu(y)


class Net(nn.Module):
    """Traceable, with the forms that fusion has to tell apart."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 7, 2, 3), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(Residual(32, 16, True), Residual(32, 16, False))
        self.shared = nn.Conv2d(32, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.late_bn = nn.BatchNorm2d(32)
        self.score = nn.Conv2d(64, 5, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        size = x.shape[-2:]
        x = self.blocks(self.stem(x))
        y = F.leaky_relu(self.shared(x), 0.1)
        z = self.shared(y)  # the same layer again, followed by something else
        z = self.late_bn(F.max_pool2d(self.depthwise(z + z), 3, 1, 1))
        z = self.dropout(torch.relu(z))
        both = self.score(torch.cat([y, z], 1))
        both = both + both.mean((2, 3), keepdim=True)
        return {"out": F.interpolate(both, size=size, mode="bilinear")}


class Untraceable(nn.Module):
    """Its forward looks at values, its child does not."""

    def __init__(self):
        super().__init__()
        self.inner = Net()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        if x.sum() > 1e30:
            return x
        return self.inner(self.conv(x))["out"]


def randomise(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@torch.no_grad()
def check(model, x, **options):
    fast = fastseg.optimize(model, **options)
    plain, y = model(x), fast(x)
    exact = model.double()(x.double())
    for out in (plain, y, exact):
        assert isinstance(out, dict) == isinstance(plain, dict)
    values = (o["out"] if isinstance(o, dict) else o for o in (y, plain, exact))
    assert_as_accurate(*values, factor=10 if options.get("accuracy") != "strict" else 2)
    return fast


@pytest.mark.parametrize("accuracy", ["default", "strict"])
def test_traced_network(accuracy):
    fast = check(randomise(Net()), torch.randn(2, 3, 45, 37), accuracy=accuracy)
    kinds = [type(m) for m in fast.modules()]
    assert kinds.count(PackedConv2d) == 10  # every convolution, shared twice
    assert kinds.count(nn.BatchNorm2d) == 1
    assert nn.ReLU not in kinds
    assert nn.Dropout not in kinds


class Block(nn.Module):
    """Layers of fastseg.nn, with a residual and with successors that fuse into one of them."""

    def __init__(self):
        super().__init__()
        self.conv1 = fastseg.nn.ConvBNReLU2d(3, 32, 3, padding=1)
        self.conv2 = fastseg.nn.ConvBNReLU2d(32, 32, 3, padding=1, activation="leaky_relu")
        self.conv3 = fastseg.nn.ConvBNReLU2d(32, 32, 1, activation="none")
        self.grouped = fastseg.nn.ConvBNReLU2d(32, 32, 1, groups=4)

    def forward(self, x):
        x = self.conv1(x)
        y = self.conv2(x, x)
        return self.grouped(torch.relu(self.conv3(x) + y))


def test_layers_of_fastseg():
    fast = check(randomise(Block()), torch.randn(1, 3, 19, 23))
    assert sum(isinstance(m, PackedConv2d) for m in fast.modules()) == 4
    text = fastseg.explain(fast)
    assert "conv3: convolution engine" in text
    assert "grouped: convolution engine, 32, 32, kernel_size=(1, 1)" in text


def test_convolutions_of_a_kind_of_their_own_stay():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean())

    hooked = nn.Conv2d(3, 8, 1)
    hooked.register_forward_hook(lambda module, args, out: out * 2)
    fast = check(nn.Sequential(Standardised(3, 3, 1), hooked).eval(), torch.randn(1, 3, 5, 5))
    assert not any(isinstance(m, PackedConv2d) for m in fast.modules())
    assert "1: left to torch, it has hooks" in fastseg.explain(fast)
    assert "conv2d: left to torch, its weights are computed" in fastseg.explain(fast)


def test_residuals_are_fused():
    fast = fastseg.optimize(randomise(Net()))
    summed = [n.target for n in fast.graph.nodes if n.op == "call_module" and len(n.args) == 2]
    layers = [fast.get_submodule(name) for name in summed]
    assert sum(isinstance(layer, PackedConv2d) for layer in layers) == 2


def test_untraceable_network_is_optimised_in_parts():
    fast = check(randomise(Untraceable()), torch.randn(1, 3, 31, 33))
    assert isinstance(fast.conv, PackedConv2d)
    assert any(isinstance(m, PackedConv2d) for m in fast.inner.modules())


def test_original_is_untouched():
    model = randomise(Net())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fastseg.optimize(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_explain():
    fast = fastseg.optimize(randomise(Net()))
    text = fastseg.explain(fast)
    assert "stem.0: convolution engine, 3, 32, kernel_size=(7, 7)" in text
    assert "depthwise: convolution engine, 32, 32, kernel_size=(3, 3)" in text
    assert "late_bn: left to torch, not behind a convolution of its own" in text


def test_errors():
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        fastseg.optimize(Net())
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32"):
        fastseg.optimize(Net().eval(), dtype=torch.float16)
    with pytest.raises(ValueError, match="accuracy must be one of"):
        fastseg.optimize(Net().eval(), accuracy="exact")
