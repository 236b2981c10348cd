"""conv_bn_act: Conv2d + BatchNorm2d + add + ReLU, inference, training forward, training step."""

import pytest
import torch

from fastseg.nn import ConvBNReLU2d

# (N, C_in, H, W), C, kernel, dilation
CASES = [
    ((1, 64, 180, 240), 64, 1, 1),  # bottleneck at a quarter of 720 x 960: little arithmetic
    ((4, 256, 65, 65), 256, 3, 2),  # dilated ResNet stage on 513 x 513 crops
    ((1, 64, 180, 240), 64, 3, 1),
    ((4, 256, 33, 33), 256, 3, 2),  # dilated ResNet stage on 257 x 257 crops
]


def make(case, channels_last):
    """The fused layer, the same in plain PyTorch, and their inputs."""
    shape, channels, kernel, dilation = case
    torch.manual_seed(0)
    fused = ConvBNReLU2d(
        shape[1], channels, kernel, padding=dilation * (kernel // 2), dilation=dilation
    )
    x = torch.randn(shape)
    if channels_last:
        fused = fused.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    plain = fused.unfuse()
    residual = torch.randn_like(plain(x).detach())
    return {"fastseg": fused, "torch": plain}, x, residual


@pytest.mark.parametrize("variant", ["fastseg", "torch"])
@pytest.mark.parametrize("mode", ["inference", "training forward", "training step"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_conv_bn(time_op, benchmark, case, channels_last, mode, variant):
    benchmark.group = f"conv_bn_act {case} {'nhwc' if channels_last else 'nchw'} {mode}"
    layers, x, residual = make(case, channels_last)
    for layer in layers.values():
        layer.train(mode != "inference")
    expected, out = (layers[name](x, residual).detach() for name in ("torch", variant))
    assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()
    layer = layers[variant]

    def step():
        with torch.inference_mode(False), torch.enable_grad():
            layer(x, residual).backward(residual)

    x.requires_grad_(mode == "training step")
    time_op(step if mode == "training step" else lambda: layer(x, residual))
