"""Resize2d against F.interpolate."""

import pytest
import torch
import torch.nn.functional as F

from fastseg.nn.resize import Resize2d


@pytest.mark.parametrize(
    ("mode", "align"), [("nearest", None), ("bilinear", False), ("bilinear", True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 16, 5, 7), (10, 14)),
        ((2, 33, 8, 9), (17, 5)),
        ((1, 8, 1, 1), (4, 3)),
        ((3, 64, 6, 4), (6, 4)),
        ((1, 20, 13, 3), (7, 31)),
        ((1, 4, 5, 7), (9, 9)),
        ((0, 16, 5, 7), (10, 14)),
    ],
    ids=str,
)
@torch.no_grad()
def test_size(shape, size, dtype, mode, align, cpu_isa):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    exact = F.interpolate(x.double(), size, mode=mode, align_corners=align)
    y = Resize2d(None, mode, align)(x, size)
    assert y.dtype == dtype
    if mode == "nearest":
        assert torch.equal(y.double(), exact)
    else:
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("factor", [2, 3, (2, 4)])
@torch.no_grad()
def test_factor_slices_and_threads(factor, threads):
    whole = torch.randn(2, 48, 6, 7).contiguous(memory_format=torch.channels_last)
    x = whole[:, 8:40]
    results = []
    for count in (1, 2):
        threads(count)
        results.append(Resize2d(factor, "bilinear", False)(x))
    assert torch.equal(*results)
    expected = F.interpolate(x, scale_factor=factor, mode="bilinear")
    torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=1e-5)


def test_errors():
    run = torch.ops.fastseg.resize_out
    x, out = (torch.randn(1, 8, n, n).contiguous(memory_format=torch.channels_last) for n in (2, 4))
    with pytest.raises(ValueError, match="channels last"):
        run(x, out.contiguous(), False, False)
    with pytest.raises(ValueError, match="one dtype, N and C"):
        run(x.double(), out, False, False)
    with pytest.raises(ValueError, match="at least one pixel"):
        run(x[..., :0], out, False, False)
