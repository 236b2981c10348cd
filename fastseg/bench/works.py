"""What is timed: layers of the papers' networks, whole networks, and the dense CRF."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseg
from fastseg.models import count_macs


@dataclass(frozen=True)
class Work:
    """A module in torch's own layers and the shape of its input.

    ``build`` makes the module with random weights; every process that times it seeds alike and so
    has the same ones. ``tolerance`` bounds the error in float32: the largest difference from
    float64 over the largest output.
    """

    name: str
    group: str  # "ops", "models" or "crf"
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    tolerance: float = 1e-4

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return settle(self.build()).eval()

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        if self.group == "crf":
            return crf_inputs(self.shape, generator)
        return (torch.randn(self.shape, generator=generator),)

    def flops(self) -> int:
        """Of the convolutions as the paper writes them, a multiply-add as two; 0 for the CRF."""
        if self.group == "crf":
            return 0
        with torch.device("meta"):
            module = self.build()
        if not list(module.parameters()):
            return 0
        return 2 * self.shape[0] * count_macs(module, self.shape[2:], self.shape[1])

    def bytes(self) -> int:
        """Input, weights and output once, in float32: what has to cross the memory bus."""
        with torch.device("meta"):
            module = self.build()
            inputs = [torch.empty(x.shape) for x in self.inputs()]
            output = module.eval()(*inputs) if self.group != "crf" else inputs[0]
        values = [*inputs, output, *module.parameters()]
        return 4 * sum(v.numel() for v in values)


def settle(module: nn.Module) -> nn.Module:
    """Random weights that keep the scale of the maps, and batch norms that have seen data."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
            assert m.running_var is not None
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return module


class Conv(nn.Module):
    """Convolution, batch norm, ReLU; with ``residual`` a stored map is added before the ReLU."""

    def __init__(
        self,
        C: int,
        K: int,
        kernel: int = 3,
        dilation: int = 1,
        stride: int = 1,
        residual: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(C, K, kernel, stride, padding, dilation, bias=False)
        self.bn = nn.BatchNorm2d(K)
        self.residual: Tensor | None
        self.register_buffer("residual", residual and torch.randn(1, K, *residual))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(y if self.residual is None else y + self.residual)


class Bottleneck(nn.Module):
    """The residual block of a dilated ResNet (He et al. 2016)."""

    def __init__(self, channels: int, width: int, dilation: int) -> None:
        super().__init__()
        self.reduce = Conv(channels, width, 1)
        self.middle = Conv(width, width, 3, dilation)
        self.expand = nn.Conv2d(width, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.expand(self.middle(self.reduce(x)))) + x)


