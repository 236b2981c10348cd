"""Copies from NCHW to channels last and back against torch's."""

import pytest
import torch

from fastseg.ops._layout import in_layout

SHAPES = ((1, 3, 512, 512), (1, 21, 512, 512), (1, 256, 128, 128), (1, 1024, 128, 128))
LAYOUTS = {"channels last": torch.channels_last, "NCHW": torch.contiguous_format}


@pytest.mark.parametrize("variant", ["fastseg", "torch"])
@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_relayout(time_op, benchmark, shape, dtype, to, variant):
    benchmark.group = f"{shape} {dtype} to {to}"
    (other,) = (layout for name, layout in LAYOUTS.items() if name != to)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=other)
    copy = {
        "fastseg": lambda: in_layout(x, LAYOUTS[to]),
        "torch": lambda: x.contiguous(memory_format=LAYOUTS[to]),
    }[variant]
    assert torch.equal(copy(), x)
    time_op(copy, bytes_moved=2 * x.numel() * x.element_size())
