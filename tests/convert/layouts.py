"""Other libraries' networks restated as functions of their own tensor names, in small widths.

`Source` makes up the tensors: a forward pass asks for a layer by name and shape and gets random
weights under the names that its library would store them under.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Source(dict):
    """A state dict in the making, with the layers that use it."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, name: str, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        if name not in self:
            noise = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            self[name] = shift + scale * noise
        assert self[name].shape == torch.Size(shape)
        return self[name]

    def conv(
        self, x: Tensor, name: str, out: int, k: int, *, bias=True, stride=1, padding=0, dilation=1
    ) -> Tensor:
        fan_in = x.shape[1] * k * k
        weight = self.tensor(f"{name}.weight", out, x.shape[1], k, k, scale=(2 / fan_in) ** 0.5)
        b = self.tensor(f"{name}.bias", out, scale=0.1) if bias else None
        return F.conv2d(x, weight, b, stride, padding, dilation)

    def bn(self, x: Tensor, name: str) -> Tensor:
        n = x.shape[1]
        weight = self.tensor(f"{name}.weight", n, scale=0.1, shift=1)
        bias = self.tensor(f"{name}.bias", n, scale=0.1)
        mean = self.tensor(f"{name}.running_mean", n, scale=0.1)
        var = self.tensor(f"{name}.running_var", n, scale=0.1, shift=1).abs_()
        self[f"{name}.num_batches_tracked"] = torch.tensor(7)
        return F.batch_norm(x, mean, var, weight, bias)

    def conv_bn_relu(self, x: Tensor, conv: str, bn: str, out: int, k: int, **options) -> Tensor:
        return F.relu(self.bn(self.conv(x, conv, out, k, bias=False, **options), bn))


def flip(x: Tensor) -> Tensor:
    """RGB to BGR, or back."""
    return x[:, [2, 1, 0]]


def resize(x: Tensor, like: Tensor, align_corners: bool) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=align_corners)


def caffe_vgg(w: Source, x: Tensor, width: int, *, first=1, padding=1, dilation5=1, pools=None):
    """VGG16 under Caffe's names: the five pooled maps."""
    pooled = []
    for s, count in enumerate((2, 2, 3, 3, 3)):
        for i in range(count):
            d = dilation5 if s == 4 else 1
            p = first if s == i == 0 else padding * d
            out = width * min(2**s, 8)
            x = F.relu(w.conv(x, f"conv{s + 1}_{i + 1}", out, 3, padding=p, dilation=d))
        x = pools[s](x) if pools else F.max_pool2d(x, 2, 2, ceil_mode=True)
        pooled.append(x)
    return pooled


def pool(k: int, stride: int, padding: int = 0):
    return lambda x: F.max_pool2d(x, k, stride, padding, ceil_mode=True)


BLOCKS = (1, 1, 2, 2)  # per stage of the small ResNets
RATES = {  # stage -> (stride, dilation of its first block, of the others), at output stride 8
    "contract": ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)),
    "full": ((1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 4, 4)),
}


def resnet(
    w: Source, x: Tensor, width: int, prefix: str, stem, *, dilation: str, stages=4
) -> list[Tensor]:
    """ResNet under torchvision's block names at output stride 8, the stride on the 3x3.

    `stem` lists its layers: names of convolution and batch norm, channels, kernel, stride.
    """
    for conv, bn, channels, k, stride in stem:
        x = w.conv_bn_relu(x, conv, bn, channels, k, stride=stride, padding=k // 2)
    x = F.max_pool2d(x, 3, 2, 1)
    maps = []
    for s, (stride, first, other) in enumerate(RATES[dilation][:stages]):
        inner = width * 2**s
        for b in range(BLOCKS[s]):
            name, d = f"{prefix}layer{s + 1}.{b}.", other if b else first
            step = 1 if b else stride
            y = w.conv_bn_relu(x, name + "conv1", name + "bn1", inner, 1)
            y = w.conv_bn_relu(
                y, name + "conv2", name + "bn2", inner, 3, stride=step, padding=d, dilation=d
            )
            y = w.bn(w.conv(y, name + "conv3", 4 * inner, 1, bias=False), name + "bn3")
            if b == 0:
                x = w.conv(x, name + "downsample.0", 4 * inner, 1, bias=False, stride=step)
                x = w.bn(x, name + "downsample.1")
            x = F.relu(x + y)
        maps.append(x)
    return maps


def torchvision_aspp(w: Source, x: Tensor, name: str, channels: int) -> Tensor:
    """The 1x1 branch, rates 12, 24 and 36, image pooling, projection."""
    maps = [w.conv_bn_relu(x, f"{name}.convs.0.0", f"{name}.convs.0.1", channels, 1)]
    for i, r in ((1, 12), (2, 24), (3, 36)):
        conv, bn = f"{name}.convs.{i}.0", f"{name}.convs.{i}.1"
        maps.append(w.conv_bn_relu(x, conv, bn, channels, 3, padding=r, dilation=r))
    mean = F.adaptive_avg_pool2d(x, 1)
    mean = w.conv_bn_relu(mean, f"{name}.convs.4.1", f"{name}.convs.4.2", channels, 1)
    maps.append(resize(mean, x, False))
    return w.conv_bn_relu(torch.cat(maps, 1), f"{name}.project.0", f"{name}.project.1", channels, 1)
