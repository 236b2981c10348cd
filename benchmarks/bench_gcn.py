"""The large separable kernels of GCN, kernel 15, to 21 channels: four convolutions in torch."""

import pytest
import torch

import fastseg


@pytest.mark.parametrize(("channels", "size"), [(256, 128), (512, 64), (1024, 32), (2048, 16)])
def bench_gcn(compare, benchmark, channels, size):
    benchmark.group = f"GlobalConv2d {channels} channels at {size}x{size}"
    block = fastseg.nn.GlobalConv2d(channels, 21, 15).eval()
    fast = fastseg.optimize(block)
    plain = block.to(memory_format=torch.channels_last)
    x = torch.randn(1, channels, size, size).contiguous(memory_format=torch.channels_last)
    flops = 2 * 2 * size * size * 15 * 21 * (channels + 21)
    compare({"fastseg": lambda: fast(x), "torch": lambda: plain(x)}, flops=flops)
