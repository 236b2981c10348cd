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
        ((2, 1, 7, 5), (16, 3)),
        ((1, 3, 1, 9), (4, 33)),
        ((1, 21, 20, 17), (301, 263)),  # written past the caches, rows at any address
        ((0, 16, 5, 7), (10, 14)),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@torch.no_grad()
def test_size(shape, size, dtype, mode, align, layout, cpu_isa):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    exact = F.interpolate(x.double(), size, mode=mode, align_corners=align)
    y = Resize2d(None, mode, align)(x, size)
    assert y.dtype == dtype
    both = x.shape[2:] == (1, 1) or x.numel() == 0  # are in both layouts
    assert both or y.is_contiguous(memory_format=layout)
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


@pytest.mark.parametrize("offset", [0, 3])
def test_large_images_among_the_channels_of_others(offset, threads):
    """Lines that are whole cache lines and lines that are not; what lies beside stays."""
    x = torch.randn(2, 32, 40, 50).contiguous(memory_format=torch.channels_last)
    results = []
    for count in (1, 2):
        threads(count)
        out = torch.zeros(2, 160, 200, 48).permute(0, 3, 1, 2)
        torch.ops.fastseg.resize_out(x, out[:, offset : offset + 32], True, False)
        results.append(out)
    assert torch.equal(*results)
    expected = F.interpolate(x, (160, 200), mode="bilinear", align_corners=True)
    torch.testing.assert_close(out[:, offset : offset + 32], expected, rtol=1e-5, atol=1e-5)
    assert not out[:, :offset].any()
    assert not out[:, offset + 32 :].any()


def test_same_size_is_a_copy_and_large_results_are_new():
    x = torch.randn(1, 3, 64, 64)
    x[0, 0, 5, 5] = float("inf")
    y = Resize2d(None, "bilinear", False)(x, (64, 64))
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    held = [Resize2d(16, "nearest", None)(x[:, :, :9, :9]) for _ in range(3)]
    assert len({y.data_ptr() for y in held}) == 3
    assert all(torch.equal(y, held[0]) for y in held)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_op(layout):
    x = torch.randn(2, 3, 5, 6).contiguous(memory_format=layout)
    torch.library.opcheck(torch.ops.fastseg.resize, (x, 7, 12, False, False))
    torch.library.opcheck(torch.ops.fastseg.resize_out, (x, torch.empty_like(x), False, True))


def test_gradients_are_torch_s():
    x = torch.randn(1, 8, 3, 3, requires_grad=True)
    Resize2d(2, "bilinear", False)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 4.0))


def test_errors():
    run = torch.ops.fastseg.resize_out
    x, out = (torch.randn(1, 8, n, n).contiguous(memory_format=torch.channels_last) for n in (2, 4))
    with pytest.raises(ValueError, match="channels last"):
        run(x.contiguous(), out, False, False)
    with pytest.raises(ValueError, match="one dtype, N and C"):
        run(x.double(), out, False, False)
    with pytest.raises(ValueError, match="at least one pixel"):
        run(x[..., :0], out, False, False)
