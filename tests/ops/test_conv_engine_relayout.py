"""Images in another memory layout: the values of torch's own copies."""

import itertools

import pytest
import torch
from torch.library import opcheck

from fastseg.ops._layout import channels_last, in_layout

LAYOUTS = (torch.channels_last, torch.contiguous_format)
SHAPES = (
    (1, 3, 37, 41),  # photographs, in blocks of 64 pixels
    (2, 3, 1, 1),
    (2, 16, 16, 16),
    (1, 1, 5, 7),
    (2, 21, 33, 17),  # neither channels nor pixels fill registers
    (3, 100, 5, 3),
    (1, 40, 1, 100),
    (2, 5, 1, 1),
    (1, 2048, 9, 8),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
)


def views(shape, dtype):
    """NCHW, channels last, crops of both, swapped axes, every other channel and pixel."""
    N, C, H, W = shape
    x = torch.randn(shape).to(dtype)
    crop = (slice(None), slice(1, 1 + C), slice(2, 2 + H), slice(1, 1 + W))
    large = torch.randn(N, C + 2, H + 3, W + 5).to(dtype)
    yield x
    yield x.contiguous(memory_format=torch.channels_last)
    yield large[crop]
    yield large.contiguous(memory_format=torch.channels_last)[crop]
    yield x.transpose(2, 3).contiguous().transpose(2, 3)
    yield torch.randn(N, 2 * C, H, W).to(dtype)[:, ::2]
    yield torch.randn(N, C, H, 2 * W).to(dtype)[..., ::2]
    yield torch.randn(1, C, H, W).to(dtype).expand(N, -1, -1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_strides(cpu_isa, shape, dtype):
    for x, layout, narrow in itertools.product(views(shape, dtype), LAYOUTS, (False, True)):
        y = torch.ops.fastseg.relayout(x, layout == torch.channels_last, narrow)
        assert torch.equal(y, x.bfloat16() if narrow else x)
        assert y.dtype == (torch.bfloat16 if narrow else dtype)
        assert y.is_contiguous(memory_format=layout)
        assert y.untyped_storage()._cdata != x.untyped_storage()._cdata


def test_keeps_every_bit_of_bfloat16():
    """Subnormal numbers and NaN with a payload too: they are moved, not computed with."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(1, 64, 32, 32)
    for x in (bits, bits.contiguous(memory_format=torch.channels_last)):
        for layout in LAYOUTS:
            y = torch.ops.fastseg.relayout(
                x.view(torch.bfloat16), layout == torch.channels_last, False
            )
            assert torch.equal(y.view(torch.int16), bits)


def test_large(threads):
    """In many tasks, of one and of three threads, into memory of the pool."""
    x = torch.randn(2, 72, 130, 129)
    for count in (1, 3):
        threads(count)
        y = torch.ops.fastseg.relayout(x, True, False)
        assert torch.equal(y, x)
        assert torch.equal(torch.ops.fastseg.relayout(y, False, False), x)


def test_only_where_needed():
    x = torch.randn(2, 5, 4, 4)
    assert in_layout(x, torch.contiguous_format) is x
    last = channels_last(x)
    assert last.stride(1) == 1
    assert channels_last(last[:, 1:3]).data_ptr() == last[:, 1:].data_ptr()
    double = channels_last(x.double())  # torch's
    assert double.stride(1) == 1
    assert torch.equal(double, x.double())


def test_opcheck():
    for layout, narrow in itertools.product((False, True), (False, True)):
        opcheck(torch.ops.fastseg.relayout.default, (torch.randn(2, 9, 5, 6), layout, narrow))
    opcheck(torch.ops.fastseg.relayout.default, (torch.randn(2, 9, 5, 6).bfloat16(), True, True))


def test_bad_input():
    with pytest.raises(ValueError, match=r"relayout: x must be .*\(N, C, H, W\)"):
        torch.ops.fastseg.relayout(torch.randn(3, 4, 5), True, False)
    with pytest.raises(ValueError, match="relayout: x must be a float32 or bfloat16 image"):
        torch.ops.fastseg.relayout(torch.randn(1, 3, 4, 5).double(), True, False)
