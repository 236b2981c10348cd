"""Optimised copies in torch.compile and torch.export, which keep nothing of their memory plan."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg

from .test_unharmed import randomise


class Net(nn.Module):
    """A skip, a pool, a sum, an inner and a last resize, a pyramid of averages."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, 2, 1)
        self.same = nn.Conv2d(16, 16, 3, padding=1)
        self.mean = nn.Conv2d(16, 16, 1)
        self.score = nn.Conv2d(48, 5, 1)

    def forward(self, x):
        fine = F.relu(self.stem(x))
        y = F.relu(self.down(fine))
        y = F.relu(self.same(y) + y)
        mean = self.mean(F.adaptive_avg_pool2d(y, 2))
        size = fine.shape[-2:]
        maps = [F.interpolate(m, size, mode="bilinear") for m in (y, mean)]
        scores = self.score(F.max_pool2d(torch.cat([fine, *maps], 1), 2))
        return {"out": F.interpolate(scores, x.shape[-2:], mode="bilinear")}


def compiled(fast, x):
    return torch.compile(fast, backend="aot_eager", fullgraph=True)


def exported(fast, x):
    return torch.export.export(fast, (x,)).module()


@pytest.mark.parametrize("form", [compiled, exported])
@torch.no_grad()
def test_same_outputs(form):
    model = randomise(Net())
    fast = fastseg.optimize(model)
    inputs = [torch.randn(2, 3, 18, 26) for _ in range(3)]
    run = form(fast, inputs[0])
    results = [run(x)["out"] for x in inputs]  # the first ones survive the later calls
    for x, y in zip(inputs, results, strict=True):
        torch.testing.assert_close(y, model(x)["out"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiled_for_other_sizes():
    model = randomise(Net())
    run = compiled(fastseg.optimize(model), None)
    for shape in ((2, 3, 18, 26), (1, 3, 20, 14), (3, 3, 18, 26)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(x)["out"], model(x)["out"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_exported_with_dynamic_sizes():
    """Optimised networks take ``*args``: the sizes of all inputs are those of one argument."""
    model, auto = randomise(Net()), torch.export.Dim.AUTO
    fast = fastseg.optimize(model)
    sizes = {0: auto, 2: auto, 3: auto}
    program = torch.export.export(fast, (torch.randn(2, 3, 18, 26),), dynamic_shapes=((sizes,),))
    for shape in ((2, 3, 18, 26), (3, 3, 21, 33)):
        x = torch.randn(shape)
        out = program.module()(x)["out"]
        torch.testing.assert_close(out, model(x)["out"], rtol=1e-4, atol=1e-4)


def onnx(fast, inputs):
    torch.onnx.export(fast, inputs, io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("record", [torch.jit.trace, torch.jit.script, onnx])
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export")
@torch.no_grad()
def test_what_does_not_know_our_operators_says_so(record):
    fast, x = fastseg.optimize(randomise(Net())), torch.randn(1, 3, 18, 26)
    with pytest.raises(ValueError, match=r"use torch\.export, or give them the network itself"):
        record(fast, (x,)) if record is not torch.jit.script else record(fast)
    assert torch.equal(fast(x)["out"], fast(x)["out"])
