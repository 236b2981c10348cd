"""Optimised copies in torch.compile and torch.export, which keep nothing of their memory plan."""

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
def test_torchscript_is_refused():
    fast = fastseg.optimize(randomise(Net()))
    with pytest.raises(ValueError, match=r"torch\.jit\.trace does not record optimised networks"):
        torch.jit.trace(fast, (torch.randn(1, 3, 18, 26),), strict=False)
    x = torch.randn(1, 3, 18, 26)
    assert torch.equal(fast(x)["out"], fast(x)["out"])
