"""Building blocks of the plain PyTorch restatements that the networks are compared with.

A restatement is a function of the network's own parameters by name, written with
torch.nn.functional only; so it shares the names with the network and none of its code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BN_EPS = 1e-5


class Weights:
    """Parameters and buffers of a network by name, with the layers that use them."""

    def __init__(self, model: nn.Module):
        self.values = dict(model.named_parameters()) | dict(model.named_buffers())
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(name)
        return self.values[name]

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.values else None

    def conv(self, x: Tensor, name: str, stride=1, padding=0, dilation=1) -> Tensor:
        return F.conv2d(
            x, self[name + ".weight"], self.get(name + ".bias"), stride, padding, dilation
        )

    def bn(self, x: Tensor, name: str) -> Tensor:
        mean, var = self[name + ".running_mean"], self[name + ".running_var"]
        return F.batch_norm(x, mean, var, self[name + ".weight"], self[name + ".bias"], eps=BN_EPS)

    def conv_bn(self, x: Tensor, name: str, **kwargs) -> Tensor:
        return self.bn(self.conv(x, name + ".conv", **kwargs), name + ".bn")

    def conv_bn_relu(self, x: Tensor, name: str, **kwargs) -> Tensor:
        return F.relu(self.conv_bn(x, name, **kwargs))


def randomize(model: nn.Module) -> nn.Module:
    """Weights of a trained network's size, biases and batch-norm statistics away from 0 and 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype) * std

    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.dim() == 4:
                    p.copy_(normal(p, (2 / p[0].numel()) ** 0.5))
                elif name == "bias":
                    p.copy_(normal(p, 0.1))
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(normal(module.weight, 0.1) + 1)
                module.running_mean.copy_(normal(module.running_mean, 0.1))
                module.running_var.copy_(
                    0.5 + torch.rand(module.running_var.shape, generator=generator)
                )
    return model


def assert_same_network(
    model: nn.Module, restatement: Callable[[Weights, Tensor], dict[str, Tensor]], *shapes
) -> None:
    """In eval mode and float64: the same outputs for each input shape and the same gradients of
    every parameter, and the restatement uses every one of them."""
    randomize(model.double()).eval()
    parameters = dict(model.named_parameters())
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        weights = Weights(model)
        ours, plain = model(x), restatement(weights, x)
        assert ours.keys() == plain.keys()
        assert weights.used >= parameters.keys(), parameters.keys() - weights.used
        for name in ours:
            assert plain[name].abs().max() > 1e-3  # a comparison of zeros would prove nothing
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-9, atol=1e-9)

        cotangents = [torch.randn_like(y) for y in ours.values()]
        gradients = [
            torch.autograd.grad(list(out.values()), list(parameters.values()), cotangents)
            for out in (ours, plain)
        ]
        for name, a, b in zip(parameters, *gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8, msg=f"gradient of {name}")


def vgg16(w: Weights, x: Tensor, *, padding=1, first_padding=None, dilation5=1, pools=None):
    """The five pooled maps of VGG16 without batch norm."""
    pooled = []
    for s, count in enumerate((2, 2, 3, 3, 3)):
        d = dilation5 if s == 4 else 1
        for i in range(count):
            p = padding * d
            if s == i == 0 and first_padding is not None:
                p = first_padding
            name = f"backbone.stages.{s}.conv{s + 1}_{i + 1}"
            x = F.relu(w.conv(x, name, padding=p, dilation=d))
        x = pools[s](x) if pools else F.max_pool2d(x, 2, 2, ceil_mode=True)
        pooled.append(x)
    return pooled


def vgg_head(w: Weights, x: Tensor, name: str, *, padding: int, dilation=1) -> Tensor:
    x = F.relu(w.conv(x, name + ".fc6", padding=padding, dilation=dilation))
    x = F.relu(w.conv(x, name + ".fc7"))
    return w.conv(x, name + ".score")


def resnet(
    w: Weights, x: Tensor, *stages: list[tuple[int, int]], deep=False, ceil=False, stride_in=2
):
    """c2 to c5 of a bottleneck ResNet. Each stage lists (stride, dilation) of its blocks;
    ``stride_in`` is the number of the convolution that strides."""
    x = w.conv_bn_relu(x, "backbone.stem.0", stride=2, padding=1 if deep else 3)
    if deep:
        x = w.conv_bn_relu(x, "backbone.stem.1", padding=1)
        x = w.conv_bn_relu(x, "backbone.stem.2", padding=1)
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=ceil)
    maps = []
    for s, blocks in enumerate(stages, 1):
        for b, (stride, dilation) in enumerate(blocks):
            name = f"backbone.layer{s}.{b}"
            s1, s2 = (stride, 1) if stride_in == 1 else (1, stride)
            x = bottleneck(w, x, name, s1, s2, dilation, stride if b == 0 else None)
        maps.append(x)
    return maps


def bottleneck(w: Weights, x: Tensor, name: str, s1=1, s2=1, dilation=1, project=None) -> Tensor:
    y = w.conv_bn_relu(x, name + ".conv1", stride=s1)
    y = w.conv_bn_relu(y, name + ".conv2", stride=s2, padding=dilation, dilation=dilation)
    y = w.conv_bn(y, name + ".conv3")
    if project is not None:
        x = w.conv_bn(x, name + ".downsample", stride=project)
    return F.relu(y + x)


# Blocks of the small ResNet of the tests, depth (1, 2, 2, 3), as (stride, dilation).
DEPTH = (1, 2, 2, 3)
STRIDE_32 = [(1, 1)], [(2, 1), (1, 1)], [(2, 1), (1, 1)], [(2, 1), (1, 1), (1, 1)]
STRIDE_16 = [(1, 1)], [(2, 1), (1, 1)], [(2, 1), (1, 1)], [(1, 1), (1, 2), (1, 2)]
STRIDE_8 = [(1, 1)], [(2, 1), (1, 1)], [(1, 1), (1, 2)], [(1, 2), (1, 4), (1, 4)]
STRIDE_8_FULL = [(1, 1)], [(2, 1), (1, 1)], [(1, 2), (1, 2)], [(1, 4), (1, 4), (1, 4)]
SMALL_RESNET = {"num_classes": 3, "in_channels": 2, "width": 4}


def up(y: Tensor, x: Tensor, align_corners: bool) -> Tensor:
    """y resized to x."""
    return F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=align_corners)


def fcn_head(w: Weights, x: Tensor, name: str) -> Tensor:
    return w.conv(w.conv_bn_relu(x, name + ".convs.0", padding=1), name + ".score")
