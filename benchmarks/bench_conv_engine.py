"""Packed convolutions against oneDNN, eager and with weights prepared as torch.compile does."""

import pytest
import torch
import torch.nn.functional as F

from fastseg.nn.packed import PackedConv2d

# N, C, H, W, K, kernel, stride, dilation: layers of dilated ResNets at 513x513.
SHAPES = [
    (1, 512, 65, 65, 512, 3, 1, 2),
    (1, 512, 65, 65, 512, 3, 1, 4),
    (4, 512, 65, 65, 512, 3, 1, 2),
    (1, 256, 65, 65, 256, 3, 1, 2),
    (1, 128, 65, 65, 128, 3, 1, 1),
    (1, 64, 129, 129, 64, 3, 1, 1),
    (1, 2048, 65, 65, 256, 3, 1, 6),
    (1, 2048, 65, 65, 256, 3, 1, 12),
    (1, 2048, 65, 65, 256, 3, 1, 18),
    (1, 2048, 65, 65, 256, 3, 1, 24),
    (1, 2048, 65, 65, 256, 3, 1, 36),
    (1, 1024, 65, 65, 256, 1, 1, 1),
    (1, 256, 65, 65, 1024, 1, 1, 1),
    (1, 2048, 65, 65, 512, 1, 1, 1),
    (1, 512, 65, 65, 2048, 1, 1, 1),
    (1, 3, 513, 513, 64, 7, 2, 1),
    (1, 128, 129, 129, 128, 3, 2, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_conv_engine(compare, benchmark, shape, dtype):
    benchmark.group = f"conv + bias + relu {shape} {dtype}"
    N, C, H, W, K, kernel, stride, dilation = shape
    padding = dilation * (kernel // 2)
    conv = torch.nn.Conv2d(C, K, kernel, stride, padding, dilation)
    packed = PackedConv2d(conv, activation="relu", dtype=dtype)
    conv.to(dtype)
    x = torch.randn(N, C, H, W).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        weight = conv.weight.contiguous(memory_format=torch.channels_last)
        geometry = ([padding] * 2, [stride] * 2, [dilation] * 2, 1)
        prepared = torch.ops.mkldnn._reorder_convolution_weight(
            conv.weight.detach(), *geometry, list(x.shape)
        )
        numel = conv(x).numel()
    variants = {
        "fastseg": lambda: packed(x),
        "torch": lambda: F.relu_(F.conv2d(x, weight, conv.bias, stride, padding, dilation)),
        "oneDNN, prepared": lambda: torch.ops.mkldnn._convolution_pointwise(
            x, prepared, conv.bias, *geometry, "relu", [], ""
        ),
    }
    if dtype == torch.bfloat16:
        single, x_single = PackedConv2d(conv.float(), activation="relu"), x.float()
        conv.to(dtype)
        variants["fastseg, float32"] = lambda: single(x_single)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    compare(variants, flops=2 * numel * C * kernel * kernel, tolerance=tolerance)
