"""What is kept between calls, and when nothing may be."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastseg.nn import ConvBNReLU2d
from fastseg.ops import _kept, gaussian_lattice


class OnCuda:
    """As much of a CUDA tensor as may_keep looks at."""

    is_cuda, device = True, "cuda:0"


@pytest.mark.parametrize("capturing", [False, True])
def test_nothing_is_kept_that_a_graph_captures(capturing, monkeypatch):
    waited = []
    monkeypatch.setattr(_kept, "Tensor", OnCuda)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert _kept.may_keep(OnCuda()) is not capturing
    assert waited == ([] if capturing else ["cuda:0"])  # other streams may read it at once


@pytest.mark.parametrize("keep", [False, True])
def test_lattices_and_folded_weights(keep, monkeypatch):
    module = sys.modules["fastseg.ops.gaussian_features"]
    monkeypatch.setattr(module, "_LATTICES", {})
    for owner in (module, sys.modules["fastseg.nn.conv_bn"]):
        monkeypatch.setattr(owner, "may_keep", lambda result: keep)
    first = gaussian_lattice((5, 6), 2.0)
    assert (gaussian_lattice((5, 6), 2.0) is first) == keep
    assert gaussian_lattice((5, 6), (2.0, 3.0)) is not first
    layer, x = ConvBNReLU2d(2, 3, 1).eval(), torch.rand(1, 2, 4, 4)
    with torch.no_grad():
        assert (layer.folded(x)[0] is layer.folded(x)[0]) == keep


def test_the_latest_lattices_are_kept():
    lattices = [gaussian_lattice((1, n), 1.5) for n in range(1, 11)]
    again = [gaussian_lattice((1, n), 1.5) for n in range(10, 0, -1)]
    assert [a is b for a, b in zip(again, lattices[::-1], strict=True)] == [True] * 8 + [False] * 2


def test_no_proxy_is_kept():
    with FakeTensorMode():
        assert not _kept.may_keep(torch.empty(3))
