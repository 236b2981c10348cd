"""Packed convolutions against oneDNN, eager and with weights prepared as torch.compile does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fastseg
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


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def prepared(conv, x):
    """x -> relu(conv(x)) by oneDNN with the weights in the form that it wants for such an x."""
    geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), 1)
    weight = torch.ops.mkldnn._reorder_convolution_weight(
        conv.weight.detach(), *geometry, list(x.shape)
    )
    return lambda x: torch.ops.mkldnn._convolution_pointwise(
        x, weight, conv.bias, *geometry, "relu", [], ""
    )


@DTYPES
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
        onednn = prepared(conv, x)
        numel = conv(x).numel()
    variants = {
        "fastseg": lambda: packed(x),
        "torch": lambda: F.relu_(F.conv2d(x, weight, conv.bias, stride, padding, dilation)),
        "oneDNN, prepared": lambda: onednn(x),
    }
    if dtype == torch.bfloat16:
        single, x_single = PackedConv2d(conv.float(), activation="relu"), x.float()
        conv.to(dtype)
        variants["fastseg, float32"] = lambda: single(x_single)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    compare(variants, flops=2 * numel * C * kernel * kernel, tolerance=tolerance)


@DTYPES
@pytest.mark.parametrize("rates", [(6, 12, 18), (12, 24, 36)], ids=str)
def bench_aspp(compare, benchmark, rates, dtype):
    """ASPP of DeepLab v3 as a whole: branches, image pooling, concatenation, projection."""
    benchmark.group = f"ASPP 2048 -> 256 at 65x65, rates {rates}, {dtype}"
    aspp = fastseg.nn.ASPP(2048, 256, rates).eval()
    fast = fastseg.optimize(aspp, dtype)
    x = torch.randn(1, 2048, 65, 65).to(dtype, memory_format=torch.channels_last)
    pixel, wide = x.mean((2, 3), keepdim=True), x[:, :1280]

    def layer(module, x):
        conv = fuse_conv_bn_eval(copy.deepcopy(module.conv), module.bn).to(dtype)
        return prepared(conv, x)

    branches = [layer(branch, x) for branch in aspp.branches]
    pool, project = layer(aspp.pool, pixel), layer(aspp.project, wide)

    def onednn():
        maps = [branch(x) for branch in branches]
        maps.append(pool(x.mean((2, 3), keepdim=True)).expand_as(maps[0]))
        return project(torch.cat(maps, 1))

    flops = 2 * 65 * 65 * 256 * (2048 * (1 + 9 * len(rates)) + 1280)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    compare(
        {"fastseg": lambda: fast(x), "oneDNN, prepared": onednn}, flops=flops, tolerance=tolerance
    )
