"""Pooling and unpooling against PyTorch, at layers of SegNet and of a network with stride 8."""

import pytest
import torch
import torch.nn.functional as F

from fastseg.ops import max_pool2d, max_unpool2d

SHAPES = [
    (1, 64, 360, 480),  # SegNet on CamVid, first pooling
    (4, 256, 90, 120),  # its third, a batch of four
]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
VARIANTS = {  # pool(x) -> (values, indices), unpool(values, indices), bytes per index
    "fastseg": (lambda x: max_pool2d(x, 2), lambda y, i: max_unpool2d(y, i, 2), 1),
    "fastseg packed": (
        lambda x: max_pool2d(x, 2, packed=True),
        lambda y, i: max_unpool2d(y, i, 2),
        0.25,
    ),
    "torch": (
        lambda x: F.max_pool2d(x, 2, return_indices=True),
        lambda y, i: F.max_unpool2d(y, i, 2),
        8,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("work", ["pool", "unpool", "pool and unpool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_max_unpool2d(time_op, benchmark, shape, layout, dtype, work, variant):
    benchmark.group = f"{work} {shape} {layout} {dtype}"
    pool, unpool, index_bytes = VARIANTS[variant]
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    y, indices = pool(x)
    plain_y, plain_indices = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, plain_y)
    assert torch.equal(unpool(y, indices), F.max_unpool2d(plain_y, plain_indices, 2))

    # Either way the full image, the pooled one and the indices pass once.
    once = (x.numel() + y.numel()) * x.element_size() + y.numel() * index_bytes
    call = {
        "pool": lambda: pool(x),
        "unpool": lambda: unpool(y, indices),
        "pool and unpool": lambda: unpool(*pool(x)),
    }[work]
    time_op(call, bytes_moved=int(once * (2 if work == "pool and unpool" else 1)))


@pytest.mark.parametrize("variant", ["fastseg", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 64, 192, 192)], ids=str)  # ResNet stem
def bench_max_pool2d_backward(time_op, benchmark, shape, layout, variant):
    benchmark.group = f"3x3 stride 2 pooling backward {shape} {layout}"
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    pool = {
        "fastseg": lambda: max_pool2d(x, 3, 2, 1)[0],
        "torch": lambda: F.max_pool2d(x, 3, 2, 1),
    }[variant]
    y = pool()
    grad = torch.ones_like(y)
    time_op(lambda: torch.autograd.grad(y, x, grad, retain_graph=True))
