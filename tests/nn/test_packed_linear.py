"""The packed linear layer against torch's."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseg.nn.packed_linear import PackedLinear, unsupported_linear
from fastseg.ops.conv_engine import ACTIVATIONS, activate
from tests.conftest import assert_as_accurate

SHAPES = [(20,), (5, 20), (2, 5, 20), (2, 3, 4, 20), (2, 2, 3, 4, 20), (0, 20), (2, 0, 20)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_like_torch(shape, activation):
    linear = nn.Linear(20, 37)
    packed = PackedLinear(linear, activation=activation, negative_slope=0.2)
    wide = copy.deepcopy(linear).double()
    x = torch.randn(shape)
    sums = (None, (*shape[:-1], 37), (37,), (), (3, *shape[:-1], 37), (*shape[:-1], 1))
    for residual in [None if s is None else torch.randn(s) for s in sums]:
        total, exact = linear(x), wide(x.double())
        if residual is not None:
            total, exact = total + residual, exact + residual
        y = packed(x, residual)
        assert y.shape == exact.shape
        plain = activate(total, activation, 0.2)
        assert_as_accurate(y, plain, activate(exact, activation, 0.2), factor=4)  # few values


@torch.no_grad()
def test_residual_behind_the_activation():
    linear, x = nn.Linear(20, 37), torch.randn(3, 4, 20)
    packed = PackedLinear(linear, activation="gelu", residual_last=True)
    for shape in ((3, 4, 37), (37,), (2, 1, 1, 37)):
        residual = torch.randn(shape)
        torch.testing.assert_close(packed(x, residual), F.gelu(linear(x)) + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_any_strides(dtype):
    """Features that lie apart, as in maps that were flattened; one output; no bias."""
    for linear in (nn.Linear(24, 40), nn.Linear(24, 1, bias=False)):
        packed = PackedLinear(linear, dtype=dtype)
        whole = torch.randn(2, 30, 24)
        tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        apart = whole.transpose(1, 2).contiguous().transpose(1, 2)
        for x in (whole, apart, whole[:, ::2], whole[:1].expand(3, -1, -1), whole[0]):
            y = packed(x)
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), linear(x), **tolerance)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@torch.no_grad()
def test_gelu_everywhere(cpu_isa, approximate):
    """No worse than torch's own over all that matters, and right at the ends."""
    identity = nn.Linear(1, 1, bias=False)
    nn.init.ones_(identity.weight)
    name = "gelu" if approximate == "none" else "gelu_tanh"
    packed = PackedLinear(identity, activation=name)
    x = torch.linspace(-20, 20, 40001)
    exact = F.gelu(x.double(), approximate=approximate)
    ours = (packed(x[:, None])[:, 0] - exact).abs().max()
    assert ours < 1e-6
    ends = torch.tensor([float("inf"), 1e30, -1e30, 0.0, float("nan")])[:, None]
    y = packed(ends)[:, 0]
    assert y[0] == float("inf")
    assert y[1] == 1e30
    assert abs(y[2]) < 1e-6
    assert y[3] == 0
    assert y[4].isnan()


@torch.no_grad()
def test_is_a_layer_like_any():
    linear, x = nn.Linear(16, 8), torch.randn(5, 16)
    packed = PackedLinear(linear)
    expected = packed(x)
    assert torch.equal(packed.weight, linear.weight)
    assert torch.equal(packed.bias, linear.bias)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x), expected)
    assert "16, 8" in repr(packed)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_says_what_it_does_not_compute():
    assert "float64" in unsupported_linear(nn.Linear(3, 3).double())
    with pytest.raises(ValueError, match="PackedLinear: Identity is not a plain Linear"):
        PackedLinear(nn.Identity())
    packed = PackedLinear(nn.Linear(3, 3))
    for shape in ((), (4,), (3, 2)):
        with pytest.raises(ValueError, match=r"PackedLinear: x must be \(\.\.\., 3\), got"):
            packed(torch.randn(shape))