class Branches(nn.Module):
    """The 1x1 and the dilated branches of ASPP, concatenated (Chen et al. 2017)."""

    def __init__(self, C: int, K: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([Conv(C, K, 1), *(Conv(C, K, 3, r) for r in rates)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class GlobalConv(nn.Module):
    """The separable large kernel of GCN in torch's own layers (Peng et al. 2017)."""

    def __init__(self, C: int, K: int, k: int) -> None:
        super().__init__()
        p = k // 2
        self.l1, self.l2 = nn.Conv2d(C, K, (k, 1), 1, (p, 0)), nn.Conv2d(K, K, (1, k), 1, (0, p))
        self.r1, self.r2 = nn.Conv2d(C, K, (1, k), 1, (0, p)), nn.Conv2d(K, K, (k, 1), 1, (p, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(self.l1(x)) + self.r2(self.r1(x))


class PoolUnpool(nn.Module):
    """SegNet's pair: maxima with their positions, and back (Badrinarayanan et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x), output_size=x.shape)


class Network(nn.Module):
    """A network of ``fastseg.models`` in torch's own layers, its logits alone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = unfused(fastseg.models.create_model(name))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)["out"]


def unfused(module: nn.Module) -> nn.Module:
    """The module with every fused layer as the layers of torch that it stands for."""
    for name, child in module.named_children():
        plain = child.unfuse() if isinstance(child, fastseg.nn.ConvBNReLU2d) else unfused(child)
        setattr(module, name, plain)
    return module


def crf_inputs(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits (N, L, H, W) of soft blobs, and images (N, 3, H, W) of smooth colours with noise."""
    N, L, H, W = shape

    def smooth(channels: int, cell: int) -> Tensor:
        coarse = torch.randn(N, channels, H // cell + 2, W // cell + 2, generator=generator)
        return F.interpolate(coarse, (H, W), mode="bilinear")

    image = 128 + 60 * smooth(3, 40) + 8 * torch.randn(N, 3, H, W, generator=generator)
    return 3 * smooth(L, 24), image.clamp(0, 255).byte()


def _ops() -> list[Work]:
    works = []
    for C, size, dilation in ((512, 65, 2), (512, 65, 4), (256, 65, 2), (128, 65, 1), (64, 129, 1)):
        for N in (1, 4) if dilation == 2 else (1,):
            name = f"conv3x3-{C}-d{dilation}-{size}" + ("" if N == 1 else f"-n{N}")
            works.append(Work(name, "ops", partial(Conv, C, C, 3, dilation), (N, C, size, size)))
    for C, K, residual in ((1024, 256, None), (256, 1024, (65, 65)), (2048, 512, None)):
        name = f"conv1x1-{C}-{K}" + ("-residual" if residual else "")
        works.append(Work(name, "ops", partial(Conv, C, K, 1, residual=residual), (1, C, 65, 65)))
    works.append(Work("conv7x7-stem", "ops", partial(Conv, 3, 64, 7, 1, 2), (1, 3, 513, 513)))
    works.append(
        Work("conv3x3-128-s2", "ops", partial(Conv, 128, 128, 3, 1, 2), (1, 128, 129, 129))
    )
    works.append(
        Work("bottleneck-1024-d2", "ops", partial(Bottleneck, 1024, 256, 2), (1, 1024, 65, 65))
    )
    for rates in ((6, 12, 18), (12, 24, 36)):
        works.append(
            Work(
                "aspp-" + "-".join(map(str, rates)),
                "ops",
                partial(Branches, 2048, 256, rates),
                (1, 2048, 65, 65),
            )
        )
    for C, size in ((256, 128), (512, 64), (1024, 32), (2048, 16)):
        works.append(
            Work(
                f"gcn15-{C}-{size}",
                "ops",
                partial(GlobalConv, C, 21, 15),
                (1, C, size, size),
            )
        )
    for C, H, W in ((64, 360, 480), (256, 90, 120)):
        works.append(Work(f"pool-unpool-{C}-{H}x{W}", "ops", PoolUnpool, (1, C, H, W)))
    return works


def _models() -> list[Work]:
    works = []
    for name, size, batches in (
        ("u2netp", (320, 320), (1, 4)),
        ("fcn_resnet50", (513, 513), (1, 4)),
        ("deeplabv3_resnet50", (513, 513), (1, 4)),
        ("deeplabv3_resnet101", (513, 513), (1, 4)),
        ("pspnet_resnet50", (513, 513), (1, 4)),
        ("segnet_vgg16", (360, 480), (1, 4)),
        ("unet", (360, 480), (1,)),
    ):
        # A near-tie of SegNet's pooling flips an index in any float32 implementation.
        tolerance = 1e-1 if name == "segnet_vgg16" else 1e-4
        for N in batches:
            full = f"{name}-{size[0]}x{size[1]}" + ("" if N == 1 else f"-n{N}")
            build = partial(Network, name)
            works.append(Work(full, "models", build, (N, 3, *size), tolerance))
    return works


def _crf() -> list[Work]:
    def build(*bilateral: float) -> Callable[[], nn.Module]:
        return partial(fastseg.nn.DenseCRF, 10, (3, 3.0), bilateral)

    return [
        Work("crf-500x375-21", "crf", build(80, 13, 10.0), (1, 21, 375, 500)),
        Work("crf-500x375-21-sparse", "crf", build(160, 3, 10.0), (1, 21, 375, 500)),
        Work("crf-400x300-2", "crf", build(80, 13, 10.0), (1, 2, 300, 400)),
        Work("crf-500x375-21-n16", "crf", build(80, 13, 10.0), (16, 21, 375, 500)),
        Work("crf-2048x1024-19", "crf", build(80, 13, 10.0), (1, 19, 1024, 2048)),
    ]


_ALL = (*_ops(), *_models(), *_crf())


def list_works(group: str = "all", pattern: str = "*") -> list[Work]:
    """The works of a group (or "all") whose names match the pattern."""
    return [
        work
        for work in _ALL
        if group in ("all", work.group) and fnmatch.fnmatch(work.name, pattern)
    ]


def find(name: str) -> Work:
    """The work of this name."""
    works = [work for work in _ALL if work.name == name]
    if not works:
        raise ValueError(f"bench: no work is named {name!r}; see `fastseg bench --list`")
    return works[0]
