"""Packed convolutions against oneDNN, eager and with weights prepared as torch.compile does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fastseg
from fastseg.nn.packed import PackedConv2d
from fastseg.nn.packed_sum import PackedConvSum2d

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


# C, C2, H = W, K, stride of the second: both paths of the first blocks of the same.
SHORTCUTS = [
    (64, 64, 129, 256, 1),
    (128, 256, 65, 512, 2),
    (256, 512, 65, 1024, 1),
    (512, 1024, 65, 2048, 1),
    (256, 512, 33, 1024, 2),
    (512, 1024, 17, 2048, 2),
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
@pytest.mark.parametrize("shape", SHORTCUTS, ids=str)
def bench_shortcut(compare, benchmark, shape, dtype):
    """The last convolution of a bottleneck and that of its shortcut, added."""
    C, C2, H, K, stride = shape
    benchmark.group = f"relu(conv({C} -> {K}) + conv({C2} -> {K})) at {H}x{H}, {stride} {dtype}"
    convs = torch.nn.Conv2d(C, K, 1), torch.nn.Conv2d(C2, K, 1, stride)
    first = PackedConv2d(convs[0], activation="relu", dtype=dtype)
    second = PackedConv2d(convs[1], dtype=dtype)
    both = PackedConvSum2d(first, second)
    sizes = (1, C, H, H), (1, C2, *[(H - 1) * stride + 1] * 2)
    x, other = (torch.randn(s).to(dtype, memory_format=torch.channels_last) for s in sizes)
    weights, strides = [], ([1, 1], [stride] * 2)
    for conv, s, size in zip(convs, strides, sizes, strict=True):
        conv.to(dtype)
        weights.append(
            torch.ops.mkldnn._reorder_convolution_weight(
                conv.weight.detach(), [0, 0], s, [1, 1], 1, list(size)
            )
        )

    def onednn():
        y = torch.ops.mkldnn._convolution_pointwise(
            other, weights[1], convs[1].bias, [0, 0], strides[1], [1, 1], 1, "none", [], ""
        )
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            y, x, weights[0], convs[0].bias, [0, 0], [1, 1], [1, 1], 1, "add", 1.0, "relu", [], ""
        )

    variants = {
        "fastseg": lambda: both(x, other),
        "fastseg, one after the other": lambda: first(x, second(other)),
        "oneDNN, prepared": onednn,
    }
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    compare(variants, flops=2 * H * H * K * (C + C2), tolerance=tolerance)


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
