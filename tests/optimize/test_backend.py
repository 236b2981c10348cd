"""``torch.compile(backend="fastseg")`` against the networks it compiles."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg import models
from fastseg.memory_plan import Concat
from fastseg.optimize.backend import compile_graph

from .test_patterns import PSP, PoolUnpool
from .test_unharmed import randomise


@pytest.fixture(autouse=True)
def _reset(threads):
    threads(1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, **options):
    return torch.compile(model, backend="fastseg", **options)


class Net(nn.Module):
    """Control flow on sizes, a graph break, a dict: what the compiler resolves."""

    def __init__(self, broken=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, 2, 1)
        self.broken = broken

    def forward(self, x):
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        y = F.relu(self.bn(self.conv(x)))
        if self.broken:
            torch._dynamo.graph_break()
        z = F.interpolate(self.down(y), y.shape[-2:], mode="bilinear")
        y = y + z
        return {"out": y, "flat": y.view(y.shape[0], -1)}


@pytest.mark.parametrize("broken", [False, True])
@torch.no_grad()
def test_same_outputs_at_all_sizes(broken):
    model = randomise(Net(broken))
    fast = compiled(model)
    for size in ((2, 3, 9, 11), (2, 3, 9, 12), (1, 3, 32, 7), (3, 3, 16, 16)):
        x = torch.randn(size)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_log(caplog):
    with caplog.at_level(logging.INFO, "fastseg"):
        compiled(randomise(Net()))(torch.randn(1, 3, 8, 8))
    assert "conv: convolution engine, 3, 8" in caplog.text
    assert "activation=relu" in caplog.text


@pytest.mark.parametrize("make", [PoolUnpool, PSP])
@torch.no_grad()
def test_patterns(make, caplog):
    model = randomise(make())
    x = torch.randn(2, 3 if make is PoolUnpool else 16, 12, 14)
    with caplog.at_level(logging.INFO, "fastseg"):
        out = compiled(model, fullgraph=True, dynamic=False)(x)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    assert "read by its unpooling" in caplog.text or "grids convolved" in caplog.text


@torch.no_grad()
def test_labels(caplog):
    model = randomise(Net())
    x = torch.randn(1, 3, 8, 8)

    def labels(x):
        return F.interpolate(model(x)["out"], (32, 32), mode="bilinear").argmax(1)

    with caplog.at_level(logging.INFO, "fastseg"):
        assert torch.equal(compiled(labels)(x), labels(x))
    assert "resize and argmax in one pass" in caplog.text


@torch.no_grad()
def test_weights_may_change():
    model, x = randomise(Net()), torch.randn(1, 3, 8, 8)
    fast = compiled(model)
    fast(x)
    for change in (
        lambda: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}),
        lambda: model.conv.weight.mul_(0.5),
        lambda: setattr(model.down.weight, "data", torch.randn(8, 8, 3, 3)),
        lambda: model.bn.running_mean.add_(1),
        lambda: setattr(model, "down", nn.Conv2d(8, 8, 3, 2, 1)),
    ):
        change()
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_gradients_are_torchs(caplog):
    model = randomise(Net())
    with caplog.at_level(logging.INFO, "fastseg"):
        out = compiled(model)(torch.randn(1, 3, 8, 8))["out"]
    out.sum().backward()
    assert model.conv.weight.grad is not None
    assert "gradients are wanted" in caplog.text
    with torch.no_grad():  # and compiled anew without
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastseg"):
            compiled(model)(torch.randn(1, 3, 8, 8))
    assert "convolution engine" in caplog.text


@torch.no_grad()
def test_training_mode():
    model, x = randomise(Net()).train(), torch.randn(2, 3, 8, 8)
    plain = copy.deepcopy(model)
    torch.testing.assert_close(compiled(model)(x), plain(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.bn.running_mean, plain.bn.running_mean)


@torch._inductor.config.patch(freezing=True)
@torch.no_grad()
def test_frozen_weights(caplog):
    """With this setting weights are no inputs of the compiler's graphs."""
    model, x = randomise(Net()), torch.randn(1, 3, 8, 8)
    fast = compiled(model)
    with caplog.at_level(logging.INFO, "fastseg"):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert "convolution engine, 3, 8" in caplog.text
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_inference_mode():
    model = randomise(Net())
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["unet", "segnet_vgg16"])
@torch.no_grad()
def test_our_networks(name):
    model = randomise(models.create_model(name, width=4))
    x = torch.randn(1, 3, 33, 40)
    out = compiled(model, fullgraph=True)(x)["out"]
    torch.testing.assert_close(out, model(x)["out"], rtol=1e-4, atol=1e-3)


def test_entry_point_and_an_import_without_the_compiler():
    """The compiler finds the installed backend by itself; importing fastseg does not load it."""
    code = """
import sys, fastseg
assert "torch._dynamo" not in sys.modules
from torch._dynamo.backends.registry import lookup_backend
from fastseg.optimize.backend import compile_graph
assert lookup_backend("fastseg") is compile_graph
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_as_a_function():
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1)))
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(compile_graph(graph, [x])(x), graph(x))
    assert fastseg.optimize  # the name of the package is the function


class Decoder(nn.Module):
    """What the compiler calls by other names than the layers have."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 6, 4, 2, 1)
        self.bn = nn.BatchNorm2d(6)
        self.act = nn.ReLU6()
        self.mix = nn.Conv2d(6 + 8, 8, 1)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        fine = self.act(self.bn(self.up(x)))
        rows = self.linear(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        return self.mix(torch.cat([fine, F.interpolate(rows, fine.shape[2:])], 1))


@torch.no_grad()
def test_functions_of_layers(caplog, monkeypatch):
    """Transposed and linear layers and ReLU6, and concatenations whose channels only it knows."""
    places = []
    monkeypatch.setattr(Concat, "__init__", _recorded(Concat.__init__, places))
    model, x = randomise(Decoder()), torch.randn(2, 8, 9, 7)
    fast = compiled(model, fullgraph=True)
    with caplog.at_level(logging.INFO, logger="fastseg"):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    lines = [record.message for record in caplog.records]
    assert sum("convolution engine" in line for line in lines) == 3
    assert any("activation=relu6" in line for line in lines)
    assert len(places) == 1


def _recorded(init, made):
    def recorded(self, *args):
        made.append(self)
        init(self, *args)

    return recorded
