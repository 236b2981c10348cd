"""The large separable kernels of GCN, kernel 15, to 21 channels: four convolutions in torch."""

import pytest
import torch

import fastseg

CASES = [(256, 128), (512, 64), (1024, 32), (2048, 16)]
cases = pytest.mark.parametrize(("channels", "size"), CASES)


def make(channels, size):
    block = fastseg.nn.GlobalConv2d(channels, 21, 15).to(memory_format=torch.channels_last)
    x = torch.randn(1, channels, size, size).contiguous(memory_format=torch.channels_last)
    return block, x, 2 * 2 * size * size * 15 * 21 * (channels + 21)


def prepared(block, x):
    """oneDNN with its weights prepared, as torch.compile with freezing calls it."""

    def convolution(conv, like):
        geometry = (list(conv.padding), [1, 1], [1, 1], 1)
        weight = torch.ops.mkldnn._reorder_convolution_weight(
            conv.weight.detach(), *geometry, list(like.shape)
        )
        bias = conv.bias.detach()
        return lambda t: torch.ops.mkldnn._convolution_pointwise(
            t, weight, bias, *geometry, "none", [], ""
        )

    with torch.no_grad():
        middle = block.l1(x)
        l1, r1 = convolution(block.l1, x), convolution(block.r1, x)
        l2, r2 = convolution(block.l2, middle), convolution(block.r2, middle)
    return lambda: l2(l1(x)) + r2(r1(x))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_gcn(compare, benchmark, channels, size, dtype):
    benchmark.group = f"GlobalConv2d {channels} channels at {size}x{size} {dtype}, inference"
    block, x, flops = make(channels, size)
    fast, plain = fastseg.optimize(block.eval(), dtype=dtype), block.unfuse().to(dtype)
    x = x.to(dtype)
    variants = {
        "fastseg": lambda: fast(x),
        "torch": lambda: plain(x),
        "oneDNN, prepared": prepared(plain, x),
    }
    compare(variants, flops=flops, tolerance=2e-2 if dtype == torch.bfloat16 else 1e-4)


@cases
def bench_gcn_training(compare, benchmark, channels, size):
    """Forward and backward; what is compared are the gradients of the input."""
    benchmark.group = f"GlobalConv2d {channels} channels at {size}x{size}, training step"
    block, x, flops = make(channels, size)
    grad = torch.randn(1, 21, size, size).contiguous(memory_format=torch.channels_last)
    layers = {"fastseg": block, "torch": block.unfuse()}
    wanted = [x.requires_grad_(), *block.parameters()]

    def step(layer):
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(layer(x), wanted, grad)[0]

    compare({name: lambda m=m: step(m) for name, m in layers.items()}, flops=3 * flops)
